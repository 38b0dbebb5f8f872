"""What a payment costs in processors and bytes, by part, and what a thousand, a hundred thousand and a million payments
a second need. Measured with one, two and three consumers and with two services on one Redis: docs/scale.md.
"""

import argparse
import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import redis
import serving
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from measure import machine, say, write_json
from serving import WIDE, World, as_lines, live_through, load, our_service, prepare, servers
from streaming import TOPIC, messages, ours, topics

from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import retention_of

PARTITIONS = 6
RATES = (1_000, 100_000, 1_000_000)  # payments in the busiest second
BUSY = 0.6  # of a processor, at most
PEAK = 3  # the busiest second beside the mean of a day


def seconds_of(process: psutil.Process) -> float:
    """Seconds that it has computed, with all its threads."""
    times = process.cpu_times()
    return times.user + times.system


def process_at(port: int) -> psutil.Process:
    """The server that we started at this port."""
    for process in psutil.Process().children(recursive=True):
        if any(one.laddr.port == port and one.status == "LISTEN" for one in process.net_connections("tcp")):
            return process
    raise LookupError(f"nothing that was started here listens at {port}")


def port_of(address: str) -> int:
    return int(address.rsplit("/", 1)[0].rsplit(":", 1)[-1]) if "//" in address else int(address.rsplit(":", 1)[-1])


def decided(consumer: KafkaConsumer, topic: str) -> int:
    """Messages in all partitions of a topic."""
    places = [TopicPartition(topic, number) for number in range(PARTITIONS)]
    return sum(consumer.end_offsets(places).values())


def produce(address: str, topic: str, world: World, count: int, run: str) -> None:
    with contextlib.closing(KafkaProducer(bootstrap_servers=address, linger_ms=20, batch_size=1 << 18)) as producer:
        for key, value in messages(world, count, run):
            producer.send(topic, value, key=key)
        producer.flush()


@contextlib.contextmanager
def filled(world: World, url: str) -> Iterator[redis.Redis]:
    """A Redis that has lived through the past; empty again afterwards."""
    contract = world.settings.contract
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushdb()
        with contextlib.closing(open_store(url, retention_of(contract), 5)) as store:
            live_through(store, world.past, contract)
        yield client
        client.flushdb()


@dataclass(frozen=True)
class Servers:
    """Where Kafka and Redis are, and their processes."""

    kafka: str
    redis: str

    def seconds(self) -> list[float]:
        """Processor seconds of both so far."""
        return [seconds_of(process_at(port_of(address))) for address in (self.redis, self.kafka)]


def size_of(address: str, topic: str) -> float:
    """Bytes of a message, the mean of a thousand."""
    with contextlib.closing(KafkaConsumer(bootstrap_servers=address, auto_offset_reset="earliest")) as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        consumer.seek_to_beginning()
        found = [record for records in consumer.poll(10_000, max_records=1_000).values() for record in records]
        return float(np.mean([len(record.key or b"") + len(record.value) for record in found]))


