"""Every public name of the package, from the notebooks: its signature with the comments of its parameters, its
docstring, and the notebook that tells why.

`make export` writes docs/reference with it.
"""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs/reference"
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


def exported(notebook: Path) -> tuple[str | None, str, list[str]]:
    """The module's name, its one-line summary, and the source of its exported cells."""
    cells = [
        (cell["cell_type"], "".join(cell["source"]))
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    ]
    name = next((text.split()[2] for _, text in cells if text.startswith("#| default_exp")), None)
    head = next((text for kind, text in cells if kind == "markdown"), "")
    summary = " ".join(line[1:].strip() for line in head.splitlines() if line.startswith(">"))
    return (
        name,
        summary,
        [
            text
            for kind, text in cells
            if kind == "code"
            and any(line.split("--")[0].strip() in ("#| export", "#|export") for line in text.splitlines()[:3])
        ],
    )


def lines_of(source: str, first: int, last: int) -> str:
    return "\n".join(source.splitlines()[first - 1 : last])


def signature(source: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """As it is written, with what stands beside each parameter, up to the body."""
    body = node.body[0].lineno
    if body == node.lineno:  # a body on the line of its def
        return lines_of(source, node.lineno, node.lineno).strip()
    return lines_of(source, node.lineno, body - 1).rstrip()


def fields(source: str, node: ast.ClassDef) -> str:
    """The head of a class and its fields, with what stands beside them."""
    public = [
        part
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and not part.target.id.startswith("_")
    ]
    kept = [lines_of(source, part.lineno, part.end_lineno or part.lineno) for part in public]
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    return "\n".join([f"class {node.name}{f'({bases})' if bases else ''}:", *kept])


def said(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    return " ".join((ast.get_docstring(node) or "").split())


def symbol(source: str, node: ast.stmt) -> str:
    """A section of the page; empty for what is not public."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
        return ""
    is_class = isinstance(node, ast.ClassDef)
    head = fields(source, node) if is_class else signature(source, node)
    section = f"### {node.name}\n\n```python\n{head}\n```\n\n{said(node)}\n"
    methods = (
        [
            part
            for part in node.body
            if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and not part.name.startswith("_")
        ]
        if is_class
        else []
    )
    return (
        section
        + "".join(
            f"\n- `{part.name}({ast.unparse(part.args)})`: {said(part) or 'see the notebook'}" for part in methods
        )
        + ("\n" if methods else "")
    )


def page(name: str, summary: str, notebook: Path, cells: list[str]) -> str:
    sections = [symbol(source, node) for source in cells for node in ast.parse(source).body]
    place = notebook.relative_to(ROOT).as_posix()
    source = f"From [{place}](../../{place}), where the reasons, examples and tests are. Written by `make export`."
    head = f"# fraud_pkg.{name}\n\n{summary}\n\n{source}\n"
    return "\n".join([head, *(section for section in sections if section)]).rstrip() + "\n"


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    pages, rows = {}, []
    order = {wing: place for place, wing in enumerate(WINGS)}
    for notebook in sorted(
        (ROOT / "nbs").rglob("*.ipynb"), key=lambda path: (order.get(path.parent.name, len(order)), path.name)
    ):
        name, summary, cells = exported(notebook)
        if name and cells and not name.endswith("__"):  # a package's own files define nothing
            pages[f"{name}.md"] = page(name, summary, notebook, cells)
            rows.append(f"| [{name}]({name}.md) | {summary.replace('|', chr(92) + '|')} |")
    head = (
        "# Reference\n\nEvery public name, wing by wing. Written by `make export` from the notebooks.\n\n"
        "| module | what it tells |\n|---|---|\n"
    )
    pages["README.md"] = head + "\n".join(rows) + "\n"
    for old in TARGET.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (TARGET / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
