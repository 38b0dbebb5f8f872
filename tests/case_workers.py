"""What other processes do with cases in `test_cases.py`: a module of its own, since each of them loads it again."""

import contextlib
import multiprocessing
import random
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import sqlalchemy as sa

from fraud_pkg.serve.case_store import CaseLabels, CaseRefused, CaseStore
from fraud_pkg.serve.case_tables import migrate, open_engine
from fraud_pkg.serve.cases import NewCase

LEASE, EXPIRE = 600, 30  # seconds, days

# A process of this kind is forked from one that has loaded the libraries; it shares no connection with the test.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fraud_pkg.serve.case_store"])


def new_case(number: int, waits: bool = True, arrived: int = 0) -> NewCase:
    return NewCase(
        transaction_id=f"t{number}",
        origin="review" if waits else "block",
        waits=waits,
        decision="review" if waits else "block",
        rule=None if number % 2 else "large",
        model="m1",
        probability=0.5,
        amount=float(number * 7 % 50),
        currency="EUR",
        expected_loss=float(number * 13 % 31),
        time=3600,
        arrived=arrived,
        entities=[("account", f"C{number % 3}", "Sender"), ("device", f"d{number % 5}", "Device")],
        record={"reasons": []},
    )


def opened(url: str, clock: Callable[[], int] = lambda: 0) -> CaseStore:
    engine = open_engine(url, Path("/"))
    migrate(engine)
    return CaseStore(engine, LEASE, EXPIRE, clock)


def take_all(url: str, person: str, names: list[int], seed: int, reports: Connection) -> None:
    store = opened(url, lambda: 1_000)
    order = random.Random(seed).sample(names, len(names))
    taken = []
    for case_id in order:
        with contextlib.suppress(CaseRefused):
            store.take(case_id, person)
            store.finish(case_id, person, "fraud")
            taken.append(case_id)
    reports.send(taken)


def open_range(url: str, begin: int, ready, go) -> None:
    store = opened(url)
    ready.release()
    go.wait()
    for start in range(begin, begin + 60, 20):
        store.open_cases([new_case(number) for number in range(start, start + 40)])


def tell_labels(url: str, told: str, moments: Connection) -> None:
    """A writer of labels that writes down each one that it tells; it says where it is, and goes on when it is told to:
    before it tells, when it has told, when it has noted that but not committed, when it has committed.
    """
    store = opened(url, lambda: 1_000)
    labels = CaseLabels(store)

    def at(moment: str) -> None:
        moments.send(moment)
        moments.recv()

    while waiting := labels.waiting(3):
        for label in waiting:
            at("waits")
            with open(told, "a") as file:
                file.write(f"{label.transaction_id},{label.is_fraud},{label.known_at}\n")
            at("told")
            before = lambda connection: at("noted")  # noqa: E731
            sa.event.listen(store.engine, "commit", before)
            labels.delivered([label])
            sa.event.remove(store.engine, "commit", before)
            at("committed")
    moments.send("done")
