"""Generated files are what the notebooks say: made again in a copy, nothing changes. And what is stored by hand fits
what is there.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT

BIN = Path(sys.executable).parent
LEFT_OUT = {".venv", ".git", ".dvc_store", "data", "models", "mlartifacts", "reports", ".hypothesis", "tmp", ".nbval"}


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


def test_the_workspace_opens_every_exploration_notebook():
    workspace = json.loads((PROJECT / "nbs/explore/lab.jupyterlab-workspace").read_text(encoding="utf-8"))
    opened = {value["data"]["path"] for key, value in workspace["data"].items() if key.startswith("notebook:")}
    assert opened == {str(file.relative_to(PROJECT)) for file in (PROJECT / "nbs/explore").glob("*.ipynb")}
    assert workspace["data"]["layout-restorer:data"]["main"]["dock"]["widgets"] == [
        key for key in workspace["data"] if key.startswith("notebook:")
    ]
