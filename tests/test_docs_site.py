"""The site of the docs: no link leads nowhere; built, it is whole in a real browser: from disk, by day, by night, on a
phone, without a network.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import servers
from browser import DESKTOP, PHONE, browser, over_http, visit  # noqa: F401

PROJECT = Path(__file__).resolve().parents[1]
BUILD = PROJECT / "docs/site/build.py"
LOOKS = {"light": (DESKTOP, False), "dark": (DESKTOP, True), "phone": (PHONE, False), "phone-dark": (PHONE, True)}
# One of each kind: the README, texts, wide tables, notebooks with pictures and tables, generated pages, a source.
PAGES = (
    "index.html", "docs/tour.html", "docs/howto/index.html", "docs/howto/own-data.html", "docs/architecture.html",
    "docs/decisions/index.html", "docs/threat-model.html", "benchmarks/results.html", "nbs/data/05_simulate.html",
    "nbs/train/01_metrics.html", "nbs/explore/drift.html", "jobs/promote.html", "docs/reference/core.policy.html",
    "docs/all-commands.html", "docs/settings.html", "docs/http-api.html", "source/LICENSE.html",
)  # fmt: skip
DIAGRAMS = ("index.html", "docs/architecture.html")
# Zensical draws diagrams into closed shadows, where nobody else may look.
OPEN_SHADOWS = """const attach = Element.prototype.attachShadow;
Element.prototype.attachShadow = function () { return attach.call(this, {mode: 'open'}); };"""
DRAWN = "document.querySelector('div.mermaid')?.shadowRoot?.querySelector('svg')?.getBoundingClientRect().height > 100"
RICH = ("index.html", "docs/howto/own-data.html", "benchmarks/results.html", "nbs/data/05_simulate.html")


def builder():
    """docs/site/build.py as a module."""
    sys.path.insert(0, str(BUILD.parent))
    try:
        spec = importlib.util.spec_from_file_location("docs_site_build", BUILD)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BUILD.parent))
    return module


def text_of(file: Path) -> str:
    """A text, or the prose of a notebook."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    # What jobs link to in the report is there after a run.
    return "\n\n".join("".join(cell["source"]) for cell in cells).replace("../monitor/", "https://report/monitor/")


def test_no_link_of_texts_and_notebooks_leads_nowhere():
    build = builder()
    assert build.dead_links("[a](b.md) and ![c](docs/tour.md) and `[d](e.md)`", "README.md") == [
        "README.md: b.md: there is no b.md"
    ]
    assert [dead for name in build.pages() for dead in build.dead_links(text_of(PROJECT / name), name)] == []


def test_lists_are_as_python_markdown_wants_them():
    regular = builder().regular
    assert regular("Text:\n- one\n  more\n  - two\n\n1. a\n   ```sh\n   x\n   ```\nend\n") == (
        "Text:\n\n- one\n    more\n    - two\n\n1. a\n    ```sh\n    x\n    ```\nend\n"
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    servers.program("npm", "npm")
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run([sys.executable, str(BUILD), str(folder)], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.long(reason="builds the whole site")
@pytest.mark.parametrize("look", LOOKS)
def test_pages_open_from_disk_and_fit(browser, site, look):  # noqa: F811
    size, dark = LOOKS[look]
    for page in PAGES if look in ("light", "phone-dark") else RICH:
        with visit(browser, (site / page).as_uri(), size, dark) as seen:
            seen.screenshot(f"docs_{page.replace('/', '_')}_{look}")
            assert seen.page.evaluate("document.documentElement.scrollWidth") <= size[0], page
            red = seen.page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0]
            assert (int(red) < 80) == dark, page
            assert seen.page.locator("article h1").count() == 1 or page == "benchmarks/results.html", page


@pytest.mark.long(reason="builds the whole site")
@pytest.mark.parametrize("look", ["light", "phone-dark"])
def test_pages_are_accessible(browser, site, look):  # noqa: F811
    with over_http(site) as url:
        for page in RICH:
            with visit(browser, f"{url}/{page}", *LOOKS[look]) as seen:
                assert seen.violations() == [], page


@pytest.mark.long(reason="builds the whole site")
@pytest.mark.parametrize("page", DIAGRAMS)
def test_diagrams_are_drawn(browser, site, page):  # noqa: F811
    with visit(browser, "about:blank") as seen:
        seen.page.add_init_script(OPEN_SHADOWS)
        seen.page.goto((site / page).as_uri())
        seen.until(DRAWN)
        assert seen.page.locator("pre.mermaid").count() == 0


@pytest.mark.long(reason="builds the whole site")
def test_search_finds_without_a_server(browser, site):  # noqa: F811
    with visit(browser, (site / "docs/tour.html").as_uri()) as seen:
        seen.page.wait_for_timeout(500)  # its scripts
        seen.page.keyboard.press("Control+k")
        seen.page.wait_for_timeout(500)
        seen.page.keyboard.type("calibration", delay=30)
        seen.page.get_by_text(re.compile(r"^\d\d+ results$")).wait_for(timeout=15_000)
        seen.screenshot("docs_search")


@pytest.mark.long(reason="builds the whole site")
def test_what_is_loaded_from_elsewhere_or_leads_nowhere_is_found(site, tmp_path):
    build = builder()
    assert list(build.broken(site)) == []
    links = '<a href="gone.html">a</a><a href="#b">b</a><a href="#a" id="a">'
    (tmp_path / "index.html").write_text(f'<script src="https://cdn.example/x.js"></script>{links}')
    assert list(build.broken(tmp_path)) == [
        "index.html: https://cdn.example/x.js: would be loaded from elsewhere",
        "index.html: gone.html: no such file",
        "index.html: #b: no such place in the page",
    ]
