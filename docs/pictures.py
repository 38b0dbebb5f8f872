"""The pictures of the docs: the report of the last run and the console on its payments, as Chromium shows them. `make
pictures`; give another folder to take its run.
"""

import json
import os
import sys
import tempfile
import urllib.request
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
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


def console(browser, folder: Path) -> None:
    """A service of its own, with the champion of the run."""
    port = servers.free_port()
    url, environ, command = (
        f"http://127.0.0.1:{port}",
        os.environ | {"FRAUD_SERVE_PORT": str(port), "FRAUD_SERVE_FILL": "no"},  # they are sent
        [sys.executable, "-m", "fraud_pkg.cli", "serve"],
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        servers.running(command, servers.answers(port), Path(scratch) / "log", cwd=folder, env=environ),
    ):
        send(url, folder)
        with visit(browser, url, WIDE) as seen:
            seen.page.locator("#filter .allow").click()
            seen.page.locator("#rows .row").first.click()  # what is stopped
            seen.page.locator(".reasons").first.wait_for()
            seen.page.locator("#filter .allow").click()
            seen.page.wait_for_timeout(500)  # the accounts, asked of the store
            save("console", seen.page.screenshot())
        with visit(browser, url, PHONE, dark=True) as seen:
            seen.page.locator("#rows .row").first.wait_for()
            save("console-phone", seen.page.screenshot())


def main(folder: Path) -> None:
    if not (folder / "reports/champion.html").is_file():
        sys.exit(f"error: {folder / 'reports'}: no report of a run; make one with: make run")
    TARGET.mkdir(exist_ok=True)
    with chromium() as browser:
        report(browser, folder)
        console(browser, folder)
    for path in sorted(TARGET.glob("*.webp")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
