"""Lambda and API Gateway on loopback: a package is unpacked in a folder of its own and driven by Lambda's runtime
client.
"""

import base64
import contextlib
import itertools
import json
import queue
import re
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import servers

PROVIDED = ("awslambdaric", "boto3")  # what the runtime of AWS brings along; everything else has to be in the package
START = (
    "import sys; sys.path[:0] = [{task!r}, {provided!r}]; "
    "from awslambdaric.__main__ import main; main(['awslambdaric', 'app.app'])"
)
ROUTES = {
    "/predict": "POST",
    "/predict/batch": "POST",
    "/feedback": "POST",
    "/model": "GET",
    "/healthz": "GET",
    "/readyz": "GET",
}


def unpack(package: Path, folder: Path) -> Path:
    """The package in `folder`/task, and beside it what AWS provides, and nothing else of this environment."""
    with zipfile.ZipFile(package) as content:
        content.extractall(folder / "task")
    (folder / "provided").mkdir()
    waiting, seen = list(PROVIDED), set()
    while waiting:
        found = distribution(waiting.pop())
        if found.name in seen:
            continue
        seen.add(found.name)
        waiting += [
            re.split(r"[\s(<>=!~;\[]", needed)[0] for needed in found.requires or [] if "extra ==" not in needed
        ]
        for name in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__")}:
            (folder / "provided" / name).symlink_to(found.locate_file(name))
    return folder


class Quick(BaseHTTPRequestHandler):
    """A handler that does not hold small answers back."""

    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


class Function:
    """The Runtime API of one instance: events wait until the function asks for them."""

    def __init__(self):
        self.events, self.results, self.numbers = queue.Queue(), {}, itertools.count()
        self.server = _listening(self._handler())
        self.address = f"{servers.HOST}:{self.server.server_address[1]}"

    def invoke(self, event: dict, seconds: float = 30) -> dict:
        """What the function answers; an `errorMessage` in it when it raised."""
        number, result = str(next(self.numbers)), queue.Queue()
        self.results[number] = result
        self.events.put((number, json.dumps(event).encode()))
        return json.loads(result.get(timeout=seconds))

    def _handler(function):
        class Handler(Quick):
            def do_GET(self):  # .../runtime/invocation/next
                number, event = function.events.get()
                deadline = str(int((time.time() + 10) * 1000))
                self.answer(
                    200,
                    event,
                    {
                        "Lambda-Runtime-Aws-Request-Id": number,
                        "Lambda-Runtime-Deadline-Ms": deadline,
                        "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:local:0:function:fraud",
                    },
                )

            def do_POST(self):  # .../runtime/invocation/ID/response, .../ID/error, .../runtime/init/error
                body = self.body()
                if "/invocation/" in self.path:
                    function.results.pop(self.path.split("/")[-2]).put(body)
                self.answer(202)

        return Handler


def _listening(handler) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer((servers.HOST, 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def instance(folder: Path, environ: Mapping[str, str], log: Path) -> Iterator[Function]:
    """A running instance of the function that `unpack` laid in `folder`."""
    function, task = Function(), str(folder / "task")
    # Without site-packages: what is missing in the package is missing here.
    command = [sys.executable, "-I", "-S", "-c", START.format(task=task, provided=str(folder / "provided"))]
    lambdas = {
        "AWS_LAMBDA_RUNTIME_API": function.address,
        "LAMBDA_TASK_ROOT": task,
        "_HANDLER": "app.app",
        "AWS_LAMBDA_FUNCTION_NAME": "fraud",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1024",
        "AWS_LAMBDA_FUNCTION_VERSION": "1",
    }
    try:
        with servers.running(command, lambda: True, log, env={"PATH": "/usr/bin:/bin", **environ, **lambdas}, cwd=task):
            yield function
    finally:
        function.server.shutdown()
        function.server.server_close()


def event(method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b"", query: str = "") -> dict:
    """A request as API Gateway hands it to a function."""
    headers, many = dict(headers or {}), parse_qs(query, keep_blank_values=True)
    try:
        text, coded = body.decode(), False
    except UnicodeDecodeError:
        text, coded = base64.b64encode(body).decode(), True
    return {
        "resource": path,
        "path": path,
        "httpMethod": method,
        "headers": headers,
        "multiValueHeaders": {name: [value] for name, value in headers.items()},
        "queryStringParameters": {name: values[-1] for name, values in many.items()} or None,
        "multiValueQueryStringParameters": many or None,
        "pathParameters": None,
        "stageVariables": None,
        "requestContext": {
            "resourcePath": path,
            "httpMethod": method,
            "path": f"/api{path}",
            "stage": "api",
            "identity": {"sourceIp": servers.HOST},
        },
        "body": text or None,
        "isBase64Encoded": coded,
    }


@contextlib.contextmanager
def gateway(function: Function) -> Iterator[str]:
    """API Gateway before a function; yields its URL. A route that was not declared is refused before the function hears
    of it.
    """
    one_at_a_time = threading.Lock()  # an instance has one request at a time

    class Handler(Quick):
        def handle_any(self) -> None:
            parts, body = urlsplit(self.path), self.body()
            if ROUTES.get(parts.path) != self.command:
                return self.answer(403, b'{"message":"Missing Authentication Token"}')
            with one_at_a_time:
                found = function.invoke(event(self.command, parts.path, dict(self.headers), body, parts.query))
            if "statusCode" not in found:
                return self.answer(502, json.dumps({"message": "Internal server error", "cause": found}).encode())
            return self.answer(found["statusCode"], found["body"].encode(), found["headers"])

        def __getattr__(self, name: str):
            if name.startswith("do_"):  # every method, whatever it is called
                return self.handle_any
            raise AttributeError(name)

    server = _listening(Handler)
    try:
        yield f"http://{servers.HOST}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
