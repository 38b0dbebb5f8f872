"""Redis and DynamoDB stores on real servers do what the memory store does."""

import concurrent.futures
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import dynamo_rules
import httpx
import payments
import numpy as np
import pytest
import servers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from payments import CONTRACT

from fraud_pkg.core.contract import DAY, HOUR, MINUTE, Contract
from fraud_pkg.core.live_price import Demand
from fraud_pkg.features.payment import OnlinePayments
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import Wire
from fraud_pkg.store import dynamodb
from fraud_pkg.store.dynamodb import DynamoStore, create_table
from fraud_pkg.store.journal import JournaledStore
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.store.open import open_store
from fraud_pkg.store.outbox import ConflictError, OffsetAdvance, PartitionProgress
from fraud_pkg.store.redis_outbox import RedisOutboxStore
from fraud_pkg.store.tiles import (
    History,
    LoadableStore,
    OnlineStore,
    Posting,
    Retention,
    StoreError,
    Transaction,
    pack_history,
    read_for,
    retention_of,
)

FEW = Retention(minutes=5, hours=3, days=payments.DAYS + 2, pair=(payments.DAYS + 2) * DAY)  # so that much is dropped
WIRE, ONLINE = Wire(CONTRACT), OnlinePayments(CONTRACT, {})
fresh = itertools.count()  # tables that no example used before
Opened = Callable[[Retention], LoadableStore]
drawn = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def transaction_of(row: Mapping, name: object) -> Transaction:
    """A drawn payment as stores record it."""
    return ONLINE.transaction(WIRE.payment(WIRE.model.model_validate(payments.request(row, str(name)))))


