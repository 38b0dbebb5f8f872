"""Who may what, how much of it, and over what: services, an identity provider, Redis and TLS as they are.

docs/threat-model.md names these tests beside the threats that they guard.
"""

import contextlib
import json
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import servers
from certificates import Authority
from joserfc import jwk, jwt

from fraud_pkg.core.contract import Contract
from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.settings import load_settings
from fraud_pkg.features.definitions import feature_names
from fraud_pkg.model.example import EXAMPLE_CONTRACT, example_bundle
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import StoreError, retention_of

SHOP, RIVAL, BEN, SCRAPER = (f"{name}-0123456789abcdef" for name in ("shop", "rival", "ben", "scraper"))
KEYS = f"shop:{SHOP}\nrival:{RIVAL}\nben@write:{BEN}\nprometheus@metrics:{SCRAPER}\n"


def key(value: str) -> dict[str, str]:
    return {"X-API-Key": value}


def payment(name: str, **changes) -> dict:
    return EXAMPLE | {"transaction_id": name} | changes


def label(*names: str) -> dict:
    return {"labels": [{"transaction_id": name, "is_fraud": True} for name in names]}


@contextlib.contextmanager
def keyed(folder: Path, keys: str = KEYS, **overrides) -> Iterator[str]:
    """A service with a file of keys; yields its URL."""
    example_bundle(folder / "champion")
    (folder / "keys").write_text(keys)
    with servers.service(folder, variables={"FRAUD_API_KEYS_FILE": str(folder / "keys")}, **overrides) as (url, _):
        yield url


def fraud(*words: object) -> str:
    """What a command prints."""
    command = [sys.executable, "-P", "-m", "fraud_pkg.cli", *map(str, words)]
    return subprocess.run(command, env=servers.environment({}), capture_output=True, text=True, check=True).stdout


# --- keys and rights


def test_a_key_is_made_replaced_and_taken_back_without_a_restart(tmp_path):
    """By the command line, while the service runs; what is in the file are hashes."""
    file = tmp_path / "keys"
    with keyed(tmp_path) as url:

        def status(value: str) -> int:
            return httpx.get(f"{url}/model", headers=key(value)).status_code

        made = fraud("access", "add", "bank", "--days", 30, "--file", file).strip()
        assert made not in file.read_text() and "bank:sha256:" in file.read_text()
        servers.until(lambda: status(made) == 200, 20)
        other = fraud("access", "rotate", "bank", "--file", file).strip()
        servers.until(lambda: status(other) == 200, 20)
        assert status(made) == 200  # for a week still
        fraud("access", "revoke", "bank", "--file", file)
        servers.until(lambda: status(other) == 401, 20)
        assert (status(made), status(SHOP)) == (401, 200)
        file.write_text("shop:short\n")  # a mistake takes nobody's key away
        time.sleep(1)
        assert status(SHOP) == 200
        file.write_text(f"ben@write:{BEN}\n")
        servers.until(lambda: status(SHOP) == 401, 20)


def test_a_key_that_is_over_is_refused(tmp_path):
    fraud("access", "add", "bank", "--file", tmp_path / "made")
    over = fraud("access", "rotate", "bank", "--overlap", 0, "--file", tmp_path / "made").strip()
    line = (tmp_path / "made").read_text().splitlines()[1] + ":2026-01-01"
    with keyed(tmp_path, KEYS + line) as url:
        answer = httpx.post(f"{url}/predict", json=EXAMPLE, headers=key(over))
        assert (answer.status_code, answer.json()["problems"][0]["reason"]) == (401, "expired")


def test_a_key_labels_only_what_it_had_decided(tmp_path):
    """A rival took eight frauds back that a person had marked, and marked a shop's payments as fraud."""
    with keyed(tmp_path) as url:

        def ask(path: str, content: dict, value: str) -> dict:
            answer = httpx.post(f"{url}/{path}", json=content, headers=key(value))
            return {"status": answer.status_code} | answer.json()

        ask("predict", payment("t1"), SHOP)
        ask("predict/batch", {"transactions": [payment("t2")]}, SHOP)
        ask("predict", payment("t1"), RIVAL)  # sent again by another: still the shop's
        assert ask("feedback", label("t1", "t2"), RIVAL) == {"status": 200, "recorded": 0, "unknown": ["t1", "t2"]}
        assert ask("feedback", label("t1", "t2"), SHOP)["recorded"] == 2
        assert ask("feedback", label("t1", "t2"), BEN)["recorded"] == 2  # a person's right
        assert ask("feedback", label("t1"), SCRAPER)["status"] == 403
    assert "labels of payments that another key had decided" in (tmp_path / "api.log").read_text()


