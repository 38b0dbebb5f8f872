"""A cluster of one node: an API server that keeps pods for those who ask over HTTP, and starts what is in them as
processes of this machine.
"""

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from servers import HOST


@dataclass
class Node:
    """What was asked for, and what runs."""

    folder: Path
    path: str  # PYTHONPATH of the image
    pods: dict[str, dict] = field(default_factory=dict)
    others: list[dict] = field(default_factory=list)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)
    asked: set[tuple[str, str]] = field(default_factory=set)  # verbs and resources, as a Role names them
    url: str = ""

    def start(self, pod: dict) -> None:
        """Runs the pod's container: its arguments behind the image's entry point, in the environment of its
        specification and no other.
        """
        container, name = pod["spec"]["containers"][0], pod["metadata"]["name"]
        known = {"status.podIP": HOST, "metadata.name": name}
        environ = {
            one["name"]: one.get("value") or known[one["valueFrom"]["fieldRef"]["fieldPath"]]
            for one in container["env"]
            if "value" in one or "valueFrom" in one
        }
        environ |= {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": self.path,
            "SPARK_LOCAL_DIRS": str(self.folder),
        }  # the image's, and its volume
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [shutil.which("fraud"), *container["args"]],
                cwd=self.folder,
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        pod["status"] = {"phase": "Running", "podIP": HOST, "containerStatuses": []}

    def stop(self) -> None:
        self.stopping.set()
        for process in self.processes.values():
            process.terminate()
            process.wait(30)


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    @property
    def node(self) -> Node:
        return self.server.node

    def _note(self, verb: str, named: str | None = None) -> None:
        """What was asked for; `named` is the verb for one object."""
        resource, _, name = urlsplit(self.path).path.partition("/namespaces/fraud-jobs/")[2].partition("/")
        self.node.asked.add((named if name and named else verb, resource))

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")

    def do_POST(self) -> None:
        self._note("create")
        made = self._body()
        made["metadata"] |= {
            "uid": f"uid-{len(self.node.pods) + len(self.node.others)}",
            "resourceVersion": "1",
            "namespace": "fraud-jobs",
            "creationTimestamp": "2026-01-05T00:00:00Z",
        }
        if made["kind"] == "Pod":
            self.node.pods[made["metadata"]["name"]] = made
            self.node.start(made)
        else:
            self.node.others.append(made)
        self._answer(made, 201)

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        self._note("watch" if "watch=true" in asked.query else "list", "get")
        if self.headers.get("Upgrade"):  # no websockets here: the client then asks again without
            self._answer({})
            return
        if parse_qs(asked.query).get("watch") == ["true"]:  # nothing changes that a list would not tell
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Connection", "close")
            self.end_headers()
            self.node.stopping.wait(600)
            self.close_connection = True
            return
        name = asked.path.rpartition("/")[2]
        if name in self.node.pods:
            self._answer(self.node.pods[name])
        else:
            self._answer(
                {
                    "kind": "PodList",
                    "apiVersion": "v1",
                    "metadata": {"resourceVersion": "1"},
                    "items": list(self.node.pods.values()),
                }
            )

    def do_PATCH(self) -> None:
        self._note("patch")
        self._body()
        self._answer(self.node.pods.get(urlsplit(self.path).path.rpartition("/")[2], {}))

    do_PUT = do_PATCH

    def do_DELETE(self) -> None:
        self._note("deletecollection", "delete")
        self._body()
        self._answer({"kind": "Status", "apiVersion": "v1", "status": "Success"})


@contextlib.contextmanager
def kubernetes(folder: Path, path: str) -> Iterator[Node]:
    """The cluster; `path` is where its image has our package. What it started is ended."""
    folder.mkdir()
    server = ThreadingHTTPServer((HOST, 0), Api)
    server.daemon_threads = True
    server.node = node = Node(folder, path)
    node.url = f"k8s://http://{HOST}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield node
    finally:
        node.stop()
        server.shutdown()
        server.server_close()
