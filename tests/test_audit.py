"""The audit log of a real service: what a client was answered is in it, and whatever is done to it is found."""

import contextlib
import functools
import hashlib
import itertools
import json
import threading

import boto3
import httpx
import pytest
import servers
import sqlalchemy as sa
from typer.testing import CliRunner

from fraud_pkg.cli import app
from fraud_pkg.core.audit import (
    AuditError,
    Entry,
    Head,
    commitment,
    entry_hash,
    read_head,
    request_proof,
    write_head,
)
from fraud_pkg.core.settings import Settings
from fraud_pkg.core.signatures import load_signer, new_key
from fraud_pkg.model.example import example_bundle
from fraud_pkg.pipeline.forget import forget_account
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.store.audit_check import Chain, Range, entries_between, export_log, verify_log
from fraud_pkg.store.audit_heads import open_heads
from fraud_pkg.store.audit_log import ACCOUNTS, ENTRIES, open_accounts, open_log

SHOP = {"X-API-Key": "shop-0123456789abcdef"}
EVE = {"X-API-Key": "eve-0123456789abcdef"}
KEYS = {"FRAUD_API_KEYS": f"shop:{SHOP['X-API-Key']},eve@read+metrics:eve-0123456789abcdef"}


@pytest.fixture
def log(database_url, tmp_path) -> Settings:
    """Settings with an empty database of each kind, a folder for heads and a key that signs them."""
    public = new_key(tmp_path / "audit.pem", servers.PROJECT)
    example_bundle(tmp_path / "champion")
    audit = {"url": database_url, "anchors": str(tmp_path / "heads"), "keys": f"log:{public}", "anchor_seconds": 0.2}
    return Settings(root=tmp_path, audit=audit)


def served(log: Settings) -> contextlib.AbstractContextManager:
    names = ("url", "accounts_url", "anchors", "anchor_seconds")
    audit = {f"audit__{name}": getattr(log.audit, name) for name in names}
    key = {"FRAUD_HEAD_KEY_FILE": str(log.root / "audit.pem")}
    return servers.service(log.root, variables=KEYS | key, **audit)


def entries(log: Settings) -> list[Entry]:
    engine = open_log(log.audit.url, log.root)
    found = list(itertools.chain.from_iterable(entries_between(engine, Range())))
    engine.dispose()
    return found


def secrets_of(log: Settings) -> dict[tuple[str, int], bytes]:
    """Keys of accounts, by account and day."""
    engine = open_log(log.audit.url, log.root)
    accounts = open_accounts(log.audit.accounts_url, log.root, engine)
    with accounts.connect() as connection:
        found = {(row.account, row.day): bytes(row.secret) for row in connection.execute(sa.select(ACCOUNTS))}
    engine.dispose()
    accounts.dispose()
    return found


def proofs(request: bytes, keys: dict[tuple[str, int], bytes]) -> set[str]:
    """What entries may say of a request: one for each day."""
    payment, digest = json.loads(request), hashlib.sha256(request).digest()
    names = (payment["sender"], payment["receiver"])
    days = {day for _, day in keys}
    return {request_proof(digest, [keys[name, day] for name in names]) for day in days if (names[0], day) in keys}


def broken(log: Settings) -> list[str]:
    return [str(chain.broken) for chain in verify_log(log) if chain.broken]


class Clients:
    """Some that decide and label all the time, and keep what they were answered."""

    def __init__(self, url: str, number: int = 8):
        self.url, self.answers, self.labels = url, {}, set()  # answers: request and answer by transaction
        self._threads = [threading.Thread(target=self._run, args=(client,)) for client in range(number)]
        for thread in self._threads:
            thread.start()

    def _run(self, client: int) -> None:
        with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=self.url, headers=SHOP) as http:
            for number in itertools.count():
                name = f"t{client}-{number}"
                payment = EXAMPLE | {"transaction_id": name, "sender": f"C{client}"}
                answer = http.post("/predict", json=payment)
                assert answer.status_code == 200, answer.text
                self.answers[name] = answer.request.content, answer.json()
                if number % 5 == 0:
                    label = {"transaction_id": name, "is_fraud": True}
                    assert http.post("/feedback", json={"labels": [label]}).status_code == 200
                    self.labels.add(name)

    def have(self, least: int) -> bool:
        return len(self.answers) >= least

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def test_every_answer_is_in_the_log_though_the_service_is_killed(log):
    known: dict[str, tuple[bytes, dict]] = {}
    labels: set[str] = set()
    for life in range(2):
        with served(log) as (url, process):
            clients = Clients(url)
            servers.until(functools.partial(clients.have, 300), 60)
            process.kill()
            clients.join()
        known |= {f"{life} {name}": answer for name, answer in clients.answers.items()}
        labels |= clients.labels
    written = entries(log)
    decisions = [json.loads(entry.content) for entry in written if entry.kind == "decision"]
    found = {json.dumps(content["answer"], sort_keys=True): content["request"] for content in decisions}
    keys = secrets_of(log)
    for request, answer in known.values():
        assert found[json.dumps(answer, sort_keys=True)] in proofs(request, keys)
    assert labels <= {entry.subject for entry in written if entry.kind == "label"}
    assert {entry.who for entry in written if entry.kind == "decision"} == {"shop"}
    chains = verify_log(log)
    assert [(chain.broken, chain.stopped, chain.signer) for chain in chains] == [(None, False, "log")] * 2
    assert sum(chain.entries for chain in chains) == len(written)


