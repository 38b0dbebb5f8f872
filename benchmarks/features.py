"""Both engines beside Polars, DuckDB and the common Spark script: a log of transactions to a file of features, as
ratios, with peak memory. What is measured: benchmarks/README.md.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from measure import Measured, machine, measured, say, summary, write_json  # noqa: E402

from fraud_pkg.core.contract import DAY, HOUR, MINUTE, duration_text, tile_of  # noqa: E402
from fraud_pkg.core.settings import Settings, load_settings  # noqa: E402
from fraud_pkg.features.definitions import feature_names  # noqa: E402

PUBLISHED = 6_362_620  # rows of the PaySim log
WINDOWS = "1h, 24h, 7d, 30d"
COMPARED = ("count", "sum", "mean", "ratio")
THREADS = 2


def compared_names(windows: Sequence[int]) -> list[str]:
    """The features that everybody computes: all numbers of the payment, and of both accounts flows, fraud shares and
    seconds since seen.
    """
    own = [
        "amount",
        "hour_of_day",
        "day_of_week",
        "sender_balance",
        "receiver_balance",
        "amount_to_balance",
        "empties_account",
    ]
    return own + [f"{side}_{name}" for side in ("sender", "receiver") for name in side_names(windows)]


def side_names(windows: Sequence[int]) -> list[str]:
    """The history features of one side, without its name."""
    texts = [duration_text(window) for window in windows]
    flows = [f"{direction}_{what}_{text}" for text in texts for direction in ("out", "in") for what in COMPARED]
    return [*flows, *(f"fraud_share_{days}" for days in label_windows(windows)), "seconds_since_seen"]


def label_windows(windows: Sequence[int]) -> dict[str, int]:
    """Windows of labels: their names, and their days."""
    return {duration_text(window): window // DAY for window in windows if window % DAY == 0}


# The peers. Each reads the raw Parquet file and writes one file with row and the compared features as float32.


def with_polars(raw: Path, target: Path, windows: Sequence[int], label_delay: int) -> None:
    """Running totals over events sorted by account and time; where windows begin is found by merging the sorted keys
    (`join_asof`).
    """
    import polars as pl

    tx = pl.read_parquet(
        raw,
        columns=[
            "row",
            "time",
            "amount",
            "sender",
            "sender_balance",
            "receiver",
            "receiver_balance",
            "is_fraud",
        ],
    ).with_columns(cents=(pl.col("amount") * 100).round().cast(pl.Int64))
    sorted_events = polars_events(tx)
    histories = polars_histories(sorted_events, windows, label_delay)
    sides = {}
    for side, name in enumerate(("sender", "receiver")):
        rows = histories.filter(pl.col("side") == side).sort("row").drop("side", "row")
        sides[name] = rows.rename({column: f"{name}_{column}" for column in rows.columns})
    balance = (pl.col("sender_balance") * 100).round()
    own = tx.select(
        "row",
        pl.col("cents").truediv(100).alias("amount"),
        (pl.col("time") // HOUR % 24).alias("hour_of_day"),
        (pl.col("time") // DAY % 7).alias("day_of_week"),
        "sender_balance",
        "receiver_balance",
        pl.when(balance != 0).then(pl.col("cents") / balance).alias("amount_to_balance"),
        (pl.col("cents") == balance).alias("empties_account"),
    )
    table = pl.concat([own, sides["sender"], sides["receiver"]], how="horizontal")
    table.select("row", pl.col(compared_names(windows)).cast(pl.Float32)).write_parquet(
        target, compression="lz4", statistics=False
    )


def polars_events(tx):
    """Two rows per transaction, sorted by account and arrival: side (0 starts it), row, account, time, cents, fraud."""
    import polars as pl

    codes = pl.concat([tx["sender"], tx["receiver"]], rechunk=True).cast(pl.Categorical).to_physical()
    events = pl.concat(
        [
            tx.select(
                code=codes[side * len(tx) : (side + 1) * len(tx)].cast(pl.Int64),
                row=pl.int_range(pl.len(), dtype=pl.Int64),
                side=pl.lit(side, pl.Int64),
                time="time",
                cents="cents",
                fraud=pl.col("is_fraud").fill_null(0).cast(pl.Int64),
            )
            for side in (0, 1)
        ]
    )
    bits = len(tx).bit_length()
    events = events.with_columns(order=(pl.col("code") * 2**bits + pl.col("row")) * 2 + pl.col("side")).sort("order")
    return events.select("side", "row", "code", "time", "cents", "fraud")


def polars_histories(events, windows: Sequence[int], label_delay: int):
    """Of each event in `events`: side, row and the features of `side_names`."""
    import polars as pl

    out, cents = pl.col("side") == 0, pl.col("cents")
    events = events.with_columns(
        place=pl.int_range(pl.len(), dtype=pl.Int64),
        out=out.cast(pl.Int64).cum_sum() - out.cast(pl.Int64),
        sent=(cents * out).cum_sum() - cents * out,
        moved=cents.cum_sum() - cents,
        frauds=pl.col("fraud").cum_sum() - pl.col("fraud"),
    )
    end = pl.DataFrame(
        {
            "place": [len(events)],
            "out": [events["out"][-1] + int(events["side"][-1] == 0)],
            "sent": [0],
            "moved": [0],
            "frauds": [events["frauds"][-1] + events["fraud"][-1]],
        }
    )
    totals = pl.concat([events.select("place", "out", "sent", "moved", "frauds"), end])
    itself = ((pl.col("code") == pl.col("code").shift(1)) & (pl.col("row") == pl.col("row").shift(1))).fill_null(False)
    last = events.select(place=pl.col("place") - itself)["place"]
    now = totals.select(pl.all().gather(last))
    far = int(events["time"].max()) + 4000 * DAY  # so that no look back reaches another account
    keys = {
        tile: events.select(
            key=(pl.col("code") * (far // tile) + pl.col("time") // tile).set_sorted(), at=pl.col("place") + 1
        )
        for tile in (MINUTE, HOUR, DAY)
    }

    def first_after(tile: int, tiles: int):
        """Where an account's events less than so many tiles ago begin."""
        wanted = keys[tile].select((pl.col("key") - tiles).set_sorted())
        return wanted.join_asof(keys[tile], on="key", strategy="backward")["at"].fill_null(0)

    def divided(number, by):
        return pl.when(by != 0).then(number / by)

    own, columns = events.select("cents"), []
    for window in windows:
        text, tile = duration_text(window), tile_of(window)
        begin = totals.select(pl.all().gather(first_after(tile, window // tile)))
        past = now - begin
        flows = (
            own.hstack(past)
            .lazy()
            .with_columns(back=pl.col("place") - pl.col("out"), received=pl.col("moved") - pl.col("sent"))
        )
        found = []
        for direction, count, total in (("out", "out", "sent"), ("in", "back", "received")):
            mean = divided(pl.col(total), pl.col(count))
            found += [
                pl.col(count).cast(pl.Float32).alias(f"{direction}_count_{text}"),
                (pl.col(total) / 100).cast(pl.Float32).alias(f"{direction}_sum_{text}"),
                (mean / 100).cast(pl.Float32).alias(f"{direction}_mean_{text}"),
                divided(pl.col("cents"), mean).cast(pl.Float32).alias(f"{direction}_ratio_{text}"),
            ]
        columns.append(flows.select(found).collect())
    known = totals.select(pl.col("place", "frauds").gather(first_after(DAY, label_delay + 1)))
    for text, days in label_windows(windows).items():
        begin = first_after(DAY, label_delay + 1 + days)
        past = known - totals.select(pl.col("place", "frauds").gather(begin))
        columns.append(
            past.select(divided(pl.col("frauds"), pl.col("place")).cast(pl.Float32).alias(f"fraud_share_{text}"))
        )
    before = (last - 1).clip(0)
    since = pl.DataFrame({"seconds": events["time"] - events["time"].gather(before)}).with_columns(
        seen=(last > 0) & (events["code"] == events["code"].gather(before)) & (pl.col("seconds") <= max(windows))
    )
    columns.append(since.select(pl.when("seen").then("seconds").cast(pl.Float32).alias("seconds_since_seen")))
    return pl.concat([events.select("side", "row"), *columns], how="horizontal")


def as_float(column: str) -> str:
    """`EXPRESSION AS NAME` in single precision."""
    expression, _, name = column.rpartition(" AS ")
    return f"({expression})::FLOAT AS {name}"


def with_duckdb(raw: Path, target: Path, windows: Sequence[int], label_delay: int) -> None:
    """Window functions with RANGE frames over the tiles of an account; the frames hold the whole of the running tile,
    so what came later in it is taken off again.
    """
    import duckdb

    sums = {"n": "count(*)", "o": "sum(o)", "s": "sum(cents)", "so": "sum(cents * o)"}
    frames = [
        "before AS (PARTITION BY account ORDER BY row RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW EXCLUDE GROUP)"
    ]
    counted = ["last_value(time) OVER before AS seen"]
    shown = [f"CASE WHEN time - seen <= {max(windows)} THEN time - seen END AS seconds_since_seen"]
    for tile in sorted({tile_of(window) for window in windows}):
        frames.append(
            f"later{tile} AS (PARTITION BY account, time // {tile} ORDER BY row "
            "RANGE BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)"
        )
    for window in windows:
        tile, text = tile_of(window), duration_text(window)
        frames.append(
            f"w{text} AS (PARTITION BY account ORDER BY time // {tile} "
            f"RANGE BETWEEN {window // tile - 1} PRECEDING AND CURRENT ROW)"
        )
        counted += [f"{what} OVER w{text} - {what} OVER later{tile} AS {name}{text}" for name, what in sums.items()]
        for direction, count, total in (
            ("out", f"o{text}", f"so{text}"),
            ("in", f"(n{text} - o{text})", f"(s{text} - so{text})"),
        ):
            mean = f"({total} / nullif({count}, 0))"
            shown += [
                f"{count} AS {direction}_count_{text}",
                f"{total} / 100 AS {direction}_sum_{text}",
                f"{mean} / 100 AS {direction}_mean_{text}",
                f"cents / nullif({mean}, 0) AS {direction}_ratio_{text}",
            ]
    for text, days in label_windows(windows).items():
        frames.append(
            f"d{text} AS (PARTITION BY account ORDER BY time // {DAY} "
            f"RANGE BETWEEN {label_delay + days} PRECEDING AND {label_delay + 1} PRECEDING)"
        )
        counted += [f"count(*) OVER d{text} AS dn{text}, sum(fraud) OVER d{text} AS df{text}"]
        shown.append(f"df{text} / nullif(dn{text}, 0) AS fraud_share_{text}")
    both = ", ".join(
        f"{side}_history.{name}::FLOAT AS {side}_{name}"
        for side in ("sender", "receiver")
        for name in side_names(windows)
    )
    with duckdb.connect(
        config={"threads": THREADS, "temp_directory": str(target.parent / "spill"), "preserve_insertion_order": "false"}
    ) as database:
        database.execute(f"""
            CREATE TEMP VIEW tx AS
                SELECT *, round(amount * 100) AS cents, round(sender_balance * 100) AS balance
                FROM read_parquet('{raw}');
            CREATE TEMP VIEW events AS
                SELECT sender AS account, row, time, cents, 1::DOUBLE AS o, coalesce(is_fraud, 0)::DOUBLE AS fraud
                FROM tx
                UNION ALL
                SELECT receiver, row, time, cents, 0, coalesce(is_fraud, 0) FROM tx;
            CREATE TEMP VIEW counted AS
                SELECT row, o, time, cents, {", ".join(counted)}
                FROM events WINDOW {", ".join(frames)};
            CREATE TEMP TABLE histories AS SELECT row, o, {", ".join(map(as_float, shown))} FROM counted;
            COPY (SELECT tx.row, (cents / 100)::FLOAT AS amount,
                         (time // {HOUR} % 24)::FLOAT AS hour_of_day, (time // {DAY} % 7)::FLOAT AS day_of_week,
                         sender_balance::FLOAT AS sender_balance, receiver_balance::FLOAT AS receiver_balance,
                         (cents / nullif(balance, 0))::FLOAT AS amount_to_balance,
                         (cents = balance)::FLOAT AS empties_account, {both}
                  FROM tx
                  JOIN histories sender_history ON sender_history.row = tx.row AND sender_history.o = 1
                  JOIN histories receiver_history ON receiver_history.row = tx.row AND receiver_history.o = 0)
            TO '{target}' (FORMAT parquet, COMPRESSION lz4_raw)""")


# The common script of the tutorials: it reads CSV, looks for types, and computes nothing that needs an account's past.


def common_script(csv: Path, target: Path, memory: str) -> None:
    """CSV with `inferSchema`, one-hot types, logarithms, Parquet."""
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import OneHotEncoder, StringIndexer
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    os.environ |= {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    spark = (
        SparkSession.builder.master(f"local[{THREADS}]")
        .config("spark.driver.memory", memory)
        .config("spark.ui.enabled", "false")
        .config("spark.log.level", "ERROR")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    log = spark.read.csv(str(csv), header=True, inferSchema=True)
    money = ["amount", "sender_balance", "sender_balance_after", "receiver_balance", "receiver_balance_after"]
    log = log.withColumns({f"log_{name}": F.log1p(name) for name in money} | {"hour": F.col("step") % 24})
    encoders = Pipeline(
        stages=[
            StringIndexer(inputCol="type", outputCol="type_index"),
            OneHotEncoder(inputCol="type_index", outputCol="type_onehot"),
        ]
    )
    encoders.fit(log).transform(log).write.parquet(str(target))
    spark.stop()


# Ours, and everybody's turn.


def chosen(preset: str, values: Mapping[str, str | float] | None = None) -> Settings:
    """The settings as they are shipped, for a log of this preset (which brings its contract), with the windows of this
    benchmark and these values.
    """
    cli = {"features.windows": WINDOWS, "simulate.preset": preset, **(values or {})}
    return load_settings(file=PROJECT / "settings.ini", environ={}, cli=cli)


def overrides(engine: str, folder: Path, memory: str) -> dict[str, str | int]:
    return {
        "paths.data": str(folder),
        "features.engine": engine,
        "features.threads": THREADS,
        "features.spark_master": f"local[{THREADS}]",
        "features.spark_memory": memory,
    }


def ours(engine: str, folder: Path, memory: str, preset: str) -> None:
    """Raw table to feature table, all features."""
    from fraud_pkg.features.table import build_features

    build_features(chosen(preset, overrides(engine, folder, memory)))


def make_log(folder: Path, rows: int, preset: str) -> Path:
    """A simulated log in `folder`, as the job acquire leaves it; returns its file."""
    from fraud_pkg.data.acquire import acquire

    days = {"paysim": 30.96, "hard": 90}[preset]
    settings = chosen(preset, {"paths.data": str(folder), "simulate.rows": rows, "simulate.days": days})
    return folder / "raw" / acquire(settings)["file"]


def differences(folder: Path, theirs: Path, windows: Sequence[int]) -> dict[str, int]:
    """How many values of a peer differ from ours, bit for bit, by feature; a missing one equals a missing one."""
    import numpy as np
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    order = np.argsort(pq.read_table(theirs, columns=["row"])["row"].to_numpy())
    parts = ds.dataset(sorted((folder / "features").glob("part-*.parquet")))
    place = np.argsort(parts.to_table(columns=["row"])["row"].to_numpy())
    found = {}
    for name in compared_names(windows):
        mine = parts.to_table(columns=[name])[name].to_numpy()[place]
        other = pq.read_table(theirs, columns=[name])[name].to_numpy()[order]
        different = (mine != other) & ~(np.isnan(mine) & np.isnan(other))
        if different.any():
            found[name] = int(different.sum())
    return found


def as_csv(raw: Path, target: Path) -> None:
    """The log as PaySim publishes it."""
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    names = [
        "step",
        "type",
        "amount",
        "sender",
        "sender_balance",
        "sender_balance_after",
        "receiver",
        "receiver_balance",
        "receiver_balance_after",
        "is_fraud",
        "flagged",
    ]
    table = pq.read_table(raw, columns=["time", *names[1:]])
    step = pa.array(table["time"].to_numpy() // HOUR)
    pc.write_csv(table.drop_columns("time").add_column(0, "step", step), target)


CONTENDERS = ("local", "polars", "duckdb", "common", "spark")


def contend(name: str, folder: Path, memory: str, preset: str) -> None:
    """One contender's turn, in a process of its own."""
    raw = next((folder / "raw").glob("*.parquet"))
    features = chosen(preset).features
    if name in ("local", "spark"):
        ours(name, folder, memory, preset)
    elif name == "common":
        common_script(folder / "log.csv", folder / "common.parquet", memory)
    else:
        {"polars": with_polars, "duckdb": with_duckdb}[name](
            raw, folder / f"{name}.parquet", features.windows, features.label_delay
        )


def take_turns(folder: Path, names: Sequence[str], rounds: int, memory: str, preset: str) -> dict[str, list[Measured]]:
    """Everybody's runs, in alternating rounds; raises `RuntimeError` when a peer's values are not ours."""
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    windows = chosen(preset).features.windows
    options = ["--folder", str(folder), "--memory", memory, "--preset", preset]
    for turn in range(rounds):
        for name in names:
            shutil.rmtree(folder / "common.parquet", ignore_errors=True)
            run = measured([sys.executable, __file__, "--contender", name, *options])
            runs[name].append(run)
            say(f"{name}: {run.seconds:.1f} s, {run.cpu:.1f} s of processor, {run.peak:.2f} GiB")
            if (
                turn == 0
                and name in ("polars", "duckdb")
                and (found := differences(folder, folder / f"{name}.parquet", windows))
            ):
                raise RuntimeError(f"{name} computes other values: {found}")
    return runs


def ratio(results: dict[str, dict[str, float]], what: str, one: str, other: str) -> str:
    return f"{results[other][what] / results[one][what]:.2f}" if one in results and other in results else ""


WHAT = {
    "local": "engine `local`: all features",
    "spark": "engine `spark`: all features",
    "polars": "Polars: the compared features",
    "duckdb": "DuckDB: the compared features",
    "common": "the common Spark script: no history",
}


def tables(results: dict[str, dict[str, float]], rows: int, preset: str, features: int, compared: int) -> list[dict]:
    """Results for people."""
    lines = [
        [
            WHAT[name],
            f"{one['seconds']:.1f} ({one['least']:.1f} to {one['most']:.1f})",
            f"{one['cpu']:.1f}",
            f"{one['peak']:.2f}",
            ratio(results, "seconds", "local", name),
            ratio(results, "cpu", "local", name),
            ratio(results, "seconds", "common", name),
        ]
        for name, one in results.items()
    ]
    equal = (
        f"; the {compared} that Polars and DuckDB compute are equal, bit for bit"
        if {"polars", "duckdb"} & results.keys()
        else ""
    )
    return [
        {
            "title": f"Features of {rows:,} transactions (preset {preset})",
            "note": "Whole processes, from a Parquet log (the common script: from CSV) to Parquet features, "
            f"{THREADS} threads. Ours writes {features} features and the keys{equal}.",
            "columns": [
                "",
                "seconds: median (least to most)",
                "processor seconds",
                "peak GiB",
                "seconds / local",
                "processor / local",
                "seconds / common script",
            ],
            "rows": lines,
        }
    ]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="see that it runs; the figures say little")
    options.add_argument("--rows", type=int, default=PUBLISHED)
    options.add_argument("--preset", choices=("paysim", "hard"), default="paysim", help="the simulated log")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--only", choices=CONTENDERS, nargs="+", default=CONTENDERS)
    options.add_argument("--memory", default="4g", help="of Spark's driver")
    options.add_argument("--json", type=Path, help="write the figures there too")
    options.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.contender:
        contend(given.contender, given.folder, given.memory, given.preset)
        return
    rows, rounds, began = (100_000, 1, machine()) if given.quick else (given.rows, given.rounds, machine())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        raw = make_log(folder, rows, given.preset)
        if "common" in given.only:
            as_csv(raw, folder / "log.csv")
        say(f"{rows:,} transactions are there")
        turns = take_turns(folder, given.only, rounds, given.memory, given.preset)
        settings, results = chosen(given.preset), {name: summary(runs) for name, runs in turns.items()}
        features, compared = len(feature_names(settings.contract)), len(compared_names(settings.features.windows))
        write_json(given.json, began, tables(results, rows, given.preset, features, compared))


if __name__ == "__main__":
    main()
