"""The pages of the project: the README and other texts, the notebooks, reports of the last run, in one folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem .6rem; border: 1px solid #ccc }}
</style>
<body>
{body}
</body>
</html>
"""


def linked(html: str) -> str:
    """Links to notebooks and Markdown lead to their pages."""
    html = re.sub(r'href="((?!https?:)[^"#]*)README\.md', r'href="\1index.html', html)
    return re.sub(r'href="((?!https?:)[^"#]*)\.(?:ipynb|md)', r'href="\1.html', html)


def texts(site: Path) -> None:
    """Every Markdown file as a page; a README is its folder's index."""
    markdown = MarkdownIt("commonmark").enable("table")
    for source in sorted(
        [
            *ROOT.glob("*.md"),
            *(path for folder in ("docs", "benchmarks", "infra") for path in (ROOT / folder).rglob("*.md")),
        ]
    ):
        name = source.relative_to(ROOT)
        target = site / (name.parent / "index.html" if source.name == "README.md" else name.with_suffix(".html"))
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8")
        target.write_text(
            PAGE.format(title=text.splitlines()[0].lstrip("# "), body=linked(markdown.render(text))), encoding="utf-8"
        )
    shutil.copy(ROOT / "LICENSE", site)
    shutil.copytree(ROOT / "docs/pictures", site / "docs/pictures")


def notebooks(site: Path) -> None:
    """Every notebook of the package as a page."""
    sources = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "nbconvert",
            "--log-level",
            "ERROR",
            "--to",
            "html",
            "--output-dir",
            str(site / "nbs"),
            *map(str, sources),
        ],
        check=True,
    )
    for page in (site / "nbs").glob("*.html"):
        page.write_text(linked(page.read_text(encoding="utf-8")), encoding="utf-8")


def main(site: Path) -> None:
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    texts(site)
    notebooks(site)
    if (ROOT / "reports/index.html").exists():
        shutil.copytree(ROOT / "reports", site / "reports", ignore=shutil.ignore_patterns("README.md", "*.jsonl"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
