"""A recorded stream is decided as it was when it was recorded: features bit for bit, decisions, reasons and dead
letters.

`tests/recorded` holds the messages (transactions, repeats, late ones, invalid ones, labels), a small model that
looks at
every feature, and what came out of them.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fraud_pkg.core.calibration import Calibration
from fraud_pkg.core.policy import Thresholds
from fraud_pkg.core.settings import Settings
from fraud_pkg.features.definitions import feature_names
from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.model.write import write_bundle
from fraud_pkg.serve.scorer import Scorer
from fraud_pkg.store.journal import JournaledStore
from fraud_pkg.store.outbox import OffsetAdvance
from fraud_pkg.stream.decide import decide_batch, label_batch
from fraud_pkg.stream.messages import BatchResult, Output, topics_of
from fraud_pkg.train.samples import Sample, Trained

RECORDED = Path(__file__).parent / "recorded"
WINDOWS = (1, 24, 168, 720)
BATCH = 37  # messages that are decided together


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RECORDED / name).read_text(encoding="utf-8").splitlines()]


def recorded_scorer(folder: Path) -> Scorer:
    """The recorded model in a bundle; its reference rows are made up, and the same each time."""
    names, rows = tuple(feature_names(WINDOWS)), np.arange(50)
    x = np.abs(np.random.default_rng(5).normal(100, 40, (50, len(names)))).astype(np.float32)
    nothing = np.full(50, None), np.zeros(50, bool)
    sample = Sample(x, names, rows % 5 == 0, x[:, 0].astype(float), rows.astype(np.int32), rows, rows, *nothing)
    trained = Trained("recorded", (RECORDED / "model.onnx").read_bytes(), names, {}, [], 0.0, 1.0)
    data = {
        "fingerprint": "0" * 12,
        "rows": 50,
        "source": "recorded",
        "periods": {},
        "epoch": None,
        "windows": WINDOWS,
        "label_delay": 24,
    }
    metrics = {"average_precision": 0.5}
    write_bundle(folder, trained, Calibration(1, 1, 0), Thresholds(0.5, 0.6), metrics, sample, data, Settings())
    return Scorer(load_bundle(folder), Settings().serve, Settings().rules)


def replay(folder: Path) -> Iterator[Output]:
    """What the messages give, batch by batch, by the stream's own functions over a store with a journal."""
    scorer, topics, messages = recorded_scorer(folder / "bundle"), topics_of(Settings().stream), lines("messages.jsonl")
    store = JournaledStore(folder / "journal", scorer.retention)
    for begin in range(0, len(messages), BATCH):
        records = [
            SimpleNamespace(
                topic=message["topic"],
                partition=0,
                offset=begin + i,
                key=None,
                headers=[],
                value=json.dumps(message["value"]).encode(),
                timestamp=0,
            )
            for i, message in enumerate(messages[begin : begin + BATCH])
        ]
        result = BatchResult()
        decide_batch(scorer, store, [r for r in records if r.topic == topics.transactions], topics, "json", result)
        label_batch(store, [r for r in records if r.topic == topics.labels], topics, result)
        advance = OffsetAdvance(begin or None, begin + len(records))
        store.commit(result.transactions, result.labels, {"group/transactions/0": advance})
        for outputs in result.outputs.values():
            yield from outputs
    store.close()


def summary(output: Output) -> dict:
    """A decision with its features as a hash of their bytes; a dead letter with its headers."""
    if output.topic != Settings().stream.decisions:
        headers = {name: value.decode() if value else None for name, value in output.headers}
        return {"topic": output.topic, "headers": headers}
    record = json.loads(output.value)
    features = np.array([np.nan if value is None else value for value in record["features"]], np.float32)
    kept = ("transaction_id", "fraud_probability", "decision", "rule", "reasons", "history", "step")
    return {name: record[name] for name in kept} | {"features": hashlib.sha256(features.tobytes()).hexdigest()[:16]}


def test_a_recorded_stream_is_decided_as_ever(tmp_path):
    expected, found = lines("outputs.jsonl"), [summary(output) for output in replay(tmp_path)]
    assert {row["decision"] for row in expected if "decision" in row} == {"allow", "review", "block"}
    assert len(found) == len(expected)
    for now, then in zip(found, expected, strict=True):
        # A processor may add the model's products in another order: its last digits are its own, all else is equal.
        for row in (now, then):
            row["reasons"] = [reason["feature"] for reason in row.get("reasons", ())]
        probabilities = now.pop("fraud_probability", 0), then.pop("fraud_probability", 0)
        assert now == then
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)