def by_consumers(world: World, at: Servers, number: int, count: int) -> dict[str, float]:
    """Microseconds of processor time for each payment, by part, with so many consumers of one topic. What they need to
    start does not count: it is measured from the moment when a fifth is decided.
    """
    say(f"{number} consumers, {count:,} payments")
    name, source = f"capacity-{number}", f"{TOPIC}-of-{number}"
    settings = {"stream__partitions": PARTITIONS, "stream__transactions": source, "store__url": at.redis}
    topics(world, at.kafka, name, **settings)
    produce(at.kafka, source, world, count, f"c{number}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(filled(world, at.redis))
        reader = stack.enter_context(contextlib.closing(KafkaConsumer(bootstrap_servers=at.kafka)))
        consumers = [stack.enter_context(ours(world, at.kafka, name, **settings)) for _ in range(number)]
        own = [psutil.Process(process.pid) for process in consumers]

        def look(share: float) -> np.ndarray:
            """Payments, moment and processor seconds, once so many are decided."""
            while (done := decided(reader, f"{TOPIC}-{name}")) < share * count:
                assert all(process.poll() is None for process in consumers), (world.root / f"{name}.log").read_text()
                time.sleep(0.05)
            return np.array([done, time.perf_counter(), sum(map(seconds_of, own)), *at.seconds()])

        begin = look(0.2)
        done, seconds, *cpu = look(0.95) - begin
    consumer, store, broker = (float(1e6 * spent / done) for spent in cpu)
    found = {"consumer": consumer, "redis": store, "kafka": broker, "per_second": float(done / seconds)}
    return found | {"in": size_of(at.kafka, source), "out": size_of(at.kafka, f"{TOPIC}-{name}")}


def by_services(world: World, at: Servers, number: int, seconds: int) -> dict[str, float]:
    """The same of so many services that decide single requests at once, on one Redis."""
    say(f"{number} services")
    lines = world.root / "stream.txt"
    lines.write_text(as_lines(world), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        stack.enter_context(filled(world, at.redis))
        started = [
            stack.enter_context(our_service(world, f"service-{i}", pin=False, FRAUD_STORE_URL=at.redis))
            for i in range(number)
        ]
        for place, one in enumerate(started):
            one.run = f"h{place}"
            load(one, lines, 16, 1)
        before = at.seconds()[0]
        with ThreadPoolExecutor(number) as pool:
            results = list(pool.map(lambda one: load(one, lines, 16, seconds), started))
        spent = at.seconds()[0] - before
    rate = sum(one["per_second"] for one in results)
    service = sum(one["cpu"] * one["per_second"] for one in results) / rate
    return {"service": service, "redis": 1e6 * spent / (rate * seconds), "per_second": rate}


KINDS = {"e": "an entity's history", "p": "a pair of partners", "t": "a payment"}  # by the letter of its key


def held_by_redis(world: World, at: Servers) -> dict[str, dict[str, float]]:
    """How many of each kind Redis holds, and their bytes (key, value and what Redis adds): median and largest."""
    sizes: dict[str, list[int]] = {letter: [] for letter in KINDS}
    counts = dict.fromkeys(KINDS, 0)
    with filled(world, at.redis) as client:
        for key in client.scan_iter(count=5_000):
            letter = key.split(b":")[1].decode()
            if letter in KINDS:
                counts[letter] += 1
                if counts[letter] <= 2_000:
                    sizes[letter].append(client.memory_usage(key))
    return {
        letter: {"number": counts[letter], "median": float(np.median(own)), "most": float(max(own))}
        for letter, own in sizes.items()
    }


# What follows of it.


@dataclass(frozen=True)
class Costs:
    """Of a payment: processor seconds by part, and bytes."""

    consumer: float
    redis: float
    kafka: float
    in_and_out: float  # bytes through Kafka
    kept: float  # bytes that Redis keeps of it
    days: int  # that it is kept


def needs(costs: Costs, rate: int) -> list[str]:
    """What so many payments a second need, as a row."""
    consumers = math.ceil(rate * costs.consumer / BUSY)
    kept = rate / PEAK * 86_400 * costs.days * costs.kept
    return [
        f"{rate:,}",
        f"{consumers:,}",
        f"{max(PARTITIONS, 2 * consumers):,}",
        f"{rate * costs.redis:.0%}",
        f"{max(1, math.ceil(rate * costs.kafka / BUSY)):,}",
        f"{rate * costs.in_and_out / 1e6:,.1f}",
        f"{kept / 1e9:,.0f}",
    ]


def tables(streams: dict[int, dict], services: dict[int, dict], held: dict, days: int, note: str) -> list[dict]:
    """The measured costs, and what follows of them."""

    def us(value: float) -> str:
        return f"{value:,.0f} us"

    measured = [
        [f"stream, {n} consumer{'s' * (n > 1)}", us(one["consumer"]), us(one["redis"]), us(one["kafka"]),
         f"{one['per_second']:,.0f}"]
        for n, one in streams.items()
    ]  # fmt: skip
    measured += [
        [f"HTTP, {n} service{'s' * (n > 1)}", us(one["service"]), us(one["redis"]), "", f"{one['per_second']:,.0f}"]
        for n, one in services.items()
    ]
    most = max(streams)
    costs = Costs(
        *(streams[most][part] / 1e6 for part in ("consumer", "redis", "kafka")),
        streams[most]["in"] + streams[most]["out"],
        held["t"]["median"],
        days,
    )
    sizes = [
        [KINDS[letter], f"{one['number']:,}", f"{one['median']:,.0f}", f"{one['most']:,.0f}"]
        for letter, one in held.items()
    ]
    return [
        {
            "title": "What a payment costs",
            "note": note,
            "columns": ["processor time of a payment", "who decides", "Redis", "Kafka", "payments/s here"],
            "rows": measured,
        },
        {
            "title": "What Redis keeps",
            "note": f"A payment is kept for {days} days, the longest window and the delay of labels.",
            "columns": ["", "number", "bytes, median", "bytes, most"],
            "rows": sizes,
        },
        {
            "title": "What so many payments a second need",
            "note": f"Of the busiest second, {PEAK} times the mean of a day; no processor busier than {BUSY:.0%}. "
            f"A Redis primary computes on one processor, and there is one: it ends at {BUSY / costs.redis:,.0f} "
            "payments/s.",
            "columns": [
                "payments/s",
                "consumers",
                "partitions",
                "of one Redis primary",
                "cores of brokers",
                "MB/s in Kafka",
                "GB of payments in Redis",
            ],
            "rows": [needs(costs, rate) for rate in RATES],
        },
    ]  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="see that it runs; the figures say little")
    options.add_argument("--bundle", type=Path, help="a model instead of a freshly trained one")
    options.add_argument("--json", type=Path, help="write the figures there too")
    chosen = options.parse_args()
    count, seconds, plan = (6_000, 1, serving.QUICK) if chosen.quick else (60_000, 5, serving.FULL)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        root = Path(scratch)
        before = machine()
        world = prepare(root, plan, chosen.bundle, WIDE)
        url = stack.enter_context(servers.redis(root))
        at = Servers(stack.enter_context(servers.kafka(root, java=())), url)
        streams = {number: by_consumers(world, at, number, count) for number in (1, 2, 3)}
        services = {number: by_services(world, at, number, seconds) for number in (1, 2)}
        days = retention_of(world.settings.contract).days
        found = tables(streams, services, held_by_redis(world, at), days, f"Model: {world.source}.")
        write_json(chosen.json, before, found)


if __name__ == "__main__":
    main()
