"""Payments for an hour, over Kafka and over HTTP, while every process of the system is killed again and again (SIGKILL:
service, consumer, Redis, broker) and started anew. At the end:

- every payment that was acknowledged has its decision, and none is a dead letter;
- the store has counted each of them once, to the cent;
- a decision that is there twice is the same to the byte, or marked as a correction;
- service and consumer do not grow.

    python tests/soak.py --minutes 60            # at 500 payments a second, a kill every 20 to 60 seconds
    python tests/soak.py --minutes 2 --pause 6 12
"""

import argparse
import contextlib
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import redis
import servers
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import KafkaError

from fraud_pkg.core.contract import DAY, TILES
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.store.tiles import unpack_history

SENDERS, RECEIVERS = 2000, 200


@dataclass
class Component:
    """A server that can be killed and started again where it was."""

    name: str
    open: Callable[[], AbstractContextManager]
    process: psutil.Process | None = None
    _running: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def start(self) -> None:
        before = set(psutil.Process().children())
        self._running.enter_context(self.open())
        (self.process,) = set(psutil.Process().children()) - before

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self._running.close()  # waits for its end

    def stop(self) -> None:
        self._running.close()


@dataclass
class System:
    """All processes on fixed ports, below one folder."""

    folder: Path
    ports: dict[str, int] = field(
        default_factory=lambda: {name: servers.free_port() for name in ("broker", "redis", "service", "consumer")}
    )

    def __post_init__(self):
        example_bundle(self.folder / "champion")
        (self.folder / "redis").mkdir()
        self.components = {
            "broker": Component("broker", lambda: servers.kafka(self.folder, self.ports["broker"])),
            "redis": Component("redis", self._redis),
            "service": Component("service", self._service),
            "consumer": Component("consumer", self._consumer),
        }

    @property
    def address(self) -> str:
        return f"{servers.HOST}:{self.ports['broker']}"

    @property
    def store(self) -> str:
        return f"redis://{servers.HOST}:{self.ports['redis']}/0"

    def _redis(self) -> AbstractContextManager:
        options = ["--appendonly", "yes", "--appendfsync", "always"]
        return servers.redis(self.folder / "redis", self.ports["redis"], options)

    def _service(self) -> AbstractContextManager:
        given = {"store__url": self.store, "store__timeout": 2, "console__enabled": "no"}
        return servers.service(self.folder, ready=False, port=self.ports["service"], **given)

    @contextlib.contextmanager
    def _consumer(self) -> Iterator[None]:
        alive = f"http://{servers.HOST}:{self.ports['consumer']}/healthz"
        given = {
            "stream.bootstrap_servers": self.address,
            "stream.session_timeout": 6,
            "stream.partitions": 3,
            "stream.port": self.ports["consumer"],
            "store.url": self.store,
            "store.timeout": 2,
            "serve.bundle": self.folder / "champion",
        }
        with servers.running(
            [sys.executable, "-m", "fraud_pkg.stream.worker"],
            lambda: servers.status(alive) == 200,
            self.folder / "consumer.log",
            seconds=90,
            env=servers.environment(given, servers.PROJECT),
        ):
            yield

    def start(self) -> None:
        for component in self.components.values():
            component.start()

    def stop(self) -> None:
        for component in reversed(self.components.values()):
            component.stop()


def payment(kind: str, number: int) -> dict:
    cents = 100 + number % 900
    names = {"sender": f"C{number % SENDERS}", "receiver": f"M{number % RECEIVERS}"}
    return {**EXAMPLE, **names, "transaction_id": f"{kind}{number}", "amount": cents / 100, "step": 2000}


@dataclass
class Sender:
    """Sends payments until it is told to stop; what is not acknowledged is sent again, under the same id."""

    system: System
    stopping: threading.Event = field(default_factory=threading.Event)
    stream: dict[str, int] = field(default_factory=dict)  # cents by id, of what was acknowledged
    http: dict[str, int] = field(default_factory=dict)
    again: int = 0

    def to_stream(self, rate: float) -> None:
        waiting, number, producer, began = {}, 0, None, time.monotonic()
        failed: list[dict] = []
        while not self.stopping.is_set() or waiting or failed:
            try:
                producer = producer or KafkaProducer(
                    bootstrap_servers=self.system.address, acks="all", enable_idempotence=True, linger_ms=5
                )
                due = 0 if self.stopping.is_set() else int((time.monotonic() - began) * rate) - number
                new = [payment("s", number + i) for i in range(due)]
                number += len(new)
                self.again += len(failed)
                failed, sending = [], failed + new
                for content in sending:
                    failed.append(content)  # until it is handed over
                    value, key = json.dumps(content).encode(), content["sender"].encode()
                    waiting[content["transaction_id"]] = (producer.send("transactions", value, key=key), content)
                    failed.pop()
            except (KafkaError, OSError):
                time.sleep(0.2)
            for name, (future, content) in list(waiting.items()):
                if future.is_done:
                    del waiting[name]
                    if future.succeeded():
                        self.stream[name] = round(content["amount"] * 100)
                    else:
                        failed.append(content)
            time.sleep(0.05)
        producer.close()

    def to_service(self, rate: float) -> None:
        number, url = 0, f"http://{servers.HOST}:{self.system.ports['service']}/predict"
        with httpx.Client(timeout=10) as client:
            while not self.stopping.wait(1 / rate):
                content, number = payment("h", number), number + 1
                while True:
                    with contextlib.suppress(httpx.HTTPError):
                        answer = client.post(url, json=content)
                        if answer.status_code == 200:
                            self.http[content["transaction_id"]] = round(content["amount"] * 100)
                            break
                        assert answer.status_code in (429, 503), answer.text
                    self.again += 1
                    time.sleep(0.2)


