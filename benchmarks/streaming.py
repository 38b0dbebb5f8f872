"""The stream on a Kafka broker on the same machine: transactions per second beside two peers in the same run, and the
time from produced to decided. What is measured: benchmarks/README.md.
"""

import argparse
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import serving
from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from measure import machine, say, write_json
from serving import DECLARED, HEADERS, HERE, PROJECT, World, clean, live_through, prepare, servers

from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import retention_of
from fraud_pkg.stream.kafka import make_topics
from fraud_pkg.stream.messages import read_record
from fraud_pkg.core.settings import load_settings

TOPIC, GROUP = "transactions", "benchmark"


def messages(world: World, count: int, run: str) -> Iterator[tuple[bytes, bytes]]:
    """(key, value): the live stream, as often as it takes, each time with new ids."""
    for i in range(count):
        row = world.stream[i % len(world.stream)]
        yield row["sender"].encode(), json.dumps({"schema": 1, "transaction_id": f"{run}-{i}", **row}).encode()


def fill(address: str, topic: str, world: World, count: int, run: str) -> None:
    with contextlib.closing(KafkaProducer(bootstrap_servers=address, linger_ms=20, batch_size=1 << 18)) as producer:
        for key, value in messages(world, count, run):
            producer.send(topic, value, key=key, partition=0)
        producer.flush()


def end_of(consumer: KafkaConsumer, topic: str) -> int:
    return consumer.end_offsets([TopicPartition(topic, 0)])[TopicPartition(topic, 0)]


def per_second(address: str, topic: str, count: int, process: subprocess.Popen, log: Path) -> float:
    """From the first message that appears in `topic` to the last; the start of a process does not count."""
    with contextlib.closing(KafkaConsumer(bootstrap_servers=address)) as consumer:
        while (first := end_of(consumer, topic)) == 0:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        began = time.perf_counter()
        while (last := end_of(consumer, topic)) < count:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        return (last - first) / (time.perf_counter() - began)


# The peers: the least that a consumer can do, and what is usually done.


def peer_copy(address: str, source: str, target: str) -> None:
    """A bare kafka-python loop: what it consumes it produces, acknowledged by all replicas before the position is
    committed.
    """
    loop(address, source, target, lambda records: [(record.key, record.value) for record in records])


def peer_http(address: str, source: str, target: str, port: str) -> None:
    """One HTTP request per message, on one kept connection, to the service on the same machine."""
    connection = http.client.HTTPConnection(servers.HOST, int(port))

    def ask(value: bytes) -> bytes:
        record = json.loads(value)
        del record["schema"]
        connection.request("POST", "/predict", json.dumps(record), HEADERS)
        answer = connection.getresponse()
        body = answer.read()
        assert answer.status == 200, body
        return body

    loop(address, source, target, lambda records: [(record.key, ask(record.value)) for record in records])


def loop(address: str, source: str, target: str, work: Callable) -> None:
    consumer = KafkaConsumer(
        bootstrap_servers=address,
        group_id=f"{target}-group",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_poll_records=500,
        max_partition_fetch_bytes=4 << 20,
    )
    consumer.subscribe([source])
    producer = KafkaProducer(bootstrap_servers=address, acks="all", linger_ms=5, batch_size=1 << 18)
    while True:
        for partition, records in consumer.poll(timeout_ms=500).items():
            for future in [producer.send(target, value, key=key, partition=0) for key, value in work(records)]:
                future.get(30)
            consumer.commit({partition: OffsetAndMetadata(records[-1].offset + 1, "", -1)})


# Ours.


def environ_of(world: World, address: str, name: str, **more: str | int) -> dict[str, str]:
    settings = {
        "stream.bootstrap_servers": address,
        "stream.transactions": TOPIC,
        "stream.decisions": f"{TOPIC}-{name}",
        "stream.labels": f"labels-{name}",
        "stream.group": f"{GROUP}-{name}",
        "stream.partitions": 1,
        "stream.port": 0,
        "stream.state": f"stream-{name}",
        "serve.bundle": world.bundle,
        "serve.fill": "no",
    } | {key.replace("__", "."): value for key, value in more.items()}
    return clean(
        PYTHONPATH=str(PROJECT),
        FRAUD_ROOT=str(world.root),
        FRAUD_SET=json.dumps({key: str(value) for key, value in settings.items()} | DECLARED[world.name]),
    )