def statement(log: Settings, text: str) -> None:
    engine = open_log(log.audit.url, log.root)
    with engine.begin() as connection:
        connection.exec_driver_sql(text)
    engine.dispose()


def verify(log: Settings) -> tuple[int, str]:
    """Exit status and output of `fraud audit verify`."""
    given = itertools.chain.from_iterable(
        ("-s", f"audit.{name}={value}")
        for name, value in (("url", log.audit.url), ("anchors", log.audit.anchors), ("keys", ",".join(log.audit.keys)))
    )
    result = CliRunner().invoke(app, ["audit", "verify", *given])
    return result.exit_code, result.output


def of(chain: Chain, sequence: str) -> str:
    return f"FROM audit_entries WHERE writer = '{chain.writer}' AND sequence {sequence}"


def test_what_is_done_by_sql_is_found(log):
    with served(log) as (url, _), httpx.Client(base_url=url, headers=SHOP) as http:
        for number in range(20):
            assert http.post("/predict", json=EXAMPLE | {"transaction_id": f"t{number}"}).status_code == 200
    (chain,) = verify_log(log)
    assert chain.broken is None and chain.stopped and chain.anchored == chain.entries
    assert verify(log)[0] == 0
    where = f"WHERE writer = '{chain.writer}' AND sequence = 7"
    statement(log, "DELETE FROM audit_accounts")  # keys of accounts that were forgotten
    assert verify_log(log)[0].forgotten == 20
    statement(log, f"UPDATE audit_entries SET content = replace(content, 'allow', 'block') {where}")
    code, said = verify(log)
    assert code == 1 and f"broken: writer {chain.writer}, sequence 7: was changed" in said
    statement(log, f"UPDATE audit_entries SET content = replace(content, 'block', 'allow') {where}")
    assert "sequence 7" in "".join(broken(log))  # not the text that it was: `block` stands in costs too
    statement(log, f"DELETE {of(chain, '= 7')}")
    assert f"writer {chain.writer}, sequence 7: missing; the next entry is 8" in broken(log)
    statement(log, f"DELETE {of(chain, '>= 7')}")
    assert "the end was cut off" in broken(log)[0] and "sequence 7: missing, up to" in broken(log)[0]
    statement(log, "DELETE FROM audit_entries")
    statement(log, "DELETE FROM audit_writers")
    assert "sequence 1: missing, up to" in broken(log)[0]


