"""The pipeline on the card transactions of the Fraud Detection Handbook, by the Handbook's own protocol, beside its recipe in the same run. What is measured: benchmarks/README.md."""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import xgboost
from serving import HERE, say

from fraud_pkg.acquire import acquire
from fraud_pkg.bundle import Model
from fraud_pkg.engines import build_features
from fraud_pkg.evaluate import Period, Sample, average_precision, load_sample, roc_auc
from fraud_pkg.settings import FraudError, Settings, load_settings
from fraud_pkg.xgboost import train_xgboost

COLUMNS = {"tx_id": "TRANSACTION_ID", "timestamp": "TX_DATETIME", "nameOrig": "CUSTOMER_ID", "nameDest": "TERMINAL_ID", "amount": "TX_AMOUNT", "isFraud": "TX_FRAUD", "scenario": "TX_FRAUD_SCENARIO"}
DELAY, TEST, INNER = 7, 7, 2  # days: until labels are known, of the test period, at the end of training that early stopping looks at
PUBLISHED = {"published: XGBoost": {"auc_roc": (0.871, 0.01), "average_precision": (0.687, 0.01), "card_precision_100": (0.302, 0.01)},  # of later folds, which are not given here
             "published: random forest": {"auc_roc": (0.87, None), "average_precision": (0.678, None), "card_precision_100": (0.299, None)}}
METRICS = ("auc_roc", "average_precision", "card_precision_100")
# Chapter 3 of the Handbook: amount, weekend, night; per customer, frequency and mean amount of 1, 7 and 30 days; per terminal, frequency and risk of the same, a week back.
RECIPE = ["TX_AMOUNT", "weekend", "night", *(f"customer_{what}_{days}" for days in (1, 7, 30) for what in ("count", "mean")), *(f"terminal_{what}_{days}" for days in (1, 7, 30) for what in ("count", "risk"))]


def rolling(frame: pd.DataFrame, key: str, column: str, days: int) -> tuple[np.ndarray, np.ndarray]:
    """Count and sum of `column` over the last `days` of each key, the transaction itself included: [n] each, in the frame's order."""
    rows = frame.sort_values([key, "TX_DATETIME"], kind="stable")
    found = rows.set_index("TX_DATETIME").groupby(key, sort=True)[column].rolling(f"{days}D").agg(["count", "sum"])
    back = np.empty((len(frame), 2))
    back[frame.index.get_indexer(rows.index)] = found.to_numpy()
    return back[:, 0], back[:, 1]


def recipe_features(frame: pd.DataFrame) -> pd.DataFrame:
    """The Handbook's fifteen features."""
    made = pd.DataFrame({"TX_AMOUNT": frame.TX_AMOUNT, "weekend": (frame.TX_DATETIME.dt.weekday >= 5).astype(int), "night": (frame.TX_DATETIME.dt.hour <= 6).astype(int)})
    late_count, late_fraud = rolling(frame, "TERMINAL_ID", "TX_FRAUD", DELAY)
    for days in (1, 7, 30):
        count, total = rolling(frame, "CUSTOMER_ID", "TX_AMOUNT", days)
        made[f"customer_count_{days}"], made[f"customer_mean_{days}"] = count, total / count
        count, fraud = rolling(frame, "TERMINAL_ID", "TX_FRAUD", days + DELAY)
        made[f"terminal_count_{days}"] = count - late_count
        made[f"terminal_risk_{days}"] = np.divide(fraud - late_fraud, count - late_count, out=np.zeros(len(frame)), where=count > late_count)
    return made[RECIPE].astype(np.float32)


def unknown_cards(frame: pd.DataFrame, first: date, train_days: int) -> np.ndarray:
    """Mask of the test rows: without cards that are known to be compromised by then. `first` is the first day of training."""
    day = (frame.TX_DATETIME.dt.normalize() - pd.Timestamp(first)).dt.days.to_numpy()
    card, fraud = frame.CUSTOMER_ID.to_numpy(), frame.TX_FRAUD.to_numpy() == 1
    known, kept = set(card[fraud & (day >= 0) & (day < train_days)]), np.zeros(len(frame), bool)
    for test_day in range(train_days + DELAY, train_days + DELAY + TEST):
        known |= set(card[fraud & (day == test_day - DELAY - 1)])
        own = np.flatnonzero(day == test_day)
        kept[own[[number not in known for number in card[own]]]] = True
    return kept


def card_precision(frame: pd.DataFrame, score: np.ndarray, top: int = 100) -> float:
    """The share of compromised cards among the `top` with the highest score, day by day; a card that was found counts once."""
    cards = frame.assign(score=score, day=frame.TX_DATETIME.dt.normalize()).groupby(["day", "CUSTOMER_ID"], as_index=False).agg(score=("score", "max"), fraud=("TX_FRAUD", "max"))
    found, shares = set(), []
    for _, day in cards.groupby("day"):
        best = day[~day.CUSTOMER_ID.isin(found)].nlargest(top, "score")
        caught = set(best.CUSTOMER_ID[best.fraud == 1])
        shares.append(len(caught) / top)
        found |= caught
    return float(np.mean(shares))