@dataclass
class Memory:
    """Resident bytes of service and consumer, by process and time."""

    system: System
    seen: dict[tuple[str, int], list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    def watch(self, stopping: threading.Event) -> None:
        while not stopping.wait(1):
            for name in ("service", "consumer"):
                process = self.system.components[name].process
                with contextlib.suppress(psutil.Error):
                    self.seen[name, process.pid].append((time.monotonic(), process.memory_info().rss))

    def grown(self, settled: float) -> dict[str, float]:
        """How many MiB each process that ran long enough has more at its end than after `settled` seconds."""
        found = {}
        for (name, pid), samples in self.seen.items():
            later = [size for at, size in samples if at - samples[0][0] > settled]
            if len(later) > 20:
                found[f"{name} {pid}"] = (max(later[-5:]) - max(later[:5])) / 2**20
        return found


def decisions(system: System, topic: str) -> dict[str, list[tuple[bytes, bool]]]:
    """What a topic holds, by id: each value, and whether it is marked as a correction."""
    found = defaultdict(list)
    options = {"bootstrap_servers": system.address, "isolation_level": "read_committed", "enable_auto_commit": False}
    with contextlib.closing(KafkaConsumer(**options)) as consumer:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        ends = consumer.end_offsets(partitions)
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            for records in consumer.poll(timeout_ms=1000).values():
                for record in records:
                    name = json.loads(record.value)["transaction_id"]
                    marked = any(header == "fraud-correction" for header, _ in record.headers)
                    found[name].append((record.value, marked))
    return found


def counted(system: System) -> tuple[int, int, int, int, int]:
    """What the store knows: transactions; payments and cents that went out, and came in."""
    client, days = redis.Redis.from_url(system.store), TILES.index(DAY)
    transactions = sum(1 for _ in client.scan_iter("fraud:t:*", count=5000))
    sums = Counter[str]()
    for key in client.scan_iter("fraud:e:account:*", count=5000):
        for _, out, out_cents, came, came_cents, *_ in unpack_history(client.get(key)).tiles[days]:
            sums.update({"out": out, "out_cents": out_cents, "in": came, "in_cents": came_cents})
    return transactions, sums["out"], sums["out_cents"], sums["in"], sums["in_cents"]


def soak(
    folder: Path,
    seconds: float,
    rate: float = 500,
    pause: tuple[float, float] = (20, 60),
    seed: int = 1,
    drain: float = 600,  # seconds for what waits at the end
) -> str:
    """Runs it all; returns a line about it, or raises `AssertionError`."""
    system, chance, kills = System(folder), random.Random(seed), Counter[str]()
    system.start()
    sender, memory, over = Sender(system), Memory(system), threading.Event()
    threads = [
        threading.Thread(target=sender.to_stream, args=(rate,), daemon=True),
        threading.Thread(target=sender.to_service, args=(max(1, rate / 50),), daemon=True),
        threading.Thread(target=memory.watch, args=(over,), daemon=True),
    ]
    try:
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(chance.uniform(*pause), max(0, end - time.monotonic())))
            name = (
                chance.choice(list(system.components))
                if sum(kills.values()) >= 4
                else list(system.components)[sum(kills.values())]
            )
            system.components[name].kill()
            kills[name] += 1
            print(f"{time.strftime('%X')} {name} killed; {len(sender.stream):,} acknowledged", flush=True)
            time.sleep(chance.uniform(0, 3))
            system.components[name].start()
        sender.stopping.set()
        for thread in threads[:2]:
            thread.join(drain)
            assert not thread.is_alive(), "what was sent is not acknowledged"
        return _judge(system, sender, memory, kills, drain)
    finally:
        sender.stopping.set()
        over.set()
        system.stop()


def _judge(system: System, sender: Sender, memory: Memory, kills: Counter, drain: float) -> str:
    found: dict[str, list[tuple[bytes, bool]]] = {}

    def all_decided() -> bool:
        found.clear()
        found.update(decisions(system, "decisions"))
        time.sleep(1)
        return sender.stream.keys() <= found.keys()

    servers.until(all_decided, drain, lambda: f"{len(sender.stream.keys() - found.keys())} have no decision")
    assert found.keys() == sender.stream.keys() and not decisions(system, "transactions.dlq")
    other = [name for name, values in found.items() if len({value for value, marked in values if not marked}) > 1]
    assert not other, f"{len(other)} decisions were repeated with other bytes, and not marked: {other[:5]}"
    amounts = [*sender.stream.values(), *sender.http.values()]
    expected = (len(amounts), len(amounts), sum(amounts), len(amounts), sum(amounts))
    assert counted(system) == expected, (counted(system), expected)
    grown = memory.grown(settled=25)
    assert all(more < 40 for more in grown.values()), grown
    repeated = sum(len(values) - 1 for values in found.values())
    return (
        f"{len(sender.stream):,} payments by stream, {len(sender.http):,} by HTTP, {sender.again:,} sent again; "
        f"killed: {dict(kills)}; {repeated:,} decisions repeated, none with other bytes; "
        f"grown, MiB: { {name: round(more, 1) for name, more in grown.items()} }"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rate", type=float, default=500, help="payments a second")
    parser.add_argument("--pause", type=float, nargs=2, default=(20, 60), help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), 60 * given.minutes, given.rate, tuple(given.pause), given.seed))


if __name__ == "__main__":
    main()
