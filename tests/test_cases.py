"""Cases: no payment that people should look at is lost, none is looked at twice, and each becomes one label."""

import contextlib
import csv
import io
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import servers
import sqlalchemy as sa
from case_workers import EXPIRE, LEASE, PROCESSES, new_case, open_range, opened, take_all, tell_labels
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from openapi import conforms

from fraud_pkg.core.contract import DAY
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.case_queue import CaseFilter, CaseQueue
from fraud_pkg.serve.case_store import CaseLabels, CaseRefused, Move
from fraud_pkg.serve.case_tables import CASES, EVENTS, LABELS_OUT, METADATA, open_engine

ANNA, BEN, EVE, SHOP, SCRAPER = (f"{name}-0123456789abcdef" for name in ("anna", "ben", "eve", "shop", "scraper"))
KEYS = {"FRAUD_API_KEYS": f"anna@cases:{ANNA},ben@write:{BEN},eve@read:{EVE},shop:{SHOP},prometheus@metrics:{SCRAPER}"}


@pytest.fixture
def url(database_url) -> str:
    return database_url


# What people may do, in any order


ENDINGS = {"fraud", "honest", "unclear", "expired", "recorded"}


class Machine(RuleBasedStateMachine):
    """A model of the queue in plain Python beside the real one: whatever happens, both agree."""

    url = ""

    def __init__(self):
        super().__init__()
        self.now = 1_000_000
        self.store = opened(self.url, lambda: self.now)
        with self.store.writing() as connection:
            for table in reversed(METADATA.sorted_tables):
                connection.execute(sa.delete(table))
        self.cases: dict[str, dict] = {}
        self.position = None
        self.told: list[tuple[str, bool]] = []

    def teardown(self):
        self.store.close()

    def passed(self) -> None:
        """What time alone does."""
        for case in self.cases.values():
            if case["state"] == "taken" and case["until"] <= self.now:
                case.update(state="open", by=None)
            if case["state"] == "open" and case["since"] <= self.now - EXPIRE * DAY * 1000:
                case.update(state="closed", outcome="expired")

    def identified(self, name: str) -> int:
        with self.store.reading() as connection:
            return connection.execute(sa.select(CASES.c.id).where(CASES.c.transaction_id == name)).scalar() or 0

    @rule(numbers=st.lists(st.integers(0, 12), max_size=5), waits=st.booleans(), skips=st.booleans())
    def decisions_arrive(self, numbers, waits, skips):
        found = [new_case(number, waits, self.now) for number in numbers]
        begin = 99 if skips else self.position
        end = (self.position or 0) + len(found)
        try:
            self.store.open_cases(found, {"decisions/0": Move(begin, end)})
        except CaseRefused:
            assert skips
            return
        assert not skips
        self.position = end
        for case in found:
            closed = {"state": "open", "outcome": None} if waits else {"state": "closed", "outcome": "recorded"}
            self.cases.setdefault(case.transaction_id, {**closed, "by": None, "since": self.now, "labels": []})

    @rule(seconds=st.sampled_from([1, 60, LEASE - 1, LEASE, EXPIRE * DAY // 2]))
    def time_passes(self, seconds):
        self.now += seconds * 1000

    @rule()
    def swept(self):
        self.store.sweep()

    def step(self, number: int, person: str, allowed: bool, act: Callable[[int], None]) -> bool:
        """Tries it; whether it was done, which has to be what the model says."""
        case_id = self.identified(f"t{number}")
        try:
            act(case_id)
        except CaseRefused as refused:
            assert not allowed, refused
            return False
        assert allowed
        return True

    @rule(number=st.integers(0, 12), person=st.sampled_from(["anna", "ben"]))
    def take(self, number, person):
        self.passed()
        case = self.cases.get(f"t{number}")
        allowed = case is not None and (case["state"] == "open" or (case["state"] == "taken" and case["by"] == person))
        if self.step(number, person, allowed, lambda case_id: self.store.take(case_id, person)):
            case.update(state="taken", by=person, until=self.now + LEASE * 1000)

    @rule(
        number=st.integers(0, 12),
        person=st.sampled_from(["anna", "ben"]),
        outcome=st.sampled_from(["fraud", "honest", "unclear", "fine"]),
    )
    def close(self, number, person, outcome):
        self.passed()
        case = self.cases.get(f"t{number}")
        own = case is not None and case["state"] == "taken" and case["by"] == person
        unsays = own and outcome == "unclear" and case["labels"]
        allowed = own and outcome != "fine" and not unsays
        done = self.step(number, person, allowed, lambda case_id: self.store.finish(case_id, person, outcome, "x"))
        if done:
            case.update(state="closed", outcome=outcome, by=None)
            label = {"fraud": True, "honest": False}.get(outcome)
            if label is not None and case["labels"][-1:] != [label]:
                case["labels"].append(label)

    @rule(number=st.integers(0, 12), person=st.sampled_from(["anna", "ben"]), why=st.sampled_from(["", "he called"]))
    def reopen(self, number, person, why):
        self.passed()
        case = self.cases.get(f"t{number}")
        allowed = case is not None and case["state"] == "closed" and bool(why)
        if self.step(number, person, allowed, lambda case_id: self.store.reopen(case_id, person, why)):
            case.update(state="open", outcome=None, by=None, since=self.now)

    @rule(number=st.integers(0, 12), person=st.sampled_from(["anna", "ben"]), note=st.booleans())
    def release_or_note(self, number, person, note):
        self.passed()
        case = self.cases.get(f"t{number}")
        own = case is not None and case["state"] == "taken" and case["by"] == person
        act = self.store.note if note else self.store.release
        words = ("seen",) if note else ()
        if self.step(number, person, own, lambda case_id: act(case_id, person, *words)):
            case.update({"until": self.now + LEASE * 1000} if note else {"state": "open", "by": None})

    @rule(dies=st.booleans())
    def labels_are_told(self, dies):
        """A writer that dies after telling tells again: the same label."""
        labels = CaseLabels(self.store)
        waiting = labels.waiting()
        self.told += [(label.transaction_id, label.is_fraud) for label in waiting]
        if not dies and waiting:
            labels.delivered(waiting)

    @invariant()
    def nothing_is_lost(self):
        self.store.sweep()
        self.passed()
        with self.store.reading() as connection:
            rows = connection.execute(sa.select(CASES)).all()
            labels = dict(connection.execute(sa.select(LABELS_OUT.c.transaction_id, LABELS_OUT.c.is_fraud)).all())
            happened = connection.execute(sa.select(EVENTS.c.case_id, EVENTS.c.action)).all()
        assert {row.transaction_id: (row.state, row.outcome, row.taken_by) for row in rows} == {
            name: (case["state"], case["outcome"], case["by"]) for name, case in self.cases.items()
        }
        assert len(rows) == len(self.cases)
        endings = Counter(row.case_id for row in happened if row.action in ENDINGS)
        reopened = Counter(row.case_id for row in happened if row.action == "reopened")
        assert all(endings[row.id] - reopened[row.id] == (row.state == "closed") for row in rows)
        written = {name: case["labels"] for name, case in self.cases.items() if case["labels"]}
        assert labels == {name: values[-1] for name, values in written.items()}
        assert all(fraud in written[name] for name, fraud in self.told)
        told = dict(self.told)  # the last that was told of each, which is right once nothing waits
        waiting = {label.transaction_id for label in CaseLabels(self.store).waiting()}
        assert all(name in waiting or told.get(name) == labels[name] for name in labels)
        assert self.store.positions() == ({} if self.position is None else {"decisions/0": self.position})


def test_any_order_of_steps(url):
    """No case is lost, none has two labels or two owners, and leases end when they should, in both databases."""
    machine = type("Machine", (Machine,), {"url": url})
    case = machine.TestCase
    case.settings = settings(
        max_examples=12 if url.startswith("sqlite") else 8,
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()


# Several at once


def test_people_at_once(url):
    """Four processes take and close the same cases: each case is closed by one of them, each label is there once."""
    store = opened(url)
    store.open_cases([new_case(number) for number in range(40)])
    names = [case["id"] for case in CaseQueue(store).page(CaseFilter(limit=200), "")["cases"]]
    received = []
    for seed, person in enumerate(("anna", "ben", "carl", "dora")):
        reports, end = PROCESSES.Pipe(duplex=False)
        process = PROCESSES.Process(target=take_all, args=(url, person, names, seed, end))
        process.start()
        received.append((process, reports))
    taken = []
    for process, reports in received:
        taken += reports.recv()
        process.join(20)
    assert sorted(taken) == sorted(names)
    assert len(CaseLabels(store).waiting()) == 40


def test_readers_at_once(url):
    """Readers that open overlapping decisions at the same time neither wait for each other for ever nor open twice."""
    ready, go = PROCESSES.Semaphore(0), PROCESSES.Event()
    readers = [PROCESSES.Process(target=open_range, args=(url, begin, ready, go)) for begin in (0, 10, 20)]
    store = opened(url)
    for reader in readers:
        reader.start()
    for _ in readers:
        assert ready.acquire(timeout=60)
    go.set()
    for reader in readers:
        reader.join(60)
        assert reader.exitcode == 0
    with store.reading() as connection:
        names = connection.execute(sa.select(CASES.c.transaction_id)).scalars().all()
    assert sorted(names) == sorted(f"t{number}" for number in range(100))


def test_ten_thousand_open_cases(url):
    """The queue's page is there within 100 ms, however it is filtered and ordered."""
    store = opened(url)
    store.open_cases([new_case(number, arrived=number) for number in range(10_000)])
    queue, took = CaseQueue(store), {}
    for asked in ({}, {"order": "oldest"}, {"order": "amount"}, {"rule": "large"}, {"entity": "d3"}, {"text": "t999"}):
        times = []
        for _ in range(7):
            began = time.perf_counter()
            page = queue.page(CaseFilter(**asked), "anna")
            times.append(time.perf_counter() - began)
        assert page["cases"]
        took[json.dumps(asked)] = sorted(times)[len(times) // 2] * 1000
    print({asked: f"{took[asked]:.1f} ms" for asked in took})
    assert max(took.values()) < 100, took


# The service dies, the database dies


@contextlib.contextmanager
def served(folder: Path, url: str, port: int = 0, **more) -> Iterator[tuple[str, "object"]]:
    """`python -m fraud_pkg.serve.server` with the example's champion, which reviews amounts from 3,500 to 4,600."""
    if not (folder / "champion").exists():
        example_bundle(folder / "champion", weight=0.002, bias=-7.0)
    port = port or servers.free_port()
    address = f"http://{servers.HOST}:{port}"
    given = {
        "serve.port": port,
        "serve.bundle": folder / "champion",
        "serve.reload_seconds": 0.2,
        "cases.url": url,
        "cases.outbox": folder / "outbox",
    } | servers.named(more)
    with servers.running(
        [sys.executable, "-m", "fraud_pkg.serve.server"],
        lambda: servers.status(f"{address}/readyz") == 200,
        folder / "api.log",
        seconds=90,
        env=servers.environment(given, servers.PROJECT, **KEYS),
    ) as process:
        yield address, process


def payment(name: str, amount: float = 4000.0, **more) -> dict:
    return {
        "transaction_id": name,
        "step": 3,
        "type": "TRANSFER",
        "amount": amount,
        "sender": "C1",
        "receiver": "C2",
    } | more


def decide(address: str, *payments: dict) -> list[str]:
    answer = httpx.post(
        f"{address}/predict/batch", json={"transactions": list(payments)}, headers={"X-API-Key": SHOP}, timeout=20
    )
    assert answer.status_code == 200, answer.text
    return [row["decision"] for row in answer.json()["decisions"]]


def cases_of(url: str) -> list[str]:
    engine = open_engine(url, Path("/"))
    try:
        with engine.connect() as connection:
            return list(connection.execute(sa.select(CASES.c.transaction_id)).scalars())
    except sa.exc.SQLAlchemyError:
        return []  # not there yet
    finally:
        engine.dispose()


def test_killed_between_decision_and_case(tmp_path):
    """kill -9 at any moment: whatever was answered with a review has its case afterwards, once."""
    url, answered, chance = f"sqlite:///{tmp_path}/cases.db", [], random.Random(7)
    for life in range(6):
        with served(tmp_path, url) as (address, process):
            killer = threading.Timer(chance.uniform(0.0, 0.05), process.kill)
            with httpx.Client(headers={"X-API-Key": SHOP}, timeout=10) as client, contextlib.suppress(httpx.HTTPError):
                for number in range(100_000):
                    name = f"life{life}-{number}"
                    if number == 3 + life:
                        killer.start()
                    answer = client.post(f"{address}/predict", json=payment(name))
                    assert answer.status_code == 200 and answer.json()["decision"] == "review"
                    answered.append(name)
            process.wait()
    assert len(answered) >= 30
    with served(tmp_path, url):
        servers.until(lambda: set(answered) <= set(cases_of(url)), 15)
    found = cases_of(url)
    assert len(found) == len(set(found))


def test_a_database_without_an_encoding(tmp_path, postgres_url):
    """As PostgreSQL makes it in the locale C: names in other alphabets come back as they were."""
    with open_engine(postgres_url, tmp_path).connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.exec_driver_sql(
            "CREATE DATABASE plain ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        )
    with open_engine(postgres_url.replace("/postgres", "/plain"), tmp_path).connect() as connection:
        assert connection.exec_driver_sql("SELECT 'Zoë 银行'").scalar() == "Zoë 银行"


def test_database_away(tmp_path, postgres_url):
    """Without its database the service decides as always; the queue says that it is away; nothing is lost."""
    with servers.postgres(tmp_path) as url, served(tmp_path, url) as (address, process):
        assert decide(address, payment("first")) == ["review"]
        servers.until(lambda: cases_of(url) == ["first"], 15)
        last = url
    port = int(last.rsplit(":", 1)[1].split("/")[0])
    gone = f"postgresql+psycopg://fraud@{servers.HOST}:{port}/postgres"
    with served(tmp_path, gone) as (address, process):
        assert decide(address, payment("second"), payment("third", 9000.0)) == ["review", "block"]
        answer = httpx.get(f"{address}/cases", headers={"X-API-Key": EVE}, timeout=20)
        assert (answer.status_code, answer.json()["problems"][0]["field"]) == (503, "cases")
        servers.until(
            lambda: "fraud_case_outbox 2.0" in servers.fetch(f"{address}/metrics", Authorization=f"Bearer {SCRAPER}"),
            15,
        )
        assert "fraud_case_up 0.0" in servers.fetch(f"{address}/metrics", Authorization=f"Bearer {SCRAPER}")
        process.kill()
    engine = open_engine(postgres_url, tmp_path)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
    with served(tmp_path, postgres_url):
        servers.until(lambda: sorted(cases_of(postgres_url)) == ["second", "third"], 15)


@pytest.mark.parametrize("moment", ["waits", "told", "noted", "committed"])
def test_writer_of_labels_killed(url, tmp_path, moment):
    """kill -9 before a label is told, before that is noted, before the note is committed, and after: every label is
    told, always as the same one, and twice only where the note was not committed.
    """
    store, told = opened(url, lambda: 1_000), tmp_path / "told.csv"
    store.open_cases([new_case(number) for number in range(9)])
    for number, case in enumerate(CaseQueue(store).page(CaseFilter(), "")["cases"]):
        store.take(case["id"], "anna")
        store.finish(case["id"], "anna", ("fraud", "honest", "unclear")[number % 3])
    for dies in (True, False):
        here, there = PROCESSES.Pipe()
        writer = PROCESSES.Process(target=tell_labels, args=(url, str(told), there))
        writer.start()
        there.close()
        seen = []
        while (said := here.recv()) != "done" and not (dies and said == moment and len(seen) >= 4):
            seen.append(said)  # the second label's
            here.send(None)
        writer.kill() if dies else None
        writer.join(60)
        assert writer.exitcode == (-signal.SIGKILL if dies else 0)
    rows = list(csv.reader(told.open()))
    assert len({row[0] for row in rows}) == len({tuple(row) for row in rows}) == 6
    assert len(rows) == 6 + (moment in ("told", "noted"))
    assert CaseLabels(store).waiting() == []


def test_a_label_reaches_the_store(tmp_path):
    """A case that is closed as fraud counts in the histories of its entities; `unclear` says nothing; a service that
    is killed right after the answer tells it when it is back.
    """
    url = f"sqlite:///{tmp_path}/cases.db"
    (tmp_path / "redis").mkdir()
    with servers.redis(tmp_path / "redis") as redis:
        with served(tmp_path, url, store__url=redis) as (address, process):
            assert decide(address, payment("a"), payment("b", sender="C9", receiver="C8")) == ["review", "review"]
            servers.until(lambda: len(cases_of(url)) == 2, 15)
            anna = httpx.Client(base_url=address, headers={"X-API-Key": ANNA}, timeout=10)
            cases = {case["transaction_id"]: case["id"] for case in anna.get("/cases").json()["cases"]}
            assert anna.post("/cases", json={"action": "take", "cases": [*cases.values()]}).json()["refused"] == []
            for name, outcome in (("a", "fraud"), ("b", "unclear")):
                asked = {"action": "close", "cases": [cases[name]], "outcome": outcome}
                assert anna.post("/cases", json=asked).status_code == 200
            process.kill()
        with served(tmp_path, url, store__url=redis) as (address, _):

            def frauds(account: str) -> int:
                asked = {"values": {"sender": account}, "time": 3 * 3600}
                found = httpx.post(f"{address}/history", json=asked, headers={"X-API-Key": EVE}).json()
                return max(row["frauds"] or 0 for entity in found["entities"] for row in entity["windows"])

            servers.until(lambda: frauds("C1") == 1, 15)
            assert frauds("C9") == 0
            assert "fraud_case_labels_waiting 0.0" in servers.fetch(
                f"{address}/metrics", Authorization=f"Bearer {SCRAPER}"
            )


def test_two_services_of_one_project(tmp_path):
    """Each has an outbox of its own, and one delivers what the other left behind when it was killed."""
    url, nowhere = (
        f"sqlite:///{tmp_path}/cases.db",
        f"postgresql+psycopg://fraud@{servers.HOST}:{servers.free_port()}/x",
    )
    with served(tmp_path, nowhere) as (first, one), served(tmp_path, nowhere) as (second, other):
        assert decide(first, payment("a")) == decide(second, payment("b")) == ["review"]
        one.kill()
        other.kill()
    with served(tmp_path, url):
        servers.until(lambda: sorted(cases_of(url)) == ["a", "b"], 15)


# What comes in wrong


def test_bad_input_changes_nothing(tmp_path):
    url = f"sqlite:///{tmp_path}/cases.db"
    with served(tmp_path, url) as (address, _):
        name = '=HYPERLINK("http://x")'
        assert decide(address, payment("one"), payment(name), payment("two", 10.0)) == ["review", "review", "allow"]
        servers.until(lambda: len(cases_of(url)) == 2, 15)
        client = httpx.Client(base_url=address, headers={"X-API-Key": ANNA}, timeout=10)
        wrong = [
            ({}, 422),
            ({"action": "eat", "cases": [1]}, 422),
            ({"action": "take", "cases": []}, 422),
            ({"action": "take", "cases": [-1]}, 422),
            ({"action": "take", "cases": ["1"]}, 422),
            ({"action": "take", "cases": [10**30]}, 422),
            ({"action": "take", "cases": list(range(201))}, 422),
            ({"action": "take", "cases": [77]}, 404),
            ({"action": "close", "cases": [1], "outcome": "fraud"}, 409),
            ({"action": "take", "cases": [1], "person": "ben"}, 422),
        ]
        for asked, status in wrong:
            answer = client.post("/cases", json=asked)
            assert (answer.status_code, bool(answer.json()["problems"])) == (status, True), asked
        assert client.post("/cases", content=b"{").status_code == 400
        assert client.get("/cases", params={"text": "\0"}).status_code in (200, 422)
        assert client.get("/cases", params={"least": "nan"}).status_code == 422
        assert client.get("/cases", params={"cursor": "x" * 257}).status_code == 422
        assert client.delete("/cases").status_code == 405
        assert {case["state"] for case in client.get("/cases").json()["cases"]} == {"open"}
        rows = list(csv.reader(io.StringIO(client.get("/cases.csv").text)))
        assert {row[1] for row in rows[1:]} == {"one", f"'{name}"}
        figures = client.get("/cases/figures").json()
        assert figures["waiting"] == 2
        assert [
            httpx.get(f"{address}/cases", headers={"X-API-Key": SHOP}).status_code,
            httpx.get(f"{address}/cases").status_code,
        ] == [403, 401]


def test_openapi_says_what_the_queue_does(tmp_path):
    """schemathesis finds no answer, on the queue's paths, that the document does not describe."""
    with served(tmp_path, f"sqlite:///{tmp_path}/cases.db") as (address, _):
        decide(address, *(payment(f"p{number}") for number in range(5)))
        conforms(f"{address}/openapi.json", address, ANNA, paths="/cases")
