"""What a team shares: a bucket for data, an MLflow server on PostgreSQL with a bucket for artifacts; and the machine
that ran first.
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import servers

FAST = {
    "features.engine": "local",
    "features.windows": "1h, 24h, 7d",
    "simulate.rows": 20_000,
    "xgboost.rounds": 30,
    "tensorflow.epochs": 1,
    "train.ablation": "false",
    "evaluate.resamples": 20,
}


@dataclass
class Team:
    aws: dict[str, str]  # the environment that leads to S3
    uri: str  # of the MLflow server
    machine: Callable  # makes one more workspace with the same settings
    first: object  # the workspace of the first machine
    outage: subprocess.CompletedProcess  # its first run, in which the registry went away
    jobs_then: dict[str, str]  # what became of each job in it
    left_behind: dict  # what the registry held after it


@contextlib.contextmanager
def opened(folder: Path, workspace: Callable) -> Iterator[Team]:
    """Starts the servers, and lets the first machine run: the registry is killed while it trains, comes back, and the
    run goes on.
    """
    with servers.moto(folder) as aws, servers.postgres(folder) as database:
        s3 = boto3.client(
            "s3",
            endpoint_url=aws["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name=aws["AWS_DEFAULT_REGION"],
        )
        for bucket in ("team-data", "mlflow"):
            s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": aws["AWS_DEFAULT_REGION"]})
        port = servers.free_port()
        uri = f"http://{servers.HOST}:{port}"

        def machine():
            made = workspace(pipeline__remote="s3://team-data/fraud", registry__tracking_uri=uri)
            made.overrides |= FAST
            made.environ |= aws
            return made

        first, server = machine(), (folder, database, "s3://mlflow/artifacts", aws, port)
        with servers.mlflow(*server):
            run = _start_training(first)
        assert not (first.root / "models/xgboost").exists(), "the training ended before the registry was away"
        outage = subprocess.CompletedProcess(run.args, run.wait(servers.PATIENCE * 300), *run.communicate())
        jobs_then = first.states()
        with servers.mlflow(*server):
            left_behind = held(uri)
            first.fraud("run")
            yield Team(aws, uri, machine, first, outage, jobs_then, left_behind)


def _start_training(first) -> subprocess.Popen:
    """A run that has come to the job train_xgboost."""
    run = subprocess.Popen(
        [sys.executable, "-m", "fraud_pkg.cli", "run"],
        cwd=first.root,
        env=first.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + servers.PATIENCE * 300
    while not (first.root / "reports/jobs/train_xgboost.ipynb").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    return run


def held(uri: str, model: str = "fraud-scorer") -> dict:
    """What a registry knows of a model: versions and the champion's number."""
    import mlflow

    client = mlflow.MlflowClient(uri, uri)
    versions = client.search_model_versions(f"name = '{model}'")
    aliases = client.get_registered_model(model).aliases if client.search_registered_models(f"name = '{model}'") else {}
    return {
        "versions": sorted(int(version.version) for version in versions),
        "champion": int(aliases["champion"]) if "champion" in aliases else None,
    }


@contextlib.contextmanager
def cut(uri: str, method: str, path: str) -> Iterator[str]:
    """The way to a server, which breaks for good at the first request with this method whose path has `path` in it.
    Yields the URL of the way.
    """
    broken, target = threading.Event(), uri.removeprefix("http://")

    class Way(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            if broken.is_set() or (self.command == method and path in self.path):
                broken.set()
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            there = HTTPConnection(target, timeout=60)
            there.request(self.command, self.path, body, dict(self.headers))
            answer = there.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            there.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer((servers.HOST, 0), Way) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://{servers.HOST}:{server.server_port}"
            assert broken.is_set(), f"nobody asked for {method} {path}"
        finally:
            server.shutdown()
