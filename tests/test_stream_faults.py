"""What is done to topics, brokers and stores while a consumer reads: nothing is missed, or repeated with other bytes,
without a word. On a real broker, with a bundle that needs no training.
"""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
import servers
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import EXAMPLE

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def broker(tmp_path_factory) -> Iterator[str]:
    with servers.kafka(tmp_path_factory.mktemp("broker")) as address:
        yield address


@dataclass
class Stream:
    """Topics of a test's own, and a consumer of them."""

    folder: Path
    broker: str
    tag: str

    @property
    def settings(self) -> dict[str, object]:
        names = {key: f"{self.tag}.{key}" for key in ("transactions", "decisions", "labels")}
        return {
            **{f"stream.{key}": name for key, name in names.items()},
            "stream.bootstrap_servers": self.broker,
            "stream.group": self.tag,
            "stream.partitions": 1,
            "stream.session_timeout": 30,
            "stream.state": self.folder / "state",
            "serve.bundle": self.folder / "champion",
        }

    @contextlib.contextmanager
    def running(self, ready: bool = True, **more) -> Iterator[subprocess.Popen]:
        """The consumer; its URL is `process.url`."""
        port = servers.free_port()
        url = f"http://{servers.HOST}:{port}"
        given = self.settings | {"stream.port": port} | servers.named(more)
        with servers.running(
            [sys.executable, "-m", "fraud_pkg.stream.worker"],
            lambda: not ready or servers.status(f"{url}/readyz") == 200,
            self.folder / "log",
            env=servers.environment(given, PROJECT),
        ) as process:
            process.url = url
            yield process

    def sink(self) -> subprocess.CompletedProcess:
        """Decisions to files, up to the present end."""
        given = self.settings | {"stream.port": 0, "stream.sink": self.folder / "lake"}
        command = [sys.executable, "-m", "fraud_pkg.cli", "stream", "sink", "--until-end"]
        environ = servers.environment(given, PROJECT)
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    @contextlib.contextmanager
    def admin(self) -> Iterator[KafkaAdminClient]:
        with contextlib.closing(KafkaAdminClient(bootstrap_servers=self.broker)) as admin:
            yield admin

    def make(self, topic: str, partitions: int = 1, **configs: str) -> str:
        name = f"{self.tag}.{topic}"
        options = {"num_partitions": partitions, "replication_factor": 1, "configs": configs}
        with self.admin() as admin:
            admin.create_topics({name: options}, wait_for_metadata=True)
        return name

    def make_anew(self, topic: str) -> None:
        name = f"{self.tag}.{topic}"
        with self.admin() as admin:
            admin.delete_topics([name])
            servers.until(lambda: name not in admin.list_topics(), 20)
        self.make(topic)

    def send(self, numbers: range, partition: int = 0, **changes) -> None:
        """Payments with these numbers."""
        rows = [{"schema": 1, **EXAMPLE, "transaction_id": f"t{n}", "sender": f"C{n % 7}", **changes} for n in numbers]
        self.send_values([json.dumps(row).encode() for row in rows], partition)

    def send_values(self, values: list[bytes], partition: int = 0) -> None:
        producer = KafkaProducer(bootstrap_servers=self.broker, acks="all", max_request_size=1 << 24)
        with contextlib.closing(producer):
            futures = [
                producer.send(f"{self.tag}.transactions", value, key=b"C1", partition=partition) for value in values
            ]
            for future in futures:
                future.get(20)

    def read(self, topic: str) -> list:
        """Every message of a topic, in the order of its partitions."""
        name = f"{self.tag}.{topic}"
        with contextlib.closing(KafkaConsumer(bootstrap_servers=self.broker, enable_auto_commit=False)) as consumer:
            partitions = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name) or ()]
            consumer.assign(partitions)
            consumer.seek_to_beginning(*partitions)
            ends, found = consumer.end_offsets(partitions), []
            while any(consumer.position(p) < ends[p] for p in partitions):
                found += [record for records in consumer.poll(timeout_ms=500).values() for record in records]
        return sorted(found, key=lambda record: (record.partition, record.offset))

    def decided(self) -> list[str]:
        return [json.loads(record.value)["transaction_id"] for record in self.read("decisions")]

    def until(self, holds: Callable[[], object], seconds: float = 30) -> None:
        servers.until(holds, seconds, self.log)


@pytest.fixture
def stream(tmp_path, broker) -> Stream:
    example_bundle(tmp_path / "champion")
    return Stream(tmp_path, broker, f"f{time.time_ns()}")


def ids(numbers: range) -> list[str]:
    return [f"t{number}" for number in numbers]


def metric(process, name: str) -> float:
    lines = servers.fetch(f"{process.url}/metrics").splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_messages_deleted_ahead_of_a_running_consumer_are_counted(stream):
    """While it stands still for a moment, the broker deletes what it has not read."""
    with stream.running() as process:
        stream.send(range(20))
        stream.until(lambda: len(stream.decided()) == 20)
        process.send_signal(signal.SIGSTOP)
        stream.send(range(20, 220))
        with stream.admin() as admin:
            admin.delete_records({TopicPartition(f"{stream.tag}.transactions", 0): 170})
        process.send_signal(signal.SIGCONT)
        stream.send(range(220, 240))
        stream.until(lambda: stream.decided()[-1:] == ["t239"])
        # What the client had fetched before is decided all the same.
        assert metric(process, "fraud_stream_missed_total") == 240 - len(stream.decided()) > 100
    assert "messages 20 to 169 were deleted before they were read" in stream.log() or "were deleted" in stream.log()


