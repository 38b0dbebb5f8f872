"""The site of the docs, in site/: texts, notebooks and the sources that they name as pages, drawn by Zensical from a
folder of Markdown that is made here. `make docs`. It opens from disk, and asks nobody for anything.
"""

import base64
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import http_api
import typer
from nbconvert import MarkdownExporter
from typer.cli import get_docs_for_click

from fraud_pkg.cli import app

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / ".docs"  # what is made on the way, and Mermaid
# What pages run and Zensical would have them load from a CDN: package, version, its archive's SHA-512, file, name here.
MERMAID = (
    "mermaid", "12.3.0",
    "4113TdXeLAsMruJ79OpFL5O8+LTFXhQqZ260rF3tgUmiNAtRm4Uume04I+65PRN6yZ69J4f8rVYWW8zRk65UYw==",
    "dist/mermaid.min.js", "mermaid.js",
)  # fmt: skip
WORKER = (
    "iframe-worker", "1.0.4",
    "roeaaI+Lg1LJNfgpCjoRe/+WzEjy9+Z08LoEvu85MCPbBjwm+qXz8Ag5U05lHa6V1CysZyGzE0SOkAtSUA5q7Q==",
    "shim/index.js", "worker.js",
)  # fmt: skip
WORKER_ADDRESS = "https://unpkg.com/iframe-worker/shim"  # lets pages from disk search
WINGS = runpy.run_path(str(ROOT / "docs/reference.py"))["WINGS"]
TEXTS = ("*.md", "docs/**/*.md", "benchmarks/*.md", "infra/**/*.md", "nbs/explore/*.md", "reports/README.md")
NOTEBOOKS = ("nbs/*/*.ipynb", "jobs/*.ipynb")
LINK = re.compile(r"""\]\(\s*(?P<plain>[^)\s]+)(?=[)\s])|(?:href|src)="(?P<html>[^"]+)\"""")
Nav = list[dict[str, "str | Nav"]]


class SiteError(Exception):
    """What keeps the site from being built, with its place."""


def pages() -> dict[str, str]:
    """From a file of the project to its page, both as paths from the top: texts and notebooks; a README is its folder's
    index.
    """
    found = [path for pattern in (*TEXTS, *NOTEBOOKS) for path in ROOT.glob(pattern)]
    names = sorted({path.relative_to(ROOT).as_posix() for path in found if ".ipynb_checkpoints" not in path.parts})
    return {name: re.sub(r"(^|/)README\.md$", r"\1index.md", re.sub(r"\.ipynb$", ".md", name)) for name in names}


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` made of what is neither in a fence nor between backticks."""
    parts = re.split(r"(^ *```.*?^ *```[^\n]*$|`[^`\n]+`)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if place % 2 else change(part) for place, part in enumerate(parts))


def regular(text: str) -> str:
    """GitHub's Markdown as Python-Markdown reads it: an empty line before a list, and four spaces for each level."""
    lines: list[str] = []
    levels: list[int] = []  # where the text of each open list item begins
    fence = False
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        item = re.match(r" *(?:[-*+]|\d+\.) +(?=\S)", line)
        if line.strip() and not fence:
            while levels and indent < levels[-1]:
                levels.pop()
        depth = len(levels)
        before = levels[-1] if levels else 0
        if item and not fence:
            previous = lines[-1] if lines else ""
            if not depth and previous.strip() and not re.match(r" *(?:[-*+]|\d+\.) ", previous) and previous[0] != " ":
                lines.append("")
            levels.append(len(item.group()))
        if line.lstrip().startswith("```"):
            fence = not fence
        lines.append("    " * depth + line[min(before, indent) :] if line.strip() else "")
    return "\n".join(lines) + "\n"


def relative(target: str, page: str) -> str:
    """The way from one page to another file of the site."""
    return PurePosixPath(os.path.relpath(target, os.path.dirname(page) or ".")).as_posix()


