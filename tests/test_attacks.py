"""Attacks on each point of the security review that are not among its own: docs/howto/security-review.md lists them."""

import base64
import contextlib
import datetime
import hmac
import itertools
import json
import os
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import onnx
import pytest
import servers
import sqlalchemy as sa
import test_k8s
from conftest import PROJECT
from joserfc import jwk, jwt
from onnx import TensorProto, helper
from test_access import BEN, KEYS, SHOP, Issuer, key, keyed, payment

from fraud_pkg.core.audit import AuditError, commitment
from fraud_pkg.core.onnx_file import OnnxFileError, check_onnx
from fraud_pkg.core.settings import Settings
from fraud_pkg.core.signatures import (
    ANSWER,
    APPROVAL,
    CHAMPION,
    CONTENDER,
    LIST,
    RULES,
    Approved,
    Approvers,
    SignatureError,
    Statement,
    TrustedKey,
    Verifier,
    load_signer,
    new_key,
)
from fraud_pkg.model.bundle import MANIFEST, BundleError, load_bundle
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.store.audit_check import Range, export_log, verify_log
from fraud_pkg.store.audit_heads import audited
from fraud_pkg.store.audit_log import ACCOUNTS, destroy_keys, named_by, open_log, read_chain

render = test_k8s.render  # a fixture


def signer_of(folder, name: str):
    file = folder / f"{name}.pem"
    if not file.exists():
        new_key(file, PROJECT)
    signer = load_signer({"FRAUD_SIGNING_KEY_FILE": str(file)})
    assert signer is not None
    return signer


# --- 1: where code or files come in


def elsewhere() -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="keys")
    return tensor


@pytest.mark.parametrize("place", ["function's default", "sparse weights of a branch in a function", "training"])
def test_weights_elsewhere_in_corners_of_a_model(place):
    """Places that no model of ours uses: the format has them, and a session may read them."""
    model = onnx.load_from_string(example_bundle_bytes())
    if place == "training":
        model.training_info.add().initialization.initializer.append(elsewhere())
    else:
        function = model.functions.add(name="f", domain="d")
        if place == "function's default":
            function.attribute_proto.append(helper.make_attribute("w", elsewhere()))
        else:
            branch = onnx.GraphProto(name="b")
            branch.sparse_initializer.add(values=elsewhere(), dims=[1])
            node = function.node.add(op_type="If")
            node.attribute.append(helper.make_attribute("then_branch", branch))
    with pytest.raises(OnnxFileError, match="in another file"):
        check_onnx(model.SerializeToString())


def example_bundle_bytes() -> bytes:
    graph = helper.make_graph([], "g", [], [])
    return helper.make_model(graph).SerializeToString()


# --- 2: signed


def test_a_signature_is_for_one_purpose_only(tmp_path):
    """Whoever signs heads, labels, approvals or answers all day signs no champion thereby, whatever the content is."""
    signer = signer_of(tmp_path, "one")
    purposes = (CONTENDER, CHAMPION, ANSWER, APPROVAL, "audit", "label")
    for given, asked in itertools.permutations(purposes, 2):
        check = Verifier([TrustedKey("one", signer.public, None)], (asked,))
        text = signer.sign(b"{}", given)
        with pytest.raises(SignatureError, match=f"signed as {given}"):
            check.verify(b"{}", text, "x")
        with pytest.raises(SignatureError, match="does not fit"):
            check.verify(b"{}", text.replace(given.encode(), asked.encode(), 1), "x")
        inner = signer.sign(text + b"{}", given)  # a signature in what is signed
        with pytest.raises(SignatureError):
            check.verify(b"{}", inner + text, "x")


# --- 3: the gate


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "1e999", "null", '"0"'])
@pytest.mark.parametrize("name", ["review_cost", "block_cost"])
def test_a_policy_of_no_number_is_no_bundle(tmp_path, name, value):
    """A cost that compares as false with everything would allow every payment."""
    folder = example_bundle(tmp_path / "bundle").folder
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["policy"][name] = "HERE"
    (folder / MANIFEST).write_text(json.dumps(manifest).replace('"HERE"', value))
    with pytest.raises(BundleError):
        load_bundle(folder)


# --- 4: who may what


def raw(url: str, *headers: str, body: dict = EXAMPLE) -> int:
    """The status of a request with exactly these lines."""
    address, content = urlsplit(url), json.dumps(body).encode()
    lines = ["POST /predict HTTP/1.1", f"Host: {address.netloc}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content)}", "Connection: close", *headers]
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        return int(connection.makefile("rb").readline().split()[1])


