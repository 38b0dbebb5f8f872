"""Rules and lists do the same everywhere: random rules on random payments by all four endpoints, `fraud rules test` on
what a real sink wrote, rules in S3 and lists in DynamoDB.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import boto3
import httpx
import payments
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
import yaml
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from kafka import KafkaProducer
from lambda_runtime import event
from starlette.testclient import TestClient
from test_cases import payment
from test_cases_stream import Stream

from fraud_pkg.core.policy import DECISIONS
from fraud_pkg.core.sections import Rules
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.model.example import example_bundle
from fraud_pkg.monitor.rule_report import write_live_rules
from fraud_pkg.serve.api import create_app
from fraud_pkg.serve.batch import score_lake
from fraud_pkg.serve.metrics import Metrics
from fraud_pkg.serve.reload import open_service
from fraud_pkg.serve.rules import rule_variables
from fraud_pkg.serve.service import Service
from fraud_pkg.store.dynamodb import create_table
from fraud_pkg.store.lists import Entry, add_entries
from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import retention_of
from fraud_pkg.stream.decide import decide_batch
from fraud_pkg.stream.messages import BatchResult, read_record, read_scored_record, topics_of

CONTRACT = payments.CONTRACT
KINDS = rule_variables(CONTRACT)
LISTS = {"mules": "account", "devices": "text", "nets": "network"}
ENTRIES = {"account": payments.ACCOUNTS, "text": ["device_1", "mcc_1"], "network": ["10.1.0.0/16", "10.9.9.0/24"]}


# Drawn rules: statistics, missing fields, divisions by zero, look-ups in lists; whatever the type checker takes


def named(kind: str) -> list[str]:
    return sorted(name for name, of in KINDS.items() if of == kind)


STATISTICS = [name for name in named("double") if "_24h" in name or "_seconds_" in name or "_10m" in name]
FIELDS = [name for name in named("double") if name not in STATISTICS]
TEXTS = {"sender": "C1", "receiver": "C2", "type": "GIFT", "device": "device_2", "mcc": "mcc_1", "card": "411111"}
numbers = st.sampled_from(STATISTICS) | st.sampled_from(["amount", "probability"]) | st.sampled_from(FIELDS)
limits = st.sampled_from(["0.0", "0.5", "1.0", "100.0", "50000.0", "-1.0", "1e9"])
compared = st.one_of(
    st.builds("{} {} {}".format, numbers, st.sampled_from(["<", "<=", ">", "==", "!="]), limits),
    st.builds("{} / {} > {}".format, numbers, numbers, limits),
    st.builds("{} / ({} - {}) == 1".format, st.just("hour"), st.just("hour"), st.integers(0, 23)),
    st.builds("{} % (weekday - {}) == 0".format, st.just("hour"), st.integers(0, 6)),
    st.builds("{0} == '{1}'".format, st.sampled_from([*TEXTS]), st.sampled_from([*TEXTS.values()])),
    st.builds("{}.startsWith('{}')".format, st.sampled_from([*TEXTS]), st.sampled_from(["C", "device", ""])),
    st.builds("{} in lists.{}".format, st.sampled_from([*TEXTS, "network"]), st.sampled_from([*LISTS, "never_made"])),
    st.sampled_from(["online", "!online", "true", *(name for name in named("bool") if name.startswith("has_"))]),
)
expressions = st.recursive(
    compared,
    lambda part: st.one_of(
        st.builds("({} {} {})".format, part, st.sampled_from(["&&", "||"]), part),
        st.builds("!({})".format, part),
        st.builds("({} ? {} : {})".format, part, part, part),
    ),
    max_leaves=4,
)
PAST, FUTURE = "2020-01-01", "2100-01-01"  # these payments have no dates: the clock counts
validity = st.sampled_from([{}, {}, {"from": PAST}, {"until": PAST}, {"from": FUTURE}, {"from": PAST, "until": FUTURE}])
rules = st.builds(
    lambda action, expression, mode, dates: {"action": action, "if": expression, "mode": mode, **dates},
    st.sampled_from(["allow", "block", "review", "tag"]),
    expressions,
    st.sampled_from(["live", "live", "shadow"]),
    validity,
)
entries = st.dictionaries(
    st.sampled_from([*LISTS]),
    st.tuples(st.integers(1, 3), st.sampled_from([None, 0.0, 4e9])),  # how many values, and until when
)
drawn_rows = st.lists(payments.rows, min_size=1, max_size=12).map(lambda rows: sorted(rows, key=lambda r: r["time"]))


# The four endpoints, each with a store of its own


@pytest.fixture(scope="module")
def champion(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("champion") / "bundle"
    payments.bundle(folder, bias=-4.0)
    return folder


@pytest.fixture(scope="module")
def function() -> ModuleType:
    """The Lambda function's module, which has opened nothing yet."""
    spec = importlib.util.spec_from_file_location("lambda_app", PROJECT / "chalice_app/app.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, {"AWS_CHALICE_CLI_MODE": "true"}):
        spec.loader.exec_module(module)
    return module


def project(folder: Path, champion: Path, found: Sequence[Mapping[str, Any]], listed: Mapping) -> Settings:
    """Settings with these rules in a file, and these lists in the file of changes."""
    file = folder / "rules.yaml"
    file.write_text(yaml.safe_dump({"rules": [{"name": f"r{i}", **rule} for i, rule in enumerate(found)]}))
    os.utime(file, (0, 0))  # nobody is writing it any more
    config = Settings(root=folder, serve={"bundle": str(champion)}, rules=Rules(file=str(file)))
    store = open_store("memory://", retention_of(CONTRACT), 5, config.changes_file)
    for name, (many, until) in listed.items():
        values = dict.fromkeys(ENTRIES[LISTS[name]][:many], Entry(until=until))
        add_entries(store, name, values, "test", "2026-01-01T00:00:00+00:00", LISTS[name])
    return config


def opened(config: Settings) -> tuple[Service, Any]:
    service, watcher = open_service(config, {}, public=False)
    assert watcher.check()
    return service, watcher


def by_service(config: Settings, body: bytes) -> bytes:
    service, _ = opened(config)
    answer = TestClient(create_app(service, Metrics()), "http://localhost").post(
        "/predict/batch", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200, answer.text
    return answer.content


def by_lambda(config: Settings, body: bytes, function: ModuleType) -> bytes:
    pair = opened(config)
    function.opened = lambda: pair
    context = SimpleNamespace(aws_request_id="r1")
    answer = function.app(event("POST", "/predict/batch", {"Content-Type": "application/json"}, body), context)
    assert answer["statusCode"] == 200, answer["body"]
    return answer["body"].encode()


def by_stream(config: Settings, requests: Sequence[Mapping], size: int, coding: str) -> list[dict]:
    """In batches of this size."""
    (service, _), topics, result = opened(config), topics_of(config.stream), BatchResult()
    messages = [
        SimpleNamespace(
            topic=topics.transactions,
            partition=0,
            offset=n,
            key=None,
            headers=[],
            timestamp=0,
            value=json.dumps({"schema": 1, **request}).encode(),
        )
        for n, request in enumerate(requests)
    ]
    for begin in range(0, len(messages), size):
        before = len(result.transactions)
        decide_batch(service.scorer, service.store, messages[begin : begin + size], topics, coding, result)
        service.store.record(result.transactions[before:])
    (outputs,) = result.outputs.values()
    return [read_scored_record(output.value).model_dump(mode="json", by_alias=True) for output in outputs]


COLUMNS = {"time": pa.int64(), "since": pa.int64(), "online": pa.bool_()}
COLUMNS |= dict.fromkeys(["amount", "risk", "fee", "sender_balance", "receiver_balance", *payments.PLACE], pa.float64())
COLUMNS |= dict.fromkeys(["transaction_id", "sender", "receiver", "type", "currency"], pa.string())
COLUMNS |= {name: pa.string() for name in CONTRACT.categories}


def by_batch(config: Settings, requests: Sequence[Mapping], folder: Path) -> list[dict]:
    columns = {name: pa.array([r.get(name) for r in requests], kind) for name, kind in COLUMNS.items()}
    pq.write_table(pa.table(columns), folder / "lake.parquet")
    engine = config.features.model_copy(update={"engine": "local", "threads": 1})
    score_lake(folder / "lake.parquet", folder / "scored", config.model_copy(update={"features": engine}))
    rows = pq.read_table(folder / "scored").to_pylist()
    return [row | {"costs": {name: row[f"cost_{name}"] for name in DECISIONS}} for row in rows]


def packed(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    return json.dumps([[row[name] for name in names] for row in rows]).encode()


def check_alike(config: Settings, function: ModuleType, rows: Sequence[Mapping], size: int, coding: str) -> list[dict]:
    """Asks all four for the same payments; returns what they decided."""
    requests = [payments.request(row, f"t{number}") for number, row in enumerate(rows)]
    body = json.dumps({"transactions": requests}).encode()
    answer = by_service(config, body)
    assert by_lambda(config, body, function) == answer
    answered = json.loads(answer)["decisions"]
    names = [name for name in answered[0] if name != "features"]
    assert {"decision", "rule", "tags", "shadow_rules", "rules", "reasons", "fraud_probability"} <= {*names}
    written = by_stream(config, requests, size, coding)
    assert packed(written, names) == packed(answered, names)
    scored = by_batch(config, requests, config.root)
    shared = [name for name in names if name in scored[0]]
    assert {"decision", "rule", "tags", "shadow_rules", "rules", "fraud_probability", "costs", "limit"} <= {*shared}
    assert packed(scored, shared) == packed(answered, shared)
    return answered


def test_all_endpoints_decide_alike(champion, function, tmp_path_factory):
    """Decision, probability, costs, limit, rule, tags, rules in the shadow and version: byte for byte."""
    seen: Counter[str] = Counter()

    @settings(deadline=None, derandomize=True, database=None, max_examples=30)
    @given(
        found=st.lists(rules, min_size=1, max_size=6),
        listed=entries,
        rows=drawn_rows,
        size=st.integers(1, 12),
        coding=st.sampled_from(["json", "avro"]),
    )
    def alike(found, listed, rows, size, coding):
        config = project(tmp_path_factory.mktemp("rules"), champion, found, listed)
        for decision in check_alike(config, function, rows, size, coding):
            seen[f"{decision['decision']} by {'a rule' if decision['rule'] else 'the policy'}"] += 1
            seen["tag"] += bool(decision["tags"])
            seen["shadow"] += bool(decision["shadow_rules"])

    alike()
    ways = {f"{name} by {who}" for name in DECISIONS for who in ("a rule", "the policy")}
    often = ways - {"review by the policy"} | {"tag", "shadow"}  # this champion's policy reviews next to nothing
    assert often <= {name for name, times in seen.items() if times}, seen


# Kept by real servers


@pytest.fixture(scope="module")
def lake(tmp_path_factory) -> Iterator[Stream]:
    """Decisions of 200 payments and some labels, as scorer and sink leave them."""
    folder = tmp_path_factory.mktemp("lake")
    with servers.kafka(folder) as broker:
        made = Stream(folder, broker)
        made.settings |= {"paths.models": folder, "cases.url": "", "evaluate.resamples": 50}
        with made.running("stream", "score"), contextlib.closing(KafkaProducer(bootstrap_servers=broker)) as producer:
            for number in range(200):
                amount = (10.0, 4000.0, 9000.0, 50.0)[number % 4]
                sent = payment(f"p{number}", amount, sender=f"C{number}", receiver=f"M{number % 10}")
                sent["step"] = 30 + number
                producer.send(
                    made.settings["stream.transactions"], json.dumps(sent).encode(), key=sent["sender"].encode()
                )
            for number in (0, 20, 40, 1, 10):  # payments of 10.00 to M0, and two that were stopped
                told = {"schema": 1, "transaction_id": f"p{number}", "is_fraud": True}
                producer.send(made.settings["stream.labels"], json.dumps(told).encode(), key=f"p{number}".encode())
            producer.flush()
            servers.until(lambda: len(made.read("decisions")) >= 200, 90, made.log)
        with made.running("stream", "sink", "--until-end") as sink:
            servers.until(lambda: sink.poll() is not None, 90, made.log)
        yield made


def command(folder: Path, given: Mapping[str, Any], *arguments: str, ok: bool = True, **environ: str) -> str:
    """What `fraud` prints; a failure says why."""
    done = subprocess.run(
        [sys.executable, "-m", "fraud_pkg.cli", *arguments],
        cwd=folder,
        env=servers.environment(given, folder, COLUMNS="250", **environ),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


TESTED = """
rules:
  - {name: small_to_mules, action: review, if: amount < 20.0 && receiver in lists.mules}
  - {name: small, action: block, if: amount < 20.0 && sender_out_count_24h == 0.0, mode: shadow}
  - {name: large, action: tag, if: amount > 3000.0}
  - {name: broken, action: block, if: hour / (hour - hour) == 1}
"""


def test_rules_on_what_a_sink_wrote(lake):
    """Figures of `fraud rules test` and of the report, beside those counted by hand."""
    folder = lake.folder
    (folder / "rules.yaml").write_text(TESTED)
    given = lake.settings | {"rules.file": "rules.yaml"}
    command(folder, given, "lists", "add", "mules", "M0")
    printed = command(folder, given, "rules", "test", "--weeks", "4")
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if len(line.split()) > 5}
    config = load_settings(file=folder / "settings.ini", cli={k: str(v) for k, v in given.items()}, environ={})
    report = write_live_rules(config)
    assert report and report.problem == "" and (report.payments, report.frauds) == (200, 5)
    found = {result.name: result for result in report.results}
    assert {name: (r.hits, r.caught, r.honest, r.failed) for name, r in found.items()} == {
        "small_to_mules": (10, 3, 7, 0),
        "small": (50, 3, 47, 0),
        "large": (100, 0, 0, 0),
        "broken": (0, 0, 0, 200),
    }
    records = [read_record(message.value) for message in lake.read("decisions")]
    told = {"p0", "p20", "p40", "p1", "p10"}
    assert report.known == sum(r["decision"] == "allow" or r["transaction_id"] in told for r in records)
    assert found["small_to_mules"].caught_amount == 30.0 and found["small_to_mules"].precision == 0.3
    assert (found["small_to_mules"].overlap, found["small_to_mules"].overlap_share) == ("small", 1.0)
    assert found["large"].with_policy == 1.0 and found["small"].with_policy == 0.0
    days = 199 / 24
    assert lines["small"][:6] == ["small", "block", "shadow", f"{50 / days:.1f}", "3", "30"]
    suggested = command(folder, given, "rules", "suggest", "--weeks", "4")
    assert suggested.startswith("rules:")


def put_rules(s3, text: str) -> None:
    s3.put_object(Bucket="fraud-rules", Key="live/rules.yaml", Body=text.encode())


@pytest.fixture
def aws(tmp_path) -> Iterator[dict[str, str]]:
    """S3 with a bucket, and a store in DynamoDB, of this process too."""
    with servers.moto(tmp_path) as environ, pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        region = {"LocationConstraint": environ["AWS_DEFAULT_REGION"]}
        boto3.client("s3").create_bucket(Bucket="fraud-rules", CreateBucketConfiguration=region)
        create_table("store")
        yield environ


def test_rules_in_s3_and_lists_in_dynamodb(tmp_path, aws):
    """A service reads both; a list holds with the next payment, another object within `reload_seconds`, an unsound one
    never. Published rules need no object at all.
    """
    shutil.copy(PROJECT / "settings.ini", tmp_path)
    example_bundle(tmp_path / "champion", bias=-8.0)
    place, s3 = "s3://fraud-rules/live/rules.yaml", boto3.client("s3")
    put_rules(s3, "rules: [{name: mules, action: block, if: receiver in lists.mules}]")
    given = {"store.url": "dynamodb://store", "rules.file": place, "rules.reload_seconds": 0.2}
    assert "1 rules are sound" in command(tmp_path, given, "rules", "check", **aws)
    assert "1 rules are sound" in command(tmp_path, {"store.url": "dynamodb://store"}, "rules", "check", place, **aws)
    overrides = {name.replace(".", "__"): value for name, value in given.items()}
    numbers = iter(range(10**6))

    def decided(url: str, amount: float = 10.0) -> tuple[str, str | None]:
        sent = payment(f"a{next(numbers)}", amount, sender="C1", receiver="M7")
        answer = httpx.post(f"{url}/predict", json=sent, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["decision"], answer.json()["rule"]

    with servers.service(tmp_path, variables=aws, **overrides) as (url, _):
        assert decided(url) == ("allow", None)
        command(tmp_path, given, "lists", "add", "mules", "M7", "--until", "30d", **aws)
        assert decided(url) == ("block", "mules")
        put_rules(s3, "rules: [{name: small, action: review, if: amount < 20.0}]")
        servers.until(lambda: decided(url) == ("review", "small"), 20)
        put_rules(s3, "rules: [{name: small, action: review, if: amuont < 20.0}]")
        refused = "fraud_rules_refused_total 1.0"
        servers.until(
            lambda: refused in httpx.get(f"{url}/metrics").text, 20, lambda: (tmp_path / "api.log").read_text()
        )
        assert decided(url) == ("review", "small")
        assert "did you mean amount" in command(tmp_path, given, "rules", "check", ok=False, **aws)
    put_rules(s3, "rules: [{name: tiny, action: block, if: amount < 11.0}]")
    with servers.service(tmp_path, variables=aws, **overrides | {"rules__file": "store"}) as (url, _):
        assert decided(url) == ("review", "small")  # what the first service recorded
        command(tmp_path, given, "rules", "publish", place, **aws)
        assert decided(url) == ("block", "tiny")
