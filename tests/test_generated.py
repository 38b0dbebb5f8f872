"""Generated files are what the notebooks say: made again in a copy, nothing changes. And what is stored by hand fits
what is there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT

BIN = Path(sys.executable).parent
LEFT_OUT = {
    *(".venv", ".git", ".dvc_store", "data", "models", "mlartifacts", "reports", ".hypothesis", "tmp", ".nbval"),
    *("site", ".docs"),
}


def left_out(folder: str, names: list[str]) -> set[str]:
    """What a run leaves at the top level, and caches anywhere."""
    top = LEFT_OUT & set(names) if Path(folder) == PROJECT else set()
    return top | {name for name in names if name in ("__pycache__", "cache") or name.endswith(".egg-info")}


def test_making_them_again_changes_nothing(tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(PROJECT, copy, ignore=left_out)
    environ = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["make", "export"], cwd=copy, env=environ, check=True, capture_output=True, timeout=300)
    written = [
        file
        for pattern in (
            "fraud_pkg/**/*.py",
            "fraud_pkg/*/assets/*",
            "README.md",
            "dvc.yaml",
            "nbs/**/*.ipynb",
            "jobs/*.ipynb",
            "k8s/jobs/*.yaml",
            "k8s/monitoring/*.yaml",
            "k8s/monitoring/dashboards/*",
            ".github/workflows/*.yml",
            "docs/*.md",
            "docs/decisions/contenders.md",
            "docs/pictures/*.svg",
            "docs/reference/*.md",
        )
        for file in PROJECT.glob(pattern)
    ]
    generated = [file for file in sorted(written) if ".ipynb_checkpoints" not in file.parts]
    stale = [
        str(file.relative_to(PROJECT))
        for file in generated
        if file.read_bytes() != (copy / file.relative_to(PROJECT)).read_bytes()
    ]
    assert not stale, f"{', '.join(stale)}: make export"
    for pattern in (
        "fraud_pkg/**/*.py",
        "fraud_pkg/*/assets/*",
        "k8s/jobs/*.yaml",
        "k8s/monitoring/dashboards/*",
        "docs/reference/*.md",
    ):
        assert sorted(p.name for p in copy.glob(pattern)) == sorted(p.name for p in PROJECT.glob(pattern))


def test_no_notebook_keeps_a_control():
    """A stored control is an error message for whoever opens the notebook; cells with controls are tagged
    `skip-execution`, so that nbconvert leaves them out.
    """
    kept, controls = [], 0
    for file in sorted((PROJECT / "nbs").rglob("*.ipynb")):
        for cell in (
            json.loads(file.read_text(encoding="utf-8"))["cells"] if ".ipynb_checkpoints" not in file.parts else ()
        ):
            controls += "skip-execution" in cell["metadata"].get("tags", ())
            kept += [
                f"{file.name}, cell {cell['id']}"
                for output in cell.get("outputs", ())
                if "application/vnd.jupyter.widget-view+json" in output.get("data", ())
            ]
    assert controls and not kept, kept


def test_exploration_begins_with_a_list_of_its_notebooks():
    folder = PROJECT / "nbs/explore"
    listed = re.findall(r"\]\((\w+\.ipynb)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(file.name for file in folder.glob("*.ipynb"))
    workspace = json.loads((folder / "lab/explore.jupyterlab-workspace").read_text(encoding="utf-8"))
    widgets = workspace["data"]["layout-restorer:data"]["main"]["dock"]["widgets"]
    assert [name.partition(":")[0] for name in widgets] == ["markdownviewer-widget", "notebook"]  # one kernel
    assert all((PROJECT / workspace["data"][name]["data"]["path"]).is_file() for name in widgets)


def test_code_of_exploration_fits_a_laptop():
    """100 columns beside JupyterLab's files, on a screen of 1280 pixels."""
    wide = [
        f"{file.name}, cell {cell['id']}: {line.rstrip()}"
        for file in sorted((PROJECT / "nbs/explore").glob("*.ipynb"))
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]
        for line in cell["source"]
        if cell["cell_type"] == "code" and len(line.rstrip()) > 100
    ]
    assert not wide, "\n".join(wide)


def test_texts_quote_the_recorded_run():
    """docs/run.json is what `make pictures` left of the run that it pictured."""
    sys.path.insert(0, str(PROJECT / "docs"))
    try:
        import record
    finally:
        sys.path.pop(0)
    run = json.loads(record.RECORD.read_text(encoding="utf-8"))
    assert record.stale(run) == [], "make export"
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert record.table(run) in readme and len(readme.encode()) <= 9_000
    hurry = json.loads(record.HURRY.read_text(encoding="utf-8"))
    assert record.stale(hurry, record.QUOTED_HURRY, record.HURRY) == [], "make export"
    other = record.stale(hurry | {"tour": run["tour"]}, record.QUOTED_HURRY, record.HURRY)
    assert len(other) == 1 and other[0].startswith("docs/tour.md: is not what docs/hurry.json says: seen more frauds")
    other = run | {"features": 7, "seconds": 700.0}
    assert [fault.split(":")[0] for fault in record.stale(other)] == [
        "nbs/index.ipynb",
        "nbs/index.ipynb",
        "docs/tour.md",
    ]
    assert record.corrected("often about ten minutes", r"about (\w+) minutes", "five") == "often about five minutes"
    for name, svg in record.badges().items():
        assert (record.PICTURES / name).read_text(encoding="utf-8") == svg, f"{name}: make export"
