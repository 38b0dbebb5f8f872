"""Workspaces: copies of the project in which a test may run anything."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import servers
import sqlalchemy as sa
from xdist.scheduler import LoadFileScheduling

PROJECT = Path(__file__).resolve().parents[1]
COPIED = ("settings.ini", "dvc.yaml", ".dvc/config", ".dvcignore", "jobs", "fraud_pkg", "chalice_app")
SHARED = Path(os.environ.get("FRAUD_SHARED_DATA", PROJECT.parent / "shared" / "data"))

# Small enough to run often, large enough that every period has every kind of fraud.
SMALL = {
    "simulate.rows": 60_000,
    "simulate.days": 60,
    "simulate.fraud_rate": 0.01,
    "split.test_hours": 336,
    "split.validation_hours": 168,
    "evaluate.resamples": 50,
    "decision.control_share": 0,  # what a test stops, it stops; tests/test_control.py has a control group
    "tensorflow.epochs": 3,
    "xgboost.rounds": 80,
    "features.engine": "local",  # by Spark: test_parity.py; equal to the byte: nbs/features/07_table
    "features.spark_memory": "2g",
    "features.spark_master": "local[2]",
}


FIRST = (
    "finished",
    "test_stream.py",
    "team",
    "test_control.py",
    "test_loop.py",
    "test_cases.py",
    "test_parity.py",
    "test_real_data.py",
    "test_workflows.py",
    "test_bad_input.py",
)


@functools.cache
def group(file: str) -> str:
    """What a test file shares with others, a fixture that takes minutes to make; otherwise the file itself."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    return next((name for name in ("finished", "team") if re.search(rf"def \w+\(.*\b{name}\b", text)), file)


class ByGroup(LoadFileScheduling):
    """Gives a group of files to one worker. xdist's own groups (`--dist loadgroup`) are in the names of tests, where
    pytest 9.2 no longer sees them.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group(Path(super()._split_scope(nodeid)).name)


def pytest_xdist_make_scheduler(config, log) -> LoadFileScheduling | None:
    return ByGroup(config, log) if config.getvalue("dist") == "loadfile" else None


LONG = pytest.StashKey[dict[str, str]]()  # tests that are left to `make test-long`, with the reason


def pytest_addoption(parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests that `make test` leaves to `make test-long`")


def pytest_configure(config) -> None:
    config.stash[LONG] = {}


def pytest_collection_modifyitems(config, items) -> None:
    """Long tests are left out unless asked for; the longest groups begin, so that none is waited for at the end."""
    long = {item: mark for item in items if (mark := item.get_closest_marker("long"))}
    if not config.getoption("long"):
        config.stash[LONG] |= {item.nodeid: mark.kwargs["reason"] for item, mark in long.items()}
        items[:] = [item for item in items if item not in long]
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(group(item.path.name), len(FIRST)))


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["long"] = session.config.stash[LONG]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[LONG] |= getattr(node, "workeroutput", {}).get("long", {})


def pytest_terminal_summary(terminalreporter, config) -> None:
    """Nothing is left out without a word."""
    left = config.stash[LONG]
    if left:
        terminalreporter.section(f"left to make test-long: {len(left)}")
    for test, reason in sorted(left.items()):
        terminalreporter.line(f"{test}: {reason}")


@dataclass
class Workspace:
    """A copy of the project, and the settings that every command in it is given."""

    root: Path
    overrides: dict = field(default_factory=dict)
    environ: dict = field(default_factory=dict)

    def environment(self, **overrides) -> dict[str, str]:
        """The environment of a command in it."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return servers.environment(self.overrides | servers.named(overrides), **self.environ, PATH=path)

    def fraud(self, *arguments: str, ok: bool = True, **overrides) -> subprocess.CompletedProcess:
        """Runs the command line; with `ok` a failure fails the test with what was printed."""
        done = subprocess.run(
            [sys.executable, "-m", "fraud_pkg.cli", *arguments],
            cwd=self.root,
            env=self.environment(**overrides),
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0 or not ok, (
            f"fraud {' '.join(arguments)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
        )
        return done

    def json(self, path: str) -> dict:
        return json.loads((self.root / path).read_text(encoding="utf-8"))

    def last_run(self) -> dict:
        return json.loads((self.root / "reports/history.jsonl").read_text(encoding="utf-8").splitlines()[-1])

    def states(self) -> dict[str, str]:
        """What the last run did with each job."""
        return {job["job"]: job["status"] for job in self.last_run()["jobs"]}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Callable[..., Workspace]:
    """Makes workspaces; keyword arguments override settings, with __ for the dot."""

    def make(**overrides) -> Workspace:
        root = tmp_path_factory.mktemp("project")
        for name in COPIED:
            source, target = PROJECT / name, root / name
            if source.is_dir():
                shutil.copytree(
                    source, target, ignore=shutil.ignore_patterns("__pycache__", "vendor", "deployed", "deployments")
                )
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        return Workspace(root, SMALL | servers.named(overrides))

    return make


@pytest.fixture(scope="session")
def finished(workspace) -> Workspace:
    """A workspace after its first run; whoever needs a true champion takes it from here."""
    made = workspace()
    made.printed = made.fraud("run").stdout
    return made


@pytest.fixture(scope="session")
def team(workspace, tmp_path_factory):
    """Two machines' common places, and a first machine that has run once; the registry was away in the middle of it."""
    import storage

    with storage.opened(tmp_path_factory.mktemp("team"), workspace) as team:
        yield team


@pytest.fixture(scope="module")
def no_pictures():
    """Data come in without a picture of them, which takes longer than a small log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fraud_pkg.data.acquire._write_profile", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    with servers.redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def postgres_url(tmp_path_factory):
    with servers.postgres(tmp_path_factory.mktemp("postgres")) as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request, tmp_path) -> str:
    """An address of each kind of database, which is empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tables.db"
    address = request.getfixturevalue("postgres_url")
    engine = sa.create_engine(address)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    engine.dispose()
    return address


def shared(name: str) -> Path:
    """A file that this project did not make; the test is skipped where it is not there."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not in {SHARED}; FRAUD_SHARED_DATA names another folder")
    return SHARED / name
