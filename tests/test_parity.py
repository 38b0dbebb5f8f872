"""What is decided online is what was learned offline: replayed payment by payment, features equal the batch's, bit for
bit, in process and over HTTP.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import payments
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from conftest import Workspace, shared
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_pkg.core.contract import DAY, SIMULATED, Contract
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.data.acquire import acquire
from fraud_pkg.features.definitions import feature_names
from fraud_pkg.features.local import local_history, part_table
from fraud_pkg.features.payment import OnlinePayments
from fraud_pkg.features.table import build_features
from fraud_pkg.features.vocabulary import encode, learn_vocabulary
from fraud_pkg.serve.scorer import BundleInput
from fraud_pkg.serve.wire import Wire
from fraud_pkg.store.dynamodb import create_table
from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import OnlineStore, read_for, retention_of

Vocabulary = Mapping[str, Sequence[str]]
Said = dict[str, Any]  # a payment as its sender says it
Decide = Callable[[list[Said]], np.ndarray]  # features [n, F] float32 of payments that are recorded
Label = Callable[[list[str]], None]  # these were fraud


def next_request(rows: Sequence[dict], waiting: Sequence[dict], most: int) -> Sequence[dict]:
    """The rows at the beginning that one request may hold: of one day, and no label comes between them."""
    first, size = rows[0]["time"], 1
    for row in rows[1:most]:
        labels = [other["known"] for other in (*waiting, *rows[:size]) if other["fraud"]]
        if row["time"] // DAY != first // DAY or any(first < known <= row["time"] for known in labels):
            break
        size += 1
    return rows[:size]


def replayed(rows: Sequence[dict], decide: Decide, label: Label, most: int) -> np.ndarray:
    """Features of all rows in order. A row has `time`, `said`, `fraud` and `known`, when it became known."""
    found, waiting, at = [], [], 0
    while at < len(rows):
        due = [row for row in waiting if row["known"] <= rows[at]["time"]]
        waiting = [row for row in waiting if row not in due]
        if due:
            label([row["said"]["transaction_id"] for row in due])
        part = next_request(rows[at : at + most], waiting, most)
        found.append(decide([row["said"] for row in part]))
        waiting += [row for row in part if row["fraud"]]
        at += len(part)
    return np.vstack(found)


def in_process(
    contract: Contract, vocabulary: Vocabulary, store: OnlineStore, columns: Mapping[str, str] | None = None
) -> tuple[Decide, Label]:
    """By the classes that the scorer uses, without a model."""
    wire, retention = Wire(contract, columns), retention_of(contract)
    made = object.__new__(BundleInput)
    made.online, made.retention = OnlinePayments(contract, vocabulary), retention

    def decide(said: list[Said]) -> np.ndarray:
        requested = [wire.payment(wire.parse(json.dumps(one).encode())) for one in said]
        transactions = [made.online.transaction(payment) for payment in requested]
        features = made.features(requested, transactions, read_for(store, transactions)).features
        assert all(store.record(transactions))
        return features

    def label(names: list[str]) -> None:
        assert store.label(dict.fromkeys(names, True)) == []

    return decide, label


def over_http(client: httpx.Client) -> tuple[Decide, Label]:
    """By a service."""

    def decide(said: list[Said]) -> np.ndarray:
        answer = client.post("/predict/batch", json={"transactions": said, "features": True})
        assert answer.status_code == 200, answer.text
        return np.array([decision["features"] for decision in answer.json()["decisions"]], float).astype(np.float32)

    def label(names: list[str]) -> None:
        told = [{"transaction_id": name, "is_fraud": True} for name in names]
        assert client.post("/feedback", json={"labels": told}).json() == {"recorded": len(names), "unknown": []}

    return decide, label


def offline(features: pa.Table, contract: Contract, vocabulary: Vocabulary) -> np.ndarray:
    """The matrix of a table of features: [n, F] float32."""
    columns = [encode(features[name], vocabulary[name]) for name in contract.categories]
    columns += [features[name].to_numpy() for name in feature_names(contract)[len(columns) :]]
    return np.column_stack(columns)


def check_equal(online: np.ndarray, batch: np.ndarray, contract: Contract) -> None:
    assert online.dtype == batch.dtype == np.float32 and online.shape == batch.shape
    different = ~((online == batch) | (np.isnan(online) & np.isnan(batch)))
    names = feature_names(contract)
    assert not different.any(), f"{different.sum()} values of {sorted({names[j] for j in np.nonzero(different)[1]})}"


# Drawn payments


WORDS = {name: (f"{name}_1", f"{name}_2") for name in payments.CONTRACT.categories} | {"type": ("CASH_OUT", "TRANSFER")}
drawn = given(rows=st.lists(payments.rows, min_size=1, max_size=25), most=st.integers(1, 4))
quiet = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def by_arrival(rows: Iterable[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: row["time"])


def sent(rows: list[dict]) -> list[dict]:
    """Drawn rows for `replayed`, in the contract's names and in the source's by turns."""
    return [
        {
            "time": row["time"],
            "said": payments.request(row, str(number), own=number % 2 == 0),
            "fraud": row["fraud"],
            "known": row["time"] + row["late"],
        }
        for number, row in enumerate(rows)
    ]


def batch_of(rows: list[dict]) -> np.ndarray:
    contract, raw = payments.CONTRACT, payments.table(rows)
    histories = local_history(raw, contract, threads=1).between(0, len(raw))
    return offline(part_table(raw, histories, contract), contract, WORDS)


@pytest.mark.parametrize("place", ["memory", "redis"])
@settings(quiet, max_examples=60)
@drawn
def test_any_history(place, request, rows, most):
    """Six entities, attributes of every kind, accounts that pay themselves, random cuts into requests, and labels that
    come at any time up to the delay, or later where the data say when: the kernel's values.
    """
    rows, url = by_arrival(rows), "memory://"
    if place == "redis":
        import redis

        url = request.getfixturevalue("redis_url")
        redis.Redis.from_url(url).flushall()
    store = open_store(url, retention_of(payments.CONTRACT), timeout=10)
    online = replayed(sent(rows), *in_process(payments.CONTRACT, WORDS, store, payments.COLUMNS), most)
    check_equal(online, batch_of(rows), payments.CONTRACT)


@pytest.fixture(scope="module")
def service(tmp_path_factory, redis_url) -> Iterator[httpx.Client]:
    """A service with a bundle of the drawn payments' contract, and its store in Redis."""
    folder = tmp_path_factory.mktemp("service")
    payments.bundle(folder / "champion")
    with servers.service(folder, store__url=redis_url) as (url, _), httpx.Client(base_url=url, timeout=30) as client:
        yield client


