"""JupyterLab as `make lab` opens it, in a real browser: one kernel, no question, nobody else asked, tabs kept."""

import json
import os
import shutil
import signal
import urllib.request

import pytest
import servers
from browser import browser, visit  # noqa: F401
from conftest import PROJECT

TABS = ".lm-DockPanel-tabBar .lm-TabBar-tab"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """`make lab` in a copy of what it needs; its address."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(
        PROJECT / "nbs/explore", folder / "nbs/explore", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    shutil.copy(PROJECT / "Makefile", folder)
    port = servers.free_port()
    options = f"--no-browser --ServerApp.port={port} --IdentityProvider.token= --allow-root"
    command = ["make", "--old-file", ".venv/.ready", "lab", f"ARGS={options}"]
    environ = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "user"),
    }
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    started = servers.running(
        command, servers.answers(port), folder / "log", cwd=folder, env=environ, start_new_session=True
    )
    with started as process:
        yield f"http://127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGKILL)  # JupyterLab, too, which outlives the make that started it


@pytest.mark.long(reason="starts JupyterLab and a kernel")
def test_it_opens_calmly_and_keeps_its_tabs(browser, lab):  # noqa: F811
    def sessions() -> list[str]:
        with urllib.request.urlopen(f"{lab}/api/sessions", timeout=30) as answer:
            return [session["path"] for session in json.load(answer)]

    with visit(browser, f"{lab}/lab/workspaces/explore") as seen:
        seen.page.get_by_role("heading", name="Exploration").wait_for(timeout=60_000)
        servers.until(lambda: sessions() == ["nbs/explore/eda.ipynb"], 60)
        seen.page.wait_for_timeout(5_000)  # whatever else would start or pop up
        assert sessions() == ["nbs/explore/eda.ipynb"]
        assert seen.page.locator(".jp-Dialog, .Toastify__toast").count() == 0
        seen.screenshot("lab")
        seen.page.locator(TABS).nth(1).click()
        seen.page.locator(".jp-CodeCell .cm-line").first.wait_for()
        cell = seen.page.locator(".jp-CodeCell .cm-scroller").first.bounding_box()
        letter = seen.page.evaluate(
            """() => { const one = document.createElement("span"); one.textContent = "x".repeat(100);
            document.querySelector(".jp-CodeCell .cm-line").append(one);
            const width = one.getBoundingClientRect().width; one.remove(); return width / 100; }"""
        )
        assert cell and cell["width"] >= 100 * letter
        seen.page.wait_for_timeout(3_000)  # the layout is saved
        seen.page.reload()
        seen.page.locator(f"{TABS}.lm-mod-current", has_text="eda.ipynb").wait_for(timeout=60_000)