def test_two_keys_in_one_request_are_none(tmp_path):
    """A gateway that looks at the first and a service that looks at the last would see two clients."""
    good, wrong = f"X-API-Key: {SHOP}", "X-API-Key: nobody-0123456789abcdef"
    with keyed(tmp_path) as url:
        assert raw(url, good) == 200
        for lines in ((wrong, good), (good, wrong), (good, good), (wrong, f"x-api-key: {SHOP}")):
            assert raw(url, *lines) == 401, lines
        assert raw(url, f"Authorization: Bearer {SHOP}") == 200
        assert raw(url, f"Authorization: Bearer {SHOP}", wrong) == 401
        assert raw(url, f"X_API_Key: {SHOP}") == 401
        assert raw(url, f"X-API-Key: {SHOP}\tx") == 401


def signed_by_secret(secret: bytes, claims: dict) -> str:
    """A token with HMAC, of which a library for tokens would not take this key."""

    def text(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).rstrip(b"=").decode()

    head = json.dumps({"alg": "HS256", "kid": "first"}).encode()
    signed = f"{text(head)}.{text(json.dumps(claims).encode())}"
    return f"{signed}.{text(hmac.digest(secret, signed.encode(), 'sha256'))}"


def test_tokens_that_choose_their_own_key(tmp_path):
    """Another algorithm, no algorithm, the public key as a secret, a key in the header, a path for a name."""
    example_bundle(tmp_path / "champion")
    issuer = Issuer()
    issuer.new_key("first")
    now = int(time.time())
    claims = {"iss": issuer.url, "aud": "fraud", "sub": "1", "exp": now + 3600, "roles": ["leads"]}
    public, own = issuer.keys[0].as_pem(private=False), jwk.RSAKey.generate_key(2048, {"kid": "own"})
    given = {"issuer": issuer.url, "audience": "fraud", "roles": "leads: write"}

    def unsigned(algorithm: str) -> str:
        token = jwt.encode({"alg": "HS256", "kid": "first"}, claims, jwk.OctKey.import_key(b"x" * 32))
        head = json.dumps({"alg": algorithm, "kid": "first"}).encode()
        return f"{jwk.OctKey.import_key(head).as_dict()['k']}.{token.split('.')[1]}."

    tokens = [
        signed_by_secret(public, claims),
        unsigned("none"),
        unsigned("RS256"),
        jwt.encode({"alg": "RS256", "jwk": own.as_dict(private=False), "kid": "first"}, claims, own),
        jwt.encode({"alg": "RS256", "jku": "https://evil.example/keys", "kid": "first"}, claims, own),
        *(jwt.encode({"alg": "RS256", "kid": kid}, claims, own) for kid in ("../../keys", "' OR 1=1", "")),
    ]
    with servers.service(tmp_path, limits__wrong_keys=0, **{f"auth__{n}": v for n, v in given.items()}) as (url, _):
        assert httpx.post(f"{url}/predict", json=EXAMPLE, headers=issuer.token("first", roles=["leads"])).is_success
        for token in tokens:
            headers = {"Authorization": f"Bearer {token}"}
            assert httpx.post(f"{url}/predict", json=EXAMPLE, headers=headers).status_code == 401, token
    issuer.close()


# --- 5: limits


def test_an_address_cannot_be_made_up(tmp_path):
    """What a client writes into X-Forwarded-For, in front, in several lines or in another form, buys no new bucket."""
    rate = {"limits__address_rate": 1, "limits__burst": 5, "limits__trusted_proxies": "127.0.0.0/8"}
    with keyed(tmp_path, **rate) as url:

        def statuses(*written: str) -> set[int]:
            """Of many requests, behind a proxy that appends the client's address in a line of its own."""
            good = f"X-API-Key: {SHOP}"
            return {
                raw(url, good, *(line.format(n) for line in written), "X-Forwarded-For: 192.0.2.7") for n in range(12)
            }

        assert statuses() == {200, 429}
        assert statuses("X-Forwarded-For: 198.51.100.{}") == {429}
        assert statuses("X-Forwarded-For: 127.0.0.{0}, 198.51.100.{0}", "X-Forwarded-For: 127.0.0.1") == {429}
        good = f"X-API-Key: {SHOP}"
        assert raw(url, good, "X-Forwarded-For: ::ffff:192.0.2.7") == 429  # the same in the form of IPv6
        assert raw(url, good, "X-Forwarded-For: 192.0.2.8, 127.0.0.2", "X-Forwarded-For: 127.0.0.3") == 200


# --- 6: four eyes


