"""What texts quote of a run: `make pictures` writes docs/run.json, `make export` puts its figures where they are
quoted, and draws the README's badges from pyproject.toml.
"""

import contextlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs/run.json"
HURRY = ROOT / "docs/hurry.json"  # of the tour's run in a hurry
PICTURES = ROOT / "docs/pictures"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def record(
    folder: Path, machine: dict[str, Any], example: dict[str, Any], tour: list[dict[str, Any]]
) -> dict[str, Any]:
    """The last whole run of the project in `folder`; `example` is what its service answers to docs/decide.md's payment,
    `tour` what it answers to those of docs/tour.md. Raises SystemExit unless that run did every job.
    """
    from fraud_pkg.cli.pipeline import _show_bake_off, _show_champion, _show_run
    from fraud_pkg.core.settings import load_settings
    from fraud_pkg.pipeline.run import Run

    settings = load_settings(environ={}, file=folder / "settings.ini")
    lines = (folder / "reports/history.jsonl").read_text(encoding="utf-8").splitlines()
    run = Run.model_validate_json(lines[-1])
    if run.error or any(job.status != "done" for job in run.jobs):
        sys.exit(f"error: {folder}: its last run did not do every job; make one anew: make clean run")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        _show_run(run)
        _show_bake_off(settings)
        _show_champion(run, settings)
    bake_off = json.loads((folder / "reports/bakeoff/bakeoff.json").read_text(encoding="utf-8"))
    features = json.loads((folder / "models/champion/manifest.json").read_text(encoding="utf-8"))["features"]
    return {
        "started": run.started,
        "machine": {key: machine[key] for key in ("processor", "cores", "memory_gib", "python")},
        "seconds": round(run.seconds, 1),
        "jobs": [
            {"job": job.job, "seconds": round(job.seconds or 0, 1), "peak_memory_mb": job.peak_memory_mb}
            for job in run.jobs
        ],
        "champion": run.champion,
        "features": len(features),
        "contenders": {row["name"]: row["metrics"] for row in bake_off["rows"]},
        "end": shown.getvalue().replace(f"{folder}/", "").splitlines(),
        "example": example,
        "tour": [{key: said[key] for key in ("transaction_id", "decision", "fraud_probability")} for said in tour],
    }


def hurried(whole: dict[str, Any]) -> dict[str, Any]:
    """Of a record what the tour quotes of its run in a hurry."""
    kept = ("started", "machine", "seconds", "jobs", "champion", "tour")
    contenders = {name: whole["contenders"][name] for name in ("plain_xgboost", "xgboost")}
    return {**{key: whole[key] for key in kept}, "contenders": contenders}


def minutes(run: dict[str, Any]) -> str:
    return NUMBERS[max(1, round(run["seconds"] / 60))]


def table(run: dict[str, Any]) -> str:
    """The bake-off as `fraud run` prints it, without its title and its rule."""
    first = next(place for place, line in enumerate(run["end"]) if line.strip().startswith("contender"))
    rows = [run["end"][first], *run["end"][first + 2 :]]
    return "\n".join(row.strip() for row in rows[: rows.index("")])


def share(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: f"{run['contenders'][name]['money_saved_share']['value']:.1%}".replace("%", " %")


def precision(name: str) -> Callable[[dict[str, Any]], str]:
    from fraud_pkg.model.bakeoff import interval

    return lambda run: interval(run["contenders"][name]["average_precision"])


def saved(name: str) -> Callable[[dict[str, Any]], str]:
    """Money saved in whole per cent, with its interval."""

    def text(run: dict[str, Any]) -> str:
        value, low, high = (
            f"{100 * run['contenders'][name]['money_saved_share'][key]:.0f}" for key in ("value", "low", "high")
        )
        return f"{value} % ({low} to {high} %)"

    return text


def load(run: dict[str, Any]) -> str:
    """The champion's reviews and blocks a day."""
    champion = run["contenders"]["xgboost"]
    return f"{champion['reviews_per_day']:.0f} reviews and {champion['blocks_per_day']:.0f} blocks"


def answer(run: dict[str, Any]) -> str:
    """The example's answer, wrapped as the page shows it."""
    lines, width = [""], 118
    for part in json.dumps(run["example"]).split(", "):
        more = f"{lines[-1]}, {part}" if lines[-1] else part
        lines = [*lines[:-1], more] if len(more) <= width else [*lines[:-1], lines[-1] + ",", f" {part}"]
    return "\n".join(lines)


def tour(run: dict[str, Any]) -> str:
    """Each payment of the tour, what was decided, and its probability of fraud."""
    return "\n".join(
        f"{said['transaction_id']}  {said['decision']:6}  {said['fraud_probability']:8.4%}" for said in run["tour"]
    )


Quoted = tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...]

