"""The results of several benchmarks as one: benchmarks/results.json for programs, benchmarks/results.md for people.

`python benchmarks/table.py FILE...` takes what the benchmarks wrote with --json; a file that is not there was not measured, and says so."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from measure import markdown

HERE = Path(__file__).resolve().parent


def read(file: Path) -> dict:
    """A benchmark's machine and tables; raises `SystemExit` for a file that has none."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if not {"machine", "tables"} <= content.keys():
        sys.exit(f"error: {file.name}: expected machine and tables, as the programs in benchmarks/ write them with --json")
    return content


def together(files: Sequence[Path]) -> dict:
    """All tables of one machine; each note says the load at its benchmark's start."""
    found = [read(file) for file in files if file.is_file()]
    if not found:
        sys.exit("error: nothing was measured")
    machines = [{key: value for key, value in one["machine"].items() if key != "load"} for one in found]
    if any(one != machines[0] for one in machines):
        sys.exit("error: these results are of different machines: " + ", ".join(file.name for file in files if file.is_file()))
    tables = [table | {"note": f"{table['note']} Load at the start: {one['machine']['load']}."} for one in found for table in one["tables"]]
    return {"machine": machines[0], "tables": tables}


def rows(results: dict, title: str, start: str) -> list[list[str]]:
    """The rows of the tables whose title begins like this, that begin like this."""
    return [row for table in results["tables"] if table["title"].startswith(title) for row in table["rows"] if row[0].startswith(start)]


def headlines(results: dict) -> str:
    """The few lines that the README shows, as Markdown."""
    def first(cell: str) -> str:
        return cell.strip().split(" (")[0].split("  ")[0]

    def beside(start: str, *peers: str) -> tuple[str, ...]:
        found = rows(results, "Decisions", start)
        return first(found[0][1]), "; ".join(f"{peer}: {first(row[3])}" for peer in peers for row in found if row[2] == peer)

    def taken(title: str, start: str) -> str:
        [row] = rows(results, title, start)
        return f"{first(row[1])} s, {row[3]} GiB"

    features, training, stream = (next(table["title"] for table in results["tables"] if table["title"].startswith(start)) for start in ("Features of", "Training on", "The stream"))
    per_second = {name: first(rows(results, stream, start)[0][1]) for name, start in (("ours", "one consumer, memory"), ("peer", "peer: one HTTP"))}
    lines = [("a decision in process, request to answer", *beside("decision, all (7% alerts); memory", "mlflow pyfunc, same model, features given")),
             ("decisions over HTTP, 32 connections", *beside("HTTP, 32", "scikit-learn pipeline behind FastAPI", "FastAPI, a constant, request and answer typed")),
             ("Lambda, cold start", *beside("Lambda, cold", "scikit-learn pipeline in a handler")),
             ("the stream, one consumer", f"{per_second['ours']}/s", f"one HTTP request per message: {per_second['peer']}/s"),
             (features.lower(), taken(features, "engine `local`"), f"Polars: {taken(features, 'Polars')}; DuckDB: {taken(features, 'DuckDB')}"),
             ("the same on Spark", taken(features, "engine `spark`"), f"the common Spark script, without history: {taken(features, 'the common')}"),
             (training.lower(), taken(training, "ours"), f"`XGBClassifier.fit`: {taken(training, '`XGB')}")]
    return "\n".join(["| | here | beside it |", "|---|---|---|", *("| " + " | ".join(line) + " |" for line in lines)])


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    for file in files:
        if not file.is_file():
            print(f"{file.stem}: not measured", file=sys.stderr)
    results = together(files)
    of = results["machine"]
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    head = f"{of['processor']}, {of['cores']} cores, {of['memory_gib']} GiB, Python {of['python']}."
    (HERE / "results.md").write_text("\n\n".join([head, *map(markdown, results["tables"])]) + "\n", encoding="utf-8")
    print(headlines(results))


if __name__ == "__main__":
    main()