@contextlib.contextmanager
def process_of(command: list[str], environ: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def ours(world: World, address: str, name: str, **more: str | int) -> Iterator[subprocess.Popen]:
    with process_of(
        [sys.executable, "-m", "fraud_pkg.stream.worker"],
        environ_of(world, address, name, **more),
        world.root / f"{name}.log",
    ) as process:
        yield process


@contextlib.contextmanager
def peer(world: World, address: str, name: str, *arguments: str) -> Iterator[subprocess.Popen]:
    command = [
        sys.executable,
        str(HERE / "streaming.py"),
        "--peer",
        name.split("-")[0],
        address,
        TOPIC,
        f"{TOPIC}-{name}",
        *arguments,
    ]
    with process_of(
        command, clean(PYTHONPATH=f"{PROJECT}{os.pathsep}{PROJECT / 'tests'}"), world.root / f"{name}.log"
    ) as process:
        yield process


def topics(world: World, address: str, name: str, **more: str | int) -> None:
    """Makes the topics of a consumer."""
    settings = load_settings(
        cli=json.loads(environ_of(world, address, name, **more)["FRAUD_SET"]),
        file=world.root / "settings.ini",
        environ={},
    )
    make_topics(settings.stream, {})


def throughput(world: World, address: str, redis: str, count: int, rounds: int) -> dict[str, list[float]]:
    """Transactions per second of each, in turns, on the same messages."""
    contract = world.settings.contract
    found: dict[str, list[float]] = {"memory store": [], "Redis store": [], "copy": [], "http": []}
    with serving.our_service(world, "api", pin=False) as api:
        for number in range(rounds):
            for what in found:
                say(f"round {number + 1}: {what}")
                name, size = f"{what.split()[0].lower()}-{number}", count // 5 if what == "http" else count
                topics(world, address, name)
                if what == "memory store":
                    running = ours(world, address, name, store__url=f"memory://{world.snapshot}")
                elif what == "Redis store":
                    url = f"{redis.rsplit('/', 1)[0]}/{number}"
                    with contextlib.closing(open_store(url, retention_of(contract), 5)) as store:
                        live_through(store, world.past, contract)
                    running = ours(world, address, name, store__url=url)
                else:
                    running = peer(world, address, name, *([str(api.port)] if what == "http" else []))
                with running as process:
                    found[what].append(
                        per_second(address, f"{TOPIC}-{name}", size, process, world.root / f"{name}.log")
                    )
    return found


def latency(world: World, address: str, rate: int, seconds: int) -> dict[str, float]:
    """Milliseconds from the moment a message is handed to the producer to the moment a consumer has its decision."""
    say(f"latency at {rate} transactions a second")
    name, sent, spent = "latency", {}, []
    topics(world, address, name)
    with ours(
        world, address, name, store__url=f"memory://{world.snapshot}", stream__transactions="transactions-live"
    ) as process:
        with contextlib.closing(KafkaConsumer(bootstrap_servers=address)) as reader:
            target = TopicPartition(f"{TOPIC}-{name}", 0)
            reader.assign([target])
            reader.seek_to_beginning(target)
            stop = threading.Event()

            def read() -> None:
                while not stop.is_set():
                    for record in reader.poll(timeout_ms=200).get(target, ()):
                        spent.append((time.perf_counter(), read_record(record.value)["transaction_id"]))

            thread = threading.Thread(target=read)
            thread.start()
            with contextlib.closing(KafkaProducer(bootstrap_servers=address)) as producer:
                total, began = rate * seconds, None
                for i, (key, value) in enumerate(messages(world, total + rate, "live")):
                    if i == rate:  # the first second, in which everything starts, does not count
                        while len(spent) < rate:
                            assert process.poll() is None, (world.root / f"{name}.log").read_text()[-3000:]
                            time.sleep(0.05)
                        began = time.perf_counter()
                    if began and (early := began + (i - rate) / rate - time.perf_counter()) > 0:
                        time.sleep(early)
                    sent[f"live-{i}"] = time.perf_counter()
                    producer.send("transactions-live", value, key=key, partition=0)
                producer.flush()
            while len(spent) < total + rate:
                time.sleep(0.05)
            stop.set()
            thread.join()
    times = [(arrived - sent[number]) * 1000 for arrived, number in spent if int(number.split("-")[1]) >= rate]
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "worst_ms": max(times)}


def table(figures: dict[str, list[float]], late: dict[str, float], rate: int, source: str) -> dict:
    middle = {name: float(np.median(found)) for name, found in figures.items()}
    labels = {
        "memory store": "one consumer, memory store with its journal",
        "Redis store": "one consumer, Redis store",
        "copy": "peer: consume and produce, nothing else (the ceiling)",
        "http": "peer: one HTTP request per message to the service, memory store",
    }
    lines = [
        [
            label,
            f"{middle[name]:,.0f} ({', '.join(f'{found:,.0f}' for found in figures[name])})",
            f"{middle[name] / middle['copy']:.2f}",
            f"{middle[name] / middle['http']:.2f}",
        ]
        for name, label in labels.items()
    ]
    note = (
        f"Model: {source}. Aim: at least 8,000 transactions/s with the memory store "
        f"({'met' if middle['memory store'] >= 8000 else 'missed'}) and 5,000 with Redis "
        f"({'met' if middle['Redis store'] >= 5000 else 'missed'}). "
        f"Produced to decided at {rate} transactions/s: median {late['p50_ms']:.1f} ms, "
        f"p99 {late['p99_ms']:.1f} ms, worst {late['worst_ms']:.0f} ms."
    )
    return {
        "title": "The stream",
        "note": note,
        "columns": ["", "transactions/s: median (rounds)", "of the ceiling", "of one request per message"],
        "rows": lines,
    }


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        {"copy": peer_copy, "http": peer_http}[sys.argv[2]](*sys.argv[3:])
        return
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="see that it runs; the figures say little")
    options.add_argument("--bundle", type=Path, help="a model instead of a freshly trained one")
    options.add_argument("--json", type=Path, help="write the figures there too")
    chosen = options.parse_args()
    given = chosen.bundle or (PROJECT / "models/champion" if (PROJECT / "models/champion").exists() else None)
    count, rounds, rate, seconds = (10_000, 1, 500, 5) if chosen.quick else (100_000, 3, 500, 30)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        root = Path(scratch)
        before = machine()
        world = prepare(root, serving.QUICK if chosen.quick else serving.FULL, given)
        redis = stack.enter_context(servers.redis(root))
        address = stack.enter_context(servers.kafka(root, java=()))
        say(f"{count:,} transactions into the topic")
        topics(world, address, "fill")
        fill(address, TOPIC, world, count, "bench")
        figures, late = throughput(world, address, redis, count, rounds), latency(world, address, rate, seconds)
        write_json(chosen.json, before, [table(figures, late, rate, world.source)])


if __name__ == "__main__":
    main()
