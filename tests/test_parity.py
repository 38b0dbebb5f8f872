"""What is decided online is what was learned offline: replayed transaction by transaction, features equal Spark's, bit
for bit.
"""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from conftest import shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_pkg.features.local import local_history
from fraud_pkg.features.definitions import feature_names
from fraud_pkg.features.kernel import matrix
from fraud_pkg.store.dynamodb import create_table
from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import Transaction
from fraud_pkg.serve.scorer import look_back, request_features
from fraud_pkg.serve.wire import TransactionRequest

WINDOWS = (1, 24, 168, 720)
NAMES = feature_names(WINDOWS)
fresh = itertools.count()  # accounts that no example used before


def live(row: dict) -> TransactionRequest:
    """A row of the raw table as its sender would have sent it."""
    return TransactionRequest(
        transaction_id=str(row["tx_id"]),
        step=row["step"],
        type=row["type"],
        amount=row["amount"],
        sender=row["sender"],
        sender_balance=row["sender_balance"],
        receiver=row["receiver"],
        receiver_balance=row["receiver_balance"],
    )


def requests(rows: list[dict], batch: int) -> Iterator[list[dict]]:
    """Requests of at most `batch` rows of one step: what was fraud an hour ago cannot be known while it is still being
    decided.
    """
    for _, hour in itertools.groupby(rows, key=lambda row: row["step"]):
        hour = list(hour)
        yield from (hour[i : i + batch] for i in range(0, len(hour), batch))


def replay(rows: list[dict], store, label_delay: int, batch: int) -> np.ndarray:
    """Online features of all rows, in requests of `batch`; what was fraud becomes known when the label delay is
    over.
    """
    found, waiting = [], []
    for part in requests(rows, batch):
        while waiting and waiting[0]["step"] <= part[0]["step"] - label_delay:
            assert store.label({str(waiting.pop(0)["tx_id"]): True}) == []
        transactions = [live(row) for row in part]
        events = [
            Transaction(t.transaction_id, t.step, t.sender, t.receiver, round(t.amount * 100)) for t in transactions
        ]
        reading = store.read(
            {a for e in events for a in (e.orig, e.dest)}, [e.transaction_id for e in events], events[0].step
        )
        found.append(matrix(request_features(transactions, events), look_back(events, reading, WINDOWS, label_delay)))
        assert all(store.record(events))
        waiting += [row for row in part if row["is_fraud"]]
    return np.vstack(found)


def check(root, rows: int, label_delay: int, url: str, batch: int) -> None:
    folder = root / "data/features"
    raw = pq.read_table(next((root / "data/raw").glob("*.parquet"))).slice(0, rows).to_pylist()
    store = open_store(url, max(WINDOWS) + label_delay, timeout=10)
    online = replay(raw, store, label_delay, batch)
    parts = [pq.read_table(file) for file in sorted(folder.glob("part-*.parquet"))]
    names = [name for name in parts[0].column_names if name in NAMES]
    offline = np.column_stack([np.concatenate([part[name].to_numpy() for part in parts])[:rows] for name in names])
    assert offline.dtype == online.dtype == np.float32 and names == NAMES
    different = ~((online == offline) | (np.isnan(online) & np.isnan(offline)))
    assert not different.any(), f"{different.sum()} values of {sorted({names[j] for j in np.nonzero(different)[1]})}"


@pytest.fixture(scope="module")
def month(workspace):
    """A simulated month and its features by Spark; labels known after a day, so that they matter within the month."""
    project = workspace(simulate__rows=12_000, simulate__days=31, features__label_delay=24, features__engine="spark")
    project.fraud("jobs", "run", "acquire")
    project.fraud("jobs", "run", "features")
    return project.root


@pytest.fixture(scope="module")
def paysim(workspace):
    """The head of the public PaySim log."""
    project = workspace(data__source=shared("paysim_head.csv"), features__label_delay=1, features__engine="spark")
    project.fraud("jobs", "run", "acquire")
    project.fraud("jobs", "run", "features")
    return project.root


@pytest.mark.parametrize("batch", [1, 100])
def test_memory(month, batch):
    check(month, 12_000, 24, "memory://", batch)


