"""The stream on a real Kafka broker: every decision that of batch scoring, and nothing lost, counted twice or changed,
whatever is killed or taken away.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from fraud_pkg.core.contract import DAY, HOUR, SIMULATED_ATTRIBUTES, SIMULATED_ENTITIES
from fraud_pkg.core.label_sources import label_signer
from fraud_pkg.core.policy import DECISIONS, decide
from fraud_pkg.core.settings import load_settings
from fraud_pkg.core.signatures import new_key
from fraud_pkg.data.acquire import acquire
from fraud_pkg.data.lake import labels_of, read_labels
from fraud_pkg.features.kernel import to_cents
from fraud_pkg.features.payment import OnlinePayments
from fraud_pkg.features.table import build_features
from fraud_pkg.features.vocabulary import encode
from fraud_pkg.model.bakeoff import evaluate_contender
from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.serve.wire import EXAMPLE, Wire
from fraud_pkg.store.journal import JournaledStore
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.store.redis_outbox import RedisOutboxStore
from fraud_pkg.store.tiles import StoreSnapshot, Transaction, read_for, retention_of
from fraud_pkg.stream.messages import messages_of, read_record, read_transaction
from fraud_pkg.stream.replay import RequestWriter, label_message, transaction_messages
from fraud_pkg.train.samples import load_periods
from fraud_pkg.train.xgboost import train_xgboost

PROJECT = Path(__file__).resolve().parents[1]
DECLARED = {f"attributes.{name}": text for name, text in SIMULATED_ATTRIBUTES.items()} | {
    f"entities.{name}": text for name, text in SIMULATED_ENTITIES.items()
}  # what the simulator brings, for its log in a file
CONTRACT = load_settings(cli=DECLARED, file=PROJECT / "settings.ini", environ={}).contract
RETENTION, MESSAGES = retention_of(CONTRACT), messages_of(CONTRACT)
ROWS = 20_000
SESSION = (
    6 if "FRAUD_STREAM_BOOTSTRAP_SERVERS" in os.environ else 1
)  # seconds; the least that a broker takes unless it is told otherwise, and what ours takes
DAYS = 28  # within the retention: nothing is forgotten, so that stores can be compared as a whole


class Broker:
    """A broker that can go away and come back with what it had."""

    def __init__(self, folder: Path):
        self._folder, self._port, self._running = folder, servers.free_port(), contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        self.address = self._running.enter_context(servers.kafka(self._folder, self._port))

    def stop(self) -> None:
        self._running.close()


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    if address := os.environ.get("FRAUD_STREAM_BOOTSTRAP_SERVERS"):
        yield SimpleNamespace(
            address=address, stop=lambda: pytest.skip("the broker is not ours to stop"), start=lambda: None
        )
        return
    made = Broker(tmp_path_factory.mktemp("broker"))
    yield made
    made.stop()


@dataclass(frozen=True)
class World:
    """Transactions, a model that learned from them, and what batch scoring says of them while nobody knows what was
    fraud.
    """

    bundle: Path
    table: pa.Table  # ROWS transactions with labels
    quiet: Path  # the same in a file, without labels
    features: np.ndarray
    probability: np.ndarray
    decision: list[str]


@pytest.fixture(scope="module")
def world(tmp_path_factory, no_pictures) -> World:
    root = tmp_path_factory.mktemp("world")
    shutil.copy(PROJECT / "settings.ini", root)

    def settings(**more):
        given = DECLARED | {
            "simulate.rows": ROWS,
            "simulate.days": DAYS,
            "simulate.fraud_rate": 0.01,
            "features.engine": "local",
            "split.test_hours": 144,
            "split.validation_hours": 96,
            "xgboost.rounds": 60,
            "evaluate.resamples": 20,
        }
        return load_settings(
            cli=given | servers.named(more),
            file=root / "settings.ini",
            environ={},
        )

    learning = settings()
    table = pq.read_table(learning.data_dir / "raw" / acquire(learning)["file"])
    build_features(learning)
    periods = load_periods(learning)
    evaluate_contender(
        train_xgboost(periods.train, periods.validation, learning, tell=lambda line: None), periods, learning
    )
    quiet = root / "quiet.parquet"
    pq.write_table(
        table.set_column(table.column_names.index("is_fraud"), "is_fraud", pa.array(np.zeros(len(table), np.int8))),
        quiet,
    )
    batch = settings(data__source=str(quiet), paths__data="batch")
    acquire(batch)
    names = build_features(batch)["features"]
    parts = pa.concat_tables(
        pq.read_table(file) for file in sorted((batch.data_dir / "features").glob("part-*.parquet"))
    )
    bundle = load_bundle(learning.models_dir / "xgboost")
    words = bundle.manifest.vocabulary
    columns = [encode(parts[name], words[name]) if name in words else parts[name].to_numpy() for name in names]
    features = np.stack(columns, axis=1).astype(np.float32)
    p = bundle.probability(np.ascontiguousarray(features[:, [names.index(name) for name in bundle.manifest.features]]))
    amounts = to_cents(table["amount"].to_numpy()) / 100
    decisions = decide(p, amounts, bundle.manifest.policy).decisions
    return World(bundle.folder, table, quiet, features, p, [DECISIONS[d] for d in decisions])


@dataclass
class Case:
    """Topics, a group and folders of their own, and the command line on them."""

    folder: Path
    broker: Broker
    settings: dict
    environ: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)

    def _variables(self, more: Mapping) -> dict[str, str]:
        return servers.environment(self.settings | servers.named(more), self.folder, **self.environ)

    def fraud(self, *arguments: str, ok: bool = True, **more) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, "-m", "fraud_pkg.cli", "stream", *arguments],
            cwd=self.folder,
            env=self._variables(more),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 or not ok, f"{arguments}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done

    def start(self, *arguments: str, **more) -> subprocess.Popen:
        port = servers.free_port()
        self.ports.append(port)
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fraud_pkg.cli", "stream", *arguments],
                cwd=self.folder,
                env=self._variables({"stream.port": port, **more}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        process.port = port
        return process

    @contextlib.contextmanager
    def running(self, *arguments: str, **more) -> Iterator[subprocess.Popen]:
        """Stopped in the friendly way afterwards, which has to end well."""
        process = self.start(*arguments, **more)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, self.log()
        finally:
            process.kill()
            process.wait()

    def log(self) -> str:
        return (self.folder / "log").read_text()[-6000:]

    def topic(self, name: str) -> str:
        return {
            "transactions": self.settings["stream.transactions"],
            "decisions": self.settings["stream.decisions"],
            "labels": self.settings["stream.labels"],
            "dead": f"{self.settings['stream.transactions']}.dlq",
            "dead labels": f"{self.settings['stream.labels']}.dlq",
        }[name]

    def read(self, name: str) -> list:
        """Every message of a topic, in the order of its partitions."""
        consumer = KafkaConsumer(
            bootstrap_servers=self.broker.address, auto_offset_reset="earliest", enable_auto_commit=False
        )
        with contextlib.closing(consumer):
            partitions = [
                TopicPartition(self.topic(name), number)
                for number in sorted(consumer.partitions_for_topic(self.topic(name)) or ())
            ]
            consumer.assign(partitions)
            ends, found = consumer.end_offsets(partitions), []
            while any(consumer.position(p) < ends[p] for p in partitions):
                found += [record for records in consumer.poll(timeout_ms=1000).values() for record in records]
        return sorted(found, key=lambda r: (r.partition, r.offset))

    def count(self, name: str) -> int:
        consumer = KafkaConsumer(bootstrap_servers=self.broker.address, enable_auto_commit=False)
        with contextlib.closing(consumer):
            return sum(
                consumer.end_offsets(
                    [
                        TopicPartition(self.topic(name), number)
                        for number in consumer.partitions_for_topic(self.topic(name)) or ()
                    ]
                ).values()
            )

    def send(self, name: str, messages: list[tuple[bytes | None, bytes | None]]) -> None:
        with contextlib.closing(
            KafkaProducer(bootstrap_servers=self.broker.address, linger_ms=20, batch_size=1 << 18)
        ) as producer:
            for future in [producer.send(self.topic(name), value, key=key) for key, value in messages]:
                future.get(30) if future.is_done else None
            producer.flush()

    def until(self, holds: Callable[[], bool], seconds: float = 120, process: subprocess.Popen | None = None) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.log()
            assert process is None or process.poll() is None, self.log()
            time.sleep(0.2)


@pytest.fixture
def case(tmp_path, broker, world) -> Callable[..., Case]:
    def make(name: str = "a", **more) -> Case:
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(PROJECT / "settings.ini", folder)
        tag = f"{os.getpid()}-{time.time_ns()}"
        settings = DECLARED | {
            "stream.bootstrap_servers": broker.address,
            "stream.transactions": f"t-{tag}",
            "stream.decisions": f"d-{tag}",
            "stream.labels": f"l-{tag}",
            "stream.group": f"g-{tag}",
            "stream.partitions": 1,
            "stream.session_timeout": SESSION,
            "stream.port": 0,
            "serve.bundle": world.bundle,
            "serve.live_price": False,  # decisions are compared with those of batch scoring
            "features.engine": "local",
        }
        return Case(folder, broker, settings | servers.named(more))

    return make


def metric(process: subprocess.Popen, name: str, **labels: str) -> float:
    """The sum of a figure that a consumer shows, 0 while it shows none."""
    try:
        text = urllib.request.urlopen(f"http://{servers.HOST}:{process.port}/metrics", timeout=5).read().decode()
    except OSError:
        return 0.0
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if re.match(rf"{name}[ {{]", line) and all(w in line for w in wanted)
    )


def ids_of(table: pa.Table) -> list[str]:
    return table["transaction_id"].to_pylist()


def frauds_of(table: pa.Table) -> list[str]:
    return [name for name, fraud in zip(ids_of(table), table["is_fraud"].to_pylist(), strict=True) if fraud]


def events_of(table: pa.Table) -> list[Transaction]:
    wire, online = Wire(CONTRACT), OnlinePayments(CONTRACT, {name: () for name in CONTRACT.categories})
    messages = transaction_messages(table, RequestWriter(CONTRACT, None, "json"))
    return [online.transaction(wire.payment(read_transaction(message.value, wire))) for message in messages]


def everything(store: MemoryStore) -> tuple:
    """A memory store as it is."""
    state = store.state
    return state.histories, state.pairs, state.transactions, state.frauds


def expected_store(table: pa.Table, frauds: bool) -> MemoryStore:
    store = MemoryStore(RETENTION)
    store.record(events_of(table))
    if frauds:
        store.label(dict.fromkeys(frauds_of(table), True))
    return store


def once(decisions: list) -> dict[str, bytes]:
    """{transaction id: message}; what is there twice is there twice the same."""
    found: dict[str, bytes] = {}
    for record in decisions:
        number = read_record(record.value)["transaction_id"]
        assert found.setdefault(number, record.value) == record.value, f"{number} was repeated with other bytes"
    return found


def check_decisions(found: Mapping[str, bytes], world: World, rows: int) -> None:
    """Those of batch scoring, bit for bit."""
    numbers = ids_of(world.table)[:rows]
    assert found.keys() == set(numbers)
    records = [read_record(found[number]) for number in numbers]
    assert np.array_equal(np.array([r["features"] for r in records], np.float32), world.features[:rows], equal_nan=True)
    assert [r["fraud_probability"] for r in records] == [round(p, 9) for p in world.probability[:rows].tolist()]
    assert [r["decision"] for r in records] == world.decision[:rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, broker, world) -> SimpleNamespace:
    """All transactions through one consumer that nothing happens to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    shutil.copy(PROJECT / "settings.ini", folder)
    tag = f"u-{os.getpid()}-{time.time_ns()}"
    made = Case(
        folder,
        broker,
        DECLARED
        | {
            "stream.bootstrap_servers": broker.address,
            "stream.transactions": f"t-{tag}",
            "stream.decisions": f"d-{tag}",
            "stream.labels": f"l-{tag}",
            "stream.group": f"g-{tag}",
            "stream.partitions": 1,
            "stream.session_timeout": SESSION,
            "stream.port": 0,
            "serve.bundle": world.bundle,
            "serve.live_price": False,  # decisions are compared with those of batch scoring
            "features.engine": "local",
        },
    )
    said = made.fraud("produce", str(world.quiet)).stdout
    with made.running("score") as process:
        made.until(lambda: made.count("decisions") >= ROWS, 300, process)
    return SimpleNamespace(case=made, said=said, decisions=made.read("decisions"))


