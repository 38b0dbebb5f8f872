"""Redis and DynamoDB stores on real servers do what the memory store does."""

import itertools
import os
import threading
import time

import pytest
import servers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_pkg.store.journal import JournaledStore
from fraud_pkg.store.outbox import ConflictError, OffsetAdvance, PartitionProgress
from fraud_pkg.store.redis_outbox import RedisOutboxStore
from fraud_pkg.store.dynamodb import create_table
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import StoreError, Transaction

RETENTION = 100
ACCOUNTS = [f"C{i}" for i in range(5)]
fresh = itertools.count()  # names that no example used before: servers are not emptied between examples

operation = st.one_of(
    st.tuples(
        st.just("record"),
        st.lists(
            st.tuples(
                st.integers(0, 9),
                st.integers(0, 60),
                st.sampled_from(ACCOUNTS),
                st.sampled_from(ACCOUNTS),
                st.integers(0, 10**12),
            ),
            max_size=4,
        ),
    ),
    st.tuples(st.just("label"), st.dictionaries(st.integers(0, 11), st.booleans(), max_size=3)),
)


@pytest.fixture(scope="module")
def dynamodb_url(tmp_path_factory):
    with servers.moto(tmp_path_factory.mktemp("moto")) as environ:
        before = dict(os.environ)
        os.environ.update(environ)
        create_table("store")
        create_table("store")  # a second time changes nothing
        yield "dynamodb://store"
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(params=["redis_url", "dynamodb_url"])
def url(request):
    return request.getfixturevalue(request.param)


def seen(store, prefix: str, step: int) -> tuple:
    """All that a store answers about the example `prefix`, without hours before the last RETENTION, which it may have
    kept or not.
    """
    reading = store.read([prefix + account for account in ACCOUNTS], [f"{prefix}{i}" for i in range(12)], step)
    rows = {
        account: [row for row in history.rows() if row[0] > step - RETENTION and any(row[1:])]
        for account, history in reading.histories.items()
    }
    return rows, reading.recorded


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(operation, max_size=12))
def test_same_as_memory(url, operations):
    prefix, memory, remote = f"x{next(fresh)}-", MemoryStore(RETENTION), open_store(url, RETENTION, timeout=5)
    for kind, content in operations:
        if kind == "record":
            events = [
                Transaction(f"{prefix}{i}", step, prefix + orig, prefix + dest, cents)
                for i, step, orig, dest, cents in content
            ]
            assert remote.record(events) == memory.record(events)
        else:
            labels = {f"{prefix}{i}": fraud for i, fraud in content.items()}
            assert remote.label(labels) == memory.label(labels)
        assert seen(remote, prefix, 60) == seen(memory, prefix, 60)


def test_hours_out_of_reach_do_not_count(url):
    store, name = open_store(url, RETENTION, timeout=5), f"old{next(fresh)}"
    store.record([Transaction(f"{name}-1", 10, name, "C9", 5), Transaction(f"{name}-2", 400, name, "C9", 7)])
    assert [row[0] for row in store.read([name], [], 400).histories[name].rows()] == [400]
    store.record([Transaction(f"{name}-3", 401, name, "C9", 7)])
    assert [row[:2] for row in store.read([name], [], 401).histories[name].rows()] == [(400, 1), (401, 1)]


def test_many_writers_lose_nothing(url):
    """Eight threads record the same forty transactions of one pair of accounts in different orders: each counts
    once.
    """
    name = f"busy{next(fresh)}"
    events = [Transaction(f"{name}-{i}", 7, name, f"{name}-to", 100 + i) for i in range(40)]
    new, failures = [], []

    def write(order: int) -> None:
        try:
            store = open_store(url, RETENTION, timeout=10)
            for i in range(40):
                new.extend(store.record([events[(i * 7 + order * 5) % 40]]))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and sum(new) == 40
    reading = open_store(url, RETENTION, timeout=5).read([name, f"{name}-to"], [], 7)
    assert reading.histories[name].rows() == [(7, 40, sum(e.cents for e in events), 0, 0, 0)]
    assert reading.histories[f"{name}-to"].rows() == [(7, 0, 0, 40, sum(e.cents for e in events), 0)]


def test_redis_one_round_trip_each(redis_url):
    """A reading and a recording cost as many commands as they have parts, and none to ask what the server knows."""
    import redis

    client, store, name = redis.Redis.from_url(redis_url), open_store(redis_url, RETENTION), f"trip{next(fresh)}"
    store.record([Transaction(f"{name}-0", 10, name, "C9", 5)])
    client.config_resetstat()
    store.read([name, "C9"], [f"{name}-1"], 10)
    store.record([Transaction(f"{name}-1", 10, name, "C9", 5)])
    calls = {key: value["calls"] for key, value in client.info("commandstats").items()}
    assert calls.get("cmdstat_evalsha") == 1 and not [key for key in calls if "script" in key]
    client.script_flush()  # as after a restart
    assert store.record([Transaction(f"{name}-1", 10, name, "C9", 5), Transaction(f"{name}-2", 10, name, "C9", 5)]) == [
        False,
        True,
    ]


def test_redis_keys_expire(redis_url):
    import redis

    store, name = open_store(redis_url, RETENTION), f"end{next(fresh)}"
    store.record([Transaction(name, 10, name, name, 5)])
    client = redis.Redis.from_url(redis_url)
    for key in (f"fraud:t:{name}", f"fraud:a:{name}"):
        assert 0 < client.ttl(key) <= (RETENTION + 24) * 3600


