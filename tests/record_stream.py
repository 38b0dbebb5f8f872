"""Records `tests/recorded` anew, after a change of features or formats that is meant: `python tests/record_stream.py`.

The same messages and model each time; look at the difference of outputs.jsonl before you commit it.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from test_recorded_stream import RECORDED, replay, summary

from fraud_pkg.core.contract import DAY, HOUR, MINUTE, Contract, contract_from
from fraud_pkg.features.definitions import feature_names

ATTRIBUTES = {
    "device": "category",
    "network": "category column=ip derive=network:24",
    "chip": "flag",
    "items": "number",
    "fee": "money",
    "opened": "moment",
    "shop": "place",
}
ENTITIES = {
    "device": "device partner=sender",
    "network": "network windows=10m,24h",
    "payee": "sender+receiver windows=24h,30d statistics=count,last_seen",
    "sender": "sender history=account partner=receiver statistics=all",
}
VOCABULARY = {
    "type": ["CASH_OUT", "PAYMENT", "TRANSFER"],
    "currency": ["EUR"],
    "device": ["d1", "d2", "d3"],
    "network": ["10.0.1.0/24"],
}
PAYMENTS = 420
SCALES = {"amount": 2000, "sum": 2000, "balance": 2000, "seen": DAY, "km": 1000, "days": 30}


def contract() -> Contract:
    return contract_from(ATTRIBUTES, ENTITIES, label_delay=1)


def recorded_onnx(names: list[str]) -> bytes:
    """sigmoid(tanh(features / scale) @ weights + bias), a missing value counting as 0."""
    rng = np.random.default_rng(3)
    scales = [next((scale for word, scale in SCALES.items() if word in name.split("_")), 5) for name in names]
    constants = {
        "zero": np.zeros(1, np.float32),
        "scale": np.array([scales], np.float32),
        "weights": rng.normal(0, 0.5, (len(names), 1)).round(3).astype(np.float32),
        "bias": np.array([0.5], np.float32),
    }
    nodes = [
        helper.make_node("IsNaN", ["features"], ["missing"]),
        helper.make_node("Where", ["missing", "zero", "features"], ["known"]),
        helper.make_node("Div", ["known", "scale"], ["scaled"]),
        helper.make_node("Tanh", ["scaled"], ["bounded"]),
        helper.make_node("MatMul", ["bounded", "weights"], ["sum"]),
        helper.make_node("Add", ["sum", "bias"], ["log_odds"]),
        helper.make_node("Sigmoid", ["log_odds"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "recorded",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, len(names)])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 15)]).SerializeToString()


def payments() -> list[dict]:
    """Payments of two months: bursts within minutes, days without any, ties, some that say little."""
    rng, time, made = np.random.default_rng(11), 40 * DAY, []
    for number in range(PAYMENTS):
        time += int(rng.choice([0, 7, 2 * MINUTE, HOUR, 9 * HOUR], p=[0.1, 0.3, 0.2, 0.2, 0.2]))
        payment = {
            "schema": 1,
            "transaction_id": f"r-{number:04}",
            "time": time,
            "type": str(rng.choice(["CASH_OUT", "PAYMENT", "TRANSFER", "DEBIT"])),
            "amount": round(float(rng.lognormal(5, 1)), 2),
            "currency": "EUR",
            "sender": f"C{rng.integers(1, 16)}",
            "sender_balance": round(float(rng.lognormal(7, 1)), 2),
            "receiver": f"{rng.choice(['C', 'M'])}{rng.integers(1, 9)}",
            "device": f"d{rng.integers(1, 6)}",
            "network": f"10.0.{rng.integers(1, 4)}.{rng.integers(1, 250)}",
            "chip": bool(rng.random() < 0.5),
            "items": int(rng.integers(1, 9)) / 2,
            "fee": round(float(rng.random()), 2),
            "opened": time - int(rng.integers(0, 900)) * DAY,
            "shop_latitude": round(float(rng.uniform(-60, 60)), 4),
            "shop_longitude": round(float(rng.uniform(-180, 180)), 4),
        }
        if rng.random() < 0.15:
            kept = ("schema", "transaction_id", "time", "amount", "sender")
            payment = {name: payment[name] for name in kept}
        made.append(payment)
    return made


def invalid(payment: dict) -> list[dict]:
    """Messages that cannot be used, made of one that can."""
    name = payment["transaction_id"]
    changes = [
        {"amount": -1},
        {"amount": "12"},
        {"schema": 2},
        {"colour": "red"},
        {"is_fraud": 1},
        {"chip": "yes"},
        {"items": math.pi * 1e308 * 10},
        {"shop_latitude": 91},
        {"shop_longitude": None},
        {"network": "somewhere"},
        {"device": "x" * 300},
        {"step": 5},
        {"time": 400 * DAY},
    ]
    return [payment | {"transaction_id": f"{name}-{i}"} | change for i, change in enumerate(changes)]


def messages() -> Iterator[dict]:
    """Payments in order, and between them late and repeated ones, contradictions, invalid ones and labels."""
    made = payments()
    full = [payment for payment in made if "device" in payment]
    for number, payment in enumerate(made):
        late = number % 20 == 7
        moved = {"time": max(payment["time"] - (number % 3 + 1) * 5 * HOUR, 0)} if late else {}
        yield {"topic": "transactions", "value": payment | moved}
        if number % 30 == 20:
            yield {"topic": "transactions", "value": made[number - 15]}
            yield {"topic": "transactions", "value": made[number - 10] | {"amount": 77.0}}
        if number % 60 == 40:
            yield {"topic": "transactions", "value": full[number // 2] | {"device": "d9"}}
        if number % 6 == 5:
            known = made[number - 5]["transaction_id"]
            yield {"topic": "labels", "value": {"schema": 1, "transaction_id": known, "is_fraud": number % 12 == 5}}
        if number == 200:
            yield from ({"topic": "transactions", "value": value} for value in invalid(full[100]))
            yield {"topic": "labels", "value": {"transaction_id": "nobody", "is_fraud": True}}
            yield {"topic": "labels", "value": {"transaction_id": "r-0001", "is_fraud": 1}}
            yield from ({"topic": "transactions", "text": text} for text in ("", "{", "[]"))


def write_lines(name: str, rows: list[dict]) -> None:
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
    (RECORDED / name).write_text(text, encoding="utf-8")


def main() -> None:
    made = contract()
    content = {"contract": made.model_dump(mode="json"), "vocabulary": VOCABULARY}
    (RECORDED / "contract.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (RECORDED / "model.onnx").write_bytes(recorded_onnx(feature_names(made)))
    write_lines("messages.jsonl", list(messages()))
    with tempfile.TemporaryDirectory() as folder:
        write_lines("outputs.jsonl", [summary(output) for output in replay(Path(folder))])


if __name__ == "__main__":
    main()
