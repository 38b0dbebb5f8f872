"""The price of a review follows live traffic by the hour: reviews fit the day's budget when traffic triples, and every
endpoint and store decides alike at the same prices.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import servers

from fraud_pkg.core.contract import DAY, HOUR, Contract, contract_from
from fraud_pkg.core.cost import Payments, solve_prices
from fraud_pkg.core.live_price import REVIEWS, price_of_hour, unpack_price
from fraud_pkg.core.policy import DECISIONS, Policy
from fraud_pkg.core.sections import Decision, Serve
from fraud_pkg.core.settings import Settings
from fraud_pkg.model.bundle import MANIFEST, load_bundle, manifest_hash, manifest_text
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.batch import BatchRules, score_rows
from fraud_pkg.serve.rules import ActiveRules
from fraud_pkg.serve.scorer import Scorer
from fraud_pkg.serve.service import Service
from fraud_pkg.store.dynamodb import DynamoStore, create_table
from fraud_pkg.store.journal import JournaledStore
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.store.open import open_store
from fraud_pkg.store.outbox import OffsetAdvance
from fraud_pkg.store.tiles import OnlineStore
from fraud_pkg.stream.decide import decide_batch
from fraud_pkg.stream.messages import BatchResult, read_record, topics_of

COSTS = Decision(alert_budget=30)
CONTRACT = contract_from({}, {}, windows=(HOUR, DAY), label_delay=1)
TOPICS = topics_of(Settings().stream)
CALM = 40  # payments an hour


def traffic(days: int, busy: Iterable[int], seed: int = 3) -> list[dict]:
    """Payments in order, with three times as many in the hours that are busy."""
    rng, made = np.random.default_rng(seed), []
    for hour in range(24 * days):
        times = np.sort(rng.integers(hour * HOUR, (hour + 1) * HOUR, CALM * (3 if hour in busy else 1)))
        made += [
            {
                "transaction_id": f"p{len(made) + i}",
                "time": int(time),
                "type": ["TRANSFER", "CASH_OUT"][rng.integers(2)],
                "amount": round(float(rng.lognormal(5, 1)), 2),
                "sender": f"C{rng.integers(300)}",
                "receiver": f"C{rng.integers(300)}",
            }
            for i, time in enumerate(times)
        ]
    return made


def probability(amount: np.ndarray) -> np.ndarray:
    """What the example's model says."""
    return 1 / (1 + np.exp(8 - 0.01 * amount))


@cache
def solved() -> Policy:
    """With prices found on two calm days."""
    amount = np.array([payment["amount"] for payment in traffic(2, (), seed=2)])
    return solve_prices(Payments(probability(amount), amount, days=2), COSTS)


def by_type() -> Policy:
    """With a low price, and one for transfers."""
    return replace(
        solved(), review_price=3.0, segment="type", segment_budgets={"TRANSFER": 10}, segment_prices={"TRANSFER": 12.0}
    )


def scorer_with(folder: Path, policy: Policy, live: bool = True, contract: Contract = CONTRACT) -> Scorer:
    """The example's model with another policy."""
    example_bundle(folder, contract=contract)
    manifest = json.loads((folder / MANIFEST).read_bytes()) | {"policy": asdict(policy)}
    manifest["files"][MANIFEST] = manifest_hash(manifest)
    (folder / MANIFEST).write_bytes(manifest_text(manifest))
    return Scorer(load_bundle(folder), Serve(live_price=live), ActiveRules())


