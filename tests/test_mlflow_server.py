"""The registry as a server: MLflow on PostgreSQL, its artifacts in S3; and with accounts, as the cluster has it."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import httpx
import psutil
import pytest
import servers
import storage
import yaml
from test_k8s import PROJECT, mebibytes

from fraud_pkg.model import example

from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.model.locations import bundle_mark, fetch_bundle
from fraud_pkg.core.errors import RegistryError
from fraud_pkg.model.registry import promote, rollback
from fraud_pkg.model.tracking import log_contender
from fraud_pkg.train.samples import load_test
from fraud_pkg.core.settings import Settings, load_settings


pytestmark = pytest.mark.long(reason="two machines, a bucket and a registry that goes away: five minutes")


def settings_of(space, **overrides) -> Settings:
    """The settings of a workspace, in this process."""
    given = space.overrides | servers.named(overrides)
    return load_settings(
        file=space.root / "settings.ini", environ={}, cli={key: str(value) for key, value in given.items()}
    )


def by_precision(space) -> list:
    """The contenders' folders, the worse one first."""
    return sorted(
        (space.root / "models" / name for name in ("xgboost", "tensorflow")),
        key=lambda folder: load_bundle(folder).manifest.metrics["average_precision"]["value"],
    )


@pytest.fixture
def apart(team, tmp_path):
    """The first machine's data and contenders in a folder of their own, without a champion."""

    def make(model: str, uri: str = team.uri, **overrides) -> Settings:
        space = team.machine()
        for name in ("data", "models"):
            shutil.copytree(team.first.root / name, space.root / name, ignore=shutil.ignore_patterns("champion"))
        return settings_of(space, registry__model=model, registry__tracking_uri=uri, **overrides)

    return make


def test_registry_away_while_training(team):
    """The training is kept, the promotion says what is missing, nothing is registered; afterwards the run goes on."""
    assert team.outage.returncode == 1
    assert f"[registry] tracking_uri = {team.uri}: not reachable" in team.outage.stderr, team.outage.stderr
    assert team.jobs_then == {
        "acquire": "done",
        "features": "done",
        "train_xgboost": "done",
        "train_tensorflow": "done",
        "blend": "done",
        "promote": "failed",
        "monitor": "not run",
        "report": "not run",
    }
    assert team.left_behind == {"versions": [], "champion": None}
    assert team.first.states() == {
        "acquire": "cached",
        "features": "cached",
        "train_xgboost": "cached",
        "train_tensorflow": "cached",
        "blend": "cached",
        "promote": "done",
        "monitor": "done",
        "report": "done",
    }
    held = storage.held(team.uri)
    assert len(held["versions"]) == 3 and held["champion"] in held["versions"]


def test_artifacts_are_in_the_bucket(team):
    import boto3

    s3 = boto3.client(
        "s3", endpoint_url=team.aws["AWS_ENDPOINT_URL"], aws_access_key_id="test", aws_secret_access_key="test"
    )
    keys = [entry["Key"] for entry in s3.list_objects_v2(Bucket="mlflow", Prefix="artifacts/")["Contents"]]
    assert sum(key.endswith("bundle/manifest.json") for key in keys) == 3 and any(
        key.endswith("figures/calibration.png") for key in keys
    )
    assert not (team.first.root / "mlflow.db").exists() and not (team.first.root / "mlartifacts").exists()


