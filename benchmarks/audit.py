"""What the audit log costs: `POST /predict` without it, with SQLite and with PostgreSQL, in alternating rounds.

    python benchmarks/audit.py [--seconds 5] [--rounds 3] [--connections 1 16 64]

Prints requests a second, latencies and the processor time of each, the median of the rounds. The load takes the
same processors: what can be compared are the rows of one run.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import psutil

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import servers  # noqa: E402
from serving import KEY, Endpoint, load  # noqa: E402

from fraud_pkg.core.signatures import new_key  # noqa: E402
from fraud_pkg.model.example import example_bundle  # noqa: E402
from fraud_pkg.serve.wire import EXAMPLE  # noqa: E402


def write_lines(file: Path) -> None:
    """2,000 payments as `load.lua` reads them."""
    said = {name: value for name, value in EXAMPLE.items() if name not in ("transaction_id", "step")}
    rows = (said | {"sender": f"C{number % 500}"} for number in range(2000))
    file.write_text("".join(f"{7_200_000 + 5 * i}\t{json.dumps(row)[1:]}\n" for i, row in enumerate(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_lines(root / "lines")
        new_key(root / "heads.pem", HERE)
        postgres = stack.enter_context(servers.postgres(root))
        endpoints, found = {}, defaultdict(list)
        for name, url in (("none", ""), ("sqlite", f"sqlite:///{root}/audit.db"), ("postgres", postgres)):
            folder = root / name
            folder.mkdir()
            example_bundle(folder / "champion")
            variables = {"FRAUD_API_KEYS": f"benchmark:{KEY}", "FRAUD_HEAD_KEY_FILE": str(root / "heads.pem")}
            more = {
                "audit__url": url,
                "audit__anchors": str(root / "heads") if url else "",
            }
            url, process = stack.enter_context(servers.service(folder, variables=variables, **more))
            endpoints[name] = Endpoint(int(url.rpartition(":")[2]), psutil.Process(process.pid))
        for _ in range(asked.rounds):
            for connections in asked.connections:
                for name, endpoint in endpoints.items():
                    found[connections, name].append(load(endpoint, root / "lines", connections, asked.seconds))
        print("| connections | audit log | requests/s | p50 ms | p99 ms | CPU µs |\n|---|---|---|---|---|---|")
        for (connections, name), rows in sorted(found.items()):
            rate, p50, p99, cpu = (
                statistics.median(row[column] for row in rows) for column in ("per_second", "p50", "p99", "cpu")
            )
            print(f"| {connections} | {name} | {rate:,.0f} | {p50 / 1000:.2f} | {p99 / 1000:.1f} | {cpu:.0f} |")


if __name__ == "__main__":
    main()
