"""Copies notebooks with execution counts: nbdev-clean removes them, and nbval takes a cell without one for never run.

usage: python tests/numbered.py FOLDER COPY
"""

import json
import sys
from pathlib import Path


def number(notebook: dict) -> dict:
    """The notebook as it is right after running it from top to bottom."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, cell in enumerate(code, 1):
        cell["execution_count"] = count
        for output in cell["outputs"]:
            if output["output_type"] == "execute_result":
                output["execution_count"] = count
    return notebook


def main(source: Path, target: Path) -> None:
    for file in sorted(source.rglob("*.ipynb")):
        if ".ipynb_checkpoints" in file.parts:
            continue
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(number(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