def test_every_decision_is_that_of_batch_scoring(uninterrupted, world):
    assert uninterrupted.said.startswith(f"{ROWS:,} transactions and 0 labels")
    assert len(uninterrupted.decisions) == ROWS
    check_decisions(once(uninterrupted.decisions), world, ROWS)
    keys = dict(zip(ids_of(world.table), world.table["sender"].to_pylist(), strict=True))
    assert all(keys[read_record(r.value)["transaction_id"]].encode() == r.key for r in uninterrupted.decisions[:1000])
    store = JournaledStore(uninterrupted.case.folder / "data/stream", RETENTION)
    assert everything(store) == everything(expected_store(world.table, frauds=False))
    store.close()


def killed(case: Case, times: int, seed: int, done: Callable[[], bool], command: str = "score", **more) -> int:
    """Starts a consumer and kills it, each time at another moment; returns how often it was in the middle of
    something.
    """
    chance, busy = random.Random(seed), 0
    for _ in range(times):
        before = case.count("decisions")
        process = case.start(command, **more)
        if chance.random() < 0.8:  # most of the time while it works, otherwise while it starts
            with contextlib.suppress(AssertionError):
                case.until(lambda before=before: case.count("decisions") > before or done(), 30, process)
        time.sleep(chance.uniform(0, 0.3))
        busy += process.poll() is None and not done()
        process.kill()
        process.wait()
    return busy


