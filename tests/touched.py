"""What `make check` runs of the tests: the notebooks, and the quick test files, that a change touches.

usage: python tests/touched.py notebooks|tests [BASE]

A change is what differs from BASE (the point where the branch left origin/main, or else HEAD). It touches
a notebook that differs itself, and a quick test file that differs or that imports, directly or
not, a module that differs.
"""

import re
import subprocess
import sys
from pathlib import Path

from fraud_pkg.core.closure import imports_of, module_closure

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "fraud_pkg"
# They start no server that is not there anyway, and take a few seconds each.
QUICK = ("test_structure.py", "test_recorded_stream.py", "test_hub.py", "test_benchmarks.py")


def git(*arguments: str) -> list[str]:
    done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed(base: str | None) -> set[str]:
    """Files that differ from the base, those that git does not know yet included."""
    start = base or next(iter(git("merge-base", "HEAD", "origin/main")), "HEAD")
    return {*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")}


def reached(test: Path) -> set[str]:
    """The files of the package that a test file leads to."""
    return set(module_closure(imports_of(test.read_text(encoding="utf-8"), PACKAGE), PACKAGE))


def main(kind: str, base: str | None = None) -> None:
    files = changed(base)
    if kind == "notebooks":
        print(*sorted(file for file in files if re.fullmatch(r"nbs/.+\.ipynb", file) and (PROJECT / file).is_file()))
        return
    tests = [PROJECT / "tests" / name for name in QUICK]
    touched = [test for test in tests if f"tests/{test.name}" in files or reached(test) & files or "dvc.yaml" in files]
    print(*(test.relative_to(PROJECT).as_posix() for test in touched))


if __name__ == "__main__":
    main(*sys.argv[1:])