def test_metrics_and_the_document_need_a_right_and_tell_no_single_payment(tmp_path):
    """Two looks at /metrics gave the amount, both balances and the score of one payment, to anybody."""
    with keyed(tmp_path) as url, httpx.Client(base_url=url, headers=key(SHOP)) as client:
        paths = ("/metrics", "/openapi.json", "/docs", "/docs/swagger-ui.js", "/healthz")
        given = ({}, key(SHOP), {"Authorization": f"Bearer {SCRAPER}"})
        seen = [[httpx.get(url + path, headers=headers).status_code for path in paths] for headers in given]
        assert seen == [[401, 401, 200, 200, 200], [403, 200, 200, 200, 200], [200, 200, 200, 200, 200]]

        def values() -> dict[str, str]:
            text = httpx.get(f"{url}/metrics", headers=given[2]).text
            return dict(re.findall(r"^(fraud_(?:feature|score)[^ ]*) (\S+)$", text, re.M))

        client.post("/predict/batch", json={"transactions": [payment(f"b{number}") for number in range(64)]})
        before = values()
        assert before["fraud_score_count"] == "64.0"
        client.post("/predict", json=payment("secret", amount=4711.37))
        assert values() == before


# --- limits


def test_wrong_keys_lock_an_address_out_and_nobody_else(tmp_path):
    """2,800 wrong keys a second were tried, without a line in the log. A key that was right from there goes on."""
    proxy = {"limits.trusted_proxies": "127.0.0.0/8", "limits.wrong_keys": 4}
    with keyed(tmp_path, **{name.replace(".", "__"): value for name, value in proxy.items()}) as url:

        def ask(value: str, address: str) -> tuple[int, int]:
            answer = httpx.get(f"{url}/model", headers=key(value) | {"X-Forwarded-For": address})
            return answer.status_code, int(answer.headers.get("retry-after", 0))

        assert ask(SHOP, "198.51.100.7") == (200, 0)
        guesses = [ask(f"guess-{number}", "198.51.100.7") for number in range(4)]
        assert [status for status, _ in guesses] == [401] * 4 and guesses[-1][1] == 1
        servers.until(lambda: ask("guess", "198.51.100.7") >= (429, 8), 30)  # each further one doubles the pause
        assert ask(SHOP, "198.51.100.7")[0] == 200
        assert ask(RIVAL, "198.51.100.7")[0] == 429  # nobody is told that it is a good one
        assert ask(RIVAL, "198.51.100.8")[0] == 200
        assert ask(RIVAL, "10.9.9.9, 198.51.100.7")[0] == 429  # what stands before is a stranger's word
        text = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {SCRAPER}"}).text
        assert all(f'fraud_requests_denied_total{{reason="{reason}"}}' in text for reason in ("unknown_key", "locked"))
    lines = [json.loads(line) for line in (tmp_path / "api.log").read_text().splitlines() if line.startswith("{")]
    refused = [line for line in lines if line["message"].startswith("refused: ")]
    assert {line["address"] for line in refused} == {"198.51.100.7"} and len(refused) <= 4
    assert "guess" not in (tmp_path / "api.log").read_text()