def plain(name: str, moment: int, sender: str, receiver: str, cents: int = 5) -> Transaction:
    """A payment between two accounts."""
    pair = f"receiver+sender:{receiver}|{sender}"
    postings = (Posting(f"account:{sender}", 0, pair), Posting(f"account:{receiver}", 1, pair))
    return Transaction(name, moment, cents, postings)


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    with servers.moto(tmp_path_factory.mktemp("moto")) as environ, pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(params=["redis", "dynamodb"])
def opened(request) -> Opened:
    """Opens stores in which nothing is."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        return lambda retention: emptied(url, retention)
    request.getfixturevalue("aws")
    return new_table


def emptied(url: str, retention: Retention) -> LoadableStore:
    import redis

    redis.Redis.from_url(url).flushall()
    return open_store(url, retention, timeout=5)


def new_table(retention: Retention) -> DynamoStore:
    name = f"store{next(fresh)}"
    create_table(name)
    create_table(name)  # a second time changes nothing
    return DynamoStore(name, retention, timeout=5)


def seen(store: OnlineStore, transactions: Iterable[Transaction]) -> tuple:
    """All that a store says of what these payments touch."""
    snapshot = read_for(store, list(transactions))
    return snapshot.histories, snapshot.pairs, snapshot.recorded, snapshot.frauds


operation = st.tuples(st.just("record"), st.lists(st.tuples(st.integers(0, 9), payments.rows), max_size=4)) | st.tuples(
    st.just("label"), st.dictionaries(st.integers(0, 11), st.booleans(), max_size=3)
)


@settings(drawn, max_examples=25)
@given(operations=st.lists(operation, max_size=12))
def test_same_as_memory(opened, operations):
    """Whatever the order of payments and labels, byte for byte."""
    memory, remote, sent = MemoryStore(FEW), opened(FEW), []
    for kind, content in operations:
        if kind == "record":
            new = [transaction_of(row, name) for name, row in content]
            sent += new
            assert remote.record(new) == memory.record(new)
        else:
            labels = {str(name): fraud for name, fraud in content.items()}
            assert sorted(remote.label(labels)) == sorted(memory.label(labels))
        assert seen(remote, sent) == seen(memory, sent)


SHORT = CONTRACT.model_copy(
    update={
        "windows": (10 * MINUTE, HOUR, DAY),
        "label_delay": 1,
        "entities": tuple(entity.model_copy(update={"windows": ()}) for entity in CONTRACT.entities),
    }
)


@settings(drawn, max_examples=20)
@given(
    rows=st.lists(st.tuples(payments.rows, st.integers(0, 3 * DAY), st.integers(0, HOUR)), min_size=1, max_size=20),
)
def test_what_a_store_forgot_changes_no_feature(opened, rows):
    """Two months in order, some payments an hour late: memory forgets by the newest payment, servers by their clock."""
    retention, online, now = retention_of(SHORT), OnlinePayments(SHORT, {}), 0
    memory, remote = MemoryStore(retention), opened(retention)
    for number, (row, gap, late) in enumerate(rows):
        now += gap
        said = payments.request({**row, "time": max(0, now - late)}, str(number))
        payment = WIRE.payment(WIRE.model.model_validate(said))
        transaction, features = online.transaction(payment), []
        for store in (memory, remote):
            snapshot = read_for(store, [transaction])
            own = online.features(payment, snapshot.pairs)
            features.append(own + online.history_features(transaction, snapshot.histories))
            assert store.record([transaction]) == [True]
            if row["fraud"] is not None:
                assert store.label({str(number): row["fraud"]}) == []
        np.testing.assert_array_equal(np.array(features[0], np.float32), np.array(features[1], np.float32))


def test_many_writers_lose_nothing(opened):
    """Eight threads record the same forty transactions of one pair of accounts in different orders: each counts
    once.
    """
    shared = opened(FEW)
    sent = [plain(f"busy-{i}", 7 * HOUR + i, "from", "to", 100 + i) for i in range(40)]
    new, failures = [], []

    def write(order: int) -> None:
        try:
            store = shared if order % 2 else again(shared)
            for i in range(40):
                new.extend(store.record([sent[(i * 7 + order * 5) % 40]]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and sum(new) == 40
    memory = MemoryStore(FEW)
    memory.record(sent)
    assert seen(shared, sent) == seen(memory, sent)
    assert read_for(shared, sent).history("account:from").tiles[1] == [(7, 40, sum(t.cents for t in sent), 0, 0, 1, 0)]


def again(store) -> LoadableStore:
    """Another client of the same store."""
    url = f"dynamodb://{store.table}" if hasattr(store, "table") else store.address
    return open_store(url, store.retention, timeout=10)


@pytest.fixture(scope="module")
def busiest() -> dict[str, bytes]:
    """A payment every second for 60 days."""
    history, retention = History(), retention_of(Contract())
    for minute in range(60 * DAY // MINUTE):
        history.add(minute * MINUTE, (60, 60 * 500, 0, 0, 1, 0), retention)
        history.seen(minute * MINUTE, None)
    history.seen(60 * DAY - 2, (48.2, 16.4))
    history.seen(60 * DAY - 1, (48.2, 16.4))
    history.add(60 * DAY - 1, (0,) * 6, retention)  # forgets what the seconds before made old
    return {"account:busiest": pack_history(history)}


def test_the_busiest_entity_has_a_bound(opened, busiest):
    """Whatever its traffic: its state is at most 20 kB, and grows by nothing."""
    store = opened(retention_of(Contract()))
    assert store.load(busiest, {}, [], (), "past") and not store.load(busiest, {}, [], (), "past")
    sizes = set()
    for second in range(3):
        store.record([plain(f"b{second}", 60 * DAY - 1 - second, "busiest", "shop")])
        sizes.add(len(store.read(["account:busiest"], [], []).histories["account:busiest"]))
    assert sizes == {len(busiest["account:busiest"])} and max(sizes) <= 20_000


def test_reading_the_busiest_entity_costs_no_more(redis_url, busiest):
    """Bytes that Redis sends for it, beside those for an entity with a payment every ten minutes."""
    import redis

    retention = retention_of(Contract())
    store, client = emptied(redis_url, retention), redis.Redis.from_url(redis_url)
    ordinary = History()
    for number in range(60 * DAY // (10 * MINUTE)):
        ordinary.add(number * 10 * MINUTE, (1, 500, 0, 0, 0, 0), retention)
        ordinary.seen(number * 10 * MINUTE, None)
    store.load({**busiest, "account:ordinary": pack_history(ordinary)}, {}, [], (), "past")

    def sent(key: str) -> int:
        before = client.info("stats")["total_net_output_bytes"]
        own = client.info("stats")["total_net_output_bytes"] - before  # that of asking
        store.read([key], [], [])
        return client.info("stats")["total_net_output_bytes"] - before - 2 * own

    assert client.strlen("fraud:e:account:busiest") <= 20_000
    assert sent("account:busiest") <= 7_000
    assert sent("account:busiest") - sent("account:ordinary") <= 36 * retention.minutes  # its minutes alone


def test_redis_one_round_trip_each(redis_url):
    """A reading and a recording cost as many commands as they have parts, and none to ask what the server knows."""
    import redis

    client, store = redis.Redis.from_url(redis_url), emptied(redis_url, FEW)
    first, second, third = (plain(f"trip-{i}", 10, "trip", "C9") for i in range(3))
    store.record([first])
    client.config_resetstat()
    read_for(store, [second])
    store.record([second])
    calls = {key: value["calls"] for key, value in client.info("commandstats").items()}
    assert calls.get("cmdstat_evalsha") == calls.get("cmdstat_mget") == 1 and not [
        key for key in calls if "script" in key
    ]
    client.script_flush()  # as after a restart
    assert store.record([second, third]) == [False, True]


def test_redis_keys_expire(redis_url):
    import redis

    emptied(redis_url, FEW).record([plain("end", 10, "end", "end")])
    client = redis.Redis.from_url(redis_url)
    kept = {key.decode() for key in client.keys("*")}
    assert kept == {"fraud:t:end", "fraud:e:account:end", "fraud:p:receiver+sender:end|end", "fraud:newest"}
    assert all(0 < client.ttl(key) <= FEW.seconds + DAY for key in kept)


def test_a_time_far_ahead_is_known_from_the_newest(opened):
    """Every store says what the latest time is, to the hour, so that a payment far ahead of it is refused; one that is
    within what may be costs nobody a history.
    """
    store = opened(FEW)
    assert store.read([], [], []).newest is None
    store.record([plain("n1", 7 * HOUR, "ann", "shop"), plain("n2", 7 * HOUR - 9, "bob", "shop")])
    for reader in (store, again(store)):
        assert reader.read([], [], []).newest == 7 * HOUR
    before = store.read(["account:ann"], [], []).histories
    store.record([plain("n3", 9 * HOUR + 30 * DAY, "eve", "shop")])
    found = again(store).read(["account:ann"], [], ["n1"])
    assert (found.newest, found.histories, len(found.recorded)) == (9 * HOUR + 30 * DAY, before, 1)


@pytest.fixture
def crowd(monkeypatch):
    """Makes instances of a store in one table that keeps to DynamoDB's rules, and has them work at once."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    clock = dynamo_rules.Clock()
    monkeypatch.setattr(dynamodb, "time", clock.module)
    monkeypatch.setattr(dynamodb, "random", random.Random(7))
    table = dynamo_rules.Table(clock)

    def instance() -> DynamoStore:
        store = DynamoStore("crowd", FEW, timeout=0.5)
        store._client = table
        return store

    return clock, table, instance


