"""The house in wings: who may import whom, what a decision loads, which stages a change reruns, and how long notebooks,
cells and lines may be.
"""

import ast
import graphlib
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import PROJECT

PACKAGE = PROJECT / "fraud_pkg"
WINGS = runpy.run_path(str(PROJECT / "docs/reference.py"))["WINGS"]  # in the order of imports


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, such as serve.scorer; an empty `__init__` is none."""
    files = [file for file in PACKAGE.glob("*/*.py") if file.stat().st_size]
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
    assert set(numbers()) == set(modules())
    for place in WINGS:
        own = sorted(number for name, number in numbers().items() if name.startswith(f"{place}."))
        assert own == list(range(len(own))), place


def test_no_wing_imports_a_wing_below_it(arrows):
    upwards = [f"{name} -> {other}" for name, others in arrows.items() for other in others if wing(other) > wing(name)]
    assert not upwards


def test_inside_a_wing_only_lower_numbers_are_imported(arrows):
    number = numbers()
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


CELLS, CODE_LINES, LINE = 75, 40, 120
# Code cells of more than CODE_LINES lines, which are honest as one. The list may only shrink.
LONG = {
    ("core/11_names.ipynb", "2ba00da6"): "a table: the names of columns in many languages",
    ("serve/07_metrics.ipynb", "322470b9"): "a table: the metrics of the service",
    ("stream/03_consumer.ipynb", "eef97ba2"): "a reader's two calls share all of its state",
    ("train/00_samples.ipynb", "4cad7faa"): "a table: the columns of a sample, and what is asked of them",
}


def cells() -> Iterator[tuple[str, dict, list[str]]]:
    """Notebook, cell and lines of every cell: those of nbs/ by their path there, the jobs'."""
    for folder in (PROJECT / "nbs", PROJECT / "jobs"):
        for file in sorted(folder.rglob("*.ipynb")):
            if ".ipynb_checkpoints" not in file.parts:
                for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
                    yield file.relative_to(folder).as_posix(), cell, "".join(cell["source"]).splitlines()


def prose(lines: list[str]) -> Iterator[str]:
    """The lines of Markdown that could be broken: no row of a table, no block of code or of output."""
    fenced = False
    for line in lines:
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        if not (fence or fenced or line.startswith("|")):
            yield line


def test_notebooks_are_short():
    counts = Counter(notebook for notebook, _, _ in cells())
    assert not {notebook: count for notebook, count in counts.items() if count > CELLS}


def test_code_cells_are_short():
    long = {
        (notebook, cell["id"])
        for notebook, cell, lines in cells()
        if cell["cell_type"] == "code" and len(lines) > CODE_LINES
    }
    assert long - LONG.keys() == set(), "more than 40 lines: into two thoughts"
    assert LONG.keys() - long == set(), "short now: out of the list"


def test_lines_are_short():
    wide = [
        f"{notebook}, cell {cell['id']}: {line[:60]}..."
        for notebook, cell, lines in cells()
        for line in (prose(lines) if cell["cell_type"] == "markdown" else lines)
        if len(line) > LINE
    ]
    assert not wide
