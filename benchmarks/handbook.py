"""The pipeline on the card transactions of the Fraud Detection Handbook, by the Handbook's own protocol, beside its
recipe in the same run. What is measured: benchmarks/README.md.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import xgboost
from scipy import stats
from scipy.special import logit
from serving import HERE, say

from fraud_pkg.data.acquire import acquire
from fraud_pkg.model.bundle import Model
from fraud_pkg.features.table import build_features
from fraud_pkg.core.calibration import fit_calibration
from fraud_pkg.core.cost import Payments, solve_prices
from fraud_pkg.core.policy import decide
from fraud_pkg.train.metrics import average_precision, calibration_curve, daily_alerts, days_in, evaluate, roc_auc
from fraud_pkg.train.samples import Period, Sample, Trained, concat, learn_words, load_sample
from fraud_pkg.core.contract import DEFAULT_ENTITIES
from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.train.xgboost import boost, matrices, train_xgboost

COLUMNS = {
    "transaction_id": "TRANSACTION_ID",
    "timestamp": "TX_DATETIME",
    "sender": "CUSTOMER_ID",
    "receiver": "TERMINAL_ID",
    "amount": "TX_AMOUNT",
    "is_fraud": "TX_FRAUD",
    "scenario": "TX_FRAUD_SCENARIO",
}
DELAY, TEST, INNER = (
    7,
    7,
    2,
)  # days: until labels are known, of the test period, at the end of training that early stopping looks at
PUBLISHED = {
    "published: XGBoost": {
        "auc_roc": (0.871, 0.01),
        "average_precision": (0.687, 0.01),
        "card_precision_100": (0.302, 0.01),
    },  # of later folds, which are not given here
    "published: random forest": {
        "auc_roc": (0.87, None),
        "average_precision": (0.678, None),
        "card_precision_100": (0.299, None),
    },
}
METRICS = ("auc_roc", "average_precision", "card_precision_100")
# Chapter 3 of the Handbook: amount, weekend, night; per customer, frequency and mean amount of 1, 7 and 30 days; per
# terminal, frequency and risk of the same, a week back.
RECIPE = [
    "TX_AMOUNT",
    "weekend",
    "night",
    *(f"customer_{what}_{days}" for days in (1, 7, 30) for what in ("count", "mean")),
    *(f"terminal_{what}_{days}" for days in (1, 7, 30) for what in ("count", "risk")),
]


def rolling(frame: pd.DataFrame, key: str, column: str, days: int) -> tuple[np.ndarray, np.ndarray]:
    """Count and sum of `column` over the last `days` of each key, the transaction itself included: [n] each, in the
    frame's order.
    """
    rows = frame.sort_values([key, "TX_DATETIME"], kind="stable")
    found = rows.set_index("TX_DATETIME").groupby(key, sort=True)[column].rolling(f"{days}D").agg(["count", "sum"])
    back = np.empty((len(frame), 2))
    back[frame.index.get_indexer(rows.index)] = found.to_numpy()
    return back[:, 0], back[:, 1]


def plain_baseline_features(frame: pd.DataFrame) -> pd.DataFrame:
    """The Handbook's fifteen features."""
    made = pd.DataFrame(
        {
            "TX_AMOUNT": frame.TX_AMOUNT,
            "weekend": (frame.TX_DATETIME.dt.weekday >= 5).astype(int),
            "night": (frame.TX_DATETIME.dt.hour <= 6).astype(int),
        }
    )
    late_count, late_fraud = rolling(frame, "TERMINAL_ID", "TX_FRAUD", DELAY)
    for days in (1, 7, 30):
        count, total = rolling(frame, "CUSTOMER_ID", "TX_AMOUNT", days)
        made[f"customer_count_{days}"], made[f"customer_mean_{days}"] = count, total / count
        count, fraud = rolling(frame, "TERMINAL_ID", "TX_FRAUD", days + DELAY)
        made[f"terminal_count_{days}"] = count - late_count
        made[f"terminal_risk_{days}"] = np.divide(
            fraud - late_fraud, count - late_count, out=np.zeros(len(frame)), where=count > late_count
        )
    return made[RECIPE].astype(np.float32)


