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


if __name__ == "__main__":
    main()
