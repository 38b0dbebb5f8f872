"""What a user gets for a mistake: one line that names the place, a status that is not 0, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fraud_pkg.pipeline.example import example_project
from fraud_pkg.pipeline.execute import exclusive

HEADER = (
    "step,type,amount,nameOrig,oldbalanceOrg,newbalanceOrig,"
    "nameDest,oldbalanceDest,newbalanceDest,isFraud,isFlaggedFraud\n"
)
ROW = "{step},PAYMENT,{amount},C{n},100,90,M1,0,0,{fraud},0\n"


@pytest.fixture(scope="module")
def space(workspace):
    return workspace(features__engine="local", pipeline__push="false")


def refused(space, *arguments, status=1, **overrides) -> str:
    """The one line that a failing command prints."""
    done = space.fraud(*arguments, ok=False, **overrides)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def csv(space, name: str, rows: list[str], header: str = HEADER) -> str:
    (space.root / name).write_text(header + "".join(rows), encoding="utf-8")
    return name


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train__trails": 1}, "train.trails"),
        ({"train__trials": "many"}, "[train] trials = many"),
        ({"split__test_hours": -1}, "[split] test_hours = -1"),
        ({"features__windows": "24h, 1h"}, "[features] windows"),
        ({"features__windows": "24"}, "expected one such as 10m, 24h or 30d"),
        ({"features__windows": "100h"}, "expected 4d or 5d"),
        ({"features__label_delay": "36h"}, "expected whole days"),
        ({"attributes__device": "colour"}, "[attributes] device"),
        ({"attributes__amount": "number"}, "[attributes] amount"),
        ({"entities__card": "card"}, "[entities] card"),
        ({"decision__alert_budget": -1}, "[decision] alert_budget = -1"),
        ({"decision__segment": "shop", "decision__segment_budgets": "a: 0.001"}, "[decision] segment = shop"),
        ({"decision__segment": "type", "decision__segment_budgets": "a: 0.1"}, "a has more than alert_budget = 0.005"),
    ],
)
def test_settings(space, overrides, said):
    assert said in refused(space, "settings", status=2, **overrides)


def test_sources(space):
    (space.root / "noise.csv").write_bytes(os.urandom(2000))
    assert "noise.csv: neither CSV nor Parquet" in refused(space, "acquire", data__source="noise.csv")
    assert "missing.csv" in refused(space, "acquire", data__source="missing.csv")
    assert "amount" in refused(space, "acquire", data__source=csv(space, "short.csv", ["1,C1\n"], "step,nameOrig\n"))
    assert "colour" in refused(
        space,
        "acquire",
        data__source=csv(space, "extra.csv", ["1,PAYMENT,5,C1,9,4,M1,0,0,0,0,red\n"], HEADER.strip() + ",colour\n"),
    )


def test_broken_rows_stop_the_run_or_are_kept(space):
    good = [ROW.format(step=1, amount=5, n=n, fraud=0) for n in range(200)]
    bad = [ROW.format(step=1, amount=-5, n=1, fraud=0)]
    said = refused(space, "acquire", data__source=csv(space, "bad.csv", good + bad * 20))
    assert "amount: below 0 (20, first in line 202)" in said and "max_quarantined" in said
    assert not (space.root / "data/raw").exists()
    space.fraud("acquire", data__source=csv(space, "nearly.csv", good + bad))
    assert space.json("data/raw/manifest.json")["quarantined"] == 1


def test_java_is_missing(space):
    environ = {"PATH": str(Path(sys.executable).parent), "FRAUD_SET": json.dumps({"features.engine": "spark"})}
    done = subprocess.run(
        [sys.executable, "-m", "fraud_pkg.cli", "run"],
        cwd=space.root,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode == 2
        and "apt-get install openjdk-17-jre-headless" in done.stderr
        and "engine = local" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


def test_one_class_in_the_training_period(space):
    rows = [
        ROW.format(step=step, amount=5, n=n, fraud=int(step > 121 and n == 0))
        for step in range(1, 131)
        for n in range(5)
    ]
    overrides = {
        "data__source": csv(space, "late.csv", rows),
        "features__label_delay": "1d",
        "split__test_hours": 5,
        "split__validation_hours": 3,
    }
    assert "the train period (steps 1 to" in refused(space, "run", **overrides)
    assert not (space.root / "reports/jobs/acquire.json").exists()  # told before any job starts


def test_all_that_is_wrong_with_the_data_at_once(space):
    rows = ["04/03/2024,5,1.2E+15,a\n", "05/03/2024,6,3.4E+15,b\n"]
    overrides = {
        "data__source": csv(space, "wrong.csv", rows, "timestamp,amount,sender,is_fraud\n"),
        "columns__receiver": "payee",
    }
    said = refused(space, "run", **overrides)
    assert "no column payee" in said
    said = refused(space, "run", **overrides | {"columns__receiver": ""})
    assert "would become 2" in said and "[data] fraud_values" in said


def test_too_short(space):
    rows = [ROW.format(step=1 + n // 40, amount=5, n=n, fraud=int(n % 9 == 0)) for n in range(400)]
    assert "test_hours" in refused(space, "run", data__source=csv(space, "brief.csv", rows))


def test_sigterm_ends_the_job_and_what_it_started(tmp_path):
    root = example_project(tmp_path / "project")
    job = root / "jobs/count.ipynb"
    notebook = json.loads(job.read_text(encoding="utf-8"))
    cell = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][-1]
    cell["source"] = (
        "import subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '600'])\nopen({str(root / 'started')!r}, 'w').close()\ntime.sleep(600)"
    )
    job.write_text(json.dumps(notebook), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "fraud_pkg.cli", "run"],
        cwd=root,
        env=os.environ | {"FRAUD_ROOT": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # as a shell starts what runs in the background
    while not (root / "started").exists():
        assert process.poll() is None
        time.sleep(0.2)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in errors
    assert not [child for child in below if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    with exclusive(root / ".dvc/tmp/fraud-run.lock", "fraud run"):
        pass


def test_interrupt_leaves_nothing_half_written(workspace):
    space = workspace(
        features__engine="local", pipeline__push="false", simulate__rows=150_000, simulate__fraud_rate=0.005
    )
    environ = os.environ | {"FRAUD_SET": json.dumps({key: str(value) for key, value in space.overrides.items()})}
    process = subprocess.Popen(
        [sys.executable, "-m", "fraud_pkg.cli", "run"],
        cwd=space.root,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a shell gives what it starts in the background no SIGINT
    while not list((space.root / "data").glob(".features.*.part/*")):  # in the middle of the features
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in errors
    left = [path.name for path in (space.root / "data").iterdir()]
    assert not [name for name in left if name.endswith(".part")], left
    assert "features" not in left or (space.root / "data/features/manifest.json").exists()
