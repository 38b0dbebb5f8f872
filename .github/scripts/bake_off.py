"""The table of the last bake-off as text, for a job's summary and for a comment."""

import json
from pathlib import Path

from fraud_pkg.model.bakeoff import bake_off_table

found = json.loads(Path("reports/bakeoff/bakeoff.json").read_text(encoding="utf-8"))
print(bake_off_table(found["rows"], found["champion"]).to_string())