def by_hour(payments: list[dict], most: int = 50) -> Iterator[list[dict]]:
    """Requests of one hour each."""
    for _, group in itertools.groupby(payments, key=lambda payment: payment["time"] // HOUR):
        rows = list(group)
        yield from (rows[begin : begin + most] for begin in range(0, len(rows), most))


def decided(scorer: Scorer, store: OnlineStore, payments: list[dict]) -> list[dict]:
    return [
        decision
        for rows in by_hour(payments)
        for decision in scorer.score([scorer.wire.model(**row) for row in rows], store).decisions
    ]


def test_reviews_fit_the_day_when_traffic_triples(tmp_path):
    """From ten in the morning of the third day to the end of the fifth. The first day of it may go beyond the budget
    by what nobody can know before; every other one by a fifth.
    """
    payments = traffic(7, range(2 * 24 + 10, 5 * 24))
    day = np.array([payment["time"] // DAY for payment in payments])
    reviews, saved = {}, {}
    for live in (True, False):
        scorer = scorer_with(tmp_path / str(live), solved(), live)
        decisions = decided(scorer, MemoryStore(scorer.retention), payments)
        reviews[live] = np.bincount(day[[d["decision"] == "review" for d in decisions]], minlength=7)
        saved[live] = sum(d["costs"]["allow"] - d["costs"][d["decision"]] for d in decisions)
        prices = [d["prices"]["review"] for d in decisions]
        assert min(prices) == solved().review_price and (len(set(prices)) > 5) == live
    print(f"reviews a day: {reviews[True]} with live prices, {reviews[False]} without")
    print(f"saved, in expectation: {saved[True]:,.0f} with live prices, {saved[False]:,.0f} without")
    budget = COSTS.alert_budget
    assert (reviews[True] <= 1.2 * budget)[[0, 1, 3, 4, 5, 6]].all() and reviews[True][2] <= 1.5 * budget
    assert (reviews[False][[3, 4]] > 2.5 * budget).all()
    assert saved[True] > 0.9 * saved[False]


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    with servers.moto(tmp_path_factory.mktemp("moto")) as environ, pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        yield


def answers(scorer: Scorer, store: OnlineStore, payments: list[dict], most: int) -> list[bytes]:
    """Bodies of a service, each decision on its own: asked one by one, or in batches."""
    service, found = Service(scorer.serve, store, {}), []
    service.use(scorer)
    for rows in by_hour(payments, most):
        if most == 1:
            found.append(service.answer("POST", "/predict", {}, json.dumps(rows[0]).encode()).body)
            continue
        body = service.answer("POST", "/predict/batch", {}, json.dumps({"transactions": rows}).encode()).body
        found += [json.dumps(one, separators=(",", ":")).encode() for one in json.loads(body)["decisions"]]
    return found


def from_the_stream(scorer: Scorer, store: JournaledStore, payments: list[dict]) -> list[bytes]:
    """The same fields of what the stream writes."""
    found, at = [], None
    for rows in by_hour(payments, 13):
        result, offset = BatchResult(), at or 0
        messages = [
            SimpleNamespace(topic="transactions", partition=0, offset=offset + i, key=None, headers=[], timestamp=0,
                            value=json.dumps({"schema": 1, **row}).encode())
            for i, row in enumerate(rows)
        ]  # fmt: skip
        decide_batch(scorer, store, messages, TOPICS, "json", result)
        store.commit(result.transactions, {}, {"p/0": OffsetAdvance(at, offset + len(rows))}, result.demand)
        at = offset + len(rows)
        records = [read_record(output.value) for outputs in result.outputs.values() for output in outputs]
        fields = list(json.loads(answers(scorer, MemoryStore(scorer.retention), payments[:1], 1)[0]))
        found += [json.dumps({name: row[name] for name in fields}, separators=(",", ":")).encode() for row in records]
    return found


def keep_prices(store: OnlineStore, kept: dict[tuple[int, str], bytes]) -> OnlineStore:
    for (hour, name), packed in kept.items():
        assert store.keep_price(hour, name, packed) == packed
    return store


def test_every_endpoint_and_store_decides_alike(tmp_path, redis_url, aws):
    """Byte for byte, given the prices of the hours; with a segment that has a budget of its own."""
    import redis

    redis.Redis.from_url(redis_url).flushall()
    create_table("prices")
    policy, payments = by_type(), traffic(2, range(24, 48))[: 36 * CALM]
    first = scorer_with(tmp_path / "first", policy)
    store = MemoryStore(first.retention)
    expected = answers(first, store, payments, 1)
    prices = {unpack_price(packed).price for packed in store.state.hours.prices.values()}
    limits = {json.loads(body)["limit"] for body in expected}
    assert len(prices) > 2 and limits >= {"review_budget", "segment_budget", None}

    kept = store.state.hours.prices
    for name, other, most in (
        ("memory, in batches", MemoryStore(first.retention), 7),
        ("redis", open_store(redis_url, first.retention, timeout=5), 20),
        ("dynamodb", DynamoStore("prices", first.retention, timeout=5), 40),
    ):
        scorer = scorer_with(tmp_path / name, policy)
        assert answers(scorer, keep_prices(other, kept), payments, most) == expected, name
    journaled = JournaledStore(tmp_path / "journal", first.retention)
    assert from_the_stream(scorer_with(tmp_path / "stream", policy), journaled, payments) == expected
    assert keep_prices(journaled, kept).price_or_demand(25, first.prices.name) == kept[25, first.prices.name]
    journaled.close()


def test_batch_scoring_decides_by_the_prices_of_the_bundle(tmp_path):
    scorer = scorer_with(tmp_path / "bundle", by_type(), live=False)
    payments = traffic(1, ())
    store = MemoryStore(scorer.retention)
    scored = [scorer.score([scorer.wire.model(**row) for row in rows], store) for rows in by_hour(payments)]
    raw = pa.Table.from_pylist(payments)
    columns = score_rows(scorer.bundle, np.concatenate([part.x for part in scored]), raw, {}, BatchRules())
    online = [decision for part in scored for decision in part.decisions]
    for name in ("fraud_probability", "decision", "limit", "rule"):
        assert columns[name].to_pylist() == [decision[name] for decision in online]
    for name in DECISIONS:
        assert columns[f"cost_{name}"].to_pylist() == [decision["costs"][name] for decision in online]


def test_the_first_of_two_services_sets_the_price(tmp_path, redis_url):
    """Both count into the same hours, and a decision is one reading and one script, as without live prices."""
    import redis

    client = redis.Redis.from_url(redis_url)
    client.flushall()
    scorers = [scorer_with(tmp_path / name, solved()) for name in ("one", "two")]
    stores = [open_store(redis_url, scorer.retention, timeout=5) for scorer in scorers]
    payments, memory = traffic(2, range(24, 48))[: 33 * CALM], MemoryStore(scorers[0].retention)
    decisions = []
    for number, rows in enumerate(by_hour(payments, 9)):
        requests = [scorers[0].wire.model(**row) for row in rows]
        decisions += scorers[number % 2].score(requests, stores[number % 2]).decisions
    alone = decided(scorer_with(tmp_path / "alone", solved()), memory, payments)
    assert [d["prices"] for d in decisions] == [d["prices"] for d in alone]
    counts = stores[0].price_or_demand(26, "nobody")
    assert counts == memory.price_or_demand(26, "nobody") and sum(c.get(REVIEWS, 0) for c in counts.values()) > 20
    name = scorers[0].prices.name
    held = unpack_price(stores[1].price_or_demand(25, name))
    assert held == price_of_hour(25, memory.state.hours.before(25), solved())
    assert all(0 < client.ttl(key) <= 3 * DAY for key in client.keys("fraud:[hq]:*"))

    client.config_resetstat()
    late = payments[-1] | {"transaction_id": "late"}
    scorers[0].score([scorers[0].wire.model(**late)], stores[0])
    calls = {key: value["calls"] for key, value in client.info("commandstats").items()}
    assert calls["cmdstat_mget"] == calls["cmdstat_evalsha"] == 1
    assert not {"cmdstat_hgetall", "cmdstat_pipeline"} & set(calls)
