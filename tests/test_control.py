"""The control group on the simulator, from the endpoint's choice over the lake to the next model."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT

from fraud_pkg.core.calibration import fit_calibration
from fraud_pkg.core.contract import DAY, Contract
from fraud_pkg.core.control import (
    LEAST_CONTROLS,
    OUTCOMES_FILE,
    ControlGroup,
    Outcomes,
    control_key,
    draw,
    usable_weights,
)
from fraud_pkg.core.policy import decide
from fraud_pkg.core.record import record_model
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.data.acquire import acquire
from fraud_pkg.data.lake import decision_table
from fraud_pkg.features.table import build_features
from fraud_pkg.model.bakeoff import calibrate_and_write
from fraud_pkg.model.bundle import Bundle, Model, load_bundle
from fraud_pkg.model.example import example_bundle
from fraud_pkg.monitor.live import DecisionWindow, Reference, load_window
from fraud_pkg.serve.auth import load_control_key
from fraud_pkg.serve.batch import score_lake
from fraud_pkg.serve.reload import open_service
from fraud_pkg.serve.rules import ActiveRules
from fraud_pkg.serve.scorer import Scorer
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.stream.decide import decide_batch
from fraud_pkg.stream.messages import BatchResult, payment_fields, read_scored_record, scored_record, topics_of
from fraud_pkg.train.metrics import bootstrap_intervals, evaluate
from fraud_pkg.train.samples import Periods, load_periods, load_test
from fraud_pkg.train.xgboost import train_xgboost

DAYS, LIVE = 40, 20  # length of the log, and when the stream begins
SHARE = 0.3
WORLD = {
    "simulate.rows": 40_000,
    "simulate.days": DAYS,
    "simulate.fraud_rate": 0.02,
    "features.engine": "local",
    "features.label_delay": "1d",
    "decision.alert_budget": 0.02,
    "decision.max_false_block_rate": 0.01,
    "decision.control_share": SHARE,
    "decision.control_most": 1e9,
    "split.validation_hours": 120,
    "xgboost.rounds": 60,
    "evaluate.resamples": 200,
    "serve.reasons": 0,
    "monitor.least_frauds": 2,
}


def world(folder: Path, **cli) -> Settings:
    shutil.copy(PROJECT / "settings.ini", folder / "settings.ini")
    return load_settings(file=folder / "settings.ini", cli=WORLD | cli, environ={})


def champion_of(settings: Settings) -> Bundle:
    """A champion of the days before the stream."""
    acquire(settings)
    build_features(settings)
    periods = load_periods(settings)
    trained = train_xgboost(periods.train, periods.validation, settings, tell=lambda text: None)
    folder, _ = calibrate_and_write(
        trained, periods.train, periods.validation, periods.test, settings, periods.data, periods.gap
    )
    return load_bundle(folder)


def decide_all(settings: Settings, bundle: Bundle, lake: Path) -> pa.Table:
    """Decides the live days as the service does, writes them as the sink does; returns the raw rows of these days."""
    raw = pq.read_table(next((settings.data_dir / "raw").glob("[!_]*.parquet")))
    live = raw.filter(pa.array(raw["time"].to_numpy() >= LIVE * DAY))
    scorer = Scorer(bundle, settings.serve, ActiveRules())
    scorer.control_secret = b"the same choice in each run"  # the bundle's hash changes with the code's revision
    store, contract = MemoryStore(scorer.retention), scorer.contract
    fingerprint = contract.fingerprint  # of all rows alike
    sent = [name for name in raw.column_names if name in scorer.wire.model.model_fields and name != "step"]

    def requests(table: pa.Table) -> list:
        rows = table.select(sent).to_pylist()
        return [scorer.wire.model(**{n: v for n, v in row.items() if v is not None}) for row in rows]

    past = raw.filter(pa.array(raw["time"].to_numpy() < LIVE * DAY))
    for batch in past.to_batches(max_chunksize=2000):
        rows = requests(pa.Table.from_batches([batch]))
        store.record([scorer.to_transaction(scorer.to_payment(row)) for row in rows])
    records: dict[int, list] = {}
    offset = 0
    for batch in live.to_batches(max_chunksize=1000):
        asked = requests(pa.Table.from_batches([batch]))
        scored = scorer.score(asked, store)
        for request, payment, decision, features in zip(
            asked, scored.payments, scored.decisions, scored.features.tolist(), strict=True
        ):
            message = SimpleNamespace(topic="transactions", partition=0, offset=offset)
            fields = payment_fields(request, payment, contract)
            record = scored_record(decision, payment.time, fields, fingerprint, features, message)
            del record["schema"]
            records.setdefault(payment.time // DAY, []).append(record_model(contract).model_validate(record))
            offset += 1
    for day, rows in records.items():
        (lake / f"day={day}").mkdir(parents=True)
        first, last = rows[0].source.offset, rows[-1].source.offset
        pq.write_table(decision_table(rows, contract), lake / f"day={day}/part-0-{first}-{last}.parquet")
    return live


def write_labels(lake: Path, fraud: dict[str, bool]) -> None:
    """Customers complain of frauds that went through; nothing comes back of what was stopped."""
    table = pa.concat_tables(
        pq.read_table(file, columns=["transaction_id", "decision"], partitioning=None)
        for file in sorted(lake.glob("day=*/*.parquet"))
    )
    ids = [
        name
        for name, decision in zip(*(column.to_pylist() for column in table.columns), strict=True)
        if decision == "allow" and fraud[name]
    ]
    (lake / "labels").mkdir()
    pq.write_table(pa.table({"transaction_id": ids, "is_fraud": [True] * len(ids)}), lake / "labels/part-0-0-0.parquet")


@pytest.fixture(scope="module")
def stream(tmp_path_factory, no_pictures):
    """A project with a champion, a lake of its decisions, and what really was fraud."""
    folder = tmp_path_factory.mktemp("control")
    settings = world(folder, **{"split.test_hours": 24 * (DAYS - LIVE)})
    bundle = champion_of(settings)
    lake = folder / "data/decisions"
    live = decide_all(settings, bundle, lake)
    fraud = dict(zip(live["transaction_id"].to_pylist(), live["is_fraud"].to_pylist(), strict=True))
    fraud = {name: bool(known) for name, known in fraud.items()}
    write_labels(lake, fraud)
    return SimpleNamespace(folder=folder, settings=settings, bundle=bundle, lake=lake, fraud=fraud)


def labels_of(lake: Path) -> dict[str, bool]:
    return dict.fromkeys(pq.read_table(lake / "labels/part-0-0-0.parquet")["transaction_id"].to_pylist(), True)


def measured(window: DecisionWindow, weight: np.ndarray, suspicious: float) -> dict[str, float]:
    """Recall and precision as the live checks measure them."""
    found, stopped = window.probability >= suspicious, window.stopped
    frauds = weight[window.fraud]
    return {
        "recall": frauds @ found[window.fraud] / frauds.sum(),
        "precision": weight[stopped] @ window.fraud[stopped] / weight[stopped].sum(),
    }


def chosen_again(truth: DecisionWindow, number: int) -> DecisionWindow:
    """What labels say of the window, had another secret chosen the control group."""
    ids = [str(place) for place in range(len(truth.x))]
    group = ControlGroup(SHARE, 1e9, control_key(str(number).encode(), ""))
    decisions = truth.stopped.astype(np.int8)
    control = np.zeros(len(ids), bool)
    control[list(group.choose(ids, np.ones(len(ids)), decisions, [None] * len(ids)))] = True
    hidden = truth.stopped & ~control
    outcomes = Outcomes(
        decision=hidden.astype(np.int8),
        control=control.astype(np.int8),
        chance=np.where(control, SHARE, np.nan),
        eligible=np.ones(len(ids), bool),
        known=np.zeros(len(ids), bool),
        fraud=truth.fraud & ~hidden,
    )
    weight, summary = usable_weights(outcomes.weights(), control, outcomes.fraud)
    return replace(truth, fraud=outcomes.fraud, stands_for=weight, control=summary)


def test_watch_sees_recall_and_precision_as_they_are_only_with_weights(stream):
    reference = Reference(stream.bundle, stream.settings.monitor)
    steps = {"first_step": 24 * LIVE, "end_step": 24 * DAYS}
    truth = load_window(stream.lake, reference, stream.fraud, **steps)
    seen = load_window(stream.lake, reference, labels_of(stream.lake), **steps)
    assert seen.control.used and seen.control.controls >= LEAST_CONTROLS
    assert abs(seen.control.controls - SHARE * seen.stopped.sum()) < 4 * np.sqrt(SHARE * seen.stopped.sum())
    assert truth.fraud.sum() > seen.fraud.sum() > 0
    once = np.ones(len(truth.fraud))
    actual = measured(truth, once, reference.suspicious)

    def statistic(draw: np.ndarray) -> dict[str, float]:
        return measured(seen, draw * seen.stands_for, reference.suspicious) | {
            f"{name} alone": value for name, value in measured(seen, draw, reference.suspicious).items()
        }

    intervals = bootstrap_intervals(statistic, np.arange(len(once)), 300, 7)
    others = [chosen_again(truth, number) for number in range(100)]
    for name, value in actual.items():
        low, high = intervals[name]
        assert low <= value <= high and high - low < 0.3, name
        assert intervals[f"{name} alone"][1] < value - 0.05, name
        weighed = [measured(other, other.stands_for, reference.suspicious)[name] for other in others]
        alone = [measured(other, once, reference.suspicious)[name] for other in others]
        assert abs(np.mean(weighed) - value) < 3 * np.std(weighed) / 10 + 0.002, name  # a ratio of sums
        assert max(alone) < value - 0.05, name


def retrained(settings: Settings) -> tuple[Periods, np.ndarray]:
    """What the stream brought, and the calibrated probabilities of a model of it in the test period."""
    periods = load_periods(settings)
    trained = train_xgboost(periods.train, periods.validation, settings, tell=lambda text: None)
    model = Model(trained.onnx, len(trained.names))
    held_out = periods.validation
    calibration = fit_calibration(model(held_out.select(trained.names)), held_out.y, held_out.outcome)
    return periods, calibration.apply(model(periods.test.select(trained.names)))


def test_the_next_model_and_its_gate_are_unbiased_only_with_weights(stream):
    settings = world(stream.folder, **{"data.decisions": "data/decisions", "split.test_hours": 168})
    manifest = acquire(settings)
    assert manifest["decisions"]["control"] >= LEAST_CONTROLS
    build_features(settings)
    periods, weighed = retrained(settings)
    for sample in (periods.train, periods.validation, periods.test):
        assert sample.control.sum() >= LEAST_CONTROLS and sample.outcome is not None
    test, bundle = load_test(settings), stream.bundle
    (settings.data_dir / "features" / OUTCOMES_FILE).unlink()
    without, alone = retrained(settings)
    assert without.train.weight is None and periods.train.weight is not None

    actual = np.array([stream.fraud[name] for name in test.transaction_id]).astype(np.int8)
    assert actual.sum() > test.y.sum()
    p = bundle.probability(test.select(bundle.manifest.features, bundle.manifest.vocabulary))
    decisions = decide(p, test.amount, bundle.manifest.policy).decisions
    seen = {
        "truth": replace(test, y=actual, outcome=None, control=None),
        "weighed": test,
        "alone": replace(test, outcome=None, control=None),
    }
    figures = {name: evaluate(sample, p, decisions, settings) for name, sample in seen.items()}
    for name in ("average_precision", "stopped_recall", "stopped_precision", "money_saved_share"):
        value = figures["truth"][name]["value"]
        print(name, figures["truth"][name], figures["weighed"][name], figures["alone"][name])
        assert figures["weighed"][name]["low"] <= value <= figures["weighed"][name]["high"], name
        if name in ("average_precision", "stopped_precision"):  # of the others the intervals are wide
            assert figures["alone"][name]["high"] < value, name
    assert figures["weighed"]["control"]["effective"] < test.y.sum()

    stopped = decisions > 0

    def calibrated(draw: np.ndarray) -> dict[str, float]:
        "How many frauds among what is stopped each model expects, for one that there is."
        frauds = float(draw[stopped] @ actual[stopped])
        return {
            "weighed": float(draw[stopped] @ weighed[stopped]) / frauds,
            "alone": float(draw[stopped] @ alone[stopped]) / frauds,
        }

    intervals = bootstrap_intervals(calibrated, test.account, 300, 7)
    print(intervals)
    assert intervals["weighed"][0] <= 1 <= intervals["weighed"][1]
    assert intervals["alone"][1] < 0.8


@pytest.mark.parametrize("key", ["", "fedcba9876543210", "0123456789abcdef"])
def test_service_stream_and_batch_choose_alike(tmp_path, key):
    (tmp_path / "rules.yaml").write_text("rules: [{name: large, action: review, if: amount > 6000.0}]\n")
    os.utime(tmp_path / "rules.yaml", (0, 0))  # nobody is writing it any more
    settings = world(tmp_path, **{"rules.file": "rules.yaml"})
    bundle = example_bundle(settings.models_dir / "champion", weight=0.002, bias=-3.0, contract=Contract(), control=0.5)
    environ = {"FRAUD_CONTROL_KEY": key} if key else {}
    rows = [
        {"transaction_id": f"t{n}", "step": n, "type": "TRANSFER", "amount": 50.0 * n, "sender": "C1", "receiver": "C2"}
        for n in range(1, 161)
    ]
    services = []
    for _ in range(2):
        service, watcher = open_service(settings, environ, public=False)
        assert watcher.check()
        services.append(service)
    answer = services[0].answer("POST", "/predict/batch", {}, json.dumps({"transactions": rows}).encode())
    answered = json.loads(answer.body)["decisions"]

    scorer, topics, result = services[1].scorer, topics_of(settings.stream), BatchResult()
    messages = [
        SimpleNamespace(
            topic=topics.transactions, partition=0, offset=n, key=None, headers=[], timestamp=0, value=value
        )
        for n, value in enumerate(json.dumps({"schema": 1, **row}).encode() for row in reversed(rows))
    ]
    for begin in range(0, len(messages), 7):  # in another order, and in other batches
        store = MemoryStore(scorer.retention)
        decide_batch(scorer, store, messages[begin : begin + 7], topics, "avro", result)
    (outputs,) = result.outputs.values()
    written = {record.transaction_id: record for record in (read_scored_record(output.value) for output in outputs)}

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "lake.parquet")
    score_lake(tmp_path / "lake.parquet", tmp_path / "scored", settings, load_control_key(environ))
    scored = {row["transaction_id"]: row for row in pq.read_table(tmp_path / "scored").to_pylist()}
    lake = decision_table([written[row["transaction_id"]] for row in rows], Contract()).to_pylist()

    chosen = 0
    for decision, kept in zip(answered, lake, strict=True):
        record, row = written[decision["transaction_id"]], scored[decision["transaction_id"]]
        control = decision["control"] or {"decision": None, "chance": None}
        assert record.model_dump()["control"] == decision["control"]
        assert record.decision == row["decision"] == kept["decision"] == decision["decision"]
        for name, value in control.items():
            assert row[f"control_{name}"] == kept[f"control_{name}"] == value
        amount = record.transaction.amount
        if decision["control"]:
            chosen += 1
            assert decision["decision"] == "allow" and decision["control"]["chance"] == 0.5 and amount <= 6000
    stopped = sum(decision["decision"] != "allow" for decision in answered)
    assert chosen >= 10 and stopped >= 50
    group = ControlGroup.of_policy(
        bundle.manifest.policy, control_key(key.encode(), bundle.manifest.files["manifest.json"])
    )
    assert all(draw(group.key, d["transaction_id"]) < 0.5 for d in answered if d["control"])
