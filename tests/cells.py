"""What `make coverage` has IPython run in every kernel: a cell that is exported counts as its lines in the module.

A notebook tests the functions that its own cells have just defined, not those of the module made from them. So such a
cell is compiled under the module's name, with the numbers that its lines have there.
"""

import ast
import json
import os
import re
from pathlib import Path

from coverage import Coverage
from IPython import get_ipython

PROJECT = Path(os.environ["COVERAGE_PROCESS_START"]).parent


def exported(module: Path) -> dict[str, int]:
    """{text of an exported cell: what to add to the number of a line in it}."""
    lines = module.read_text(encoding="utf-8").splitlines()
    notebook = re.search(r"File to edit: (?:\.\./)+(\S+\.ipynb)", "\n".join(lines[:5]))[1]
    begins = {line.rsplit("#", 1)[1]: number for number, line in enumerate(lines, 1) if line.startswith("# %% ../")}
    cells = json.loads((PROJECT / notebook).read_text(encoding="utf-8"))["cells"]
    texts = {cell["id"]: "".join(cell["source"]).strip() for cell in cells if cell["id"] in begins}
    return {text: begins[name] - len(re.findall(r"^#\|", text, re.MULTILINE)) for name, text in texts.items()}


class Cells:
    """Names a cell's code, as IPython asks before it compiles it, and moves its lines."""

    def __init__(self, shell) -> None:
        self.usual = shell.compile.get_code_name
        self.module, self.offsets, self.offset = Path(), {}, 0
        shell.compile.get_code_name = self.name
        shell.ast_transformers.append(self)

    def name(self, raw: str, code: str, number: int) -> str:
        if found := re.match(r"#\| default_exp (\S+)", raw):
            self.module = PROJECT / "fraud_pkg" / f"{found[1].replace('.', '/')}.py"
            self.offsets = exported(self.module)
        self.offset = self.offsets.get(raw.strip(), 0)
        return str(self.module) if self.offset else self.usual(raw, code, number)

    def visit(self, tree: ast.AST) -> ast.AST:
        return ast.increment_lineno(tree, self.offset)


Cells(get_ipython())
# nbval ends its kernels by SIGKILL.
get_ipython().events.register("post_run_cell", lambda result: Coverage.current().save())