def test_a_key_that_is_destroyed_leaves_nothing_to_try_names_with(log):
    """Whoever has the log, a copy of it of before, all keys that are left, and knows all of a request but a name."""
    apart = {"accounts_url": f"sqlite:///{log.root}/accounts.db"}
    log = log.model_copy(update={"audit": log.audit.model_copy(update=apart)})
    names = [f"C{number}" for number in range(100, 130)]
    paid = [
        EXAMPLE | {"transaction_id": f"t{number}", "sender": one, "receiver": other}
        for number, (one, other) in enumerate([("C107", "C108"), ("C109", "C107"), ("C110", "C111")])
    ]
    with served(log) as (url, _), httpx.Client(base_url=url, headers=SHOP) as http:
        alone = [http.post("/predict", json=payment) for payment in paid]
        again = [payment | {"transaction_id": f"b{payment['transaction_id']}"} for payment in paid]
        many = http.post("/predict/batch", json={"transactions": again})
        assert {answer.status_code for answer in (*alone, many)} == {200}
        requests = [answer.request.content for answer in (*alone, many)]
        before, file = entries(log), log.root / "export.jsonl"
        told = [json.loads(entry.content)["request"] for entry in before if entry.kind == "decision"]
        assert told[0] in proofs(requests[0], secrets_of(log)) and len(set(told)) == 4

        def exported() -> list[tuple[str | None, bool]]:
            export_log(log, file, Range(kind="decision"))
            return [(row["account"], row["forgotten"]) for row in map(json.loads, file.read_text().splitlines())]

        assert exported() == [("C107", False), ("C109", False), ("C110", False)] * 2
        (place,) = (place for place in forget_account(log, "C107", {}) if place.name == "audit log")
        assert (place.found, place.erased, place.failed) == (1, 1, False)
        assert exported() == [(None, True), ("C109", False), ("C110", False)] * 2
        assert http.post("/predict", json=paid[0] | {"transaction_id": "t9"}).status_code == 200
        assert exported()[-1] == ("C107", False)  # who pays after that is known by a new key
        assert forget_account(log, "C107", {})
    (chain,) = verify_log(log)
    assert (chain.broken, chain.forgotten) == (None, 3)
    assert entries(log)[: len(before)] == before  # the log itself was not touched
    left = secrets_of(log)
    guesses = {commitment(name, secret) for name in names for secret in (*left.values(), b"")}
    assert not {entry.commitment for entry in before if entry.subject in ("t0", "bt0")} & guesses
    assert {entry.commitment for entry in before if entry.subject == "t1"} <= guesses  # so the guess is a real one
    for request in (requests[0], requests[1], requests[3]):
        bodies = {request.replace(b"C107", name.encode()) for name in names}
        digests = [hashlib.sha256(body).digest() for body in bodies]
        pairs = [*itertools.combinations(left.values(), 2), *((secret,) for secret in left.values()), ()]
        pairs += [tuple(left.values())]
        assert not {request_proof(digest, pair) for digest in digests for pair in pairs} & {*told[:2], told[3]}
    digest = hashlib.sha256(requests[2]).digest()
    assert told[2] in {request_proof(digest, pair) for pair in itertools.combinations(left.values(), 2)}
    contents = b"".join(path.read_bytes() for path in log.root.rglob("*.db*"))
    assert b"C109" in contents and b"C107" not in contents


def test_a_chain_that_is_computed_anew_is_found(log):
    """Whoever may write into the database, and has all of this code."""
    with served(log) as (url, _):
        assert httpx.post(f"{url}/predict", json=EXAMPLE, headers=SHOP).status_code == 200
    written, engine, previous = entries(log), open_log(log.audit.url, log.root), None
    with engine.begin() as connection:
        for entry in written:
            content = entry.content.replace('"allow"', '"block"') if entry.kind == "decision" else entry.content
            forged = entry._replace(content=content, previous=previous or entry.previous)
            previous = entry_hash(forged)
            values = forged._replace(hash=previous)._asdict()
            place = (ENTRIES.c.writer == entry.writer, ENTRIES.c.sequence == entry.sequence)
            connection.execute(sa.update(ENTRIES).where(*place).values(**values))
    engine.dispose()
    assert "is not the entry that was anchored here: computed anew" in broken(log)[0]
    without = log.model_copy(update={"audit": log.audit.model_copy(update={"anchors": ""})})
    assert broken(without) == []  # what cannot be found without heads


def test_nothing_is_answered_while_the_log_takes_nothing(log):
    def post(http: httpx.Client, name: str) -> int:
        return http.post("/predict", json=EXAMPLE | {"transaction_id": name}, timeout=30).status_code

    with served(log) as (url, _), httpx.Client(base_url=url, headers=SHOP) as http:
        assert post(http, "before") == 200
        statement(log, "ALTER TABLE audit_entries RENAME TO elsewhere")
        # Opening the log makes tables that are missing; away they are, so none is opened from here on.
        engine = sa.create_engine(log.audit.url)
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE IF EXISTS audit_entries")
        assert post(http, "meanwhile") == 503
        assert post(http, "refused") == 503
        assert [servers.status(f"{url}{path}") for path in ("/readyz", "/healthz")] == [503, 200]
        assert "fraud_audit_up 0.0" in servers.fetch(f"{url}/metrics", **EVE)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO audit_entries")
        engine.dispose()
        servers.until(lambda: servers.status(f"{url}/readyz") == 200)
        assert post(http, "after") == 200
    written = [(entry.kind, entry.subject) for entry in entries(log)]
    assert [subject for kind, subject in written if kind == "decision"] == ["before", "meanwhile", "after"]
    withheld = json.loads(next(entry for entry in entries(log) if entry.kind == "withheld").content)
    assert [entries(log)[place - 1].subject for place in (withheld["from"], withheld["to"])] == ["meanwhile"] * 2
    assert broken(log) == []