@pytest.mark.parametrize("batch", [1, 100])
def test_redis(month, tmp_path, batch):
    with servers.redis(tmp_path) as url:
        check(month, 12_000, 24, url, batch)


@pytest.fixture
def table(tmp_path, monkeypatch) -> str:
    with servers.moto(tmp_path) as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        create_table("store")
        yield "dynamodb://store"


@pytest.fixture(scope="module")
def quiet_month(workspace):
    """A month with fewer transactions: the emulator of DynamoDB takes ten milliseconds for each. The local engine's
    files are Spark's, byte for byte (test_pipeline).
    """
    project = workspace(
        simulate__rows=1_500,
        simulate__days=31,
        simulate__fraud_rate=0.02,
        features__label_delay=24,
        features__engine="local",
    )
    project.fraud("jobs", "run", "acquire")
    project.fraud("jobs", "run", "features")
    return project.root


@pytest.mark.long(reason="the emulator of DynamoDB takes ten milliseconds a transaction")
def test_dynamodb(quiet_month, table):
    check(quiet_month, 1_500, 24, table, 100)


@pytest.mark.external
def test_paysim_memory(paysim):
    check(paysim, 19_999, 1, "memory://", 1)


@pytest.mark.external
def test_paysim_redis(paysim, tmp_path):
    with servers.redis(tmp_path) as url:
        check(paysim, 19_999, 1, url, 100)


@pytest.mark.long(reason="the emulator of DynamoDB takes ten milliseconds a transaction")
@pytest.mark.external
def test_paysim_dynamodb(paysim, table):
    """The first two hours, for the same reason."""
    check(paysim, 3_000, 1, table, 100)


moment = st.tuples(
    st.integers(0, 60),
    st.sampled_from("ABCD"),
    st.sampled_from("ABCD"),
    st.integers(0, 10**7),
    st.booleans(),
    st.integers(0, 30),
)


@pytest.mark.parametrize("place", ["memory", "redis"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(drawn=st.lists(moment, min_size=1, max_size=25), delay=st.integers(0, 30), cuts=st.integers(1, 4))
def test_any_history_any_interleaving(place, request, drawn, delay, cuts):
    """Random accounts that also pay themselves, random cuts into requests, and labels that come at any time up to the
    delay: the kernel's values.
    """
    windows, prefix = (1, 5, 24), f"h{next(fresh)}-"
    cuts = cuts if delay else 1  # a label of the own hour cannot be known to a request that is still being decided
    rows = [
        {
            "tx_id": i,
            "step": step,
            "type": "TRANSFER",
            "amount": cents / 100,
            "sender": prefix + orig,
            "sender_balance": 5.0,
            "receiver": prefix + dest,
            "receiver_balance": None,
            "is_fraud": int(fraud),
            "known": step + min(late, delay),
        }
        for i, (step, orig, dest, cents, fraud, late) in enumerate(sorted(drawn, key=lambda one: one[0]))
    ]
    raw = pa.table(
        {
            name: pa.array([row[name] for row in rows], kind)
            for name, kind in (
                ("tx_id", pa.int64()),
                ("step", pa.int32()),
                ("amount", pa.float64()),
                ("sender", pa.string()),
                ("receiver", pa.string()),
                ("is_fraud", pa.int8()),
            )
        }
    )
    store = open_store(
        "memory://" if place == "memory" else request.getfixturevalue("redis_url"), max(windows) + delay, timeout=10
    )
    online, waiting = [], []
    for part in requests(rows, cuts):
        due = [row for row in waiting if row["known"] <= part[0]["step"]]
        waiting = [row for row in waiting if row not in due]
        store.label({prefix + str(row["tx_id"]): True for row in due})
        events = [
            Transaction(
                prefix + str(row["tx_id"]), row["step"], row["sender"], row["receiver"], round(row["amount"] * 100)
            )
            for row in part
        ]
        reading = store.read(
            {a for e in events for a in (e.orig, e.dest)}, [e.transaction_id for e in events], events[0].step
        )
        online.append(look_back(events, reading, windows, delay))
        assert all(store.record(events))
        waiting += [row for row in part if row["is_fraud"]]
    np.testing.assert_array_equal(np.vstack(online), local_history(raw, windows, delay, threads=1).sides())
