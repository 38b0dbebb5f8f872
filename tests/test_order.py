"""What does not fit into memory: a log is sorted and brought in within a bound on the address space."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 2_000_000
LIMIT = 3 << 30  # address space, of which libraries alone map about one and a half

SORT = """
from pathlib import Path
from fraud_pkg.data import order
order.MEMORY = "64MB"
folder = Path(".")
order.sort_file(folder / "log.parquet", folder / "sorted.parquet", folder)
print(len(order.repeated_rows(folder / "log.parquet", folder)))
"""


def test_a_sort_that_does_not_fit_into_memory(tmp_path):
    rng = np.random.default_rng(7)
    time = rng.integers(0, 10**7, ROWS)
    ids = pa.array(np.arange(ROWS)).cast(pa.string())
    log = pa.table({"time": time, "row": np.arange(ROWS), "transaction_id": ids})  # 64 MB is less than half of it
    pq.write_table(log, tmp_path / "log.parquet")
    run = subprocess.run(
        [sys.executable, "-c", SORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )
    assert run.stdout.strip() == "0", run.stderr[-2000:]
    found = pq.read_table(tmp_path / "sorted.parquet")
    assert np.array_equal(found["row"].to_numpy(), np.argsort(time, kind="stable"))
    assert not list(tmp_path.glob("duckdb/*"))  # what was spilled is gone


ACQUIRE = """
from fraud_pkg.core.settings import load_settings
from fraud_pkg.data.acquire import acquire
import json
manifest = acquire(load_settings(cli={"data.source": "log.csv", "data.step_unit": "seconds"}))
print(json.dumps({name: manifest[name] for name in ("rows", "quarantined", "out_of_order", "first_step", "last_step")}))
"""


def test_a_shuffled_log_in_little_memory(tmp_path):
    rows = 300_000
    steps = np.random.default_rng(7).permutation(rows)
    lines = "\n".join(f"{step},5.25,C{step % 999},M{step % 77},{int(step % 500 == 0)}" for step in steps.tolist())
    (tmp_path / "log.csv").write_text(f"step,amount,sender,receiver,is_fraud\n{lines}\n")
    (tmp_path / "settings.ini").touch()
    run = subprocess.run(
        [sys.executable, "-c", ACQUIRE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"FRAUD_ROOT": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT)),
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert (found["rows"], found["quarantined"], found["first_step"], found["last_step"]) == (rows, 0, 0, 83)
    assert found["out_of_order"] > rows - 50