def test_dynamodb_items_expire(dynamodb_url):
    import boto3

    open_store(dynamodb_url, RETENTION).record([Transaction("expiring", 10, "expiring", "C9", 5)])
    client = boto3.client("dynamodb")
    assert client.describe_time_to_live(TableName="store")["TimeToLiveDescription"]["AttributeName"] == "expires"
    item = client.get_item(TableName="store", Key={"key": {"S": "a#expiring"}, "day": {"N": "0"}})["Item"]
    assert time.time() < int(item["expires"]["N"]) <= time.time() + (RETENTION + 24) * 3600


def test_server_that_went_away(tmp_path):
    with servers.redis(tmp_path) as url:
        store = open_store(url, RETENTION, timeout=0.3)
        store.record([Transaction("t", 1, "a", "b", 5)])
    for call in (
        lambda: store.read(["a"], ["t"], 1),
        lambda: store.record([Transaction("u", 1, "a", "b", 5)]),
        lambda: store.label({"t": True}),
        store.ping,
    ):
        with pytest.raises(StoreError, match=r"store redis://127\.0\.0\.1:\d+/0: "):
            call()


def test_missing_table(dynamodb_url):
    with pytest.raises(StoreError, match="dynamodb://nowhere"):
        open_store("dynamodb://nowhere", RETENTION).ping()


step = st.tuples(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(0, 60),
            st.sampled_from(ACCOUNTS),
            st.sampled_from(ACCOUNTS),
            st.integers(0, 10**12),
        ),
        max_size=3,
    ),
    st.dictionaries(st.integers(0, 11), st.booleans(), max_size=2),
    st.dictionaries(st.integers(0, 2), st.tuples(st.integers(1, 5), st.binary(max_size=8), st.booleans()), max_size=3),
    st.booleans(),
)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(step, max_size=10))
def test_steps_are_whole_or_not_at_all(redis_url, tmp_path_factory, steps):
    """The journal, its process ending at any time, and Redis agree: offsets and tiles move together; a commit from
    the wrong place changes nothing.
    """
    prefix, folder = f"s{next(fresh)}-", tmp_path_factory.mktemp("journal")
    journaled, shared = JournaledStore(folder, RETENTION), RedisOutboxStore(redis_url, RETENTION, 5)
    at: dict[str, PartitionProgress] = {}
    recorded: set[str] = set()
    for content, known, partitions, ends in steps:
        events = [
            Transaction(f"{prefix}{i}", hour, prefix + orig, prefix + dest, cents)
            for i, hour, orig, dest, cents in content
        ]
        labels = {f"{prefix}{i}": fraud for i, fraud in known.items()}
        names = {f"{prefix}{number}": given for number, given in partitions.items()}
        begins = {name: at[name].position if name in at else None for name in names}
        advances = {
            name: OffsetAdvance(
                (begins[name] or 0) + 7 if wrong else begins[name], (begins[name] or 0) + further, outputs
            )
            for name, (further, outputs, wrong) in names.items()
        }
        refused = any(wrong for _, _, wrong in names.values()) or any(
            event.transaction_id in recorded for event in events
        )
        for store in (journaled, shared):
            if refused:
                with pytest.raises(ConflictError, match="another consumer has moved on"):
                    store.commit(events, labels, advances)
            else:
                store.commit(events, labels, advances)
        if not refused:
            recorded |= {event.transaction_id for event in events}
            at |= {name: PartitionProgress(advance.position, advance.outputs) for name, advance in advances.items()}
        if ends:
            journaled.close()  # what the process's memory had is gone
            journaled = JournaledStore(folder, RETENTION)
        asked = [f"{prefix}{number}" for number in range(3)]
        assert journaled.progress(asked) == shared.progress(asked) == at
        assert seen(journaled, prefix, 60) == seen(shared, prefix, 60)
    journaled.close()


def test_a_step_in_a_redis_that_forgot_its_scripts(redis_url):
    store = RedisOutboxStore(redis_url, RETENTION, 5)
    store._client.script_flush()
    store.commit(
        [Transaction("script-1", 5, "script-a", "script-b", 10)], {}, {"script/0": OffsetAdvance(None, 1, b"\xff\x00")}
    )
    assert store.progress(["script/0"]) == {"script/0": PartitionProgress(1, b"\xff\x00")}
    assert store.read(["script-a"], [], 5).histories["script-a"].rows() == [(5, 1, 10, 0, 0, 0)]


def test_a_full_disk_refuses_the_step(tmp_path):
    """Nothing of it has happened, and the store goes on when there is room again."""
    store = JournaledStore(tmp_path / "store", RETENTION)
    store.commit([Transaction("a", 5, "C1", "C2", 10)], {}, {"p/0": OffsetAdvance(None, 1)})
    pages = store._journal.execute("PRAGMA page_count").fetchone()[0]
    store._journal.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full"):
        store.commit([Transaction(f"b{i}", 6, "C1", "C2", 10) for i in range(2000)], {}, {"p/0": OffsetAdvance(1, 2)})
    assert store.progress(["p/0"]) == {"p/0": PartitionProgress(1)} and len(store.state.transactions) == 1
    store._journal.execute("PRAGMA max_page_count = 100000")
    store.commit([Transaction("b", 6, "C1", "C2", 10)], {}, {"p/0": OffsetAdvance(1, 2)})
    store.close()
    again = JournaledStore(tmp_path / "store", RETENTION)
    assert (len(again.state.transactions), again.progress(["p/0"])) == (2, {"p/0": PartitionProgress(2)})
    again.close()
