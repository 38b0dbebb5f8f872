"""Acquire from hf://, against a local HTTP server that answers as the Hugging Face hub does, on good days and bad."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from fraud_pkg.data.acquire import acquire
from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.settings import Settings, load_settings

HEADER = "step,type,amount,nameOrig,nameDest,isFraud\n"
LOG = (HEADER + "".join(f"{i // 50},PAYMENT,{i}.25,C{i},M{i % 7},{int(i % 100 == 0)}\n" for i in range(3000))).encode()
COMMIT = "6d7b3e0c1f2a4b5c6d7e8f9a0b1c2d3e4f5a6b7c"
SOURCE = "hf://datasets/someone/paysim/data/log.csv"


class Hub(BaseHTTPRequestHandler):
    """`resolve` answers with the file's metadata and a redirect to storage on another host, as for large files.

    `server.files` holds {(repository, revision, file): bytes}; storage hangs up in the middle `server.hang_ups` times.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, headers: dict, body: bytes = b"", hang_up: bool = False):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if hang_up else body)
            self.close_connection = hang_up

    def do_GET(self):
        self.server.requests.append((self.command, self.path))
        _, *parts = unquote(self.path).split("/")
        if parts[0] == "storage":
            body = self.server.storage[parts[1]]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            partial = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
            self.server.hang_ups -= 1
            return self.answer(206 if start else 200, partial, body[start:], hang_up=self.server.hang_ups >= 0)
        if parts[0] == "api":
            return self.list_files("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        repository, revision, file = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
        if repository not in {r for r, _, _ in self.server.files}:
            return self.answer(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if revision not in {v for r, v, _ in self.server.files if r == repository}:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        body = self.server.files.get((repository, revision, file))
        if body is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        sha = hashlib.sha256(body).hexdigest()
        self.server.storage[sha] = self.server.corrupt(body)
        elsewhere = f"http://localhost:{self.server.server_port}/storage/{sha}"
        return self.answer(
            302,
            {
                "Location": elsewhere,
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": len(body),
                "X-Linked-ETag": f'"{sha}"',
                "ETag": f'"{sha}"',
            },
        )

    def list_files(self, repository: str, revision: str):
        names = [file for r, v, file in self.server.files if (r, v) == (repository, revision)]
        if not names:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode())

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {("someone/paysim", revision, "data/log.csv"): LOG for revision in ("main", "v1", COMMIT)}
    server.requests, server.storage, server.hang_ups, server.corrupt = [], {}, 0, lambda body: body
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    sleep = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: sleep(min(seconds, 0.01)))  # the client waits between retries
    yield server
    server.shutdown()
    server.server_close()


def project(folder: Path, source: str) -> Settings:
    (folder / "settings.ini").touch()
    return load_settings(file=folder / "settings.ini", cli={"data.source": source}, environ={})


def complaint(folder: Path, source: str) -> str:
    with pytest.raises(FraudError) as error:
        acquire(project(folder, source))
    assert len(str(error.value).splitlines()) == 1
    assert not (folder / "data").exists(), "something was written"
    return str(error.value)


def test_a_file_of_a_data_set(hub, tmp_path):
    manifest = acquire(project(tmp_path, SOURCE))
    assert (manifest["rows"], manifest["quarantined"]) == (3000, 0)
    assert manifest["source"] == f"{SOURCE}@{COMMIT}"
    assert any(path.startswith("/storage/") for _, path in hub.requests)
    assert json.loads((tmp_path / "data/raw/manifest.json").read_text()) == manifest

    hub.requests.clear()
    assert acquire(project(tmp_path, f"{SOURCE}@v1")) == manifest
    assert not any(path.startswith("/storage/") for _, path in hub.requests), "the cached file was downloaded again"
    assert acquire(project(tmp_path, manifest["source"])) == manifest


def test_a_folder_of_a_data_set(hub, tmp_path):
    rows = LOG.decode().splitlines(keepends=True)
    halves = ("".join(rows[:1500]), rows[0] + "".join(rows[1500:]))
    for revision in ("main", COMMIT):
        hub.files["someone/paysim", revision, "README.md"] = b"# What this is"
        for day, half in enumerate(halves):
            hub.files["someone/paysim", revision, f"days/day={day}/part-0.csv"] = half.encode()
    whole = acquire(project(tmp_path, SOURCE))
    for place in ("days", "days/", "days/*/part-*.csv"):
        source = f"hf://datasets/someone/paysim/{place}"
        settings = load_settings(
            file=tmp_path / "settings.ini", cli={"data.source": source, "data.ignore": "day"}, environ={}
        )
        manifest = acquire(settings)
        assert (manifest["rows"], manifest["source"]) == (whole["rows"], f"{source}@{COMMIT}")
    assert not any("README" in path for _, path in hub.requests)
    everything = "hf://datasets/someone/paysim"
    settings = load_settings(
        file=tmp_path / "settings.ini", cli={"data.source": everything, "data.member": "data/*"}, environ={}
    )
    assert acquire(settings)["rows"] == 3000


def test_what_is_not_there(hub, tmp_path):
    other = "hf://datasets/someone/paysim/data/other.csv"
    assert complaint(tmp_path, other) == f"{other}: no file data/other.csv in data set someone/paysim"
    assert "no data set nobody/paysim at http://127.0.0.1" in complaint(tmp_path, "hf://datasets/nobody/paysim/log.csv")
    assert "no revision v9 of someone/paysim" in complaint(tmp_path, f"{SOURCE}@v9")


def test_a_server_that_dies_in_the_middle(hub, tmp_path):
    hub.hang_ups = 1000
    assert "download failed, nothing was taken over" in complaint(tmp_path, SOURCE)
    hub.hang_ups = 0
    assert acquire(project(tmp_path, SOURCE))["rows"] == 3000


def test_a_connection_that_breaks_and_comes_back(hub, tmp_path):
    hub.hang_ups = 2
    assert acquire(project(tmp_path, SOURCE))["rows"] == 3000


def test_other_bytes_than_announced(hub, tmp_path):
    hub.corrupt = lambda body: body.replace(b"0,PAYMENT,1.25", b"0,PAYMENT,9.25")
    assert "does not have the sha256 that the hub announced" in complaint(tmp_path, SOURCE)


def test_no_server(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    assert "does not answer, and the file is not in the local cache" in complaint(tmp_path, SOURCE)


def test_a_file_that_is_no_table(hub, tmp_path):
    hub.files["someone/paysim", "main", "data/log.csv"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    assert complaint(tmp_path, SOURCE).startswith(f"{SOURCE}: a Git LFS pointer")