def test_two_services_with_one_redis_share_a_limit(tmp_path):
    """A key with 5 requests a second has them once, however many services there are."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(servers.redis(tmp_path))
        given = {"store__url": store, "limits__key_rate": 5, "limits__burst": 4}
        urls = [stack.enter_context(keyed(tmp_path / name, **given)) for name in ("one", "two")]
        clients = [stack.enter_context(httpx.Client(base_url=url, headers=key(SHOP))) for url in urls]
        began, answers = time.monotonic(), []
        while time.monotonic() < began + 6:
            answers += [client.get("/model") for client in clients]
        seconds = time.monotonic() - began
        passed = sum(answer.status_code == 200 for answer in answers)
        assert {answer.status_code for answer in answers} == {200, 429}
        # What one may: the burst and the rate; what two may that know nothing of each other is twice that.
        allowed = 20 + 5 * seconds
        assert 0.8 * allowed <= passed <= 1.3 * allowed, (passed, allowed)
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        assert clients[0].get("/healthz").status_code == 200
        other = [httpx.get(f"{url}/model", headers=key(RIVAL)).status_code for url in urls]
        assert other == [200, 200]


# --- tokens


class Issuer:
    """An identity provider on loopback."""

    def __init__(self):
        self.keys: list[jwk.Key] = []
        self.asked = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                documents = {
                    "/.well-known/openid-configuration": {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/keys"},
                    "/keys": {"keys": [one.as_dict(private=False) for one in issuer.keys]},
                }
                issuer.asked += self.path == "/keys"
                self.send_response(200 if self.path in documents else 404)
                self.end_headers()
                self.wfile.write(json.dumps(documents.get(self.path, {})).encode())

            def log_message(self, *_) -> None: ...

        self._server = ThreadingHTTPServer((servers.HOST, 0), Handler)
        self.url = f"http://{servers.HOST}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def new_key(self, kid: str) -> None:
        self.keys.append(jwk.RSAKey.generate_key(2048, {"kid": kid}, auto_kid=False))

    def token(self, kid: str, **claims) -> dict[str, str]:
        """The header with a token of this key, for an hour."""
        [signer] = [one for one in self.keys if one.kid == kid]
        content = {"iss": self.url, "aud": "fraud", "sub": "4711", "name": "anna", "exp": int(time.time()) + 3600}
        text = jwt.encode({"alg": "RS256", "kid": kid}, content | claims, signer)
        return {"Authorization": f"Bearer {text}"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def issuer():
    made = Issuer()
    yield made
    made.close()


def test_tokens_of_an_identity_provider(tmp_path, issuer):
    """Rights from a claim, over keys that the issuer replaces; no API key is needed, and none is known."""
    example_bundle(tmp_path / "champion")
    issuer.new_key("first")
    given = {"issuer": issuer.url, "audience": "fraud", "roles": "leads: write, gates: decide", "name_claim": "name"}
    with servers.service(tmp_path, **{f"auth__{name}": value for name, value in given.items()}) as (url, _):

        def ask(headers: dict[str, str], path: str = "predict", content: dict = EXAMPLE) -> int:
            return httpx.post(f"{url}/{path}", json=content, headers=headers).status_code

        lead, gate = (issuer.token("first", roles=[role], sub=role) for role in ("leads", "gates"))
        assert (ask({}), ask(key(SHOP)), ask(gate), ask(lead)) == (401, 401, 200, 200)
        assert (ask(gate, "feedback", label("a-1001")), ask(lead, "feedback", label("a-1001"))) == (403, 200)
        for wrong in ({"aud": "shop"}, {"exp": int(time.time()) - 120}, {"iss": "https://evil.example"}):
            assert ask(issuer.token("first", roles=["leads"], **wrong)) == 401
        assert ask(issuer.token("first", roles=["strangers"])) == 403
        issuer.new_key("second")  # rotation: known at once, without waiting for the next look
        time.sleep(10)  # the issuer is not asked more often, whatever comes
        asked = issuer.asked
        assert ask(issuer.token("second", roles=["gates"])) == 200
        assert issuer.asked == asked + 1 and ask(gate) == 200
        stranger = Issuer()
        stranger.new_key("third")
        assert [ask(stranger.token("third", iss=issuer.url, roles=["leads"])) for _ in range(3)] == [401] * 3
        assert issuer.asked == asked + 1
        stranger.close()
    log = (tmp_path / "api.log").read_text()
    assert '"by":"anna"' in log and not re.search(r"eyJ[\w-]{20}", log)


# --- TLS


def test_the_service_speaks_tls_and_may_ask_for_certificates(tmp_path):
    """With a certificate of the authority, and a key: one alone is not enough."""
    authority = Authority(tmp_path)
    certificate, secret = authority.signed("service")
    client_files = authority.signed("client")
    stranger = Authority(tmp_path, "stranger").signed("other")
    example_bundle(tmp_path / "champion")
    port = servers.free_port()
    given = {"serve.port": port, "serve.bundle": tmp_path / "champion", "cases.url": ""}
    given |= {"serve.tls_certificate": certificate, "serve.tls_key": secret, "serve.tls_client_ca": authority.file}
    environ = servers.environment(given, servers.PROJECT, FRAUD_API_KEYS=f"shop:{SHOP}")
    command = [sys.executable, "-m", "fraud_pkg.serve.server"]
    url = f"https://{servers.HOST}:{port}/predict"

    def ask(*files: Path, headers: dict[str, str]) -> int:
        context = ssl.create_default_context(cafile=str(authority.file))
        if files:
            context.load_cert_chain(*files)
        return httpx.post(url, json=EXAMPLE, headers=headers, verify=context).status_code

    with servers.running(command, servers.answers(port), tmp_path / "api.log", env=environ):
        assert ask(*client_files, headers=key(SHOP)) == 200
        assert ask(*client_files, headers={}) == 401
        for files in ((), stranger):
            with pytest.raises(httpx.TransportError):
                ask(*files, headers=key(SHOP))
        with pytest.raises(httpx.TransportError):
            httpx.post(url.replace("https", "http"), json=EXAMPLE)


def test_a_redis_that_asks_for_certificates(tmp_path):
    """rediss:// with the authority, certificate and key of [store]; without them nothing is sent."""
    authority = Authority(tmp_path)
    certificate, secret = authority.signed("redis")
    own, own_key = authority.signed("store")
    port = servers.free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(secret)]
    options += ["--tls-ca-cert-file", str(authority.file), "--tls-auth-clients", "yes"]
    with servers.redis(tmp_path, options=options):
        (tmp_path / "settings.ini").touch()
        files = {"store.tls_ca": str(authority.file), "store.tls_certificate": str(own), "store.tls_key": str(own_key)}
        given = {"store.url": f"rediss://{servers.HOST}:{port}/0"} | files
        made = load_settings(file=tmp_path / "settings.ini", environ={}, cli=given)
        servers.until(servers.answers(port), what="redis over TLS")
        retention = retention_of(Contract())
        open_store(made.store_url, retention, 5).ping()
        for missing in ("store.tls_certificate", "store.tls_ca"):
            less = {name: value for name, value in given.items() if name != missing}
            less = less if missing == "store.tls_ca" else {n: v for n, v in less.items() if n != "store.tls_key"}
            poor = load_settings(file=tmp_path / "settings.ini", environ={}, cli=less)
            with pytest.raises(StoreError):
                open_store(poor.store_url, retention, 5).ping()


