"""A recorded stream is decided as it was when it was recorded: features bit for bit, decisions, reasons and dead
letters.

`tests/recorded` holds the contract, the messages (transactions with attributes, repeats, late ones, invalid ones,
labels), a small model that looks at every feature, and what came out of them. `tests/record_stream.py` records anew.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fraud_pkg.core.contract import HOUR, Contract, contract_from
from fraud_pkg.core.policy import DECISIONS, LIMITS
from fraud_pkg.core.settings import Settings
from fraud_pkg.model.bundle import MANIFEST, MODEL, load_bundle, manifest_hash, manifest_text, sha256_hex
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.rules import ActiveRules
from fraud_pkg.serve.scorer import Scorer
from fraud_pkg.store.journal import JournaledStore
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.store.outbox import OffsetAdvance
from fraud_pkg.stream.decide import decide_batch, label_batch
from fraud_pkg.stream.messages import (
    INVALID_KINDS,
    LABEL_FORMAT,
    BatchResult,
    Output,
    messages_of,
    read_scored_record,
    topics_of,
)

RECORDED = Path(__file__).parent / "recorded"
PAGE = Path(__file__).parents[1] / "docs/stream.md"
# The costs of `[decision]`, and limits that all change some decisions; the price of a review follows the demand.
POLICY = Settings().decision.model_dump() | {
    "alert_budget": 2,
    "least_review": 30,
    "review_price": 20,
    "block_price": 100,
    "segment": "type",
    "segment_budgets": {"TRANSFER": 0.5},
    "segment_prices": {"TRANSFER": 70},
    "control_share": 0,  # decided as ever
}
BATCH = 37  # messages that are decided together
TOPICS = topics_of(Settings().stream)


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RECORDED / name).read_text(encoding="utf-8").splitlines()]


def recorded_scorer(folder: Path) -> Scorer:
    """The recorded model in a bundle, with 0 as the usual value of each feature."""
    recorded = json.loads((RECORDED / "contract.json").read_text(encoding="utf-8"))
    contract = Contract.model_validate(recorded["contract"])
    example_bundle(folder, contract=contract)
    model, manifest = (RECORDED / MODEL).read_bytes(), json.loads((folder / MANIFEST).read_bytes())
    (folder / MODEL).write_bytes(model)
    manifest["vocabulary"] = recorded["vocabulary"]
    manifest["policy"] |= POLICY
    manifest["files"][MODEL] = sha256_hex(model)
    manifest["version"] = manifest["files"][MODEL][:12]
    manifest["reference"] = dict.fromkeys(manifest["features"], 0.0)
    manifest["files"][MANIFEST] = manifest_hash(manifest)
    (folder / MANIFEST).write_bytes(manifest_text(manifest))
    return Scorer(load_bundle(folder), Settings().serve, ActiveRules())


def as_json(message: dict) -> bytes:
    return message["text"].encode() if "text" in message else json.dumps(message["value"]).encode()


def as_avro(message: dict, contract: Contract) -> bytes:
    avro = LABEL_FORMAT if message["topic"] == TOPICS.labels else messages_of(contract).transaction_format
    return avro.write({name: said for name, said in message["value"].items() if name != "schema"})


def received(message: dict, offset: int, value: bytes) -> SimpleNamespace:
    """A recorded message as the client library gives it."""
    return SimpleNamespace(
        topic=message["topic"], partition=0, offset=offset, key=None, headers=[], value=value, timestamp=0
    )


def replay(folder: Path, format: str = "json", left: frozenset[int] = frozenset()) -> Iterator[Output]:
    """What the messages give, batch by batch, by the stream's own functions over a store with a journal.

    With `avro`, the messages at the offsets in `left` stay JSON: some of them cannot be written otherwise.
    """
    scorer, messages = recorded_scorer(folder / "bundle"), lines("messages.jsonl")
    store = JournaledStore(folder / "journal", scorer.retention)
    records = []
    for offset, message in enumerate(messages):
        in_avro = format == "avro" and offset not in left
        value = as_avro(message, scorer.contract) if in_avro else as_json(message)
        records.append(received(message, offset, value))
    for begin in range(0, len(records), BATCH):
        batch, result = records[begin : begin + BATCH], BatchResult()
        decide_batch(scorer, store, [r for r in batch if r.topic == TOPICS.transactions], TOPICS, format, result)
        label_batch(store, [r for r in batch if r.topic == TOPICS.labels], TOPICS, result)
        advance = OffsetAdvance(begin or None, begin + len(batch))
        store.commit(result.transactions, result.labels, {"group/transactions/0": advance}, result.demand)
        for outputs in result.outputs.values():
            yield from outputs
    store.close()


def summary(output: Output) -> dict:
    """A decision with its features as a hash of their bytes; a dead letter with its headers."""
    if output.topic != TOPICS.decisions:
        headers = {name: value.decode() if value else None for name, value in output.headers}
        return {"topic": output.topic, "headers": headers}
    record = read_scored_record(output.value).model_dump(mode="json", by_alias=True)
    features = np.array([np.nan if value is None else value for value in record["features"]], np.float32)
    kept = ("transaction_id", "fraud_probability", "decision", "costs", "prices", "limit", "rule", "reasons")
    kept += ("history", "known_entities", "time")
    decided = {name: record[name] for name in kept} | {"transaction": record["transaction"]}
    return decided | {"features": hashlib.sha256(features.tobytes()).hexdigest()[:16]}


def comparable(row: dict) -> dict:
    """Without what depends on the processor, which may add the model's products in another order."""
    reasons = [reason["feature"] for reason in row.get("reasons", ())]
    return {name: value for name, value in row.items() if name not in ("fraud_probability", "costs")} | {
        "reasons": reasons
    }