def unknown_cards(frame: pd.DataFrame, first: date, train_days: int) -> np.ndarray:
    """Mask of the test rows: without cards that are known to be compromised by then. `first` is the first day of
    training.
    """
    day = (frame.TX_DATETIME.dt.normalize() - pd.Timestamp(first)).dt.days.to_numpy()
    card, fraud = frame.CUSTOMER_ID.to_numpy(), frame.TX_FRAUD.to_numpy() == 1
    known, kept = set(card[fraud & (day >= 0) & (day < train_days)]), np.zeros(len(frame), bool)
    for test_day in range(train_days + DELAY, train_days + DELAY + TEST):
        known |= set(card[fraud & (day == test_day - DELAY - 1)])
        own = np.flatnonzero(day == test_day)
        kept[own[[number not in known for number in card[own]]]] = True
    return kept


def card_precision(frame: pd.DataFrame, score: np.ndarray, top: int = 100) -> float:
    """The share of compromised cards among the `top` with the highest score, day by day; a card that was found counts
    once.
    """
    cards = (
        frame.assign(score=score, day=frame.TX_DATETIME.dt.normalize())
        .groupby(["day", "CUSTOMER_ID"], as_index=False)
        .agg(score=("score", "max"), fraud=("TX_FRAUD", "max"))
    )
    found, shares = set(), []
    for _, day in cards.groupby("day"):
        best = day[~day.CUSTOMER_ID.isin(found)].nlargest(top, "score")
        caught = set(best.CUSTOMER_ID[best.fraud == 1])
        shares.append(len(caught) / top)
        found |= caught
    return float(np.mean(shares))


def measure(frame: pd.DataFrame, score: np.ndarray) -> dict[str, float]:
    y = frame.TX_FRAUD.to_numpy().astype(np.int8)
    return {
        "auc_roc": roc_auc(y, score),
        "average_precision": average_precision(y, score),
        "card_precision_100": card_precision(frame, score),
    }


def prepare(file: Path, root: Path) -> tuple[Settings, dict, pd.DataFrame]:
    """The pipeline's features of the file, their manifest, and the file itself by transaction."""
    given: dict = {
        "entities": dict(DEFAULT_ENTITIES),
        "data.source": str(file.resolve()),
        "data.sender_prefix": "C",
        "data.receiver_prefix": "M",
        "features.engine": "local",
        "features.label_delay": f"{DELAY}d",
        **{f"columns.{name}": column for name, column in COLUMNS.items()},
    }
    settings = load_settings(cli=given, file=HERE.parent / "settings.ini", environ={}).model_copy(update={"root": root})
    acquire(settings)
    frame = pd.read_parquet(file).rename_axis("row").reset_index(drop=True)
    frame["TX_DATETIME"] = pd.to_datetime(frame.TX_DATETIME)
    return settings, build_features(settings), frame


@dataclass(frozen=True)
class Way:
    """One way to learn from a fold."""

    name: str
    history: bool = False  # learns from the file's first day on, not from the fold's
    without: str = "-"  # features that it does not see: a part of their names
    overrides: Mapping[str, object] = field(default_factory=dict)
    seeds: int = 1  # models whose log-odds are averaged
    refit: bool = False  # once the number of trees is known, the days that chose it are learned too


OURS = (Way("ours"), Way("ours-history", history=True))
# What was kept (left out here, one at a time) and what was tried besides.
STEPS = (
    Way("without peak ratios", without="_peak_ratio_"),
    Way("without fraud streaks", without="_fraud_streak_"),
    Way("without either", without="_peak_ratio_|_fraud_streak_"),
    Way("without terminals' known frauds", without="receiver_fraud_"),
    Way("without any history", without="sender_out_|sender_in_|receiver_out_|receiver_in_|_fraud_|_seen|_new_"),
    Way("smaller steps, flatter trees", overrides={"learning_rate": 0.05, "max_depth": 5}),
    Way("three seeds averaged", seeds=3),
    Way("the last days learned too", refit=True),
)


def scores(
    way: Way, train: Sample, validation: Sample, test: Sample, settings: Settings
) -> tuple[np.ndarray, list[Trained]]:
    """Scores of the test transactions [n] float64, and the models that gave them."""
    names = [name for name in train.names if not re.search(way.without, name)]
    chosen = settings.model_copy(update={"xgboost": settings.xgboost.model_copy(update=dict(way.overrides))})
    models = [
        train_xgboost(
            train,
            validation,
            chosen.model_copy(update={"train": chosen.train.model_copy(update={"seed": seed})}),
            names,
            tell=lambda line: None,
        )
        for seed in range(settings.train.seed, settings.train.seed + way.seeds)
    ]
    if way.refit:
        return refitted(models[0], concat([train, validation]), validation, test), models
    given = np.stack([Model(model.onnx, len(names))(test.select(names)) for model in models]).astype(np.float64)
    return (given[0] if way.seeds == 1 else logit(given).mean(axis=0)), models