@pytest.mark.parametrize(
    "times",
    [3, pytest.param(20, marks=pytest.mark.long(reason="the same with twenty kills; three are tried in make test"))],
)
def test_killed_many_times(case, uninterrupted, world, times):
    """The same transactions again, with a consumer that is killed at random moments: the same bytes for each, and the
    same store.
    """
    made = case(
        stream__batch=100,
        stream__transactions=uninterrupted.case.topic("transactions"),
        stream__labels=uninterrupted.case.topic("labels"),
    )
    made.fraud("redrive", "--dry-run")  # makes the topics
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    busy = killed(made, times, seed, lambda: made.count("decisions") >= ROWS)
    assert busy >= times / 2, "the consumer was through before it could be killed"
    with made.running("score", stream__batch=500) as process:
        made.until(
            lambda: metric(process, "fraud_stream_lag") == 0 and made.count("decisions") >= ROWS, process=process
        )
    decisions = made.read("decisions")
    print(f"{busy} of {times} kills in the middle of work, {len(decisions) - ROWS} decisions repeated")
    assert once(decisions) == once(uninterrupted.decisions)
    store = JournaledStore(made.folder / "data/stream", RETENTION)
    assert everything(store) == everything(expected_store(world.table, frauds=False))
    store.close()


def days_of(snapshot: StoreSnapshot) -> dict[str, tuple]:
    """What does not depend on how far one partition is ahead of another, as minutes and hours do."""
    histories = {key: snapshot.history(key) for key in snapshot.histories}
    return {key: (history.tiles[-1], history.last) for key, history in histories.items()}


