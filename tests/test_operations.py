"""Faults in operation: nothing is wrong without a word. Each was seen once; the service is a process of its own."""

import contextlib
import http.client
import json
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis
import servers


from fraud_pkg.features.definitions import feature_names
from fraud_pkg.model.example import EXAMPLE_CONTRACT, example_bundle
from fraud_pkg.serve.wire import EXAMPLE

PROJECT = Path(__file__).resolve().parents[1]
NAMES = feature_names(EXAMPLE_CONTRACT)


def payment(number: object, **changes) -> dict:
    return {**EXAMPLE, "transaction_id": f"t{number}", **changes}


def batch(url: str, payments: list[dict], **more) -> httpx.Response:
    return httpx.post(f"{url}/predict/batch", json={"transactions": payments, **more}, timeout=60)


def features_of(url: str, asked: dict) -> dict[str, float]:
    """What a payment is decided on, by name."""
    return dict(zip(NAMES, batch(url, [asked], features=True).json()["decisions"][0]["features"], strict=True))


def outcome(url: str, number: object) -> tuple[int, int]:
    """Of a decision, and of readiness."""
    return httpx.post(f"{url}/predict", json=payment(number)).status_code, servers.status(f"{url}/readyz")


def client_of(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


@pytest.mark.parametrize("place", ["memory", "redis"])
def test_one_time_far_ahead_costs_nobody_a_history(tmp_path, place):
    """A payment to a shop that lies 38 days ahead is within what may be; the shop's past and all labels stay."""
    example_bundle(tmp_path / "champion")
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(servers.redis(tmp_path)) if place == "redis" else "memory://"
        url, _ = stack.enter_context(servers.service(tmp_path, store__url=store))
        batch(url, [payment(i, step=2000, sender=f"C{i}", receiver="shop") for i in range(50)])

        def counts(number: object) -> dict:
            features = features_of(url, payment(number, step=2001, sender="asks", receiver="shop"))
            return {name: features[name] for name in NAMES if name.startswith("receiver_in_count")}

        before = counts("before")
        assert batch(url, [payment("ahead", step=2001 + 38 * 24, receiver="shop")]).status_code == 200
        after = counts("after")
        assert {name: value + 1 for name, value in before.items()} == after and len(before) > 3
        known = httpx.post(f"{url}/feedback", json={"labels": [{"transaction_id": "t5", "is_fraud": True}]})
        assert known.json() == {"recorded": 1, "unknown": []}
        assert httpx.post(f"{url}/predict", json=payment(5, step=2000, sender="other")).status_code == 409


def test_ready_means_that_the_next_payment_can_be_recorded(tmp_path):
    """Full, a replica, evicting: not ready, and ready again afterwards."""
    example_bundle(tmp_path / "champion")
    with servers.redis(tmp_path) as store, servers.service(tmp_path, store__url=store) as (url, _):
        client = client_of(store)
        assert outcome(url, 1) == (200, 200)
        client.config_set("maxmemory", "1")
        assert outcome(url, 2) == (503, 503)
        client.config_set("maxmemory", "0")
        assert outcome(url, 3) == (200, 200)
        client.replicaof(servers.HOST, "1")
        assert outcome(url, 4) == (503, 503)
        client.replicaof("NO", "ONE")
        assert outcome(url, 5) == (200, 200)
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert servers.status(f"{url}/readyz") == 503
        client.config_set("maxmemory-policy", "noeviction")
        assert outcome(url, 6) == (200, 200)
        log = (tmp_path / "api.log").read_text()
    assert "not ready: " in log and "maxmemory-policy = allkeys-lru: it would forget accounts one by one" in log


def said_at_start(folder: Path, module: str = "fraud_pkg.serve.server", **overrides) -> str:
    """The last line of a process that must end by itself with an error."""
    given = {"serve.port": servers.free_port(), "serve.bundle": folder / "champion", "cases.url": ""} | servers.named(
        overrides
    )
    done = subprocess.run(
        [sys.executable, "-m", module],
        env=servers.environment(given, PROJECT),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("module", ["fraud_pkg.serve.server", "fraud_pkg.stream.worker"])
def test_a_redis_that_would_lose_histories_is_refused_at_start(tmp_path, module, request):
    """One that evicts, a cluster, a Sentinel's address: each with the reason and the way."""
    overrides = {}
    if module == "fraud_pkg.stream.worker":
        overrides["stream.bootstrap_servers"] = request.getfixturevalue("broker")
    with servers.redis(tmp_path, options=["--maxmemory-policy", "allkeys-lru"]) as store:
        assert "expected noeviction" in said_at_start(tmp_path, module, store__url=store, **overrides)
    bus = str(servers.free_port())  # by default ten thousand above the port, which may be no port at all
    with servers.redis(tmp_path, options=["--cluster-enabled", "yes", "--cluster-port", bus]) as store:
        assert "expected one primary" in said_at_start(tmp_path, module, store__url=store, **overrides)
    for address in ("redis+sentinel://:secret@127.0.0.1:26379/main", "redis://:se/cret@127.0.0.1:1/0"):
        said = said_at_start(tmp_path, module, store__url=address, **overrides)
        assert "[store] url = redis" in said and "expected" in said and "cret" not in said


@pytest.fixture(scope="module")
def broker(tmp_path_factory) -> Iterator[str]:
    with servers.kafka(tmp_path_factory.mktemp("broker")) as address:
        yield address


def test_a_failover_behind_one_address_is_followed(tmp_path):
    """The primary becomes a replica and the connections stay: within 2 s decisions are recorded by the new primary, and
    nothing is counted twice.
    """
    example_bundle(tmp_path / "champion")
    (tmp_path / "b").mkdir()
    with servers.redis(tmp_path) as one, servers.redis(tmp_path / "b") as two:
        ports = [int(url.rsplit(":", 1)[1].partition("/")[0]) for url in (one, two)]
        client_of(two).replicaof(servers.HOST, str(ports[0]))
        servers.until(lambda: client_of(two).info("replication")["master_link_status"] == "up", 20)
        front = servers.Front(ports[0])
        with servers.service(tmp_path, store__url=f"redis://{servers.HOST}:{front.address}/0") as (url, _):
            taken = [n for n in range(20) if outcome(url, n) == (200, 200)]
            assert len(taken) == 20
            client_of(one).execute_command("WAIT", 1, 2000)
            client_of(two).replicaof("NO", "ONE")
            client_of(one).replicaof(servers.HOST, str(ports[1]))
            front.port = ports[1]
            moved = time.monotonic()
            servers.until(lambda: httpx.post(f"{url}/predict", json=payment(20)).status_code == 200, 2)
            assert servers.status(f"{url}/readyz") == 200 and time.monotonic() - moved < 2
            assert httpx.post(f"{url}/predict", json=payment(5)).status_code == 200  # once more
            features = features_of(url, payment("asks", step=2001))
            assert {features[f"sender_out_count_{window}"] for window in ("24h", "7d")} == {21}
        front.close()


def test_a_passing_fault_refuses_no_champion_for_good(tmp_path):
    """No file descriptors are left when a new champion comes: it is taken when there are some again."""
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path) as (url, process):
        first = httpx.get(f"{url}/model").json()["version"]
        taken = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
        with contextlib.ExitStack() as clients:
            resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (taken + 9, hard))
            address = (servers.HOST, int(url.rsplit(":", 1)[1]))
            for _ in range(20):
                clients.enter_context(socket.create_connection(address)).sendall(b"POST /predict HTTP/1.1\r\n")
            example_bundle(tmp_path / "champion", bias=-3.0)
            time.sleep(2)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        servers.until(lambda: httpx.get(f"{url}/model").json()["version"] != first, 20)