@pytest.mark.parametrize(
    "number, method, path",
    [
        (1, "POST", "/runs/log-batch"),
        (2, "PUT", "/bundle/model.onnx"),
        (3, "POST", "/model-versions/create"),
        (4, "GET", "/bundle/model.onnx"),
        (5, "POST", "/registered-models/alias"),
    ],
)
def test_registry_lost_while_registering(team, apart, monkeypatch, number, method, path):
    """Wherever the connection breaks: no champion there and none here; the next try registers and promotes."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    model = f"lost-{number}"
    with storage.cut(team.uri, method, path) as uri:
        settings = apart(model, uri)
        best = by_precision(team.first)[-1]
        with pytest.raises(RegistryError, match=rf"\[registry\] tracking_uri = {uri}: "):
            promote(settings, load_test(settings), settings.models_dir / best.name)
    assert storage.held(team.uri, model)["champion"] is None
    assert not (settings.models_dir / "champion").exists()
    again = settings.model_copy(update={"registry": settings.registry.model_copy(update={"tracking_uri": team.uri})})
    assert promote(again, load_test(again), again.models_dir / best.name).passed
    assert storage.held(team.uri, model) == {"versions": [1], "champion": 1}
    wanted = load_bundle(best).manifest
    assert (
        load_bundle(again.models_dir / "champion").manifest
        == fetch_bundle(f"{team.uri}#{model}@champion").manifest
        == wanted
    )


def served(url: str) -> str:
    """The version that decides."""
    with urllib.request.urlopen(f"{url}/readyz", timeout=5) as response:
        return json.load(response)["model"]


def test_services_follow_the_registry(team, apart, tmp_path):
    """Who is promoted there decides here, without a file that is carried; and the way back."""
    settings = apart("followed", gate__confidence="0.51", gate__min_money_saved="-10", gate__min_average_precision="0")
    worse, better = (settings.models_dir / folder.name for folder in by_precision(team.first))
    versions = [load_bundle(folder).manifest.version for folder in (worse, better)]
    assert promote(settings, load_test(settings), worse).passed
    with servers.service(
        tmp_path, serve__bundle="registry://champion", registry__tracking_uri=team.uri, registry__model="followed"
    ) as (url, _):
        assert served(url) == versions[0]
        assert promote(settings, load_test(settings), better).passed
        wait_for(url, versions[1])
        rollback(settings)
        wait_for(url, versions[0])


def wait_for(url: str, version: str) -> None:
    """Waits until this version decides."""
    servers.until(lambda: served(url) == version, 30, f"{version} never came")


def test_no_champion_is_no_error_and_a_lost_server_is_one(team):
    assert bundle_mark(f"{team.uri}#never@champion") is None
    away = f"http://{servers.HOST}:{servers.free_port()}"
    space = team.machine()
    done = space.fraud("run", ok=False, registry__tracking_uri=away)
    assert (
        done.returncode == 1
        and f"[registry] tracking_uri = {away}: not reachable" in done.stderr
        and not (space.root / "data").exists()
    )
    done = space.fraud(
        "serve", ok=False, serve__bundle="registry://champion", registry__tracking_uri="sqlite:///mlflow.db"
    )
    assert (
        done.returncode == 2
        and "[serve] bundle = registry://champion: expected [registry] tracking_uri to be an MLflow server"
        in done.stderr
    )


# With accounts, as components/mlflow declares it


PASSWORDS = {name: f"{name}-0123456789abcdef" for name in ("admin", "jobs", "forms")}  # of the Secret
COMPONENT = PROJECT / "k8s/components/mlflow"


def declared(container: dict, moved: dict[str, str], tmp: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a container, with the places of this machine."""

    def here(text: str) -> str:
        for place, other in moved.items():
            text = text.replace(place, other)
        return text

    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "PYTHONPATH"))}
    for variable in container["env"]:
        if source := variable.get("valueFrom"):
            assert source["secretKeyRef"]["name"] == "fraud-mlflow"
            environ[variable["name"]] = PASSWORDS[source["secretKeyRef"]["key"]]
        else:
            environ[variable["name"]] = here(variable["value"])
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/mlflow", "/etc/mlflow", "/tmp"]
    program, *arguments = map(here, container["command"])
    command = {"python": [sys.executable], "mlflow": [sys.executable, "-m", "mlflow"]}[program]
    return [*command, *arguments], environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "HOME": str(tmp), "TMPDIR": str(tmp)}


def with_metrics(*arguments, write=example.write_bundle, **named) -> None:
    """A bundle with the metrics that the pipeline's have."""
    write(*arguments, **named | {"metrics": {"average_precision": {"value": 0.5}}})