def same_days(url: str, table: pa.Table, frauds: bool, found: set[str]) -> None:
    """Redis knows these transactions, and of every entity what a store knows that saw everything in order."""
    store, events, ordered = RedisOutboxStore(url, RETENTION, 10), events_of(table), expected_store(table, frauds)
    with contextlib.closing(store):
        for begin in range(0, len(events), 1000):
            some = events[begin : begin + 1000]
            reading = read_for(store, some)
            assert reading.recorded.keys() == {event.transaction_id for event in some} <= found
            expected = read_for(ordered, some)
            assert days_of(reading) == days_of(expected)
            assert reading.pairs == expected.pairs


@pytest.mark.long(reason="a second round of kills, with Redis")
def test_killed_with_a_shared_store(case, world, redis_url):
    """Redis, three partitions, labels in a process of their own, two scorers and a labeller that are killed."""
    made, table = (
        case(stream__partitions=3, stream__batch=100, store__url=redis_url.replace("/0", "/1")),
        world.table,
    )
    source = made.folder / "source.parquet"
    pq.write_table(table, source)
    made.fraud("produce", str(source))
    made.send(
        "labels",
        [(name.encode(), label_message(name, True, "json")) for name in frauds_of(table)],
    )
    seed = int.from_bytes(os.urandom(4), "big")
    print("seed", seed)
    with made.running("score") as beside:
        killed(made, 6, seed, lambda: made.count("decisions") >= len(table))
        killed(made, 4, seed + 1, lambda: made.count("decisions") >= len(table), "labels")
        made.until(
            lambda: made.count("decisions") >= len(table) and metric(beside, "fraud_stream_lag") == 0, process=beside
        )
        for _ in range(3):  # labels that were too early come back
            with made.running("labels") as labeller:
                made.until(
                    lambda: (
                        (
                            metric(labeller, "fraud_stream_messages_total") > 0
                            or metric(labeller, "fraud_stream_lag") == 0
                        )
                        and servers.status(f"http://{servers.HOST}:{labeller.port}/readyz") == 200
                    ),
                    process=labeller,
                )
                time.sleep(1.5)
            made.fraud("redrive", "--labels")
        with made.running("labels") as labeller:
            made.until(lambda: servers.status(f"http://{servers.HOST}:{labeller.port}/readyz") == 200, process=labeller)
            time.sleep(1.5)
    found = once(made.read("decisions"))
    assert found.keys() == set(ids_of(table))
    same_days(made.settings["store.url"], table, True, set(found))


def test_broker_goes_away_and_comes_back(case, world, broker):
    made = case(stream__batch=100)
    made.fraud("produce", str(world.quiet), "--limit", "12000")
    with made.running("score") as process:
        made.until(lambda: metric(process, "fraud_stream_messages_total") > 3000, process=process)
        broker.stop()
        time.sleep(4)
        assert process.poll() is None, made.log()
        broker.start()
        made.until(lambda: metric(process, "fraud_stream_messages_total", outcome="decided") == 12_000, process=process)
    check_decisions(once(made.read("decisions")), world, 12_000)