def test_a_champion_that_was_refused_is_tried_again(tmp_path):
    """A file that was cut comes whole a moment later, with the same manifest: it is taken, and both are said."""
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path) as (url, _):
        made = example_bundle(tmp_path / "new", bias=-3.0)
        whole = (tmp_path / "new/model.onnx").read_bytes()
        (tmp_path / "new/model.onnx").write_bytes(whole[: len(whole) // 2])
        for name in ("reference.parquet", "model.onnx", "manifest.json"):
            shutil.copy(tmp_path / "new" / name, tmp_path / "champion")
        servers.until(lambda: "fraud_model_retried_total 2.0" in httpx.get(f"{url}/metrics").text, 20)
        assert "fraud_model_refused_total 1.0" in httpx.get(f"{url}/metrics").text
        (tmp_path / "champion/model.onnx").write_bytes(whole)
        servers.until(lambda: httpx.get(f"{url}/model").json()["version"] == made.manifest.version, 20)
    assert (tmp_path / "api.log").read_text().count("bundle refused") == 1


def test_what_two_parsers_read_differently_is_refused(tmp_path):
    """A name that is there twice, a packed body, and headers beyond the bound that come in one piece or after the
    body.
    """
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path) as (url, _):
        twice = json.dumps(payment(1))[:-1] + ', "amount": 1000000}'
        for path, body in (
            ("predict", twice),
            ("predict/batch", '{"transactions": [' + twice + "]}"),
            ("feedback", '{"labels": [{"transaction_id": "t1", "is_fraud": true, "is_fraud": false}]}'),
        ):
            answer = httpx.post(f"{url}/{path}", content=body, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["problems"][0]["reason"]) == (422, "is there twice")
        packed = httpx.post(
            f"{url}/predict",
            content=b"\x1f\x8b",
            headers={"Content-Encoding": "gzip", "Content-Type": "application/json"},
        )
        assert (packed.status_code, packed.json()["problems"][0]["field"]) == (415, "Content-Encoding")
        body, large = json.dumps(payment(2)).encode(), b"a" * 80_000
        for request in (
            b"X-Large: %s\r\nContent-Length: 0\r\n\r\n" % large,
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\nX-Large: %s\r\n\r\n" % (len(body), body, large),
        ):
            with socket.create_connection((servers.HOST, int(url.rsplit(":", 1)[1])), timeout=5) as client:
                client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\n" + request)
                assert client.recv(100).startswith(b"HTTP/1.1 431")
        assert httpx.post(f"{url}/predict", json=payment(3)).status_code == 200


def test_an_idle_connection_outlives_the_proxy_before_it(tmp_path):
    """It stays open for `[serve] keep_alive`, and no longer."""
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path, serve__keep_alive=7) as (url, _):
        client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=12)
        for pause in (0, 5.5):
            time.sleep(pause)
            client.request("GET", "/healthz")
            assert client.getresponse().read() == b'{"status":"alive"}'
        assert client.sock.recv(1000) == b""