class Sources:
    """Pages for files and folders that texts link to and that are no pages themselves."""

    def __init__(self, known: dict[str, str]):
        self.known = known
        self.made: set[str] = set()  # pages
        self.copied: set[str] = set()  # pictures

    def page(self, name: str) -> str:
        """Where the site has the file or folder `name`, which exists."""
        path = ROOT / name
        if path.is_dir():
            name = next(
                (f"{name}/{index}" for index in ("README.md", "index.md") if f"{name}/{index}" in self.known), name
            )
        if name in self.known:
            return self.known[name]
        if path.suffix in {".png", ".webp", ".svg"} and path.is_file():
            self.copied.add(name)
            return name
        target = f"source/{name}.md"
        if name not in self.made:
            self.made.add(name)
            (WORK / "pages" / target).parent.mkdir(parents=True, exist_ok=True)
            (WORK / "pages" / target).write_text(
                self.listing(name) if path.is_dir() else source(path), encoding="utf-8"
            )
        return target

    def listing(self, name: str) -> str:
        """A folder as a page: its files, with links to those that are pages."""
        tracked = subprocess.run(
            ["git", "ls-files", "-z", "--", name], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\0")
        rows = []
        for file in filter(None, tracked):
            shown = f"`{file.removeprefix(name + '/')}`"
            target = self.known.get(file)
            rows.append(f"- [{shown}]({relative(target, f'source/{name}.md')})" if target else f"- {shown}")
        return "\n".join([f"# {name}/", "", *rows, ""])


def source(path: Path) -> str:
    """A file as a page."""
    kind = {".yml": "yaml", ".tf": "hcl", "": "text"}.get(path.suffix, path.suffix[1:])
    kind = {"Dockerfile": "docker", "Makefile": "make"}.get(path.name.split(".")[0], kind)
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8").rstrip()
    return f"---\nsearch:\n  exclude: true\n---\n\n# {path.name}\n\n`{name}`\n\n````` {kind}\n{text}\n`````\n"


def target_of(address: str, name: str) -> str | None:
    """The file or folder of the project that a link in the file `name` leads to, which may not exist; None for a link
    to elsewhere, within the page, or to what the page brings along.
    """
    parts = urlsplit(address)
    if parts.scheme or parts.netloc or not parts.path or parts.path.startswith(f"{Path(name).stem}_files/"):
        return None
    return os.path.normpath(os.path.join(os.path.dirname(name), unquote(parts.path)))


def dead_links(text: str, name: str) -> list[str]:
    """Links in the text of the file `name` to files that the project does not have."""
    found: list[str] = []

    def look(part: str) -> str:
        for match in LINK.finditer(part):
            target = target_of(address := match["plain"] or match["html"], name)
            if target is not None and (target.startswith("..") or not (ROOT / target).exists()):
                found.append(f"{name}: {address}: there is no {target}")
        return part

    outside_code(text, look)
    return found


def linked(text: str, name: str, page: str, sources: Sources) -> str:
    """Links of the file `name` as its page has them."""

    def change(match: re.Match[str]) -> str:
        address = match["plain"] or match["html"]
        file = target_of(address, name)
        if file is None:
            return match.group()
        target = relative(sources.page(file), page)
        if match["html"] and target.endswith(".md"):
            target = target.removesuffix(".md") + ".html"  # Zensical changes only what Markdown wrote
        if fragment := urlsplit(address).fragment:
            target += f"#{fragment}"
        head, _, tail = match.group().partition(address)
        return head.rstrip() + target + tail

    return outside_code(text, lambda part: LINK.sub(change, part))


def notebook(path: Path, target: Path) -> str:
    """A notebook as Markdown; its pictures beside it."""
    exporter = MarkdownExporter(template_file=str(HERE / "notebook.md.j2"))
    exporter.register_filter("without_directives", lambda code: re.sub(r"(?m)^#\|.*\n", "", code).strip("\n"))
    text, resources = exporter.from_filename(str(path), resources={"output_files_dir": f"{path.stem}_files"})
    for name, data in resources["outputs"].items():
        (target.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (target.parent / name).write_bytes(data)
    text = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\.html(?:#[^)]*)?\)", r"\1", text)  # a job's links within the report
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = re.search(r"^#\| default_exp (\S+)", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    name = found[1] if found else ""
    if (ROOT / f"docs/reference/{name}.md").exists():
        note = f"*Exported to `fraud_pkg.{name}`: [every public name](../../docs/reference/{name}.md).*"
        text = re.sub(r"\A\s*(# .+\n(?:\s*>.*\n)*)", lambda match: f"{match[1]}\n{note}\n", text)
    return re.sub(r"\n{3,}", "\n\n", text)


def settings_page() -> str:
    """Every setting: the file itself, section by section."""
    parts = ["# Settings", "", "Every section of `settings.ini`, as it is shipped; `fraud settings` prints what holds."]
    for block in re.split(r"(?m)^(?=\[)", (ROOT / "settings.ini").read_text(encoding="utf-8")):
        if head := re.match(r"\[(\w+)\]", block):
            parts += ["", f"## {head[1]}", "", "```ini", block.rstrip(), "```"]
    return "\n".join(parts) + "\n"


def commands_page() -> str:
    """Every command with its options, as `fraud COMMAND --help` says it."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="fraud")
    text = get_docs_for_click(obj=command, ctx=context, name="fraud")
    text = re.sub(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n?", "", text)  # cut off after some words; each follows below
    return re.sub(r"\A# `?fraud`?", "# All commands", text)


def title(page: str) -> str:
    """A page's first heading, as the navigation shows it."""
    text = (WORK / "pages" / page).read_text(encoding="utf-8")
    head = re.search(r"^# +(.+)$", text, re.MULTILINE)
    if head is None:
        raise SiteError(f"{page}: no heading")
    if head is None:
        raise SiteError(f"{page}: no heading")
    return re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", lambda match: match[1] or "", head[1]).strip()


def named(*names: str) -> Nav:
    return [{title(name): name} for name in names]


def navigation(known: dict[str, str], reports: bool) -> Nav:
    """What stands where: Diátaxis' four, and beside them benchmarks, security and the report of the last run."""
    made = sorted(known.values())

    def under(folder: str, *left_out: str) -> list[str]:
        return [page for page in made if page.startswith(folder + "/") and page not in left_out]

    decisions = re.findall(r"\]\(([\w-]+)\.md\)", (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8"))
    modules = {wing: [page for page in made if re.match(rf"docs/reference/{wing}\.", page)] for wing in WINGS}
    how_to = under("docs/howto", "docs/howto/index.md", "docs/howto/own-data.md", "docs/howto/security-review.md")
    tabs: Nav = [
        {"Home": "index.md"},
        {
            "Tutorials": [
                *named("docs/tour.md", "docs/howto/own-data.md"),
                {
                    "Exploration": [
                        {"All of it": "nbs/explore/index.md"},
                        *named(*under("nbs/explore", "nbs/explore/index.md")),
                    ]
                },
            ]
        },
        {
            "How-to": [
                {"Guides": "docs/howto/index.md"},
                {"Decide": named("docs/decide.md", "docs/stream.md", "docs/console.md", "docs/kubernetes.md")},
                {"Operate": named("docs/monitoring.md", "docs/runbooks.md")},
                {"More": named(*how_to)},
                {"The project": named("CONTRIBUTING.md", "docs/releasing.md", *under("infra"), "CHANGELOG.md")},
            ]
        },
        {
            "Explanation": [
                *named("docs/architecture.md"),
                {
                    "Decisions": [
                        {"All decisions": "docs/decisions/index.md"},
                        *named(*(f"docs/decisions/{name}.md" for name in decisions)),
                    ]
                },
                {"Library": [{wing: named(*under(f"nbs/{wing}"))} for wing in WINGS]},
                {"Jobs": named(*under("jobs"))},
            ]
        },
        {
            "Reference": [
                {"Everyday commands": "docs/commands.md"},
                *named("docs/all-commands.md", "docs/settings.md", "docs/http-api.md"),
                {
                    "Python": [
                        {"All modules": "docs/reference/index.md"},
                        *({wing: named(*modules[wing])} for wing in WINGS),
                    ]
                },
            ]
        },
        {"Benchmarks": [*named("benchmarks/index.md"), {"Results": "benchmarks/results.md"}]},
        {
            "Security": named(
                "SECURITY.md", "docs/threat-model.md", "docs/howto/security-review.md", "docs/eu-ai-act.md"
            )
        },
    ]
    return tabs + ([{"Report": "reports/index.html"}] if reports else [])


def toml(value: object) -> str:
    """A value of the navigation, written as TOML."""
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return (
            "{ "
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {toml(part)}" for key, part in value.items())
            + " }"
        )
    return json.dumps(value, ensure_ascii=False)


def packaged(package: str, version: str, digest: str, file: str, name: str) -> Path:
    """One file of an npm package, whose archive has this hash; kept for the next time."""
    kept = WORK / "packages" / version / name
    if not kept.is_file():
        if not shutil.which("npm"):
            raise SiteError("npm brings what draws the diagrams, and is not installed: sudo apt-get install npm")
        kept.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package}@{version}"]
        done = subprocess.run(command, cwd=kept.parent, capture_output=True, text=True)
        if done.returncode:
            raise SiteError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        archive = kept.parent / f"{package}-{version}.tgz"
        found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
        if found != digest:
            raise SiteError(f"{package} {version}: not the archive whose hash is in {Path(__file__).name}: {found}")
        with tarfile.open(archive) as opened:
            member = opened.extractfile(f"package/{file}")
            assert member is not None
            kept.write_bytes(member.read())
        archive.unlink()
    return kept


class Page(HTMLParser):
    """What a page links to, and the places in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.loaded: set[str] = set()  # what a browser fetches by itself
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value for key, value in attrs if value}
        self.links += [given[key] for key in ("href", "src") if key in given]
        self.places.update(given[key] for key in ("id", "name") if key in given)
        if "src" in given or (tag == "link" and given.get("rel") not in ("canonical", "prev", "next")):
            self.loaded.add(given.get("src") or given.get("href", ""))


def broken(site: Path) -> Iterator[str]:
    """Links of the site's pages that lead nowhere, and what pages would load from elsewhere."""
    found = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    for path, page in found.items():
        place = path.relative_to(site).as_posix()
        if place.startswith("reports/") or place == "404.html":  # not ours; and shown at every address
            continue
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    yield f"{place}: {link}: would be loaded from elsewhere"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                yield f"{place}: {link}: no such file"
            elif parts.fragment and target in found and unquote(parts.fragment) not in found[target].places:
                yield f"{place}: {link}: no such place in the page"


def write_pages() -> dict[str, str]:
    """The Markdown of every page, under .docs/pages; from files to pages."""
    folder = WORK / "pages"
    shutil.rmtree(folder, ignore_errors=True)
    known = pages()
    sources = Sources(known)
    faults: list[str] = []
    for name, page in known.items():
        target = folder / page
        target.parent.mkdir(parents=True, exist_ok=True)
        text = notebook(ROOT / name, target) if name.endswith(".ipynb") else (ROOT / name).read_text(encoding="utf-8")
        if dead := dead_links(text, name):
            faults += dead
            continue
        target.write_text(regular(linked(text, name, page, sources)), encoding="utf-8")
    if faults:
        raise SiteError("\n".join(faults))
    for name, text in {
        "all-commands": commands_page(),
        "settings": settings_page(),
        "http-api": http_api.page(),
    }.items():
        (folder / f"docs/{name}.md").write_text(text, encoding="utf-8")
    for name in sources.copied:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(HERE / "assets", folder / "assets")
    shutil.copytree(HERE / "overrides", WORK / "overrides", dirs_exist_ok=True)
    for package in (MERMAID, WORKER):
        shutil.copy(packaged(*package), folder / "assets")
    return known


def main(site: Path) -> None:
    if site.exists() and not (site / "index.html").is_file() and any(site.iterdir()):
        raise SiteError(f"{site}: is not empty, and no site that could be made anew")
    known = write_pages()
    reports = (ROOT / "reports/index.html").is_file()
    config = (HERE / "zensical.toml").read_text(encoding="utf-8")
    config = config.replace("nav = []", f"nav = {toml(navigation(known, reports))}")
    (WORK / "zensical.toml").write_text(config, encoding="utf-8")
    made = WORK / "site"
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", "zensical.toml"]
    done = subprocess.run(command, cwd=WORK, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    if done.returncode:
        plain = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
        raise SiteError(f"zensical: {plain.partition('Traceback')[0]}")
    for path in made.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        here = os.path.relpath(made / "assets/worker.js", path.parent)
        path.write_text(text.replace(WORKER_ADDRESS, here), encoding="utf-8")
    if reports:
        left_out = shutil.ignore_patterns("README.md", "*.jsonl")
        shutil.copytree(ROOT / "reports", made / "reports", ignore=left_out, dirs_exist_ok=True)
    if faults := list(broken(made)):
        raise SiteError("\n".join(faults))
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(made, site)
    print(f"{site}/index.html: {len(list(site.rglob('*.html')))} pages")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site").resolve())
    except SiteError as error:
        sys.exit(f"error: {error}")
