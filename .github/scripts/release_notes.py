"""The section of CHANGELOG.md for a tag; an error unless pyproject.toml has the tag's version."""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def notes(tag: str, root: Path = ROOT) -> str:
    version = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    if tag != f"v{version}":
        sys.exit(f"error: the tag is {tag}, and pyproject.toml has version {version}; expected the tag v{version}")
    sections = re.split(r"^## ", (root / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for section in sections[1:]:
        title, _, body = section.partition("\n")
        if re.match(rf"\[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}$", title) and body.strip():
            return body.strip()
    sys.exit(f"error: CHANGELOG.md has no section `## [{version}] - YYYY-MM-DD` with something in it")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: release_notes.py vX.Y.Z")
    print(notes(sys.argv[1]))