def test_nothing_is_sent_beyond_loopback_without_tls(tmp_path):
    """Redis, MLflow, the Pushgateway, Kafka, another service and an issuer, unless the settings name the host."""
    (tmp_path / "settings.ini").touch()
    for name, value in (
        ("store.url", "redis://:S3CRET@redis:6379/0"),
        ("registry.tracking_uri", "http://mlflow:5000"),
        ("monitor.pushgateway", "pushgateway:9091"),
        ("stream.bootstrap_servers", "kafka:9092"),
        ("stream.via", "http://api:8000"),
        ("auth.issuer", "http://login"),
    ):
        given = {name: value} | ({"auth.audience": "fraud"} if name == "auth.issuer" else {})
        with pytest.raises(FraudError, match="would be reached without TLS") as caught:
            load_settings(file=tmp_path / "settings.ini", environ={}, cli=given)
        assert "S3CRET" not in str(caught.value)
        load_settings(file=tmp_path / "settings.ini", environ={}, cli=given | {"trust.plain_hosts": "*"})


def test_eight_frauds_cannot_be_called_honest_by_a_system(tmp_path):
    """A key that takes back frauds of its own payments changes no feature and no later decision; persons are asked."""
    names = [f"f{number}" for number in range(8)]
    taken_back = {"labels": [{"transaction_id": name, "is_fraud": False} for name in names]}
    anna = "anna-0123456789abcdef"
    places = {"cases__url": f"sqlite:///{tmp_path}/cases.db", "cases__outbox": tmp_path / "cases"}
    with keyed(tmp_path, f"{KEYS}anna@cases:{anna}\n", limits__labels_per_hour=20, **places) as url:

        def ask(path: str, content: dict, value: str = SHOP) -> dict:
            return httpx.post(f"{url}/{path}", json=content, headers=key(value)).json()

        def cases(state: str) -> list[dict]:
            found = httpx.get(f"{url}/cases?state={state}", headers=key(anna)).json()["cases"]
            return [case for case in found if case["transaction_id"] in names]

        def fraud_features(name: str) -> dict[str, float]:
            """What a later payment to the same account is told of frauds, when labels of now are known."""
            later = payment(name, step=EXAMPLE["step"] + 24 * 9)
            (decision,) = ask("predict/batch", {"transactions": [later], "features": True})["decisions"]
            order = feature_names(EXAMPLE_CONTRACT)
            return {name: decision["features"][order.index(name)] for name in order if "fraud" in name}

        for name in names:
            assert ask("predict", payment(name, amount=2000.0))["decision"] == "block"
        clean = fraud_features("n0")
        assert ask("feedback", label(*names), BEN)["recorded"] == 8
        before = fraud_features("n1")
        servers.until(lambda: len(cases("closed")) == 8)  # blocked, and so nobody's work
        assert ask("feedback", taken_back) == {"recorded": 0, "unknown": [], "contested": names}
        assert fraud_features("n2") == before != clean
        servers.until(lambda: len(cases("open")) == 8)
        assert {case["reopened_by"] for case in cases("open")} == {"key shop"}
        assert "more than 20 in an hour" in str([ask("feedback", taken_back) for _ in range(2)])
        assert ask("feedback", taken_back, BEN)["recorded"] == 8  # a person may, under a name
        assert fraud_features("n3") == clean
    assert "frauds that a system would take back wait for a person" in (tmp_path / "api.log").read_text()