@settings(quiet, max_examples=25)
@drawn
def test_any_history_over_http(service, redis_url, rows, most):
    import redis

    redis.Redis.from_url(redis_url).flushall()
    rows = by_arrival(rows)
    check_equal(replayed(sent(rows), *over_http(service), most), batch_of(rows), payments.CONTRACT)


# Whole logs


def settings_of(project: Workspace) -> Settings:
    """Its settings, in this process: a job would take ten times as long."""
    return load_settings(
        file=project.root / "settings.ini", environ={}, cli={k: str(v) for k, v in project.overrides.items()}
    )


def made_features(project: Workspace) -> Path:
    """The folder of a project with its features."""
    acquire(settings_of(project))
    build_features(settings_of(project))
    return project.root


@pytest.fixture(scope="module")
def month(workspace, no_pictures) -> Path:
    """A simulated month, with six entities and eight attributes, and its features by Spark."""
    project = workspace(simulate__rows=12_000, simulate__days=31, features__label_delay="1d", features__engine="spark")
    acquire(settings_of(project))
    project.fraud("jobs", "run", "features")
    return project.root


@pytest.fixture(scope="module")
def paysim(workspace, no_pictures) -> Path:
    """The head of the public PaySim log; half of it is replayed. The local engine's files are Spark's, byte for byte
    (test_pipeline).
    """
    source = shared("paysim_head.csv")
    return made_features(workspace(data__source=source, features__label_delay="1d", features__engine="local"))


LATER = {"sender_balance_after", "receiver_balance_after", "is_fraud", "label_time", "flagged", "scenario", "row"}


def log_of(root: Path, rows: int, contract: Contract) -> list[dict]:
    """The first rows of a raw table for `replayed`."""
    raw = pq.read_table(next((root / "data/raw").glob("*.parquet"))).slice(0, rows).to_pylist()
    delay = contract.label_delay * DAY
    return [
        {
            "time": row["time"],
            "said": {name: value for name, value in row.items() if value is not None and name not in LATER},
            "fraud": bool(row["is_fraud"]),
            "known": row["time"] + delay if row["label_time"] is None else row["label_time"],
        }
        for row in raw
    ]


def check_log(root: Path, rows: int, contract: Contract, url: str, most: int) -> None:
    features = pa.concat_tables(pq.read_table(file) for file in sorted((root / "data/features").glob("part-*.parquet")))
    manifest = json.loads((root / "data/features/manifest.json").read_text())
    assert Contract.model_validate(manifest["contract"]) == contract
    features = features.slice(0, rows)
    vocabulary = learn_vocabulary({name: features[name] for name in contract.categories})
    store = open_store(url, retention_of(contract), timeout=10)
    online = replayed(log_of(root, rows, contract), *in_process(contract, vocabulary, store), most)
    check_equal(online, offline(features, contract, vocabulary), contract)


MONTH, PAYSIM = SIMULATED.model_copy(update={"label_delay": 1}), Contract(label_delay=1)


@pytest.mark.parametrize("most", [1, 100])
def test_memory(month, most):
    check_log(month, 12_000, MONTH, "memory://", most)


@pytest.mark.parametrize("most", [1, 100])
def test_redis(month, tmp_path, most):
    with servers.redis(tmp_path) as url:
        check_log(month, 12_000, MONTH, url, most)


@pytest.fixture
def aws_table(tmp_path, monkeypatch) -> Iterator[str]:
    with servers.moto(tmp_path) as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        create_table("store")
        yield "dynamodb://store"


@pytest.fixture(scope="module")
def quiet_month(workspace, no_pictures) -> Path:
    """A month with fewer transactions: the emulator of DynamoDB takes ten milliseconds for each."""
    return made_features(
        workspace(
            simulate__rows=1_500,
            simulate__days=31,
            simulate__fraud_rate=0.02,
            features__label_delay="1d",
            features__engine="local",
        )
    )


@pytest.mark.long(reason="the emulator of DynamoDB takes ten milliseconds a transaction")
def test_dynamodb(quiet_month, aws_table):
    check_log(quiet_month, 1_500, MONTH, aws_table, 100)


@pytest.mark.external
def test_paysim_memory(paysim):
    check_log(paysim, 10_000, PAYSIM, "memory://", 1)


@pytest.mark.external
def test_paysim_redis(paysim, tmp_path):
    with servers.redis(tmp_path) as url:
        check_log(paysim, 10_000, PAYSIM, url, 100)


@pytest.mark.long(reason="the emulator of DynamoDB takes ten milliseconds a transaction")
@pytest.mark.external
def test_paysim_dynamodb(paysim, aws_table):
    """The first two hours, for the same reason."""
    check_log(paysim, 3_000, PAYSIM, aws_table, 100)