def refitted(model: Trained, every: Sample, validation: Sample, test: Sample) -> np.ndarray:
    """Log-odds by as many trees as early stopping chose, from all training days."""
    params = {
        key: value for key, value in model.params.items() if key not in ("rounds", "early_stopping", "best_round")
    }
    return (
        boost(matrices(every, validation, model.names, model.params["nthread"]), params, model.params["best_round"])
        .booster.inplace_predict(test.select(model.names), predict_type="margin")
        .astype(np.float64)
    )


def decided(
    model: Trained, validation: Sample, test: Sample, probability: np.ndarray, settings: Settings
) -> tuple[dict, np.ndarray]:
    """The pipeline's own report on the fold (the policy, money, recall by scenario, 95 % intervals), and
    calibrated probabilities.
    """
    before = Model(model.onnx, len(model.names))(validation.select(model.names))
    calibration = fit_calibration(before, validation.y)
    calibrated = calibration.apply(probability.astype(np.float32))
    known = Payments(calibration.apply(before), validation.amount, days_in(validation.step), validation.y)
    policy = solve_prices(known, settings.decision)
    return evaluate(test, calibrated, decide(calibrated, test.amount, policy).decisions, settings), calibrated


def terminal_age(frame: pd.DataFrame) -> pd.Series:
    """Days since the terminal's takeover began, for transactions of scenario 2; NaN for others. A takeover lasts 28
    days; 14 without a fraud separate two of them.
    """
    taken = frame[frame.TX_FRAUD_SCENARIO == 2].sort_values("TX_DATETIME")
    began = taken.groupby("TERMINAL_ID").TX_DATETIME.diff().isna() | (
        taken.groupby("TERMINAL_ID").TX_DATETIME.diff() > pd.Timedelta(days=14)
    )
    start = taken.TX_DATETIME.where(began).groupby(taken.TERMINAL_ID).ffill()
    return (taken.TX_DATETIME - start).dt.days.reindex(frame.index)


