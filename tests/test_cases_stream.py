"""Cases of what the stream decides, and labels back into it: whatever is killed, each once."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import servers
import sqlalchemy as sa
from conftest import PROJECT
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from case_workers import opened
from test_cases import cases_of, payment

from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.case_store import CaseLabels
from fraud_pkg.serve.case_tables import CASES, LABELS_OUT
from fraud_pkg.stream.messages import read_record

PAYMENTS = 400


class Stream:
    """Topics of its own on a broker, and the command line on them."""

    def __init__(self, folder: Path, broker: str):
        self.folder, self.broker, tag = folder, broker, f"{os.getpid()}-{time.time_ns()}"
        shutil.copy(PROJECT / "settings.ini", folder)
        example_bundle(folder / "champion", weight=0.002, bias=-7.0)
        self.url = f"sqlite:///{folder}/cases.db"
        self.settings = {
            "stream.bootstrap_servers": broker,
            "stream.transactions": f"t-{tag}",
            "stream.decisions": f"d-{tag}",
            "stream.labels": f"l-{tag}",
            "stream.group": f"g-{tag}",
            "stream.partitions": 2,
            "stream.batch": 20,
            "stream.session_timeout": 1,
            "stream.port": 0,
            "serve.bundle": folder / "champion",
            "cases.url": self.url,
            "cases.labels": "topic",
        }

    def start(self, *arguments: str) -> subprocess.Popen:
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "fraud_pkg.cli", *arguments],
                cwd=self.folder,
                env=servers.environment(self.settings, self.folder),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @contextlib.contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen]:
        """Stopped in the friendly way afterwards, which has to end well."""
        seen = self.whole_log().count(" reading ")
        process = self.start(*arguments)
        try:
            servers.until(lambda: self.whole_log().count(" reading ") > seen, 60, self.log)
            yield process
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (self.folder / "log").read_text()[-3000:]
        finally:
            process.kill()
            process.wait()

    def read(self, name: str) -> list:
        """Every message of a topic."""
        topic = self.settings[f"stream.{name}"]
        consumer = KafkaConsumer(bootstrap_servers=self.broker, enable_auto_commit=False)
        with contextlib.closing(consumer):
            partitions = [TopicPartition(topic, each) for each in sorted(consumer.partitions_for_topic(topic) or ())]
            consumer.assign(partitions)
            consumer.seek_to_beginning()
            ends, found = consumer.end_offsets(partitions), []
            while any(consumer.position(each) < ends[each] for each in partitions):
                found += [message for part in consumer.poll(timeout_ms=1000).values() for message in part]
        return found

    def whole_log(self) -> str:
        file = self.folder / "log"
        return file.read_text() if file.exists() else ""

    def log(self) -> str:
        return self.whole_log()[-3000:]


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Iterator[Stream]:
    """Decisions in a topic: a quarter are reviews."""
    folder = tmp_path_factory.mktemp("stream")
    with servers.kafka(folder) as broker:
        made = Stream(folder, broker)
        with made.running("stream", "score"), contextlib.closing(KafkaProducer(bootstrap_servers=broker)) as producer:
            servers.until(lambda: "reading" in made.log(), 60, made.log)
            for number in range(PAYMENTS):
                amount = (10.0, 4000.0, 9000.0, 50.0)[number % 4]
                sent = payment(f"p{number}", amount, sender=f"C{number}", receiver=f"M{number % 9}")
                producer.send(
                    made.settings["stream.transactions"], json.dumps(sent).encode(), key=sent["sender"].encode()
                )
            producer.flush()
            servers.until(lambda: len(made.read("decisions")) >= PAYMENTS, 90, made.log)
        yield made


def wanted(stream: Stream) -> set[str]:
    records = [read_record(message.value) for message in stream.read("decisions")]
    return {record["transaction_id"] for record in records if record["decision"] != "allow"}


def test_a_follower_that_is_killed(stream):
    """kill -9 at any moment, and two at once: every review and block has one case."""
    names, chance = wanted(stream), random.Random(7)
    assert len(names) == PAYMENTS // 2
    for _ in range(4):
        pair = [stream.start("cases", "follow") for _ in range(2)]
        before = len(cases_of(stream.url))
        servers.until(
            lambda before=before: len(cases_of(stream.url)) > before or set(cases_of(stream.url)) == names, 60
        )
        time.sleep(chance.uniform(0, 0.2))
        for process in pair:
            process.kill()
            process.wait()
    with stream.running("cases", "follow"):
        servers.until(lambda: set(cases_of(stream.url)) == names, 60, stream.log)
    assert sorted(cases_of(stream.url)) == sorted(names)


def test_labels_go_back_once(stream, tmp_path):
    """What people close becomes a label in the topic; a follower that is killed sends the same message again or none;
    the sink writes it where the next training reads it.
    """
    with stream.running("cases", "follow"):
        servers.until(lambda: set(cases_of(stream.url)) == wanted(stream), 60, stream.log)
    store = opened(stream.url, lambda: round(time.time() * 1000))
    with store.reading() as connection:
        open_cases = connection.execute(
            sa.select(CASES.c.id, CASES.c.transaction_id).where(CASES.c.state == "open")
        ).all()
    assert len(open_cases) == PAYMENTS // 4
    outcomes = {}
    for number, (case_id, name) in enumerate(open_cases):
        store.take(case_id, "anna")
        store.finish(case_id, "anna", ("fraud", "honest", "unclear")[number % 3])
        outcomes[name] = (True, False, None)[number % 3]
    told = {name: fraud for name, fraud in outcomes.items() if fraud is not None}
    for _ in range(3):
        process = stream.start("cases", "follow")
        servers.until(lambda: "cases of" in stream.log(), 60, stream.log)
        time.sleep(random.Random(len(told)).uniform(0.5, 2.0))
        process.kill()
        process.wait()
    with stream.running("cases", "follow"):
        servers.until(lambda: {m.key.decode() for m in stream.read("labels")} == told.keys(), 60, stream.log)
    messages = stream.read("labels")
    assert {json.loads(m.value)["transaction_id"]: json.loads(m.value)["is_fraud"] for m in messages} == told
    assert len({(m.key, m.value, m.timestamp) for m in messages}) == len(told)  # a repeated one is the same one
    with stream.running("stream", "sink", "--until-end") as sink:
        servers.until(lambda: sink.poll() is not None, 90, stream.log)
    labels = pq.read_table(stream.folder / "data/decisions/labels")
    found = dict(zip(labels["transaction_id"].to_pylist(), labels["is_fraud"].to_pylist(), strict=True))
    assert {name: bool(fraud) for name, fraud in found.items()} == told


OUTCOMES = {"fraud": True, "honest": False, "unclear": None}


def close_what_opens(url: str, stopping: threading.Event) -> None:
    """A person who never sleeps."""
    store = opened(url, lambda: round(time.time() * 1000))
    query = sa.select(CASES.c.id).where(CASES.c.state == "open").order_by(CASES.c.id).limit(10)
    while not stopping.wait(0.02):
        with store.reading() as connection:
            waiting = connection.execute(query).scalars().all()
        for case_id in waiting:
            store.take(case_id, "anna")
            store.finish(case_id, "anna", list(OUTCOMES)[case_id % 3])
    store.close()


def test_the_broker_is_killed(tmp_path):
    """kill -9 of the broker, twice, while payments are decided, decisions followed, labels sent; then it is started on
    what it had: each payment that is reviewed or blocked has one case, each that was closed with an answer one label.
    """
    port, numbers, kills = servers.free_port(), iter(range(150)), [50, 100]
    folder = tmp_path / "stream"
    folder.mkdir()
    stopping, life = threading.Event(), contextlib.ExitStack()
    with contextlib.ExitStack() as stack:
        stack.callback(life.close)
        broker = life.enter_context(servers.kafka(tmp_path, port))
        made = Stream(folder, broker)
        stack.enter_context(made.running("stream", "score"))
        stack.enter_context(made.running("cases", "follow"))
        person = threading.Thread(target=close_what_opens, args=(made.url, stopping))
        person.start()
        stack.callback(person.join)
        stack.callback(stopping.set)
        producer = KafkaProducer(bootstrap_servers=broker)
        for number in numbers:
            sent = payment(f"p{number}", (10.0, 4000.0, 9000.0)[number % 3], sender=f"C{number}", receiver="M1")
            producer.send(made.settings["stream.transactions"], json.dumps(sent).encode()).get(timeout=30)
            time.sleep(0.01)
            if number in kills:  # what was just sent is on its way through three processes
                servers.until(lambda number=number: len(cases_of(made.url)) > number // 3, 60, made.log)
                life.close()
                producer.close(timeout=0)
                time.sleep(1)
                assert life.enter_context(servers.kafka(tmp_path, port)) == broker
                producer = KafkaProducer(bootstrap_servers=broker)
        producer.close()
        reviewed = {f"p{number}" for number in range(150) if number % 3}
        servers.until(lambda: set(cases_of(made.url)) == reviewed, 90, made.log)
        store = opened(made.url)

        def told() -> bool:
            with store.reading() as connection:
                count = sa.select(sa.func.count()).where(CASES.c.state != "closed")
                return connection.execute(count).scalar() == 0 and not CaseLabels(store).waiting()

        servers.until(told, 60, made.log)
        messages, decided = (
            made.read("labels"),
            {read_record(m.value)["transaction_id"] for m in made.read("decisions")},
        )
        with store.reading() as connection:
            outcomes = dict(connection.execute(sa.select(CASES.c.transaction_id, CASES.c.outcome)).all())
            labels = connection.execute(sa.select(LABELS_OUT)).all()
        store.close()
    assert sorted(cases_of(made.url)) == sorted(reviewed) and len(decided) == 150
    wanted = {name: OUTCOMES[outcome] for name, outcome in outcomes.items() if OUTCOMES.get(outcome) is not None}
    assert len(wanted) > 20 and {label.transaction_id: label.is_fraud for label in labels} == wanted
    sent_labels = {(m.key.decode(), json.loads(m.value)["is_fraud"], m.timestamp) for m in messages}
    assert sent_labels == {(label.transaction_id, label.is_fraud, label.known_at) for label in labels}
    assert "waiting for the" in made.whole_log()  # the follower met a broker that was away