def measure(frame: pd.DataFrame, score: np.ndarray) -> dict[str, float]:
    y = frame.TX_FRAUD.to_numpy().astype(np.int8)
    return {"auc_roc": roc_auc(y, score), "average_precision": average_precision(y, score), "card_precision_100": card_precision(frame, score)}


def prepare(file: Path, root: Path) -> tuple[Settings, dict, pd.DataFrame]:
    """The pipeline's features of the file, their manifest, and the file itself by transaction."""
    given = {"data.source": str(file.resolve()), "data.orig_prefix": "C", "data.dest_prefix": "M", "features.engine": "local", "features.label_delay": 24 * DELAY, **{f"columns.{name}": column for name, column in COLUMNS.items()}}
    settings = load_settings(cli=given, file=HERE.parent / "settings.ini", environ={}).model_copy(update={"root": root})
    acquire(settings)
    frame = pd.read_parquet(file).rename_axis("row").reset_index(drop=True)
    frame["TX_DATETIME"] = pd.to_datetime(frame.TX_DATETIME)
    return settings, build_features(settings), frame


def ours(settings: Settings, made: Mapping, steps: tuple[int, int, int], rows: np.ndarray, first_step: int) -> np.ndarray:
    """Scores of the test transactions `rows` (ids, in the order wanted) by the pipeline's booster, trained from `first_step` on; `steps`: end of training, begin and end of the test."""
    end, begin, last = steps
    train, validation, test = (load_sample(settings.data_dir / "features", Period(name, *period), made["features"])
                               for name, period in (("train", (first_step, end - 24 * INNER)), ("validation", (end - 24 * INNER, end)), ("test", (begin, last))))
    trained = train_xgboost(train, validation, settings, tell=lambda line: None)
    return scores_of(trained.onnx, test, rows)


def scores_of(onnx: bytes, test: Sample, rows: np.ndarray) -> np.ndarray:
    order = np.argsort(test.tx_id)
    return Model(onnx, test.x.shape[1])(test.x)[order[np.searchsorted(test.tx_id[order], rows)]].astype(np.float64)


def fold(settings: Settings, made: Mapping, frame: pd.DataFrame, recipe: pd.DataFrame, first: date, train_days: int) -> dict[str, dict[str, float]]:
    """{row: metrics} of the fold whose training begins on `first`."""
    epoch = datetime.fromisoformat(made["epoch"]).replace(tzinfo=None)
    begin = int((datetime.combine(first, datetime.min.time()) - epoch).total_seconds() // 3600)
    end, test = begin + 24 * train_days, begin + 24 * (train_days + DELAY)
    if end - 24 * INNER <= begin or begin < made["first_step"] or test + 24 * TEST > made["last_step"] + 24:
        raise FraudError(f"--folds {first}: needs {train_days + DELAY + TEST} days from there on within the file's, and more than {INNER} days of training")
    kept = unknown_cards(frame, first, train_days)
    rows = frame.TRANSACTION_ID.to_numpy()[kept]
    day = (frame.TX_DATETIME.dt.normalize() - pd.Timestamp(first)).dt.days.to_numpy()
    learned = (day >= 0) & (day < train_days)
    booster = xgboost.XGBClassifier(max_depth=9, n_estimators=100, learning_rate=0.1, random_state=0, n_jobs=2).fit(recipe[learned], frame.TX_FRAUD[learned])
    scores = {"recipe": booster.predict_proba(recipe[kept])[:, 1].astype(np.float64), "ours": ours(settings, made, (end, test, test + 24 * TEST), rows, begin),
              "ours-history": ours(settings, made, (end, test, test + 24 * TEST), rows, made["first_step"])}
    return {name: measure(frame[kept], score) for name, score in scores.items()}


def table(found: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict]:
    """Mean and standard deviation over the folds."""
    return [{"name": name, **{metric: {"mean": float(np.mean(values)), "std": float(np.std(values))} for metric in METRICS for values in [[f[name][metric] for f in found]]}} for name in found[0]]


def show(rows: Sequence[Mapping], folds: Sequence[date]) -> None:
    print(f"\n{len(folds)} folds, training from {', '.join(map(str, folds))} on\n\n| | AUC ROC | average precision | card precision@100 |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['name']} | " + " | ".join(f"{row[m]['mean']:.3f} ± {row[m]['std']:.3f}" for m in METRICS) + " |")
    for name, values in PUBLISHED.items():
        print(f"| {name} | " + " | ".join(f"{mean:.3f}" + (f" ± {std:.2f}" if std else "") for mean, std in (values[m] for m in METRICS)) + " |")
    print("\nPublished figures are of later folds, which this file does not reach.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the Handbook's transactions as Parquet")
    parser.add_argument("--folds", required=True, type=lambda text: [date.fromisoformat(day) for day in text.split(",")], metavar="YYYY-MM-DD,...", help="first days of training")
    parser.add_argument("--train-days", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there too")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        say("features")
        settings, made, frame = prepare(chosen.file, Path(folder))
        recipe, found = recipe_features(frame), []
        for first in chosen.folds:
            say(f"fold {first} to {first + timedelta(chosen.train_days + DELAY + TEST - 1)}")
            found.append(fold(settings, made, frame, recipe, first, chosen.train_days))
    rows = table(found)
    show(rows, chosen.folds)
    if chosen.json:
        chosen.json.write_text(json.dumps({"folds": list(map(str, chosen.folds)), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
