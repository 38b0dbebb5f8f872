"""The pictures of the docs: the report of the last run and the console on its payments, as Chromium shows them; and
docs/run.json, what texts quote of that run (docs/record.py). `make pictures`; give another folder to take its run.
`python docs/pictures.py FOLDER hurry` records the tour's run in a hurry in docs/hurry.json instead, without pictures.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
import measure  # noqa: E402
import record  # noqa: E402
import servers  # noqa: E402
from browser import PHONE, chromium, visit  # noqa: E402

from fraud_pkg.core.contract import raw_columns  # noqa: E402
from fraud_pkg.core.settings import load_settings  # noqa: E402

TARGET = ROOT / "docs/pictures"
WIDE = (1280, 860)
# name: page, what is brought to the top, size, dark
REPORT = {
    "report": ("index.html", None, WIDE, False),
    "report-where-it-fails": ("index.html", "#fails", WIDE, True),
    "champion-curves": ("champion.html", "#curves", WIDE, False),
    "champion-mistakes": ("champion.html", "#false-alarms", WIDE, True),
    "bake-off": ("bakeoff.html", "#measures", WIDE, False),
    "report-phone": ("index.html", None, PHONE, True),
}
SENT = 20_000  # payments before the picture of the console, so that accounts have a history


def save(name: str, png: bytes) -> None:
    """Without a loss, in a third of the bytes."""
    Image.open(BytesIO(png)).convert("RGB").save(TARGET / f"{name}.webp", lossless=True, method=6)


def report(browser, folder: Path) -> None:
    for name, (page, place, size, dark) in REPORT.items():
        with visit(browser, (folder / "reports" / page).as_uri(), size, dark) as seen:
            if place:
                seen.page.evaluate("(place) => document.querySelector(place).scrollIntoView()", place)
            save(name, seen.page.screenshot())


def send(url: str, folder: Path) -> None:
    """The newest payments of the run, in their order."""
    contract = load_settings(environ={}, file=folder / "settings.ini").contract
    known = [column.name for column in raw_columns(contract) if not column.known_later]
    table = pq.read_table(sorted((folder / "data/raw").glob("*.parquet")), columns=known)
    rows = table.slice(max(0, len(table) - SENT)).to_pylist()
    for first in range(0, len(rows), 1000):
        batch = [{key: value for key, value in row.items() if value is not None} for row in rows[first : first + 1000]]
        request = urllib.request.Request(
            f"{url}/predict/batch", json.dumps({"transactions": batch}).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=60).read()


def ask(url: str, payment: str) -> dict:
    request = urllib.request.Request(f"{url}/predict", payment.encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def answered(url: str) -> tuple[dict, list[dict]]:
    """What the service says to the payment of docs/decide.md, when it knows nobody yet, and to those of the tour."""
    text = (ROOT / "docs/decide.md").read_text(encoding="utf-8")
    payment = re.search(r"/predict [^{]*--data '(\{.*?\})'", text, re.DOTALL)
    assert payment, "docs/decide.md: no payment in it"
    names = ("transaction_id", "step", "type", "amount", "sender_balance", "receiver")
    lines = re.findall(r"^pay (t-\S+) (\S+) (\S+) (\S+) (\S+) (\S+)$", (ROOT / "docs/tour.md").read_text("utf-8"), re.M)
    tour = []
    for line in lines:
        numbers = {name: float(value) for name, value in zip(names, line, strict=True) if name in names[3:5]}
        named = dict(zip(names, line, strict=True)) | numbers | {"step": int(line[1]), "sender": "C1001"}
        tour.append(ask(url, json.dumps(named)))
    return ask(url, payment[1]), tour


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A service of its own, with the champion of the run and nothing in its store."""
    port = servers.free_port()
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "fraud_pkg.cli", "serve"]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        environ = os.environ | {
            "FRAUD_SERVE_PORT": str(port),
            "FRAUD_SERVE_FILL": "no",  # payments are sent
            "FRAUD_CASES_URL": f"sqlite:///{scratch}/cases.db",
            "FRAUD_CASES_OUTBOX": f"{scratch}/cases",
        }
        log = Path(scratch) / "log"
        stack.enter_context(servers.running(command, servers.answers(port), log, cwd=folder, env=environ))
        yield url


def console(browser, folder: Path) -> tuple[dict, list[dict]]:
    """Pictures of the console; what the service answers to the examples of the docs."""
    with serving(folder) as url:
        examples = answered(url)
        send(url, folder)
        with visit(browser, url, WIDE) as seen:
            seen.page.locator("#filter .allow").click()
            seen.page.locator("#rows .row").first.click(position={"x": 40, "y": 16})  # stopped; not on a link
            seen.page.locator(".reasons").first.wait_for()
            seen.page.locator("#filter .allow").click()
            seen.page.wait_for_timeout(500)  # the accounts, asked of the store
            save("console", seen.page.screenshot())
        with visit(browser, url, PHONE, dark=True) as seen:
            seen.page.locator("#rows .row").first.wait_for()
            save("console-phone", seen.page.screenshot())
    return examples


def main(folder: Path) -> None:
    if not (folder / "reports/champion.html").is_file():
        sys.exit(f"error: {folder / 'reports'}: no report of a run; make one with: make run")
    TARGET.mkdir(exist_ok=True)
    with chromium() as browser:
        report(browser, folder)
        examples = console(browser, folder)
    run = record.record(folder, measure.machine(), *examples)
    record.RECORD.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in sorted(TARGET.glob("*.webp")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


def hurry(folder: Path) -> None:
    with serving(folder) as url:
        examples = answered(url)
    run = record.hurried(record.record(folder, measure.machine(), *examples))
    record.HURRY.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    (hurry if sys.argv[2:] == ["hurry"] else main)(where)
