"""The promise of the live checks, on the simulator: two hundred days on which nothing changes, and few of them look
bad.
"""

import json
from pathlib import Path

import pytest

from fraud_pkg.core.policy import decide
from fraud_pkg.data.acquire import acquire
from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.features.table import build_features
from fraud_pkg.train.samples import Period, learn_words, load_sample, split_periods
from fraud_pkg.monitor.live import DecisionWindow, JudgedWindow, Reference, chance, judge_window, sum_up
from fraud_pkg.model.bakeoff import evaluate_contender
from fraud_pkg.train.samples import Periods
from fraud_pkg.core.settings import load_settings
from fraud_pkg.train.xgboost import train_xgboost

PROJECT = Path(__file__).resolve().parents[1]
LEARNED, WATCHED = 90, 200  # days


@pytest.fixture(scope="module")
def judged(tmp_path_factory, no_pictures) -> tuple[list[JudgedWindow], Reference]:
    """Daily windows after a champion's test period, in a world without drift."""
    given = {
        "simulate.rows": 1500 * (LEARNED + WATCHED),
        "simulate.days": LEARNED + WATCHED,
        "simulate.fraud_rate": 0.01,
        "features.engine": "local",
        "evaluate.resamples": 20,
        "xgboost.rounds": 80,
    }
    settings = load_settings(cli=given, file=PROJECT / "settings.ini", environ={}).model_copy(
        update={"root": tmp_path_factory.mktemp("calm")}
    )
    acquire(settings)
    made, folder = build_features(settings), settings.data_dir / "features"
    periods = split_periods(0, 24 * LEARNED - 1, settings.split, settings.contract.label_delay)
    words = learn_words(folder, periods["train"], made["features"])
    periods["gap"] = Period("gap", periods["validation"].end_step, periods["test"].first_step)
    samples = {name: load_sample(folder, period, made["features"], words) for name, period in periods.items()}
    data = json.loads((folder / "manifest.json").read_text())
    learned = Periods(
        **samples, data={key: data[key] for key in ("fingerprint", "rows", "source", "epoch", "contract")}
    )
    evaluate_contender(
        train_xgboost(learned.train, learned.validation, settings, tell=lambda line: None), learned, settings
    )
    bundle = load_bundle(settings.models_dir / "xgboost")
    reference = Reference(bundle, settings.monitor)
    live = load_sample(folder, Period("live", 24 * LEARNED, 24 * (LEARNED + WATCHED)), made["features"], words)
    p, x, day = bundle.probability(live.select(bundle.manifest.features)), live.select(reference.names), live.step // 24
    stopped = decide(p, live.amount, bundle.manifest.policy).stopped
    windows = [
        DecisionWindow(24 * d, 24 * d + 24, x[day == d], p[day == d], stopped[day == d], live.y[day == d] == 1)
        for d in range(LEARNED, LEARNED + WATCHED)
    ]
    return [judge_window(window, reference) for window in windows], reference


def test_bad_windows_are_as_rare_as_promised(judged):
    """Up to the 99 % bound of a count of chances with the promised rate."""
    windows, reference = judged
    rate = reference.monitor.false_alarm_rate
    for check in reference.checks:
        bad = [result.bad for window in windows if (result := window.result(check))]
        assert len(bad) >= 0.8 * WATCHED, (check, len(bad))
        bound = next(i for i in range(len(bad)) if chance(i + 1, len(bad), rate) < 0.01)
        assert sum(bad) <= bound, f"{check}: {sum(bad)} of {len(bad)} windows are bad; at most {bound} are promised"


def test_alarms_are_rarer_still(judged):
    """k of n: at most two days in a hundred have an alarm of any check."""
    windows, reference = judged
    looks = [windows[max(0, i + 1 - reference.monitor.of_windows) : i + 1] for i in range(WATCHED)]
    alarms = sum(any(sum_up(look, check).alarm for check in reference.checks.values()) for look in looks)
    assert alarms <= 0.02 * WATCHED, alarms