def test_partitions_that_are_added_are_read(stream):
    with stream.running() as process:
        stream.send(range(5))
        stream.until(lambda: len(stream.decided()) == 5)
        with stream.admin() as admin:
            admin.create_partitions({f"{stream.tag}.transactions": 3})
        for partition in (1, 2):
            stream.send(range(10 * partition, 10 * partition + 5), partition)
        stream.until(lambda: len(stream.decided()) == 15, 30)
        assert servers.status(f"{process.url}/readyz") == 200
        assert {record.partition for record in stream.read("decisions")} == {0, 1, 2}


@pytest.mark.parametrize("store", ["memory", "redis"])
def test_a_longer_topic_of_the_same_name_is_another_topic(stream, store, tmp_path):
    """Its offsets are there, its messages are others: the consumer says so and ends, at a start and while it runs."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(servers.redis(tmp_path)) if store == "redis" else "memory://"
        with stream.running(store__url=url):
            stream.send(range(20))
            stream.until(lambda: len(stream.decided()) == 20)
        stream.make_anew("transactions")
        stream.send(range(100, 140))
        with stream.running(ready=False, store__url=url) as process:
            assert process.wait(30) == 1
        assert "the topic was made anew since it was read" in stream.log() and len(stream.decided()) == 20
        with stream.running(store__url=url, stream__group=f"{stream.tag}2") as process:
            stream.until(lambda: len(stream.decided()) == 60)
            stream.make_anew("transactions")
            stream.send(range(200, 260))
            assert process.wait(40) == 1
        assert stream.log().count("the topic was made anew") + stream.log().count("was made anew or has lost") == 2


def test_other_topics_are_noticed_without_a_store(stream):
    """A consumer whose service decides finds what it read in the decisions, a sink in its folder: made anew while they
    were stopped, transactions and decisions are refused, and nothing of the new ones is passed over.
    """
    with servers.service(stream.folder) as (url, _):
        with stream.running(stream__via=url):
            stream.send(range(20))
            stream.until(lambda: len(stream.decided()) == 20)
        assert stream.sink().returncode == 0 and stream.sink().returncode == 0
        stream.make_anew("transactions")
        stream.send(range(100, 140))
        with stream.running(ready=False, stream__via=url) as process:
            assert process.wait(30) == 1
        assert "the topic was made anew since it was read" in stream.log() and len(stream.decided()) == 20
        stream.make_anew("decisions")
        refused = stream.sink()
        assert refused.returncode == 1 and "decisions: the topic was made anew" in refused.stderr
        with stream.running(stream__via=url):
            stream.until(lambda: len(stream.decided()) == 40)


def test_a_compacted_topic_is_said(stream):
    with stream.running(), stream.admin() as admin:
        resource = ConfigResource(ConfigResourceType.TOPIC, f"{stream.tag}.transactions", {"cleanup.policy": "compact"})
        admin.alter_configs([resource])
        stream.until(lambda: "is compacted: of the messages with one key only the last is kept" in stream.log(), 30)


def test_a_dead_letter_that_is_too_large_stops_nothing(stream):
    """The topic of dead letters takes less than somebody sends: the letter is cut and says so."""
    stream.make("transactions.dlq", **{"max.message.bytes": "100000"})
    with stream.running():
        stream.send_values([b"x" * 900_000, b"y" * 900_000])
        stream.send(range(10))
        stream.until(lambda: len(stream.decided()) == 10)
    letters = stream.read("transactions.dlq")
    assert [len(letter.value) for letter in letters] == [65536, 0] or [len(x.value) for x in letters] == [65536] * 2
    for offset, letter in enumerate(letters):
        headers: Mapping[str, bytes] = dict(letter.headers)
        assert json.loads(headers["fraud-cut"])["value"] == 900_000 and headers["fraud-offset"] == str(offset).encode()


def test_a_store_that_cannot_record_is_not_ready(stream, tmp_path):
    """Also while there is nothing to decide."""
    with servers.redis(tmp_path) as url, stream.running(store__url=url) as process:
        redis.Redis.from_url(url).config_set("maxmemory", "1")
        stream.until(lambda: servers.status(f"{process.url}/readyz") == 503, 15)
        redis.Redis.from_url(url).config_set("maxmemory", "0")
        stream.until(lambda: servers.status(f"{process.url}/readyz") == 200, 15)


def test_what_a_failover_lost_is_decided_again_and_marked(stream, tmp_path):
    """Redis comes back as it was twenty payments ago: those are decided again, counted once, and marked."""
    port = servers.free_port()
    with contextlib.ExitStack() as running:
        url = running.enter_context(servers.redis(tmp_path, port))
        worker = running.enter_context(contextlib.ExitStack())
        worker.enter_context(stream.running(store__url=url))
        stream.send(range(20))
        stream.until(lambda: len(stream.decided()) == 20)
        client = redis.Redis.from_url(url)
        client.save()
        stream.send(range(20, 40))
        stream.until(lambda: len(stream.decided()) == 40)
        client.shutdown(nosave=True)
        with servers.redis(tmp_path, port):
            stream.send(range(40, 45))
            stream.until(lambda: len(stream.decided()) == 65)
            marked = [dict(record.headers).get("fraud-correction") for record in stream.read("decisions")]
            assert stream.decided() == ids(range(40)) + ids(range(20, 45))
            assert marked == [None] * 40 + [b"1"] * 20 + [None] * 5
            histories = [key for key in client.keys("fraud:e:*") if b"C1" in key]
            assert client.dbsize() > 45 and histories
            worker.close()
    assert "the store is at 20, and decisions were sent up to 39: it has lost writes" in stream.log()