def test_one_person_is_not_two(tmp_path):
    """Two keys of one name, one key twice, an approval of rules for a list, and one that is given too late."""
    anna, laptop, ben = (signer_of(tmp_path, name) for name in ("anna", "laptop", "ben"))
    keys = [TrustedKey("anna", anna.public, None), TrustedKey("anna", laptop.public, None)]
    approvers = Approvers(2, [*keys, TrustedKey("ben", ben.public, datetime.date(2020, 1, 1))])
    soon = int(time.time() * 1000) + 60_000
    statement = Statement(LIST, "a" * 64, 7, soon, "b" * 64)
    own = [one.sign(statement.text, APPROVAL) for one in (anna, laptop, anna)]
    other = statement._replace(kind=RULES)
    moved = anna.sign(other.text, APPROVAL), ben.sign(statement.text, APPROVAL)
    names = approvers.names(Approved(statement, (*own, *moved)))
    assert names == ("anna",) and "expected 1 more" in approvers.lacking(names)


# --- 7: the audit log


def test_nobody_is_framed_by_a_key_that_was_destroyed(tmp_path):
    """Whoever may write into the accounts' keys says that an entry is about somebody else, or brings a name back."""
    config = Settings(root=tmp_path, audit={"url": "sqlite:///audit.db"})
    with audited(config, {}, "command", "anna") as note:
        note("lookup", "sender", {}, "C1")
    log = open_log(config.audit.url, tmp_path)
    (chain,) = verify_log(config)
    entry = next(one for one in read_chain(log, chain.writer) if one.commitment)
    day = entry.time // 86_400_000_000
    assert destroy_keys(log, ACCOUNTS.c.account == "C1") == 1
    assert verify_log(config)[0].broken is None
    forged = {"account": "C2", "day": day, "commitment": entry.commitment, "secret": os.urandom(32)}
    with log.begin() as connection:
        connection.execute(sa.insert(ACCOUNTS).values(**forged))
    assert "its account was changed" in str(verify_log(config)[0].broken)
    with pytest.raises(AuditError, match="its account was changed"):
        export_log(config, tmp_path / "export.jsonl", Range())
    with log.begin() as connection:  # also one whose own commitment fits
        secret = os.urandom(32)
        own = {"commitment": commitment("C2", secret), "secret": secret}
        connection.execute(sa.update(ACCOUNTS).values(**own))
    assert verify_log(config)[0].forgotten == 1 and named_by(log, [entry]) == {}
    log.dispose()


# --- 10: stages apart


def test_no_peer_of_a_policy_is_a_whole_foreign_namespace(render):
    """A peer with a namespace and no pod lets in whatever somebody starts there; a label alone counts in ours only."""
    for overlay in ("minikube", "production"):
        objects = [one for one in render(f"overlays/{overlay}") if one["kind"] == "NetworkPolicy"]
        rules = [rule for one in objects for way in ("ingress", "egress") for rule in one["spec"].get(way, ())]
        peers = [peer for rule in rules for peer in (*rule.get("from", ()), *rule.get("to", ()))]
        foreign = [peer for peer in peers if "namespaceSelector" in peer]
        assert peers and foreign
        for peer in foreign:
            name = peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
            assert "podSelector" in peer or name == "ingress-nginx", peer


# --- 11: poisoned labels


@contextlib.contextmanager
def decided(folder, *names: str, **limits) -> Iterator[str]:
    with keyed(folder, KEYS, **limits) as url:
        for name in names:
            assert httpx.post(f"{url}/predict", json=payment(name, amount=2000.0), headers=key(SHOP)).is_success
        yield url


def test_a_label_does_not_come_around_the_limit_or_the_contradiction(tmp_path):
    """One payment many times in a request, both answers in one, an id in another writing."""
    with decided(tmp_path, "t1", "t2", limits__labels_per_hour=20) as url:

        def send(*labels: tuple[str, bool], who: str = SHOP) -> httpx.Response:
            content = {"labels": [{"transaction_id": name, "is_fraud": fraud} for name, fraud in labels]}
            return httpx.post(f"{url}/feedback", json=content, headers=key(who))

        assert send(("t1", True), who=BEN).json()["recorded"] == 1
        for labels in ([("t1", True), ("t1", False)], [("t1", False), ("t1", True), ("t1", False)]):
            answer = send(*labels)
            assert answer.status_code == 422 or answer.json()["contested"] == ["t1"], answer.text
        for name in ("t1 ", " t1", "t1\u200b", "T1", "\uff541"):
            answer = send((name, False))
            said = answer.json()  # blanks around an id, and other forms of a letter, are the same id
            assert answer.status_code == 422 or said["unknown"] or said["contested"] == ["t1"], answer.text