@pytest.mark.parametrize("instances", [50, 100])
def test_many_instances_pay_one_merchant(crowd, instances):
    """All at once, three payments each: none is refused, each is recorded within a second, and the sums are right."""
    clock, table, instance = crowd
    took, sent = [], []

    def pay(number: int) -> Callable[[], None]:
        def one_after_the_other() -> None:
            store = instance()
            for k in range(3):
                payment = plain(f"{number}-{k}", 7 * HOUR + number, f"C{number}", "M1", 100 + number)
                began = clock.now
                read_for(store, [payment])
                assert store.record([payment], [Demand(7, 0, False)]) == [True]
                took.append(clock.now - began)
                sent.append(payment)

        return one_after_the_other

    clock.run(pay(number) for number in range(instances))
    took.sort()
    print(f"{instances} instances: median {took[len(took) // 2]:.3f} s, longest {took[-1]:.3f} s; {table.reasons}")
    assert len(sent) == 3 * instances and took[-1] < 1
    memory = MemoryStore(FEW)
    memory.record(sent)
    found = []
    clock.run([lambda: found.append(seen(instance(), sent))])
    assert found == [seen(memory, sent)]


def test_a_merchant_with_hundreds_of_payments_a_second(crowd):
    """300 a second for eight seconds, at random, from 100 instances, into a history with every tile: more than one
    partition takes.
    """
    clock, table, instance = crowd
    took, chance, pool = [], random.Random(3), [instance() for _ in range(100)]
    retention = pool[0].retention

    def pay(number: int, moment: float) -> Callable[[], None]:
        def one() -> None:
            clock.sleep(moment)
            store = pool.pop() if pool else instance()
            payment = plain(f"r{number}", 7 * HOUR, f"C{number}", "M1", 100)
            began = clock.now
            read_for(store, [payment])
            assert store.record([payment]) == [True]
            took.append(clock.now - began)
            pool.append(store)

        return one

    full = History()
    for minute in range(7 * 60):
        full.add(minute * MINUTE, (0, 0, 1, 100, 0, 0), retention)
    clock.run([lambda: instance().load({"account:M1": pack_history(full)}, {}, [], (), "past")])
    clock.run(pay(number, chance.uniform(0, 8)) for number in range(2400))
    took.sort()
    print(f"300/s: median {took[1200]:.3f} s, p99 {took[2376]:.3f} s, longest {took[-1]:.3f} s; {table.reasons}")
    assert len(took) == 2400 and took[-1] < 2


