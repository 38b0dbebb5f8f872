"""Data and models in S3, between two machines."""

import hashlib
import json
from pathlib import Path

import pytest
import servers
import yaml

pytestmark = pytest.mark.long(reason="two machines, a bucket and a registry that goes away: five minutes")
JOBS = ["acquire", "features", "train_xgboost", "train_tensorflow", "blend", "promote", "monitor", "report"]


def files(folder: Path) -> dict[str, str]:
    """The hash of every file in a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture(scope="module")
def second(team):
    """Another machine, which takes over what the first has computed."""
    made = team.machine()
    made.printed = made.fraud("run", "--pull").stdout
    return made


def test_second_machine_computes_nothing_twice(team, second):
    assert second.states() == dict.fromkeys(JOBS, "cached")
    assert "taken over from s3://team-data/fraud: acquire, features" in second.printed
    for folder in (
        "data/raw",
        "data/features",
        "data/scores",
        "models/xgboost",
        "models/tensorflow",
        "models/blend",
        "models/champion",
    ):
        assert files(second.root / folder) == files(team.first.root / folder) != {}, folder
    assert second.last_run()["champion"] == team.first.last_run()["champion"]


def test_configuration_stays_and_holds_no_secret(team, second):
    assert (
        (second.root / ".dvc/config").read_bytes()
        == (team.first.root / ".dvc/config").read_bytes()
        == (Path(__file__).parents[1] / ".dvc/config").read_bytes()
    )
    local = (second.root / ".dvc/config.local").read_text()
    assert "s3://team-data/fraud" in local and "key" not in local and team.aws["AWS_ENDPOINT_URL"] not in local


def test_what_differs_is_computed(team):
    third = team.machine()
    third.fraud("run", "--pull", "--job", "features", features__windows="1h, 24h")
    assert third.states() == dict.fromkeys(JOBS, "not run") | {"acquire": "cached", "features": "done"}


def test_champion_leads_to_its_data(team):
    """On a machine that has nothing but the settings."""
    other, first = team.machine(), team.first
    shown = yaml.safe_load(other.fraud("models", "show").stdout)
    hashes = {
        out["path"]: out["md5"]
        for stage in yaml.safe_load((first.root / "dvc.lock").read_text())["stages"].values()
        for out in stage["outs"]
    }
    assert shown["dvc"] == {
        "remote": "s3://team-data/fraud",
        "raw": hashes["data/raw"],
        "features": hashes["data/features"],
        "get": f"fraud models data {shown['version']} FOLDER",
    }
    other.fraud(*shown["dvc"]["get"].split()[1:-1], "back")
    for name in ("raw", "features"):
        assert files(other.root / "back" / name) == files(first.root / "data" / name) != {}
    assert (
        json.loads((other.root / "back/features/manifest.json").read_text())["fingerprint"] == shown["data_fingerprint"]
    )
    assert not (other.root / "data").exists()


@pytest.mark.parametrize(
    "what, remote, environ, expected",
    [
        ("a bucket that does not exist", "s3://nobody/fraud", {}, "there is no bucket nobody"),
        (
            "no credentials",
            "s3://team-data/fraud",
            {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
            "no credentials for S3; set AWS_ACCESS_KEY_ID",
        ),
        (
            "a server that is away",
            "s3://team-data/fraud",
            {"AWS_ENDPOINT_URL": f"http://{servers.HOST}:{servers.free_port()}"},
            "Could not connect to the endpoint",
        ),
        (
            "no URL of S3",
            "gs://team-data/fraud",
            {},
            "expected a name in .dvc/config such as store, or s3://BUCKET/PREFIX",
        ),
    ],
)
def test_bad_remote(team, tmp_path, what, remote, environ, expected):
    """It is said before anything is computed, with the setting's name."""
    space = team.machine()
    space.environ = {
        name: value for name, value in (space.environ | environ | {"HOME": str(tmp_path)}).items() if value is not None
    }
    done = space.fraud("run", ok=False, pipeline__remote=remote)
    assert done.returncode in (1, 2) and f"[pipeline] remote = {remote}: " in done.stderr and expected in done.stderr, (
        done.stderr
    )
    assert len(done.stderr.splitlines()) == 1 and not (space.root / "data").exists()


def test_bucket_lost_after_the_work(team):
    """A copy that fails says so, the results stay, and the next run copies."""
    space = team.machine()
    space.overrides["simulate.rows"] = 2_000
    space.fraud("run", "--job", "acquire", pipeline__push="false")
    (space.root / ".dvc/config.local").write_text(
        "['remote \"away\"']\n    url = s3://team-data/fraud\n"
        f"    endpointurl = http://{servers.HOST}:{servers.free_port()}\n    connect_timeout = 1\n"
    )
    done = space.fraud("run", "--job", "acquire", ok=False, pipeline__remote="away")
    assert (
        done.returncode == 1
        and "[pipeline] remote = away: dvc push: " in done.stderr
        and "the results are complete, only their copy is not" in done.stderr
    ), done.stderr
    space.fraud("run", "--job", "acquire")
    assert (
        space.states()["acquire"] == "cached"
        and (space.root / ".dvc/tmp/fraud-pushed").read_text() == "s3://team-data/fraud"
    )
