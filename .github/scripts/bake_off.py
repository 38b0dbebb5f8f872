"""The table of the last bake-off as text, for a job's summary and for a comment."""

from pathlib import Path

from fraud_pkg.model.bakeoff import BakeOffReport, bake_off_table

report = BakeOffReport.model_validate_json(
    Path("reports/bakeoff/bakeoff.json").read_text(encoding="utf-8"), extra="ignore"
)
print(bake_off_table(report.rows, report.champion).to_string())
