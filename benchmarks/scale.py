"""How time and memory grow with the number of transactions, job by job, and what the growth says of a billion. What is
measured: benchmarks/README.md.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from features import make_log, ours
from measure import Measured, machine, measured, say, write_json
from train import train_once

from fraud_pkg.core.contract import HOUR

SIZES = (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000, 25_000_000)
COPY = 1_000_000  # transactions that are simulated together; a larger log is that of many towns
TREES = 30
BILLION = 10**9
MEMORY = "2g"  # of Spark's driver at every size: what does not fit is spilled


def widen(town: Path, target: Path, rows: int) -> None:
    """A log of about `rows` transactions in the folder `target`: many towns side by side, each with accounts of its
    own, in the order of time. Memory: a day of all towns.
    """
    manifest = json.loads((town / "raw/manifest.json").read_text(encoding="utf-8"))
    log = pq.read_table(town / "raw" / manifest["file"])
    hour, towns = log["time"].to_numpy() // HOUR, max(1, round(rows / len(log)))
    (target / "raw").mkdir(parents=True)
    ends = np.searchsorted(hour, np.arange(0, int(hour[-1]) + 25, 24))
    written = 0
    with pq.ParquetWriter(target / "raw" / manifest["file"], log.schema) as file:
        for first, end in zip(ends[:-1], ends[1:], strict=True):
            day = pa.concat_tables([_of_town(log.slice(first, end - first), number) for number in range(towns)])
            day = day.take(np.argsort(day["time"].to_numpy(), kind="stable"))
            numbers = pa.array(np.arange(written, written + len(day)), log.schema.field("row").type)
            for name, values in (("row", numbers), ("transaction_id", numbers.cast(pa.string()))):
                day = day.set_column(day.column_names.index(name), log.schema.field(name), values)
            file.write_table(day)
            written += len(day)
    (target / "raw/manifest.json").write_text(json.dumps(manifest | {"rows": written}), encoding="utf-8")


def _of_town(log: pa.Table, number: int) -> pa.Table:
    """The log with the town's number at the end of the names of accounts, devices and cards."""
    for name in ("sender", "receiver", "device", "card"):
        if name not in log.column_names:
            continue
        log = log.set_column(
            log.column_names.index(name),
            log.schema.field(name),
            pc.binary_join_element_wise(log[name], str(number), "t"),
        )
    return log


def job(name: str, folder: Path, rows: int) -> Measured:
    if name == "train_xgboost":
        return train_once("ours", folder, TREES)
    return measured([sys.executable, __file__, "--job", name, "--folder", str(folder), "--rows", str(rows)])


def run_job(name: str, folder: Path, rows: int) -> None:
    if name == "acquire":
        make_log(folder / "acquired", rows, "hard")
    else:
        ours(name.removeprefix("features "), folder, MEMORY, "hard")


JOBS = ("acquire", "features local", "features spark", "train_xgboost")


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Least squares: a constant and a slope per million, and the exponent of the growth without that constant's share
    (log-log slope over the larger half).
    """
    rows, seconds = np.array(points, dtype=np.float64).T
    slope, constant = np.polyfit(rows / 1e6, seconds, 1)
    upper = slice(len(points) // 2, None) if len(points) > 3 else slice(None)
    exponent = np.polyfit(np.log(rows[upper]), np.log(seconds[upper]), 1)[0] if len(rows[upper]) > 1 else float("nan")
    return float(constant), float(slope), float(exponent)


def growth(results: dict[str, dict[int, Measured]]) -> dict:
    lines = []
    for name, sizes in results.items():
        if len(sizes) < 2:
            continue
        constant, slope, exponent = fitted([(rows, one.cpu) for rows, one in sizes.items()])
        hours = (constant + slope * BILLION / 1e6) / 3600
        lines.append(
            [
                name,
                f"{min(sizes) / 1e6:g} to {max(sizes) / 1e6:g}",
                f"{constant:.1f} + {slope:.2f} n",
                f"{exponent:.2f}",
                f"{hours:.1f}",
                f"{hours / 64:.2f}" if name == "features spark" else "",
            ]
        )
    return {
        "title": "Growth",
        "note": "n in millions. Predicted, not measured: a billion transactions at the fitted line, and on a cluster "
        "of 64 such cores, if work spreads evenly over accounts, no account holds more than a task's memory, "
        "and shuffles over the network keep up with the cores. The other jobs run in one process: their memory "
        "grows with n, so a billion means sampling accounts (data.sample_size).",
        "columns": [
            "job",
            "measured, million",
            "processor seconds",
            "exponent, larger half",
            "1,000 million: core hours",
            "hours on 64 cores",
        ],
        "rows": lines,
    }


def report(results: dict[str, dict[int, Measured]], left_out: Sequence[str]) -> list[dict]:
    lines = [
        [f"{rows / 1e6:g}", name, f"{one.seconds:.1f}", f"{one.cpu:.1f}", f"{one.peak:.2f}"]
        for name, sizes in results.items()
        for rows, one in sizes.items()
    ]
    note = (
        f"One run each, hard log of 90 days; Spark's driver has {MEMORY} at every size. "
        f"Logs above {COPY / 1e6:g} million are many copies of a population of that size. " + " ".join(left_out)
    )
    return [
        {
            "title": "Time and memory by number of transactions",
            "note": note.strip(),
            "columns": ["million", "job", "seconds", "processor seconds", "peak GiB"],
            "rows": lines,
        },
        growth(results),
    ]


def all_sizes(sizes: Sequence[int], limit: float, keep: Callable) -> None:
    """Every job at every size, the smallest first; `keep` gets all results after each run. A job that would need more
    than `limit` GiB is left out.
    """
    results: dict[str, dict[int, Measured]] = {name: {} for name in JOBS}
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        town = Path(scratch) / "town"
        make_log(town, min(COPY, max(sizes)), "hard")
        for rows in sizes:
            if rows <= COPY:
                folder = Path(scratch) / f"log{rows}"
                make_log(folder, rows, "hard")
            else:
                folder = Path(scratch) / f"log{rows}"
                widen(town, folder, rows)
            for name in JOBS:
                before = max(results[name], default=None)
                needed = results[name][before].peak * rows / before if before and name != "features spark" else 0
                if needed > limit or (
                    name in ("acquire", "train_xgboost") and any(one.startswith(name) for one in left_out)
                ):
                    left_out.append(
                        f"{name} at {rows / 1e6:g} million was left out: it would need about {needed:.0f} GiB."
                    )
                    continue
                results[name][rows] = job(name, folder, rows)
                say(f"{rows:,} {name}: {results[name][rows].seconds:.1f} s, {results[name][rows].peak:.2f} GiB")
                keep(report(results, left_out))
            shutil.rmtree(folder)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="see that it runs; the figures say little")
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options.add_argument("--limit", type=float, default=10, help="GiB that a job may need")
    options.add_argument("--json", type=Path, help="write the figures there too")
    options.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.job:
        run_job(given.job, given.folder, given.rows)
        return
    began, last = machine(), []

    def keep(tables: list[dict]) -> None:
        last[:] = tables
        if given.json:
            given.json.write_text(json.dumps({"machine": began, "tables": tables}, indent=1) + "\n", encoding="utf-8")

    all_sizes((30_000, 60_000) if given.quick else sorted(given.sizes), given.limit, keep)
    write_json(given.json, began, last)


if __name__ == "__main__":
    main()