@pytest.mark.parametrize("place", ["memory", "redis"])
def test_a_wave_of_frauds_is_answered_and_bounded(tmp_path, place):
    """Forty clients with batches of a thousand flagged payments, and one with a single payment: the service stays under
    the pod's limit, healthy and fair; what cannot be taken is told when to come again.
    """
    example_bundle(tmp_path / "champion", bias=-0.5)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(servers.redis(tmp_path)) if place == "redis" else "memory://"
        overrides = {"store__url": store, "store__timeout": 5, "serve__max_in_work": 6_000_000}
        url, process = stack.enter_context(servers.service(tmp_path, **overrides))

        def send(client: int) -> tuple[int, str | None]:
            answer = batch(url, [payment(f"{client}-{n}", sender=f"C{client}-{n}") for n in range(1000)])
            return answer.status_code, answer.headers.get("Retry-After")

        with ThreadPoolExecutor(40) as pool:
            waiting = [pool.submit(send, client) for client in range(40)]
            slowest: dict[str, float] = {"healthz": 0, "predict": 0}
            while not all(future.done() for future in waiting):
                for name in slowest:
                    began = time.monotonic()
                    if name == "healthz":
                        assert servers.status(f"{url}/healthz") == 200
                    else:
                        assert httpx.post(f"{url}/predict", json=payment(f"one{began}"), timeout=30).status_code == 200
                    slowest[name] = max(slowest[name], time.monotonic() - began)
                time.sleep(0.05)
        answers = [future.result() for future in waiting]
        assert {status for status, _ in answers} <= {200, 429} and [status for status, _ in answers].count(200) >= 10
        assert {after for status, after in answers if status == 429} <= {"2"}
        peak = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024
        print(f"{place}: {Counter(answers)}, slowest {slowest}, at most {peak:.0f} MiB")
        assert peak < 512 and slowest["healthz"] < 1 and slowest["predict"] < 5