@contextlib.contextmanager
def trickling(case: Case, messages: list[tuple[bytes, bytes]], rate: int) -> Iterator[list[int]]:
    """Messages go to the transactions, so many a second, for as long as the block lasts; yields a list that then holds
    how many they were.
    """
    ended, sent = threading.Event(), []

    def send() -> None:
        at = 0
        with contextlib.closing(KafkaProducer(bootstrap_servers=case.broker.address)) as producer:
            while at < len(messages) and not ended.wait(0.1):
                for key, value in messages[at : at + rate // 10]:
                    producer.send(case.topic("transactions"), value, key=key)
                at = min(at + rate // 10, len(messages))
            producer.flush()
        sent.append(at)

    source = threading.Thread(target=send)
    source.start()
    try:
        yield sent
    finally:
        ended.set()
        source.join()


def test_consumers_join_and_leave(case, world, redis_url):
    """Up to three share the work, and the partitions change hands while messages flow; each is decided once, and each
    account's in their order.
    """
    made = case(stream__partitions=6, stream__batch=50, store__url=redis_url.replace("/0", "/2"))
    made.fraud("redrive", "--dry-run")  # makes the topics
    messages = [(m.key, m.value) for m in transaction_messages(world.table, RequestWriter(CONTRACT, None, "json"))]
    with made.running("score") as first:
        with trickling(made, messages, rate=200) as sent:
            made.until(lambda: metric(first, "fraud_stream_messages_total") > 500, process=first)
            with made.running("score") as second:
                made.until(lambda: metric(second, "fraud_stream_messages_total") > 300, process=second)
                with made.running("score") as third:
                    made.until(lambda: metric(third, "fraud_stream_messages_total") > 300, process=third)
            time.sleep(1)  # the first has it all again
        (rows,) = sent
        assert rows < len(messages), "everything was sent before the last consumer left"
        made.until(  # one that changed hands may be there twice
            lambda: made.count("decisions") >= rows and len(once(made.read("decisions"))) >= rows, process=first
        )
    decisions = made.read("decisions")
    found = once(decisions)
    assert found.keys() == set(ids_of(world.table)[:rows])
    same_days(made.settings["store.url"], world.table.slice(0, rows), False, set(found))
    place = {name: i for i, name in enumerate(ids_of(world.table))}
    order: dict[bytes, list[int]] = defaultdict(list)
    for record in decisions:
        order[record.key].append(place[read_record(record.value)["transaction_id"]])
    assert all(list(dict.fromkeys(numbers)) == sorted(set(numbers)) for numbers in order.values())


def test_a_memory_store_is_not_shared(case, world):
    made = case(stream__partitions=2)
    made.fraud("produce", str(world.quiet), "--limit", "1000")
    with made.running("score") as process:
        made.until(lambda: metric(process, "fraud_stream_messages_total") == 1000, process=process)
        beside = made.fraud("score", ok=False)
        assert beside.returncode == 1 and "another consumer keeps its memory store here" in beside.stderr
        elsewhere = made.fraud("score", ok=False, stream__state="data/elsewhere")
        assert (
            elsewhere.returncode == 1
            and "a memory store must see them all; several consumers need [store] url = redis://" in elsewhere.stderr
        )
        labeller = made.fraud("labels", ok=False, stream__state="data/elsewhere")
        assert labeller.returncode == 1 and "a memory store lives in `fraud stream score`" in labeller.stderr
        made.fraud("produce", str(world.quiet), "--limit", "1000", "--prefix", "again-")
        made.until(lambda: metric(process, "fraud_stream_messages_total") == 2000, process=process)


POISON = {
    "empty": [None, b""],
    "encoding": [
        b"{",
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b"not json",
        MESSAGES.transaction_format.write(EXAMPLE)[:-4],
        MESSAGES.transaction_format.write(EXAMPLE) + b"\x00",
    ],
    "schema": [
        json.dumps({"schema": 2, **EXAMPLE}).encode(),
        json.dumps({"schema": "1", **EXAMPLE}).encode(),
        b"\xc3\x01" + bytes(8) + b"x",
        MESSAGES.decision_format.head + b"x",
    ],
    "contract": [
        b"[]",
        b"null",
        b"{}",
        json.dumps({"schema": 1, **EXAMPLE, "amount": -5}).encode(),
        json.dumps({"schema": 1, **EXAMPLE, "amount": 1e300}).encode(),
        json.dumps({"schema": 1, **EXAMPLE, "extra": 1}).encode(),
        json.dumps({"schema": 1, **EXAMPLE, "timestamp": "2026-01-05T10:00:00Z"}).encode(),
        json.dumps({"schema": 1, **EXAMPLE, "transaction_id": "far", "step": 20_000}).encode(),
        b'{"transaction_id": "' + b"y" * 1_040_000 + b'"}',
        json.dumps({"schema": 1, **EXAMPLE, "sender": "x" * 65}).encode(),
    ],
    "conflict": [json.dumps({"schema": 1, **EXAMPLE, "transaction_id": "first", "amount": 1.0, "step": 3}).encode()],
}


def test_poison_among_good_ones(case, world):
    """Each kind ends in the dead-letter topic as it came, the good ones are decided as if it were not there; what is
    sent twice is decided once.
    """
    made, rows, first = case(), 2_000, ids_of(world.table)[0].encode()
    poison = [(kind, value) for kind, values in POISON.items() for value in values]
    bad = [(kind, value and value.replace(b'"first"', b'"%s"' % first)) for kind, value in poison]
    table = world.table.slice(0, rows)
    good = [(m.key, m.value) for m in transaction_messages(table, RequestWriter(CONTRACT, None, "json"))]
    made.fraud("redrive", "--dry-run")
    messages = list(good)
    for i, (_, value) in enumerate(bad):
        messages.insert(200 + 70 * i, (b"\xff\x00key", value))
    with contextlib.closing(
        KafkaProducer(bootstrap_servers=made.broker.address, compression_type="gzip", max_request_size=8 << 20)
    ) as producer:  # larger than anybody's usual limit once it is unpacked
        producer.send(
            made.topic("transactions"), b'{"transaction_id": "' + b"z" * 3_000_000 + b'"}', key=b"\xff\x00key"
        ).get(30)
    made.send("transactions", messages[:1000] + [messages[5], messages[700]] + messages[1000:] + [messages[9]])
    with made.running("score") as process:
        made.until(lambda: metric(process, "fraud_stream_messages_total") == len(messages) + 4, process=process)
        assert metric(process, "fraud_stream_messages_total", outcome="duplicate") == 3
        assert {kind: metric(process, "fraud_stream_dead_letters_total", kind=kind) for kind in POISON} == {
            kind: len(values) + (kind == "contract") for kind, values in POISON.items()
        }
        text = urllib.request.urlopen(f"http://{servers.HOST}:{process.port}/metrics").read()
        check = subprocess.run(
            [servers.program("promtool", "prometheus"), "check", "metrics"], input=text, capture_output=True
        )
        assert check.returncode == 0, check.stdout + check.stderr
    check_decisions(once(made.read("decisions")), world, rows)
    dead = made.read("dead")
    large = [d for d in dead if d.value and len(d.value) > 3_000_000]
    assert len(large) == 1 and Counter(
        (dict(d.headers)["fraud-kind"].decode(), d.value) for d in dead if d not in large
    ) == Counter((kind, value) for kind, value in bad)
    source = {r.offset: r.value for r in made.read("transactions")}
    for letter in dead:
        headers = {name: value.decode() for name, value in letter.headers}
        assert (
            letter.key == b"\xff\x00key"
            and headers["fraud-topic"] == made.topic("transactions")
            and source[int(headers["fraud-offset"])] == letter.value
        )
        assert json.loads(headers["fraud-reason"])[0]["reason"]
    assert "20 dead letters are there" not in made.fraud("redrive", "--dry-run").stdout


def test_dead_letters_come_back_when_what_was_wrong_is_mended(case, world):
    """Timestamps need the moment of step 0; without it they are dead letters, with it they are decided."""
    made = case()
    made.fraud("redrive", "--dry-run")
    timed = [
        {key: value for key, value in EXAMPLE.items() if key != "step"}
        | {"transaction_id": f"t{i}", "timestamp": f"2026-01-05T10:{i:02}:00Z"}
        for i in range(40)
    ]
    made.send("transactions", [(b"C1001", json.dumps(t).encode()) for t in timed] + [(b"C1001", b"{")])
    with made.running("score") as process:
        made.until(lambda: made.count("dead") == 41, process=process)
    assert "41 dead letters are there" in made.fraud("redrive", "--dry-run").stdout
    with made.running("score", serve__epoch="2026-01-01T00:00") as process:
        shown = made.fraud("redrive").stdout
        assert re.search(r"contract .*timestamp.* 40\n", shown) and "41 dead letters sent back" in shown
        made.until(lambda: made.count("decisions") == 40 and made.count("dead") == 42, process=process)
    moments = [(4 * 24 + 10) * HOUR + i * 60 for i in range(40)]
    assert sorted(read_record(r.value)["time"] for r in made.read("decisions")) == moments
    left = made.read("dead")[-1]
    assert (left.value, dict(left.headers)["fraud-redriven"]) == (b"{", b"1")
    assert "1 dead letters are there" in made.fraud("redrive", "--dry-run").stdout


@contextlib.contextmanager
def api(folder: Path, bundle: Path, port: int) -> Iterator[subprocess.Popen]:
    """The service with a memory store that survives a friendly stop."""
    keys, place = {"FRAUD_API_KEYS": "stream:0123456789abcdef"}, f"memory://{folder}/store.npz"
    with servers.service(
        folder, variables=keys, port=port, serve__bundle=bundle, store__url=place, serve__live_price=False
    ) as (_, process):
        yield process


def test_the_service_decides_goes_away_and_comes_back(case, world, tmp_path):
    """Through the API: decisions equal those of batch scoring too; while it is away the consumer waits; a consumer that
    is killed repeats nothing.
    """
    port, rows = servers.free_port(), 10_000
    made = case(stream__via=f"http://{servers.HOST}:{port}", stream__batch=100)
    made.environ["FRAUD_API_KEY"] = "0123456789abcdef"
    made.fraud("produce", str(world.quiet), "--limit", str(rows))
    with made.running("score") as process:
        made.until(
            lambda: metric(process, "fraud_stream_waits_total", reason="service") >= 2, process=process
        )  # nobody there yet
        with api(tmp_path, world.bundle, port):
            made.until(lambda: made.count("decisions") > 2_000, process=process)
        made.until(lambda: metric(process, "fraud_stream_circuit_open") == 1, 60, process)
        assert (
            servers.status(f"http://{servers.HOST}:{process.port}/readyz") == 503
            and servers.status(f"http://{servers.HOST}:{process.port}/healthz") == 200
        )
        with api(tmp_path, world.bundle, port):
            made.until(lambda: made.count("decisions") > 5_000, process=process)
            process.kill()
            process.wait()
            killed(made, 3, 5, lambda: made.count("decisions") >= rows)
            with made.running("score") as last:
                made.until(
                    lambda: (
                        made.count("decisions") >= rows
                        and servers.status(f"http://{servers.HOST}:{last.port}/readyz") == 200
                    ),
                    process=last,
                )
            process.send_signal = lambda number: setattr(process, "returncode", 0)  # it is gone already
    decisions = made.read("decisions")
    assert len(decisions) == rows
    check_decisions(once(decisions), world, rows)


def test_labels_through_the_service(case, world, tmp_path):
    port = servers.free_port()
    made = case(stream__via=f"http://{servers.HOST}:{port}")
    made.environ["FRAUD_API_KEY"] = "0123456789abcdef"
    made.fraud("produce", str(world.quiet), "--limit", "1000")
    with api(tmp_path, world.bundle, port), made.running("score") as scorer:
        made.until(lambda: made.count("decisions") >= 1000, process=scorer)
        made.send(
            "labels",
            [
                (b"7", label_message(ids_of(world.table)[7], True, "json")),
                (b"none", label_message("none", True, "avro")),
                (b"x", b"{}"),
            ],
        )
        with made.running("labels") as labeller:
            made.until(lambda: metric(labeller, "fraud_stream_messages_total") == 3, process=labeller)
            assert metric(labeller, "fraud_stream_messages_total", outcome="label") == 1
    assert sorted(dict(d.headers)["fraud-kind"] for d in made.read("dead labels")) == [b"contract", b"unknown"]
    made.environ["FRAUD_API_KEY"] = "not-this-one-either"
    with api(tmp_path, world.bundle, port):
        made.fraud("produce", str(world.quiet), "--limit", "10", "--prefix", "x")
        refused = made.fraud("score", ok=False)
        assert refused.returncode == 1 and "its key in FRAUD_API_KEY" in refused.stderr


def test_labels_come_from_named_keys_only(case, world, tmp_path):
    """A bank's desk signs labels, a shop too, whose labels do not count, and somebody writes to the topic."""
    people = ("desk", "shop", "eve")
    publics = {name: new_key(tmp_path / f"{name}.pem", PROJECT) for name in people}
    signers = {name: label_signer({"FRAUD_LABEL_KEY_FILE": str(tmp_path / f"{name}.pem")}) for name in people}
    keys = ", ".join(f"{name}:{publics[name]}" for name in ("desk", "shop"))
    made, ids = case(trust__label_keys=keys, gate__label_sources="desk"), ids_of(world.table)

    def signed(name: str, transaction: str, fraud: bool) -> tuple[bytes, list]:
        value = label_message(transaction, fraud, "json")
        return value, signers[name].headers(value)

    early, confirmed = signed("desk", ids[0], False), signed("desk", ids[0], True)
    forged = label_message(ids[0], False, "json")
    other = signed("shop", ids[1], True)
    made.fraud("produce", str(world.quiet), "--limit", "1000")
    with made.running("score") as scorer:
        made.until(lambda: made.count("decisions") >= 1000, process=scorer)
        sent = [confirmed, other, early, confirmed, (forged, []), (forged, confirmed[1]), signed("eve", ids[0], False)]
        sent += [(forged, [*early[1], *early[1]]), signed("desk", "nobody", True), signed("desk", ids[2], True)]
        with contextlib.closing(KafkaProducer(bootstrap_servers=made.broker.address)) as producer:
            for value, headers in sent:
                producer.send(made.topic("labels"), value, headers=headers).get(30)
        made.until(lambda: metric(scorer, "fraud_stream_messages_total") == 1000 + len(sent), process=scorer)
        taken, others = (
            metric(scorer, "fraud_stream_messages_total", outcome=kind) for kind in ("label", "other_source")
        )
    dead = Counter(dict(letter.headers)["fraud-kind"] for letter in made.read("dead labels"))
    assert (others, dead[b"source"], dead[b"unknown"]) == (1, 4, 1)
    assert dead[b"replay"] + taken == 4  # what is older or the same in one batch does no harm there
    store = JournaledStore(made.folder / "data/stream", retention_of(load_bundle(world.bundle).manifest.contract))
    assert store.state.frauds == {ids[0], ids[2]}
    store.close()
    made.fraud("sink", "--until-end")
    lake = made.folder / "data/decisions"
    assert labels_of(lake, ["desk"]) == ({ids[0]: True, ids[2]: True, "nobody": True}, 1)
    assert read_labels(lake)[ids[1]]
    assert len([*(lake / "unreadable").iterdir()]) == 4


def test_avro_from_end_to_end(case, world, uninterrupted):
    made, rows = case(stream__format="avro", stream__compression="lz4"), 5_000
    made.fraud("produce", str(world.quiet), "--limit", str(rows))
    with made.running("score") as process:
        made.until(lambda: made.count("decisions") >= rows, process=process)
    decisions = made.read("decisions")
    check_decisions(once(decisions), world, rows)
    as_json = {read_record(r.value)["transaction_id"]: len(r.value) for r in uninterrupted.decisions[:rows]}
    assert sum(len(r.value) for r in decisions) < 0.7 * sum(as_json.values())


def test_the_sink_writes_each_decision_once(case, world, uninterrupted):
    """Killed while it writes, with messages that a crash had repeated, and with what is no decision."""
    made = case(stream__decisions=uninterrupted.case.topic("decisions"))
    values = [(r.key, r.value) for r in uninterrupted.decisions]
    chance = random.Random(3)
    for _ in range(5):
        process = made.start("sink")
        time.sleep(chance.uniform(2.0, 6.0))
        process.kill()
        process.wait()
    made.send("decisions", [*values[-400:], (b"x", b"no decision"), (b"x", b'{"schema":1,"transaction_id":"half"}')])
    said = made.fraud("sink", "--until-end").stdout
    assert re.match(r"[\d,]+ decisions and 0 labels written to", said)
    lake = made.folder / "data/decisions"
    table = pq.read_table(lake, filters=None, ignore_prefixes=["unreadable", "labels", "."])
    assert sorted(ids_of(table)) == sorted(ids_of(world.table))
    assert sorted(path.read_bytes() for path in (lake / "unreadable").iterdir()) == [
        b"no decision",
        b'{"schema":1,"transaction_id":"half"}',
    ]
    ordered = table.sort_by("source_offset")
    assert ordered["decision"].to_pylist() == world.decision
    assert all(
        day == time // DAY for day, time in zip(ordered["day"].to_pylist(), ordered["time"].to_pylist(), strict=True)
    )
    assert "0 decisions and 0 labels written" in made.fraud("sink", "--until-end").stdout


def test_stops_when_asked_and_repeats_nothing(case, world):
    made, rows = case(stream__batch=50), 8_000
    made.fraud("produce", str(world.quiet), "--limit", str(rows))
    for _ in range(3):
        with made.running("score") as process:
            made.until(lambda: metric(process, "fraud_stream_messages_total") > 500, process=process)
    with made.running("score") as process:
        made.until(lambda: made.count("decisions") >= rows, process=process)
        assert metric(process, "fraud_stream_repeated_total") == 0
    decisions = made.read("decisions")
    assert len(decisions) == rows
    check_decisions(once(decisions), world, rows)


def test_a_topic_that_was_made_anew(case, world):
    made = case()
    made.fraud("produce", str(world.quiet), "--limit", "500")
    with made.running("score") as process:
        made.until(lambda: made.count("decisions") >= 500, process=process)
    with contextlib.closing(KafkaAdminClient(bootstrap_servers=made.broker.address)) as admin:
        admin.delete_topics([made.topic("transactions")])
        made.until(lambda: made.topic("transactions") not in admin.list_topics())
    made.fraud("produce", str(world.quiet), "--limit", "10")
    refused = made.fraud("score", ok=False)
    assert refused.returncode == 1 and "the topic was made anew since it was read" in refused.stderr


def test_replay_at_a_rate_with_labels(case, world):
    """Labels follow label_delay days after their transactions, and reach the memory store."""
    made, table = case(features__label_delay="1d"), world.table
    source, rows = made.folder / "source.parquet", 12_000
    pq.write_table(table.slice(0, rows), source)
    began = time.monotonic()
    said = made.fraud("produce", str(source), "--rate", "3000", "--labels").stdout
    assert time.monotonic() - began > rows / 3000
    last = table["time"][rows - 1].as_py()
    known = {
        row["transaction_id"]
        for row in table.slice(0, rows).select(["transaction_id", "time", "is_fraud"]).to_pylist()
        if row["is_fraud"] and row["time"] + DAY <= last
    }
    assert f"{rows:,} transactions and {len(known):,} labels" in said
    with made.running("score") as process:
        made.until(  # or more: a consumer that lost its group for a moment sends again what may not have arrived
            lambda: (
                made.count("decisions") >= rows and metric(process, "fraud_stream_messages_total") >= rows + len(known)
            ),
            process=process,
        )
    made.fraud("redrive", "--labels")  # those that were read before their transactions
    with made.running("score") as process:
        made.until(lambda: servers.status(f"http://{servers.HOST}:{process.port}/readyz") == 200, process=process)
        time.sleep(2)
    store = JournaledStore(made.folder / "data/stream", RETENTION)
    assert store.state.frauds == known
    store.close()