def fold(
    settings: Settings,
    made: Mapping,
    frame: pd.DataFrame,
    recipe: pd.DataFrame,
    first: date,
    train_days: int,
    ways: Sequence[Way],
) -> dict:
    """{"rows": {name: metrics}, ...} of the fold whose training begins on `first`; with the pipeline's own report on
    "ours".
    """
    epoch = datetime.fromisoformat(made["epoch"]).replace(tzinfo=None)
    begin = int((datetime.combine(first, datetime.min.time()) - epoch).total_seconds() // 3600)
    end, late = begin + 24 * train_days, begin + 24 * (train_days + DELAY)
    if end - 24 * INNER <= begin or begin < made["first_step"] or late + 24 * TEST > made["last_step"] + 24:
        raise FraudError(
            f"--folds {first}: needs {train_days + DELAY + TEST} days from there on within the file's, "
            f"and more than {INNER} days of training"
        )

    folder = settings.data_dir / "features"
    words = learn_words(folder, Period("train", begin, end - 24 * INNER), made["features"])

    def load(name: str, *steps: int) -> Sample:
        return load_sample(folder, Period(name, *steps), made["features"], words)

    day = (frame.TX_DATETIME.dt.normalize() - pd.Timestamp(first)).dt.days.to_numpy()
    learned, kept = (day >= 0) & (day < train_days), unknown_cards(frame, first, train_days)
    booster = xgboost.XGBClassifier(max_depth=9, n_estimators=100, learning_rate=0.1, random_state=0, n_jobs=2).fit(
        recipe[learned], frame.TX_FRAUD[learned]
    )
    rows = {"recipe": measure(frame[kept], booster.predict_proba(recipe[kept])[:, 1].astype(np.float64))}
    validation, test = load("validation", end - 24 * INNER, end), load("test", late, late + 24 * TEST)
    test = test.take(np.isin(test.transaction_id.astype(np.int64), frame.TRANSACTION_ID[kept]))
    tested = frame.set_index("TRANSACTION_ID", drop=False).loc[test.transaction_id.astype(np.int64)]
    report = {}
    for history in sorted({way.history for way in ways}):
        train = load("train", made["first_step"] if history else begin, end - 24 * INNER)
        for way in (way for way in ways if way.history == history):
            score, models = scores(way, train, validation, test, settings)
            rows[way.name] = measure(tested, score)
            if way.name == "ours":
                report, calibrated = decided(models[0], validation, test, score, settings)
                budget = daily_alerts(score, test.step, settings.decision.alert_budget)
                report |= {
                    "y": test.y,
                    "probability": calibrated,
                    "takeover_days": tested.takeover.to_numpy(),
                    "found": budget,
                }
    return {"rows": rows, "report": report}


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean over the folds and its 95 % interval (Student's t, None for one fold); folds are taken as independent,
    though they share cards.
    """
    low, high = (
        map(float, stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)))
        if len(values) > 1 and np.ptp(values)
        else (None, None)
    )
    return {"mean": float(np.mean(values)), "low": low, "high": high}


def told(gain: Mapping) -> str:
    """A gain as text."""
    return (
        f"{gain['mean']:+.3f}"
        + (f" [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain["low"] is not None else "")
        + f" over {gain['over']}"
    )


def in_depth(found: Sequence[dict]) -> dict:
    """What the folds say together of decisions, money and failures of "ours", JSON-able."""
    reports = [one["report"] for one in found]
    y, probability, days, hit = (
        np.concatenate([report.pop(key) for report in reports])
        for key in ("y", "probability", "takeover_days", "found")
    )
    curve = calibration_curve(y, probability)
    by_day = [
        {"day": day, "frauds": int((days == day).sum()), "recall": float(hit[days == day].mean())}
        for day in range(28)
        if (days == day).any()
    ]
    return {
        "folds": reports,
        "calibration": {key: [round(float(value), 6) for value in values] for key, values in curve.items()},
        "takeovers": by_day,
    }


def table(found: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict]:
    """Mean and standard deviation over the folds, the folds' own figures, and the gain over the recipe (or over "ours",
    for its variants) with a 95 % interval.
    """
    against = {way.name: "ours" for way in STEPS}
    return [
        {
            "name": name,
            **{
                metric: {"mean": float(np.mean(values)), "std": float(np.std(values))}
                for metric in METRICS
                for values in [[f[name][metric] for f in found]]
            },
            "by_fold": [f[name]["average_precision"] for f in found],
            "gain": {
                "over": against.get(name, "recipe"),
                **spread(
                    [f[name]["average_precision"] - f[against.get(name, "recipe")]["average_precision"] for f in found]
                ),
            },
        }
        for name in found[0]
    ]


def show(rows: Sequence[Mapping], folds: Sequence[date]) -> None:
    print(
        f"\n{len(folds)} folds, training from {', '.join(map(str, folds))} on\n\n"
        "| | AUC ROC | average precision | card precision@100 | gain in average precision, 95 % |\n"
        "|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['name']} | "
            + " | ".join(f"{row[m]['mean']:.3f} ± {row[m]['std']:.3f}" for m in METRICS)
            + f" | {told(row['gain'])} |"
        )
    for name, values in PUBLISHED.items():
        print(
            f"| {name} | "
            + " | ".join(f"{mean:.3f}" + (f" ± {std:.2f}" if std else "") for mean, std in (values[m] for m in METRICS))
            + " | |"
        )
    print("\nPublished figures are of later folds, which this file does not reach.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the Handbook's transactions as Parquet")
    parser.add_argument(
        "--folds",
        required=True,
        type=lambda text: [date.fromisoformat(day) for day in text.split(",")],
        metavar="YYYY-MM-DD,...",
        help="first days of training",
    )
    parser.add_argument("--train-days", type=int, default=7)
    parser.add_argument(
        "--steps",
        action="store_true",
        help="also what each part of the pipeline adds, and what was tried besides: eight more models a fold",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there too")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        say("features")
        settings, made, frame = prepare(chosen.file, Path(folder))
        recipe, found, ways = plain_baseline_features(frame), [], OURS + (STEPS if chosen.steps else ())
        frame["takeover"] = terminal_age(frame)
        for first in chosen.folds:
            say(f"fold {first} to {first + timedelta(chosen.train_days + DELAY + TEST - 1)}")
            found.append(fold(settings, made, frame, recipe, first, chosen.train_days, ways))
    rows = table([one["rows"] for one in found])
    show(rows, chosen.folds)
    if chosen.json:
        chosen.json.write_text(
            json.dumps(
                {
                    "folds": list(map(str, chosen.folds)),
                    "train_days": chosen.train_days,
                    "rows": rows,
                    "in_depth": in_depth(found),
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