def test_dynamodb_items_expire(aws):
    import boto3

    store = new_table(FEW)
    store.record([plain("expiring", 10, "expiring", "C9")])
    client = boto3.client("dynamodb")
    assert client.describe_time_to_live(TableName=store.table)["TimeToLiveDescription"]["AttributeName"] == "expires"
    for key in ("t#expiring", "e#account:expiring", "p#receiver+sender:C9|expiring"):
        item = client.get_item(TableName=store.table, Key={"key": {"S": key}})["Item"]
        assert time.time() < int(item["expires"]["N"]) <= time.time() + FEW.seconds + DAY


def test_server_that_went_away(tmp_path):
    with servers.redis(tmp_path) as url:
        store = open_store(url, FEW, timeout=0.3)
        store.record([plain("t", 1, "a", "b")])
    for call in (
        lambda: store.read(["account:a"], [], ["t"]),
        lambda: store.record([plain("u", 1, "a", "b")]),
        lambda: store.label({"t": True}),
        lambda: store.load({}, {}, [], (), "chunk"),
        store.ping,
    ):
        with pytest.raises(StoreError, match=r"store redis://127\.0\.0\.1:\d+/0: "):
            call()


def test_missing_table(aws):
    with pytest.raises(StoreError, match="dynamodb://nowhere"):
        open_store("dynamodb://nowhere", FEW).ping()


def test_two_services_with_one_redis(tmp_path, redis_url):
    """Payments go to one service or the other, several at a time: the totals are those of one that saw everything."""
    import redis

    redis.Redis.from_url(redis_url).flushall()
    example_bundle(tmp_path / "one/champion", contract=CONTRACT)
    example_bundle(tmp_path / "two/champion", contract=CONTRACT)
    sent = [
        {
            "transaction_id": f"p{i}",
            "time": DAY + 7 * i,
            "amount": 1 + i / 100,
            "sender": f"C{i % 5}",
            "receiver": f"C{i % 3}",
            "device": f"device_{i % 2}",
            "mcc": "mcc_1",
        }
        for i in range(400)
    ]
    with (
        servers.service(tmp_path / "one", store__url=redis_url) as (one, _),
        servers.service(tmp_path / "two", store__url=redis_url) as (two, _),
        httpx.Client(timeout=30) as client,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):

        def send(number: int) -> int:
            url = one if number % 3 else two
            return client.post(f"{url}/predict", json=sent[number]).status_code

        assert set(pool.map(send, range(len(sent)))) == {200}
        frauds = {f"p{i}": True for i in range(0, 400, 40)}
        labels = [{"transaction_id": name, "is_fraud": True} for name in frauds]
        assert client.post(f"{two}/feedback", json={"labels": labels}).json() == {"recorded": 10, "unknown": []}
    retention = retention_of(CONTRACT)
    memory = MemoryStore(retention)
    recorded = [ONLINE.transaction(WIRE.payment(WIRE.model.model_validate(said))) for said in sent]
    assert all(memory.record(recorded))
    memory.label(frauds)
    assert seen(open_store(redis_url, retention), recorded) == seen(memory, recorded)


