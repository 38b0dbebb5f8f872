"""Personal data: behind the entry nobody finds a name, and what one account has left behind can be erased."""

import json
import re
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import servers
from typer.testing import CliRunner

from fraud_pkg.cli import app
from fraud_pkg.core.contract import contract_from
from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.pseudonyms import Pseudonyms, load_pseudonyms, parse_privacy_keys
from fraud_pkg.core.sections import Privacy, Serve
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.data.acquire import acquire
from fraud_pkg.features.manifest import read_manifest
from fraud_pkg.model.example import example_bundle
from fraud_pkg.pipeline.forget import forget_account
from fraud_pkg.serve.lambda_package import place_rules
from fraud_pkg.serve.rules import ActiveRules
from fraud_pkg.serve.scorer import Scorer
from fraud_pkg.store.audit_check import verify_log
from fraud_pkg.store.dynamodb import DynamoStore, create_table
from fraud_pkg.store.forget import forget_in_dynamodb
from fraud_pkg.store.memory import MemoryStore
from fraud_pkg.store.tiles import Posting, Retention, Transaction
from fraud_pkg.stream.decide import decide_batch
from fraud_pkg.stream.messages import BatchResult, Topics

SHOP, LEAD, ANNA = (f"{name}-0123456789abcdef" for name in ("shop", "lead", "anna"))
API_KEYS = f"shop:{SHOP},lead@write+rules+metrics:{LEAD},anna@cases+read:{ANNA}"
ERIKA, MAX, PHONE = "Erika-Mustermann-7", "Max-Mustermann-9", "phone-of-erika"
NAMES = [name.encode() for name in (ERIKA, MAX, PHONE)]
CONTRACT = contract_from({"device": "category"}, {"device": "device partner=sender"}, (3600,), 1)
KEY = f"a:{secrets.token_hex(32)}"


def in_redis(url: str) -> Iterator[bytes]:
    """Every key and every value of a server."""
    client = redis.Redis.from_url(url)
    for key in client.scan_iter():
        yield key
        yield client.dump(key)
    client.close()


