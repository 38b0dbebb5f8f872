"""Training from the feature table beside plain `XGBClassifier.fit` on a data frame: the same rows, features, trees and
threads; time and peak memory. What is measured: benchmarks/README.md.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from features import PUBLISHED, THREADS, make_log, ours
from measure import Measured, machine, measured, say, summary, write_json

from fraud_pkg.train.metrics import average_precision
from fraud_pkg.train.samples import Period, learn_words, load_sample, periods_of
from fraud_pkg.features.manifest import feature_manifest
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.train.tuning import check_training
from fraud_pkg.train.xgboost import TREE_KEYS, boost, matrices

PROJECT = Path(__file__).resolve().parents[1]
HELD_OUT = 72  # hours of validation and of test, so that nearly all is training


def chosen(folder: Path) -> Settings:
    """The settings of both contenders."""
    given = {
        "paths.data": str(folder),
        "split.test_hours": HELD_OUT,
        "split.validation_hours": HELD_OUT,
        "train.threads": THREADS,
    }
    return load_settings(file=PROJECT / "settings.ini", environ={}, cli=given)


def periods(settings: Settings) -> tuple[list[str], Period, Period]:
    """Feature names, training and validation period."""
    manifest = feature_manifest(settings)
    cut = periods_of(manifest, settings.split)
    return manifest["features"], cut["train"], cut["validation"]


def parameters(settings: Settings) -> dict:
    return {key: getattr(settings.xgboost, key) for key in TREE_KEYS} | {
        "seed": settings.train.seed,
        "nthread": THREADS,
    }


def from_parquet(settings: Settings, trees: int) -> dict:
    """As the job trains: one float32 matrix, quantile histograms in files, boosting with the average precision of each
    round.
    """
    names, *both = periods(settings)
    folder = settings.data_dir / "features"
    words = learn_words(folder, both[0], names)
    train, validation = (load_sample(folder, period, names, words) for period in both)
    check_training(train, validation, names)
    with tempfile.TemporaryDirectory(dir=settings.data_dir) as scratch:
        data = matrices(train, validation, names, THREADS, Path(scratch))
        boosted = boost(data, parameters(settings) | {"base_score": data.base_rate}, trees)
        return {
            "rows": len(train),
            "average_precision": average_precision(validation.y, boosted.booster.predict(data.validation)),
        }


def from_frame(settings: Settings, trees: int) -> dict:
    """As the tutorials train: a data frame, `XGBClassifier.fit`."""
    import pandas as pd
    import xgboost

    names, *both = periods(settings)
    categories = list(settings.contract.categories)

    def frame(period: Period) -> pd.DataFrame:
        found = pd.read_parquet(
            sorted((settings.data_dir / "features").glob("part-*.parquet")),
            columns=[*names, "is_fraud"],
            filters=[("step", ">=", period.first_step), ("step", "<", period.end_step)],
        )
        return found.dropna(subset="is_fraud")

    train, validation = map(frame, both)
    for name in categories:
        words = pd.Index(train[name].dropna().unique())
        for some in (train, validation):
            some[name] = words.get_indexer(some[name]).astype("float32")  # -1: missing or unknown
    own = {
        "random_state" if key == "seed" else "n_jobs" if key == "nthread" else key: value
        for key, value in parameters(settings).items()
    }
    model = xgboost.XGBClassifier(n_estimators=trees, eval_metric="aucpr", **own)
    model.fit(train[names], train["is_fraud"], eval_set=[(validation[names], validation["is_fraud"])], verbose=False)
    return {
        "rows": len(train),
        "average_precision": average_precision(
            validation["is_fraud"].to_numpy(), model.predict_proba(validation[names])[:, 1]
        ),
    }


CONTENDERS = {"ours": from_parquet, "frame": from_frame}
WHAT = {
    "ours": "ours: Parquet, one float32 matrix, quantile histograms in files",
    "frame": "`XGBClassifier.fit` on a data frame",
}


def train_once(name: str, folder: Path, trees: int) -> Measured:
    return measured([sys.executable, __file__, "--contender", name, "--folder", str(folder), "--trees", str(trees)])


def table(runs: dict[str, list[Measured]], trees: int, features: int) -> dict:
    results, said = (
        {name: summary(some) for name, some in runs.items()},
        {name: json.loads(some[0].printed) for name, some in runs.items()},
    )
    lines = [
        [
            WHAT[name],
            f"{one['seconds']:.1f} ({one['least']:.1f} to {one['most']:.1f})",
            f"{one['cpu']:.1f}",
            f"{one['peak']:.2f}",
            f"{said[name]['average_precision']:.4f}",
            f"{one['seconds'] / results['ours']['seconds']:.2f}",
            f"{one['peak'] / results['ours']['peak']:.2f}",
        ]
        for name, one in results.items()
    ]
    return {
        "title": f"Training on {said['ours']['rows']:,} transactions, {features} features, {trees} trees",
        "note": f"Whole processes, from the feature table (Parquet) to trees, {THREADS} threads, "
        "the average precision of three days after each tree.",
        "columns": [
            "",
            "seconds: median (least to most)",
            "processor seconds",
            "peak GiB",
            "average precision",
            "seconds / ours",
            "peak / ours",
        ],
        "rows": lines,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="see that it runs; the figures say little")
    options.add_argument("--rows", type=int, default=PUBLISHED)
    options.add_argument("--trees", type=int, default=100)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--json", type=Path, help="write the figures there too")
    options.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.contender:
        print(json.dumps(CONTENDERS[given.contender](chosen(given.folder), given.trees)))
        return
    rows, trees, rounds, began = (
        (120_000, 10, 1, machine()) if given.quick else (given.rows, given.trees, given.rounds, machine())
    )
    runs: dict[str, list[Measured]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_log(folder, rows, "hard")
        ours("local", folder, "1g", "hard")
        for _ in range(rounds):
            for name in CONTENDERS:
                runs[name].append(train_once(name, folder, trees))
                say(f"{name}: {runs[name][-1].seconds:.1f} s, {runs[name][-1].peak:.2f} GiB")
        write_json(given.json, began, [table(runs, trees, len(feature_manifest(chosen(folder))["features"]))])


if __name__ == "__main__":
    main()