def test_what_a_kill_lost_is_said(tmp_path):
    """A memory store with a place is written by and by; what came after the last snapshot is gone, and the next service
    says how many payments and labels, since when, in its log and its metrics.
    """
    example_bundle(tmp_path / "champion")
    kept = tmp_path / "kept.npz"
    overrides = {"store__url": f"memory://{kept}", "store__snapshot_seconds": 2}
    with servers.service(tmp_path, **overrides) as (url, process):
        assert httpx.post(f"{url}/predict", json=payment(1)).status_code == 200
        servers.until(kept.exists, 10)
        at = kept.stat().st_mtime_ns
        servers.until(lambda: kept.stat().st_mtime_ns != at, 10)  # two seconds until the next one
        for number in (2, 3, 2):
            assert httpx.post(f"{url}/predict", json=payment(number)).status_code == 200
        label = {"labels": [{"transaction_id": "t2", "is_fraud": True}]}
        assert httpx.post(f"{url}/feedback", json=label).json()["recorded"] == 1
        process.kill()
        process.wait()
    with servers.service(tmp_path, **overrides) as (url, _):
        label = {"labels": [{"transaction_id": f"t{number}", "is_fraud": True} for number in (1, 2, 3)]}
        unknown = httpx.post(f"{url}/feedback", json=label).json()["unknown"]
        lost = figures(url)["fraud_store_lost_payments"]
        assert lost == len(unknown) and (lost, unknown) in ((0, []), (2, ["t2", "t3"])), (lost, unknown)
        log = (tmp_path / "api.log").read_text()
        assert "the service before was killed: what it recorded since 20" in log
        assert f"is lost, {lost:.0f} payments and {lost / 2:.0f} labels within" in log
    with servers.service(tmp_path, **overrides) as (url, _):
        assert figures(url)["fraud_store_lost_payments"] == 0
    assert (tmp_path / "api.log").read_text().count("was killed") == 1


def figures(url: str) -> dict[str, float]:
    """The metrics without labels, by name."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#" and "{" not in line]
    return {name: float(value) for name, value in (line.split() for line in lines)}


def test_a_full_memory_store_refuses_and_forgets_nothing(tmp_path):
    """Payments get 503 and the service is not ready; what it knows, it knows; labels are taken."""
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path, store__memory_mb=1) as (url, _):
        answers = [batch(url, [payment(f"{n}-{i}", sender=f"C{n}-{i}") for i in range(100)]) for n in range(20)]
        statuses = [answer.status_code for answer in answers]
        assert statuses == sorted(statuses) and statuses[:5] == [200] * 5 and statuses[-1] == 503
        assert outcome(url, "more") == (503, 503)
        taken = figures(url)
        assert 1e6 <= taken["fraud_store_bytes"] < 1.2e6 and taken["fraud_store_bytes_limit"] == 1e6
        label = {"labels": [{"transaction_id": "t0-0", "is_fraud": True}]}
        assert httpx.post(f"{url}/feedback", json=label).json() == {"recorded": 1, "unknown": []}
        assert httpx.post(f"{url}/predict", json=payment("0-0", sender="C0-0", amount=77.0)).status_code == 409
    assert "memory_mb = 1; expected more" in (tmp_path / "api.log").read_text()
