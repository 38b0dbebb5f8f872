"""The registry as a server: MLflow on PostgreSQL, its artifacts in S3."""

import json
import shutil
import urllib.request

import pytest
import servers
import storage

from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.model.locations import bundle_mark, fetch_bundle
from fraud_pkg.core.errors import RegistryError
from fraud_pkg.model.registry import promote, rollback
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