def test_several_services_share_a_database(log):
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(served(log))[0] for _ in range(2)]
        clients = [Clients(url, 3) for url in urls]
        servers.until(lambda: all(len(one.answers) > 100 for one in clients), 60)
        assert broken(log) == []  # also while it is written
        assert httpx.get(f"{urls[0]}/model", headers={"X-API-Key": "guess-0123456789abcdef"}).status_code == 401
        stack.close()
        for one in clients:
            one.join()
    assert [(chain.broken, chain.stopped) for chain in verify_log(log)] == [(None, True)] * 2
    denied = [entry for entry in entries(log) if entry.kind == "denied"]
    assert [(entry.who, entry.subject) for entry in denied] == [("", "/model")]
    assert "guess" not in denied[0].content


def test_a_service_does_not_start_without_what_is_required(log):
    def said(**audit) -> str:
        given = {f"audit__{name}": value for name, value in audit.items()}
        with pytest.raises(AssertionError) as failed, servers.service(log.root, variables=KEYS, **given):
            pass
        return str(failed.value)

    assert "[audit] required = yes: expected [audit] url and [audit] anchors and FRAUD_HEAD_KEY_FILE" in said(
        required="yes"
    )
    assert "[audit] anchors = /dev/null/x: Not a directory" in said(url=log.audit.url, anchors="/dev/null/x")


def test_heads_in_a_bucket(tmp_path, monkeypatch):
    public = new_key(tmp_path / "audit.pem", servers.PROJECT)
    signer = load_signer({"FRAUD_HEAD_KEY_FILE": str(tmp_path / "audit.pem")}, "FRAUD_HEAD_KEY")
    with servers.moto(tmp_path) as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(
            Bucket="log", CreateBucketConfiguration={"LocationConstraint": environ["AWS_DEFAULT_REGION"]}
        )
        place = open_heads("s3://log/heads", tmp_path)
        for writer, sequence in (("a", 9), ("a", 10), ("a", 2), ("b", 1)):
            head = Head(writer, sequence, bytes(32))
            place.put(head, write_head(head, signer))
        newest = {writer: read_head(text, where) for writer, (where, text) in place.newest().items()}
        assert {writer: head.sequence for writer, head in newest.items()} == {"a": 10, "b": 1}
        with pytest.raises(AuditError, match=r"\[audit\] anchors = s3://absent/heads: "):
            open_heads("s3://absent/heads", tmp_path).put(head, b"")
    assert public == signer.public


def test_what_commands_change_is_in_the_log(tmp_path, monkeypatch):
    """A champion that is signed or published, settings that are written, and what held before and is proposed now."""
    example_bundle(tmp_path / "models/champion")
    public = new_key(tmp_path / "prod.pem", servers.PROJECT)
    (tmp_path / "settings.ini").write_text(f"[audit]\nurl = sqlite:///audit.db\n[trust]\nkeys = prod:{public}\n")
    (tmp_path / "log.csv").write_text(
        "id,hour,amount,payer,payee,fraud\n"
        + "".join(f"t{n},{n},{n + 1}.5,C{n % 7},M{n % 3},{int(n % 10 == 0)}\n" for n in range(400))
    )
    monkeypatch.setenv("FRAUD_ROOT", str(tmp_path))
    monkeypatch.setenv("FRAUD_SIGNING_KEY_FILE", str(tmp_path / "prod.pem"))
    with servers.moto(tmp_path) as environ:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        place = {"LocationConstraint": environ["AWS_DEFAULT_REGION"]}
        boto3.client("s3").create_bucket(Bucket="models", CreateBucketConfiguration=place)
        for words in (
            ["keys", "sign", str(tmp_path / "models/champion")],
            ["models", "publish", "s3://models/champion"],
            ["approvals", "adopt"],
            ["init", str(tmp_path / "log.csv"), "--yes"],
        ):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, (words, done.output, done.exception)
    config = Settings(root=tmp_path, audit={"url": "sqlite:///audit.db"})
    noted = {entry.kind: (entry.subject, json.loads(entry.content)) for entry in entries(config)}
    version = json.loads((tmp_path / "models/champion/manifest.json").read_text())["version"]
    assert noted["sign"][0] == noted["publish"][0] == version and noted["sign"][1]["key"] == public
    assert noted["publish"][1]["to"] == "s3://models/champion"
    assert noted["proposal"][0] == "adopt" and "log.csv" in noted["setting"][1]["changes"]
    assert broken(config) == []
