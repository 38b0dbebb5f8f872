"""The house in wings: who may import whom, what a decision loads, and which stages a change reruns."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT

PACKAGE = PROJECT / "fraud_pkg"
WINGS = (
    "core",
    "store",
    "features",
    "data",
    "train",
    "model",
    "serve",
    "stream",
    "monitor",
    "report",
    "pipeline",
    "cli",
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, such as serve.scorer."""
    files = [file for file in PACKAGE.rglob("*.py") if not file.name.startswith("_")]
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}


def numbers() -> dict[str, int]:
    """The number of each module's notebook in its wing."""
    found = {}
    for notebook in (PROJECT / "nbs").glob("*/[0-9]*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        name = next(text.split()[2] for cell in cells if (text := "".join(cell["source"])).startswith("#| default_exp"))
        assert name == f"{notebook.parent.name}.{notebook.stem.split('_', 1)[1]}", notebook
        found[name] = int(notebook.stem.split("_")[0])
    return found


def imported(name: str, file: Path) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in its file; a package's own name is no module."""
    here = ["fraud_pkg", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (other.removeprefix("fraud_pkg.") for other in found if other.startswith("fraud_pkg."))


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    """Who imports whom."""
    known = modules()
    return {name: {other for other in imported(name, file) if other in known} - {name} for name, file in known.items()}


def wing(name: str) -> int:
    return WINGS.index(name.split(".")[0])


def test_every_module_is_a_numbered_notebook_of_a_wing():
    assert set(numbers()) | {"cli"} == set(modules())
    for place in WINGS[:-1]:
        own = sorted(number for name, number in numbers().items() if name.startswith(f"{place}."))
        assert own == list(range(len(own))), place


def test_no_wing_imports_a_wing_below_it(arrows):
    upwards = [f"{name} -> {other}" for name, others in arrows.items() for other in others if wing(other) > wing(name)]
    assert not upwards


def test_inside_a_wing_only_lower_numbers_are_imported(arrows):
    number = numbers() | {"cli": 0}
    wrong = [
        f"{name} -> {other}"
        for name, others in arrows.items()
        for other in others
        if wing(other) == wing(name) and number[other] >= number[name]
    ]
    assert not wrong


def test_no_import_goes_in_a_circle(arrows):
    assert len(list(graphlib.TopologicalSorter(arrows).static_order())) == len(arrows)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("serve.scorer", ("pyarrow", "pandas", "xgboost", "tensorflow", "mlflow", "fastapi")),
        ("stream.worker", ("fastapi", "uvicorn", "pyarrow", "pandas", "xgboost", "tensorflow", "mlflow")),
        ("serve.api", ("pyarrow", "pandas", "xgboost", "tensorflow", "mlflow")),
        ("cli", ("pyarrow", "pandas", "xgboost", "tensorflow", "mlflow", "fastapi", "onnxruntime")),
    ],
)
def test_what_decides_loads_nothing_that_trains(module, absent):
    code = f"import sys, fraud_pkg.{module}; print(*(name for name in {absent!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.split() == []


@pytest.mark.parametrize("changed", ["store/redis.py", "serve/api.py"])
def test_a_change_of_what_serves_reruns_no_feature_and_no_training(changed):
    """DVC compares what a stage names: none before the promotion names what only serves."""
    text = (PROJECT / "dvc.yaml").read_text(encoding="utf-8")
    stages = dict(re.findall(r"^  (\w+):\n((?:    .*\n|\n)+)", text, flags=re.MULTILINE))
    assert {"acquire", "features", "train_xgboost", "train_tensorflow"} <= stages.keys()
    naming = {name for name, body in stages.items() if f"- fraud_pkg/{changed}\n" in body}
    assert naming.isdisjoint({"acquire", "features", "train_xgboost", "train_tensorflow"})