def test_a_recorded_stream_is_decided_as_ever(tmp_path):
    expected, found = lines("outputs.jsonl"), [summary(output) for output in replay(tmp_path)]
    assert {row["decision"] for row in expected if "decision" in row} == set(DECISIONS)
    assert {row["limit"] for row in expected if "decision" in row} == set(LIMITS)
    assert len({row["prices"]["review"] for row in expected if "decision" in row}) > 10
    kinds = {row["headers"]["fraud-kind"] for row in expected if "headers" in row}
    assert kinds == set(INVALID_KINDS) - {"model", "source", "replay"}
    assert len(found) == len(expected)
    for now, then in zip(found, expected, strict=True):
        assert comparable(now) == comparable(then)
        assert now.get("fraud_probability", 0) == pytest.approx(then.get("fraud_probability", 0), abs=1e-6)


def test_avro_gives_the_same_decisions_as_json(tmp_path):
    expected = lines("outputs.jsonl")
    dead = frozenset(int(row["headers"]["fraud-offset"]) for row in expected if "headers" in row)
    found = [summary(output) for output in replay(tmp_path, "avro", dead)]
    assert [comparable(row) for row in found] == [comparable(row) for row in expected]


# The contract and the policy of docs/stream.md: few histories, so that a message fits on a page.
SHOWN = contract_from(
    {"device": "category"},
    {
        "sender": "sender history=account partner=receiver statistics=count,last_seen",
        "receiver": "",
        "device": "device statistics=count",
    },
    windows=(HOUR,),
)
SHOWN_POLICY = Settings().decision.model_dump() | {"review_price": 20, "block_price": 15, "control_share": 0}


def shown_scorer(folder: Path) -> Scorer:
    """The example bundle with the costs of the default settings."""
    example_bundle(folder, contract=SHOWN)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["policy"] |= SHOWN_POLICY
    manifest["files"][MANIFEST] = manifest_hash(manifest)
    (folder / MANIFEST).write_bytes(manifest_text(manifest))
    return Scorer(load_bundle(folder), Settings().serve, ActiveRules())


def test_the_page_shows_messages_as_they_are(tmp_path):
    """docs/stream.md: a message of `transactions`, the one of `decisions` that it gives, and a dead letter."""
    sent, decided, refused, dead = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    scorer, result = shown_scorer(tmp_path / "bundle"), BatchResult()
    topic, texts = {"topic": TOPICS.transactions}, (sent, refused)
    records = [received(topic, 7 + i, text.strip().encode()) for i, text in enumerate(texts)]
    decide_batch(scorer, MemoryStore(scorer.retention), records, TOPICS, "json", result)
    by_topic = {output.topic: output for outputs in result.outputs.values() for output in outputs}
    letter, decision = by_topic["transactions.dlq"], by_topic[TOPICS.decisions]
    headers = {name: value.decode() for name, value in letter.headers if value}
    assert (letter.value, headers) == (refused.strip().encode(), json.loads(dead)), json.dumps(headers, indent=1)
    shown, found = json.loads(decided), json.loads(decision.value)
    assert found.pop("fraud_probability") == pytest.approx(shown.pop("fraud_probability"), abs=1e-6)
    assert found == shown, decision.value.decode()
