"""The whole pipeline on a small simulation, through the command line, as a user runs it."""

import hashlib
import re

import pyarrow.parquet as pq
import pytest

from fraud_pkg.model.bundle import load_bundle

JOBS = ["acquire", "features", "train_xgboost", "train_tensorflow", "blend", "promote", "monitor", "report"]


def hashes(folder) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_first_run_does_everything(finished):
    assert finished.states() == dict.fromkeys(JOBS, "done")
    for file in ["reports/index.html", "reports/monitor/drift.html", *(f"reports/jobs/{job}.html" for job in JOBS)]:
        assert (finished.root / file).stat().st_size > 1000, file
    champion = load_bundle(finished.root / "models/champion").manifest
    assert champion.version in finished.printed and "index.html" in finished.printed and "Bake-off" in finished.printed


def test_bake_off_shows_baselines_and_intervals(finished):
    rows = {
        row["name"]: row["metrics"]["average_precision"]
        for row in finished.json("reports/bakeoff/bakeoff.json")["rows"]
    }
    assert {"rule", "plain_xgboost", "xgboost", "xgboost_without_history", "tensorflow", "blend"} <= rows.keys()
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows.values())
    assert rows["xgboost"]["low"] > rows["rule"]["high"]


def test_test_period_is_later_and_unseen(finished):
    periods = load_bundle(finished.root / "models/champion").manifest.data["periods"]
    (train,), (validation,), (test,) = periods["train"], periods["validation"], periods["test"]  # first and last step
    assert train[0] < train[1] < validation[0] < validation[1] < test[0] < test[1]
    assert validation[1] + 7 * 24 < test[0]


def test_second_run_is_cached(finished):
    finished.fraud("run")
    assert finished.states() == dict.fromkeys(JOBS, "cached")
    assert finished.last_run()["seconds"] < 60


@pytest.mark.long(reason="a second pipeline; nbs/features/07_table compares the engines' files, byte for byte")
def test_engines_and_repetition_give_the_same_champion(finished, workspace):
    again = workspace(features__engine="spark", pipeline__push="false")
    again.fraud("run", "--job", "promote")
    assert hashes(again.root / "data/features") == hashes(finished.root / "data/features")
    for model in ("xgboost", "tensorflow", "blend", "champion"):
        first, second = (load_bundle(space.root / "models" / model).manifest.version for space in (finished, again))
        assert first == second, model


def test_what_a_run_would_do(finished, workspace):
    """Said without running anything: of another contender's settings, and where nothing was run."""
    before = (finished.root / "params.json").read_bytes()

    def said(space, **overrides) -> dict[str, str]:
        lines = space.fraud("run", "--dry-run", **overrides).stdout.splitlines()
        found = [re.match(r"\s*(\w+) +(cached|runs|may run)\b", line) for line in lines]
        return {match[1]: match[2] for match in found if match}

    assert said(finished, train__ablation="false", xgboost__rounds=20) == dict.fromkeys(JOBS, "may run") | {
        "acquire": "cached",
        "features": "cached",
        "train_xgboost": "runs",
        "train_tensorflow": "cached",
        "promote": "runs",
    }
    assert said(workspace()) == dict.fromkeys(JOBS, "runs")
    assert (finished.root / "params.json").read_bytes() == before
    assert "none yet" in workspace().fraud("status").stdout


@pytest.mark.long(reason="a training more; test_what_a_run_would_do asks the same of the plan")
def test_changed_training_does_not_touch_features(finished):
    """Nor the contender that it does not concern."""
    before = finished.json("data/features/manifest.json")
    finished.fraud("run", "--job", "promote", train__ablation="false", xgboost__rounds=20)
    assert finished.states() == {
        "acquire": "cached",
        "features": "cached",
        "train_xgboost": "done",
        "train_tensorflow": "cached",
        "blend": "done",
        "promote": "done",
        "monitor": "not run",
        "report": "not run",
    }
    assert finished.json("data/features/manifest.json") == before


def test_lineage_leads_from_champion_to_data(finished):
    shown = finished.fraud("models", "show").stdout
    manifest = load_bundle(finished.root / "models/champion").manifest
    for part in (manifest.version, manifest.data["fingerprint"], manifest.code_revision):
        assert part in shown


def test_same_data_and_settings_same_raw_version(finished):
    raw = finished.json("data/raw/manifest.json")
    table = pq.read_table(finished.root / "data/raw" / raw["file"])
    assert raw["rows"] == len(table) == 60_000
    assert raw["file"].startswith(raw["version"])