# Where a text quotes the run: its file, a pattern whose group is the quotation (spaces: any white space), what it is.
QUOTED: Quoted = (
    ("nbs/index.ipynb", r"```text\n(contender [^`]*?)\n```", table),
    ("nbs/index.ipynb", r"computes (\d+) features of each", lambda run: str(run["features"])),
    ("nbs/index.ipynb", r"about (\w+) minutes on two cores", minutes),
    ("docs/tour.md", r"About (\w+) minutes on two cores", minutes),
    (
        "docs/tour.md",
        r"\(the whole run's has (\d+)\)",
        lambda run: str(run["contenders"]["xgboost"]["frauds"]),
    ),
    ("docs/tour.md", r"whole run that gives\n\n```text\n([^`]*?)\n```", tour),
    ("docs/decide.md", r"```json\n(\{\"transaction_id\": \"a-1001\", \"fraud_probability\"[^`]*?)\n```", answer),
    ("docs/decisions/contenders.md", r"on the default simulation it has (0\.\d+ \[[^]]*\])", precision("blend")),
    ("docs/decisions/contenders.md", r"on test and saves ([\d.]+ %)", share("blend")),
    ("docs/decisions/contenders.md", r"%, the trees (0\.\d+ \[[^]]*\])", precision("xgboost")),
    ("docs/decisions/contenders.md", r"%, the trees 0\.\d+ \[[^]]*\] and ([\d.]+ %)", share("xgboost")),
)


# The same of the tour's run in a hurry.
QUOTED_HURRY: Quoted = (
    ("docs/tour.md", r"Its test period has (\d+) frauds", lambda run: str(run["contenders"]["xgboost"]["frauds"])),
    ("docs/tour.md", r"the champion saves (-?\d+ % \(-?\d+ to \d+ %\))", saved("xgboost")),
    ("docs/tour.md", r"plain XGBoost saves (-?\d+ % \(-?\d+ to \d+ %\))", saved("plain_xgboost")),
    ("docs/tour.md", r"with (\d+ reviews and \d+ blocks) a day", load),
    (
        "docs/tour.md",
        r"seen more frauds, they get ([a-z, ]+)\)",
        lambda run: ", ".join(said["decision"] for said in run["tour"]),
    ),
)


def quoted(pattern: str, text: str) -> re.Match[str] | None:
    return re.search(pattern.replace(" ", r"\s"), text)


def corrected(text: str, pattern: str, value: str) -> str:
    """The text with the quotation as the run has it; the same words stay, however their lines are broken."""
    match = quoted(pattern, text)
    if match is None or match[1].split() == value.split():
        return text
    return text[: match.start(1)] + value + text[match.end(1) :]


def cells_of(file: str, text: str) -> list[str]:
    """The pieces that are searched: a text as a whole, a notebook's cells."""
    return ["".join(cell["source"]) for cell in json.loads(text)["cells"]] if file.endswith(".ipynb") else [text]


def stale(run: dict[str, Any], quotations: Quoted = QUOTED, record: Path = RECORD) -> list[str]:
    """Quotations that are not what the run says, and places that are gone."""
    faults = []
    for file, pattern, value in quotations:
        cells = cells_of(file, (ROOT / file).read_text(encoding="utf-8"))
        if not any(quoted(pattern, cell) for cell in cells):
            faults.append(f"{file}: the place that quotes the run is gone: {pattern}; mend QUOTED in docs/record.py")
        if any(corrected(cell, pattern, value(run)) != cell for cell in cells):
            faults.append(f"{file}: is not what docs/{record.name} says: {pattern}: {value(run)}")
    return faults


def fill(run: dict[str, Any], quotations: Quoted = QUOTED) -> None:
    """Puts the run's figures where they are quoted."""
    for file, pattern, value in quotations:
        path = ROOT / file
        text = path.read_text(encoding="utf-8")
        if file.endswith(".ipynb"):
            notebook = json.loads(text)
            for cell in notebook["cells"]:
                source = corrected("".join(cell["source"]), pattern, value(run))
                cell["source"] = source.splitlines(keepends=True)
            text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        else:
            text = corrected(text, pattern, value(run))
        path.write_text(text, encoding="utf-8")


BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}: {value}">
<title>{label}: {value}</title>
<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath>
<g clip-path="url(#r)"><rect width="{left}" height="20" fill="#3d444d"/>\
<rect x="{left}" width="{right}" height="20" fill="#0f766e"/></g>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{middle}" y="14" textLength="{label_width}">{label}</text>
<text x="{middle_right}" y="14" textLength="{value_width}">{value}</text></g></svg>
"""


def badge(label: str, value: str) -> str:
    label_width, value_width = (round(6.6 * len(text)) for text in (label, value))
    left, right = label_width + 12, value_width + 12
    return BADGE.format(
        label=label, value=value, label_width=label_width, value_width=value_width, left=left, right=right,
        width=left + right, middle=left / 2, middle_right=left + right / 2,
    )  # fmt: skip


def badges() -> dict[str, str]:
    """What pyproject.toml says of licence and Python, as pictures that need no other host."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = (int(minor) for minor in re.findall(r"3\.(\d+)", project["requires-python"]))
    pythons = " | ".join(f"3.{minor}" for minor in range(low, high))
    licence = project["license"].replace("-", " ")
    return {"badge-licence.svg": badge("licence", licence), "badge-python.svg": badge("Python", pythons)}


def main() -> None:
    for file, quotations in ((RECORD, QUOTED), (HURRY, QUOTED_HURRY)):
        run = json.loads(file.read_text(encoding="utf-8"))
        fill(run, quotations)
        if faults := stale(run, quotations, file):
            sys.exit("error: " + "\n".join(faults))
    for name, svg in badges().items():
        (PICTURES / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
