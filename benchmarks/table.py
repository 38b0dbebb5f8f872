"""The results of several benchmarks as one: benchmarks/results.json for programs, benchmarks/results.md for people.

`python benchmarks/table.py FILE...` takes what the benchmarks wrote with --json; a file that is not there was not
measured, and says so. With --keep the tables that are there stay, where nothing new of their title came: every table
is of one run with its peers, and names its day and its machine.
"""

import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import markdown

HERE = Path(__file__).resolve().parent
SCALE = HERE.parent / "docs/scale.md"
SHOWN_THERE = ("What a payment costs", "What Redis keeps", "What so many payments a second need", "Growth")
BEGIN, END = "<!-- written by benchmarks/table.py -->", "<!-- end -->"


def read(file: Path) -> dict:
    """A benchmark's machine and tables; raises `SystemExit` for a file that has none."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not {"machine", "tables"} <= content.keys():
        sys.exit(
            f"error: {file.name}: expected machine and tables, as the programs in benchmarks/ write them with --json"
        )
    return content


def in_words(machine: dict) -> str:
    return f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, Python {machine['python']}"


def day(file: Path) -> str:
    """When a benchmark was done."""
    return datetime.date.fromtimestamp(file.stat().st_mtime).isoformat()


def together(files: Sequence[Path], before: dict | None = None) -> dict:
    """All tables of one machine, and those of `before` whose title is not there anew; each note says the machine, the
    day, and the load at its benchmark's start.
    """
    found = {file: read(file) for file in files if file.is_file()}
    if not found:
        sys.exit("error: nothing was measured")
    machines = [{key: value for key, value in one["machine"].items() if key != "load"} for one in found.values()]
    if any(one != machines[0] for one in machines):
        sys.exit(f"error: these results are of different machines: {', '.join(file.name for file in found)}")
    tables = [
        table
        | {"note": f"{table['note']} {in_words(machines[0])}, load at the start {one['machine']['load']}; {day(file)}."}
        for file, one in found.items()
        for table in one["tables"]
    ]
    if before:
        new = {table["title"]: table for table in tables}
        old = [new.pop(table["title"], table) for table in before["tables"]]
        tables = [*old, *new.values()]
    return {"machine": machines[0], "tables": tables}


# What the README shows: in words (empty: the table's title), the table, our row, and the peers: in a table of decisions
# by name, elsewhere with their rows.
DECISIONS = (
    ("a decision in process, request to answer", "decision, all", ("mlflow pyfunc, same model, features given",)),
    (
        "decisions over HTTP, 32 connections",
        "HTTP, 32",
        ("scikit-learn pipeline behind FastAPI", "FastAPI, a constant, request and answer typed"),
    ),
    ("Lambda, cold start", "Lambda, cold", ("scikit-learn pipeline in a handler",)),
)
OTHERS = (
    (
        "the stream, one consumer",
        "The stream",
        "one consumer, memory",
        {"one HTTP request per message": "peer: one HTTP"},
    ),
    ("", "Features of", "engine `local`", {"Polars": "Polars", "DuckDB": "DuckDB"}),
    ("the same on Spark", "Features of", "engine `spark`", {"the common Spark script, without history": "the common"}),
    ("", "Training on", "ours", {"`XGBClassifier.fit`": "`XGB"}),
    (
        "fifty rules with ten look-ups, added to a decision",
        "50 rules",
        "here",
        {"`eval` of the same in Python": "eval", "cel-python": "cel-python"},
    ),
)


def first(cell: str) -> str:
    """A cell's first figure."""
    return cell.strip().split(" (")[0].split("  ")[0]


def figure(table: dict, start: str) -> str:
    """What the row that begins like this says: transactions a second, microseconds, or seconds and memory."""
    row = next(row for row in table["rows"] if row[0].startswith(start))
    if table["title"] == "The stream":
        return f"{first(row[1])}/s"
    return f"{first(row[1])} us" if len(row) == 3 else f"{first(row[1])} s, {row[3]} GiB"


def headlines(results: dict) -> str:
    """The few lines that the README shows, as Markdown; of what was measured."""
    lines = []

    def line(what: str, ours: str, peers: dict[str, str]) -> None:
        lines.append(f"| {what} | {ours} | {'; '.join(f'{name}: {figure}' for name, figure in peers.items())} |")

    decisions = [row for table in results["tables"] if table["title"] == "Decisions" for row in table["rows"]]
    for what, start, peers in DECISIONS:
        if found := [row for row in decisions if row[0].startswith(start)]:
            theirs = {row[2]: first(row[3]) for row in found if row[0] == found[0][0]}
            line(what, first(found[0][1]), {name: theirs[name] for name in peers})
    for what, title, start, peers in OTHERS:
        for table in (one for one in results["tables"] if one["title"].startswith(title)):
            line(
                what or table["title"].lower(),
                figure(table, start),
                {name: figure(table, peer) for name, peer in peers.items()},
            )
    return "\n".join(["| | here | alternative |", "|---|---|---|", *lines])


def with_tables(page: str, results: dict) -> str:
    """The page, with the tables of `SHOWN_THERE` that were measured between its marks."""
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    shown = [markdown(table) for title in SHOWN_THERE for table in results["tables"] if table["title"] == title]
    return "\n\n".join([head + BEGIN, *shown, END + tail])


def detection(found: dict) -> str:
    """Two rows of handbook.json as the README shows them: the Handbook's recipe, and this project."""
    lines = ["| | average precision | AUC ROC | card precision, 100 a day |", "|---|---|---|---|"]
    rows = {row["name"]: row for row in found["rows"]}
    for name, label in (("recipe", "the Handbook's recipe with XGBoost"), ("ours", "here")):
        figures = [rows[name][measure] for measure in ("average_precision", "auc_roc", "card_precision_100")]
        cells = [f"{figure['mean']:.3f} ± {figure['std']:.3f}" for figure in figures]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    gain = rows["ours"]["gain"]
    difference = f"{gain['mean']:.3f}, 95 % [{gain['low']:.3f}, {gain['high']:.3f}]"
    return "\n".join(
        [*lines, "", f"The difference in average precision: {difference}, over {len(found['folds'])} folds."]
    )


def main() -> None:
    keep = "--keep" in sys.argv
    files = [Path(name) for name in sys.argv[1:] if name != "--keep"]
    for file in files:
        if not file.is_file():
            print(f"{file.stem}: not measured", file=sys.stderr)
    results = together(files, json.loads((HERE / "results.json").read_text(encoding="utf-8")) if keep else None)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    head = "Each table is of one run with its peers; below it are its machine and its day."
    (HERE / "results.md").write_text("\n\n".join([head, *map(markdown, results["tables"])]) + "\n", encoding="utf-8")
    SCALE.write_text(with_tables(SCALE.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(headlines(results))


if __name__ == "__main__":
    main()