step = st.tuples(
    st.lists(st.tuples(st.integers(0, 9), payments.rows), max_size=3),
    st.dictionaries(st.integers(0, 11), st.booleans(), max_size=2),
    st.dictionaries(st.integers(0, 2), st.tuples(st.integers(1, 5), st.binary(max_size=8), st.booleans()), max_size=3),
    st.booleans(),
)


@settings(drawn, max_examples=40)
@given(steps=st.lists(step, max_size=10))
def test_steps_are_whole_or_not_at_all(redis_url, tmp_path_factory, steps):
    """The journal, its process ending at any time, and Redis agree: offsets and tiles move together; a commit from
    the wrong place changes nothing.
    """
    folder = tmp_path_factory.mktemp("journal")
    emptied(redis_url, FEW)
    journaled, shared = JournaledStore(folder, FEW), RedisOutboxStore(redis_url, FEW, 5)
    at: dict[str, PartitionProgress] = {}
    sent: dict[str, Transaction] = {}
    for content, known, partitions, ends in steps:
        transactions = [transaction_of(row, name) for name, row in content]
        labels = {str(name): fraud for name, fraud in known.items()}
        names = {str(number): given for number, given in partitions.items()}
        begins = {name: at[name].position if name in at else None for name in names}
        advances = {
            name: OffsetAdvance(
                (begins[name] or 0) + 7 if wrong else begins[name], (begins[name] or 0) + further, outputs
            )
            for name, (further, outputs, wrong) in names.items()
        }
        refused = any(wrong for _, _, wrong in names.values()) or any(t.transaction_id in sent for t in transactions)
        for store in (journaled, shared):
            if refused:
                with pytest.raises(ConflictError, match="another consumer has moved on"):
                    store.commit(transactions, labels, advances)
            else:
                store.commit(transactions, labels, advances)
        if not refused:
            sent = {transaction.transaction_id: transaction for transaction in transactions} | sent
            at |= {name: PartitionProgress(advance.position, advance.outputs) for name, advance in advances.items()}
        if ends:
            journaled.close()  # what the process's memory had is gone
            journaled = JournaledStore(folder, FEW)
        asked = [str(number) for number in range(3)]
        assert journaled.progress(asked) == shared.progress(asked) == at
        assert seen(journaled, sent.values()) == seen(shared, sent.values())
    journaled.close()


def test_a_step_in_a_redis_that_forgot_its_scripts(redis_url):
    store = RedisOutboxStore(redis_url, FEW, 5)
    store._client.flushall()
    store._client.script_flush()
    payment = plain("script-1", 5, "script-a", "script-b", 10)
    store.commit([payment], {}, {"script/0": OffsetAdvance(None, 1, b"\xff\x00")})
    assert store.progress(["script/0"]) == {"script/0": PartitionProgress(1, b"\xff\x00")}
    assert store.read(["account:script-a"], [], []).history("account:script-a").tiles[2] == [(0, 1, 10, 0, 0, 1, 0)]


def test_a_full_disk_refuses_the_step(tmp_path):
    """Nothing of it has happened, and the store goes on when there is room again."""
    store = JournaledStore(tmp_path / "store", FEW)
    store.commit([plain("a", 5, "C1", "C2", 10)], {}, {"p/0": OffsetAdvance(None, 1)})
    pages = store._journal.execute("PRAGMA page_count").fetchone()[0]
    store._journal.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full"):
        store.commit([plain(f"b{i}", 6, "C1", "C2", 10) for i in range(2000)], {}, {"p/0": OffsetAdvance(1, 2)})
    assert store.progress(["p/0"]) == {"p/0": PartitionProgress(1)} and len(store.state.transactions) == 1
    store._journal.execute("PRAGMA max_page_count = 100000")
    store.commit([plain("b", 6, "C1", "C2", 10)], {}, {"p/0": OffsetAdvance(1, 2)})
    store.close()
    restarted = JournaledStore(tmp_path / "store", FEW)
    assert (len(restarted.state.transactions), restarted.progress(["p/0"])) == (2, {"p/0": PartitionProgress(2)})
    restarted.close()