def test_accounts_as_declared(tmp_path, monkeypatch):
    """The component's own commands: without an account nothing, a job registers with its own, people look, and another
    password in the Secret is another password.
    """
    pod = yaml.safe_load((COMPONENT / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    [first], [main] = pod["initContainers"], pod["containers"]
    for name in ("data", "config", "tmp", "elsewhere"):
        (tmp_path / name).mkdir()
    port = servers.free_port()
    moved = {"/etc/mlflow": f"{tmp_path}/config", "/mlflow/": f"{tmp_path}/data/", "0.0.0.0": servers.HOST}
    moved["5000"] = str(port)
    for name in ("basic_auth.ini", "accounts.py"):
        text = (COMPONENT / name).read_text()
        (tmp_path / "config" / name).write_text(text.replace("/mlflow/", f"{tmp_path}/data/"))
    url = f"http://{servers.HOST}:{port}"

    @contextlib.contextmanager
    def started() -> Iterator[subprocess.Popen]:
        command, environ = declared(first, moved, tmp_path / "tmp")
        there = tmp_path / "elsewhere"
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, cwd=there)
        assert done.returncode == 0, done.stderr
        command, environ = declared(main, moved, tmp_path / "tmp")
        path, log = main["readinessProbe"]["httpGet"]["path"], tmp_path / "mlflow.log"
        more = {"seconds": 90, "env": environ, "cwd": there, "start_new_session": True}
        # A probe comes by the pod's address, which is none of the allowed hosts.
        probe = functools.partial(servers.status, url + path, Host="10.0.0.1:5000")
        with servers.running(command, lambda: probe() == 200, log, **more) as server:
            try:
                yield server
            finally:
                os.killpg(server.pid, signal.SIGKILL)

    def asked(method: str, path: str, account: tuple[str, str] | None, **body) -> int:
        sent = httpx.request(method, f"{url}/api/2.0/mlflow/{path}", json=body, auth=account, timeout=60)
        return sent.status_code

    def account(name: str) -> tuple[str, str]:
        return name, PASSWORDS[name]

    search = ("POST", "experiments/search")
    settings = load_settings(file=PROJECT / "settings.ini", environ={}, cli={"registry.tracking_uri": url})
    bundle = tmp_path / "bundle"
    with mock.patch.object(example, "write_bundle", with_metrics):
        example.example_bundle(bundle)
    with started() as server:
        assert asked(*search, None, max_results=1) == asked(*search, ("jobs", "wrong"), max_results=1) == 401
        assert servers.status(url) == 401  # its pages, too
        assert httpx.get(url, headers={"Host": "elsewhere.example"}, auth=account("jobs")).status_code == 403
        with pytest.raises(RegistryError, match=r"\[registry\] tracking_uri = .*(?i:401|unauthorized)"):
            log_contender(bundle, settings)
        for name, value in zip(("USERNAME", "PASSWORD"), account("jobs"), strict=True):
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        version = log_contender(bundle, settings)
        alias = {"name": settings.registry.model, "alias": "champion", "version": str(version.number)}
        assert asked("POST", "registered-models/alias", account("jobs"), **alias) == 200
        fetched = fetch_bundle(f"{url}#{settings.registry.model}@champion")
        assert fetched.manifest == load_bundle(bundle).manifest
        ann = {"username": "ann", "password": "ann-0123456789abcdef"}  # pragma: allowlist secret
        assert asked("POST", "users/create", account("jobs"), **ann) == 403  # a job makes no accounts
        assert asked("POST", "users/create", account("admin"), **ann) == 200
        person = tuple(ann.values())
        assert asked(*search, person, max_results=1) == 200
        assert asked("POST", "registered-models/alias", person, **alias) == 403  # who looks makes no champion
        memory = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        held = sum(process.memory_info().rss for process in memory) / 2**20
        assert held < 0.8 * mebibytes(main["resources"]["limits"]["memory"]), f"{held:.0f} MiB"
    former = account("jobs")
    monkeypatch.setitem(PASSWORDS, "jobs", "jobs-another-0123456789")
    with started():
        assert asked(*search, former, max_results=1) == 401 and asked(*search, account("jobs"), max_results=1) == 200
        assert asked(*search, person, max_results=1) == 200
    # What it writes is on its volume; the rest of its file system is read-only.
    assert {entry.name for entry in (tmp_path / "data").iterdir()} >= {"mlflow.db", "accounts.db", "artifacts"}
    assert not list((tmp_path / "elsewhere").iterdir())