def in_files(folder: Path, *left_out: str) -> Iterator[tuple[Path, bytes]]:
    """The bytes of every file, Parquet as it is read."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in left_out:
            content = path.read_bytes()
            yield (
                path,
                json.dumps(pq.read_table(path).to_pylist(), default=str).encode()
                if content[:4] == b"PAR1"
                else content,
            )


def in_database(url: str) -> Iterator[bytes]:
    """Every row of PostgreSQL; SQLite is a file."""
    import sqlalchemy as sa

    engine = sa.create_engine(url)
    metadata = sa.MetaData()
    metadata.reflect(engine)
    with engine.connect() as connection:
        for table in metadata.sorted_tables:
            for row in connection.execute(sa.select(table)):
                yield repr(tuple(row)).encode()
    engine.dispose()


def assert_none(contents, names=NAMES) -> None:
    for content in contents:
        where, content = content if isinstance(content, tuple) else ("", content)
        assert not [name for name in names if name in content], where


@pytest.fixture
def redis_server(tmp_path_factory) -> Iterator[str]:
    with servers.redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


def test_behind_the_entry_nobody_finds_a_name_and_forget_finds_all(tmp_path, redis_server, database_url):
    example_bundle(tmp_path / "champion", contract=CONTRACT)
    (tmp_path / "rules.yaml").write_text("rules: [{name: mules, action: block, if: receiver in lists.mules}]\n")
    places = {"store.url": redis_server, "cases.url": database_url, "cases.outbox": tmp_path / "cases"}
    places |= {"audit.url": f"sqlite:///{tmp_path}/audit.db", "audit.anchors": tmp_path / "heads"}
    given = places | {"rules.file": tmp_path / "rules.yaml", "privacy.pseudonymise": "accounts, device"}
    variables = {"FRAUD_API_KEYS": API_KEYS, "FRAUD_PRIVACY_KEY": KEY}
    overrides = {name.replace(".", "__"): value for name, value in given.items()}
    payment = {"transaction_id": "t1", "step": 1, "amount": 850.0, "sender": ERIKA, "receiver": MAX, "device": PHONE}
    with servers.service(tmp_path, variables=variables, **overrides) as (url, _):
        with httpx.Client(base_url=url) as http:
            lead, shop, anna = ({"X-API-Key": key} for key in (LEAD, SHOP, ANNA))
            first = http.post("/predict", json=payment, headers=shop)
            assert first.status_code == 200 and first.json()["decision"] == "review"
            again = http.post("/predict", json=payment, headers=shop)
            assert again.json()["transaction_id"] == "t1"
            listed = {"name": "mules", "kind": "account", "add": [{"value": MAX}]}
            assert http.post("/lists", json=listed, headers=lead).status_code == 200
            blocked = http.post("/predict", json=payment | {"transaction_id": "t2"}, headers=shop).json()
            assert (blocked["decision"], blocked["rule"]) == ("block", "mules")
            asked = {"values": {"sender": ERIKA, "device": PHONE}, "time": 4000}
            histories = http.post("/history", json=asked, headers=anna)
            assert {row["windows"][0]["out_count"] for row in histories.json()["entities"]} == {2}
            servers.until(lambda: http.get("/cases", headers=anna).json().get("cases"))
            found = http.get("/cases", params={"entity": ERIKA}, headers=anna).json()["cases"]
            assert [case["transaction_id"] for case in found] == ["t1"]
            shown = [http.get(f"/cases/{found[0]['id']}", headers=anna).content, histories.content, first.content]
            shown.append(http.get("/metrics", headers=lead).content)
            bad = http.post("/predict", json=payment | {"transaction_id": "t3", "amount": -1}, headers=shop)
            assert bad.status_code == 422
            assert_none([*shown, bad.content])
        assert_none(in_redis(redis_server))
        settings = load_settings(cli={name: str(value) for name, value in given.items()}, environ={})
        settings = settings.model_copy(update={"root": tmp_path})
        theirs = load_pseudonyms(settings, variables).of("sender", ERIKA).encode()
        assert any(theirs in content for content in in_redis(redis_server))
        tried = forget_account(settings, ERIKA, variables, dry_run=True)
        done = forget_account(settings, ERIKA, variables)
        assert not [place for place in (*tried, *done) if place.failed]
        erased = {place.name: place.erased for place in done if place.erased}
        assert {"store", "cases", "audit log"} <= erased.keys() and not any(place.erased for place in tried)
        assert_none(in_redis(redis_server), [theirs])
        repeated = forget_account(settings, ERIKA, variables)
        assert not any(place.found for place in repeated)
    left_out = ("rules.yaml",)
    assert_none(in_files(tmp_path, *left_out), [*NAMES, theirs])
    if database_url.startswith("postgresql"):
        assert_none(in_database(database_url), [*NAMES, theirs])
    assert [chain.broken for chain in verify_log(settings)] == [None]


def test_decisions_of_the_stream_name_nobody(tmp_path):
    bundle = example_bundle(tmp_path / "champion", contract=CONTRACT)
    pseudonyms = Pseudonyms(parse_privacy_keys(KEY), ["device"])
    scorer = Scorer(bundle, Serve(), ActiveRules(), pseudonyms=pseudonyms)
    value = {"transaction_id": "t1", "step": 1, "amount": 850.0, "sender": ERIKA, "receiver": MAX, "device": PHONE}
    messages = [
        SimpleNamespace(
            topic="transactions", partition=0, offset=offset, key=ERIKA.encode(), value=body, headers=(), timestamp=-1
        )
        for offset, body in enumerate([json.dumps(value).encode(), b"{}"])
    ]
    for format in ("json", "avro"):
        result = BatchResult()
        topics = Topics("transactions", "decisions", "labels")
        decide_batch(scorer, MemoryStore(scorer.retention), messages, topics, format, result)
        outputs = [output for partition in result.outputs.values() for output in partition]
        (decided,) = [output for output in outputs if output.topic == "decisions"]
        assert_none([decided.key, decided.value])
        assert decided.key == pseudonyms.of("sender", ERIKA).encode()
        (dead,) = [output for output in outputs if output.topic == "transactions.dlq"]
        assert dead.key == ERIKA.encode()  # a request, as it came


def project(folder: Path, source: str, **privacy) -> Settings:
    (folder / "settings.ini").touch()
    given = {"data.source": source, "stream.sink": "lake", "data.max_quarantined": "0.9"}
    cli = given | {f"privacy.{name}": value for name, value in privacy.items()}
    return load_settings(file=folder / "settings.ini", cli=cli, environ={})


def test_raw_data_hold_pseudonyms_and_lose_an_account(tmp_path, monkeypatch):
    lines = [f"t{i},{i % 9},{10 + i},{ERIKA if i % 5 == 0 else f'C{i % 7}'},{MAX},0" for i in range(200)]
    lines += [f"t900,1,{ERIKA},C1,C2,0", f"{ERIKA},broken"]
    (tmp_path / "log.csv").write_text("\n".join(["transaction_id,step,amount,sender,receiver,is_fraud", *lines]))
    with pytest.raises(FraudError, match="FRAUD_PRIVACY_KEY"):
        acquire(project(tmp_path, "log.csv", pseudonymise="accounts"))
    monkeypatch.setenv("FRAUD_PRIVACY_KEY", KEY)
    settings = project(tmp_path, "log.csv", pseudonymise="accounts")
    manifest = acquire(settings)
    assert (manifest["rows"], manifest["quarantined"]) == (200, 2)
    assert_none(in_files(tmp_path, "log.csv", "settings.ini"))
    modes = {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "data").rglob("*")}
    assert modes == {"600", "700"}
    theirs = load_pseudonyms(settings).of("sender", ERIKA)
    before = pq.read_table(tmp_path / "data" / "raw" / manifest["file"])
    assert before["sender"].to_pylist().count(theirs) == 40
    places = {place.name: place for place in forget_account(settings, ERIKA)}
    assert places["raw data"].erased == 40 and places["source"].remains
    after = read_manifest(settings, "raw")
    assert after["rows"] == 160 and after["fingerprint"] != manifest["fingerprint"]
    left = pq.read_table(tmp_path / "data" / "raw" / after["file"])
    assert left["row"].to_pylist() == list(range(160)) and theirs not in left["sender"].to_pylist()
    assert_none(in_files(tmp_path / "data"), [theirs.encode()])
    assert not any(place.found for place in forget_account(settings, ERIKA))


def test_a_new_key_writes_and_a_former_one_still_finds(tmp_path):
    former, newer = secrets.token_hex(32), secrets.token_hex(32)
    settings = Settings(root=tmp_path, privacy=Privacy(pseudonymise="accounts"))
    one = load_pseudonyms(settings, {"FRAUD_PRIVACY_KEY": f"a:{former}"})
    two = load_pseudonyms(settings, {"FRAUD_PRIVACY_KEY": f"b:{newer}, a:{former}"})
    assert one and two and two.of("sender", ERIKA).startswith("pb-") and one.of("sender", ERIKA).startswith("pa-")
    lake = tmp_path / settings.stream.sink / "day=0"
    lake.mkdir(parents=True)
    senders = [one.of("sender", ERIKA), two.of("sender", ERIKA), two.of("sender", MAX)]
    pq.write_table(pa.table({"transaction_id": ["1", "2", "3"], "payment_sender": senders}), lake / "part-0.parquet")
    forget_account(settings, ERIKA, {"FRAUD_PRIVACY_KEY": f"b:{newer}, a:{former}"})
    assert pq.read_table(lake / "part-0.parquet")["payment_sender"].to_pylist() == senders[2:]


def test_dynamodb_forgets_an_account(tmp_path, monkeypatch):
    with servers.moto(tmp_path) as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        create_table("privacy")
        store = DynamoStore("privacy", Retention(120, 25, 39, 37 * 86_400), 5)
        paid = [
            Transaction(f"t{i}", 60, 100, (Posting(f"account:{who}", 0, f"pair:{who}\x1fM"), Posting("account:M", 1)))
            for i, who in enumerate([ERIKA, "C2"])
        ]
        store.record(paid)
        assert [forget_in_dynamodb(store, {ERIKA}, dry) for dry in (True, False, False)] == [3, 3, 0]
        left = json.dumps(store._call("scan", TableName="privacy")["Items"], default=str)
        assert ERIKA not in left and "account:C2" in left


def test_rules_that_read_a_pseudonym_are_refused_before_they_are_served(tmp_path, monkeypatch):
    """By the check, by publishing and by the package for Lambda, as by the service; no key is needed for that."""
    (tmp_path / "settings.ini").write_text("[privacy]\npseudonymise = accounts\n[rules]\nfile = rules.yaml\n")
    (tmp_path / "rules.yaml").write_text("rules: [{name: one, action: block, if: sender == 'C1'}]\n")
    monkeypatch.setenv("FRAUD_ROOT", str(tmp_path))
    monkeypatch.delenv("FRAUD_PRIVACY_KEY", raising=False)
    for words in (["rules", "check"], ["rules", "publish", str(tmp_path / "rules.yaml")]):
        refused = CliRunner().invoke(app, words).exception
        assert isinstance(refused, FraudError) and "rule one reads sender, which is a pseudonym" in str(refused)
    with pytest.raises(FraudError, match="rule one reads sender, which is a pseudonym"):
        place_rules(load_settings(file=tmp_path / "settings.ini", environ={}), tmp_path)
    (tmp_path / "rules.yaml").write_text("rules: [{name: one, action: block, if: sender in lists.mules}]\n")
    assert CliRunner().invoke(app, ["rules", "check"]).exit_code == 0


def test_the_command_says_what_remains(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[privacy]\npseudonymise = accounts\nkeep_days = lake: 1\n")
    monkeypatch.setenv("FRAUD_ROOT", str(tmp_path))
    run = CliRunner().invoke
    missing = run(app, ["forget", ERIKA])
    assert isinstance(missing.exception, FraudError) and "FRAUD_PRIVACY_KEY" in str(missing.exception)
    monkeypatch.setenv("FRAUD_PRIVACY_KEY", KEY)
    done = run(app, ["forget", ERIKA])
    assert done.exit_code == 0 and "topic transactions" in done.stdout and ERIKA not in done.stdout
    (tmp_path / "data").mkdir(exist_ok=True)
    with sqlite3.connect(tmp_path / "data" / "cases.db") as database:
        database.execute("CREATE TABLE cases (id INTEGER)")
    failed = run(app, ["forget", ERIKA])
    assert failed.exit_code == 1 and re.search("cases.*failed", failed.stdout)
    assert run(app, ["retain"]).exit_code == 0
