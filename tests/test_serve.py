"""The FastAPI twin as a process of its own: start, load, slow clients, a champion swap under load, the end."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import servers
from openapi import conforms

from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import EXAMPLE

PROJECT = Path(__file__).resolve().parents[1]


def transaction(number: int, **changes) -> dict:
    return {**EXAMPLE, "transaction_id": f"t{number}", **changes}


# How a request begins.
POST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_alive_then_ready(tmp_path):
    """The probes as a kubelet sees them; and nobody keeps a diary for its maker at home."""
    with servers.service(tmp_path, ready=False, variables={"HOME": str(tmp_path / "home")}) as (url, _):
        assert [servers.status(f"{url}/{path}") for path in ("healthz", "readyz", "model")] == [200, 503, 503]
        example_bundle(tmp_path / "champion")
        servers.until(lambda: servers.status(f"{url}/readyz") == 200)
        assert httpx.post(f"{url}/predict", json=EXAMPLE).json()["decision"] == "block"
        assert not (tmp_path / "home").exists()


async def load(url: str, seconds: float, clients: int, keep: list) -> None:
    """Clients that send one transaction after the other."""
    end, number = time.monotonic() + seconds, iter(range(10**9))
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:

        async def send() -> None:
            while time.monotonic() < end:
                answer = await client.post("/predict", json=transaction(next(number)))
                keep.append((answer.status_code, answer.json().get("model"), answer.json().get("fraud_probability")))

        await asyncio.gather(*(send() for _ in range(clients)))


def test_champion_swap_under_load(tmp_path):
    """Six swaps among four champions while sixteen clients send: every request is answered, by a version that existed,
    with that version's probability.
    """
    made = [example_bundle(tmp_path / f"made{i}", bias=-14.0 - i) for i in range(4)]
    expected = {
        bundle.manifest.version: round(float(1 / (1 + 2.718281828459045 ** -(15.205 - 14.0 - i))), 4)
        for i, bundle in enumerate(made)
    }
    example_bundle(tmp_path / "champion", bias=-14.0)
    answers: list = []
    with servers.service(tmp_path) as (url, _):

        async def swapping() -> None:
            for i in (1, 2, 3, 0, 1, 2):
                await asyncio.sleep(0.7)
                await asyncio.to_thread(example_bundle, tmp_path / "champion", bias=-14.0 - i)

        async def both() -> None:
            await asyncio.gather(load(url, 5.5, 16, answers), swapping())

        asyncio.run(both())
    assert Counter(status for status, _, _ in answers).keys() == {200}
    assert {version for _, version, _ in answers} == expected.keys()
    assert all(abs(probability - expected[version]) < 1e-3 for _, version, probability in answers)


def test_flipped_byte_is_refused(tmp_path):
    good = example_bundle(tmp_path / "champion").manifest.version
    with servers.service(tmp_path) as (url, _):
        model = tmp_path / "champion/model.onnx"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
        (tmp_path / "champion/manifest.json").touch()
        servers.until(lambda: "fraud_model_refused_total 1.0" in httpx.get(f"{url}/metrics").text)
        assert (
            httpx.get(f"{url}/model").json()["version"] == good
            and httpx.post(f"{url}/predict", json=EXAMPLE).status_code == 200
        )
    assert "its hash does not match" in (tmp_path / "api.log").read_text()


def test_slow_and_rude_clients(tmp_path):
    """A client that never ends its headers, one that never ends its body, one that goes away, and a body of 10 MB: none
    of them keeps others from being answered.
    """
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path, serve__timeout=1) as (url, _):
        address = (servers.HOST, int(url.rsplit(":", 1)[1]))
        with (
            socket.create_connection(address) as headers,
            socket.create_connection(address) as body,
            socket.create_connection(address) as idle,
        ):
            headers.sendall(POST + b"X-Slow: ")
            body.sendall(POST + b"Content-Length: 500\r\n\r\n{")
            assert httpx.post(f"{url}/predict", json=EXAMPLE).status_code == 200
            for connection in (headers, body, idle):
                connection.settimeout(8)
            assert body.recv(4096).startswith(b"HTTP/1.1 408")
            assert headers.recv(4096) == b"" and idle.recv(4096) == b""  # closed
        with socket.create_connection(address) as gone:
            gone.sendall(POST + b"Content-Length: 500\r\n\r\n{")
        large = httpx.post(f"{url}/predict", content=b" " * 10_000_000, headers={"Content-Type": "application/json"})
        assert (large.status_code, large.json()["problems"][0]["field"]) == (413, "body")
        unannounced = httpx.post(
            f"{url}/predict", content=(b" " * 100_000 for _ in range(100)), headers={"Content-Type": "application/json"}
        )
        assert unannounced.status_code == 413
        many = httpx.post(
            f"{url}/predict/batch", json={"transactions": [transaction(i) for i in range(100_000)]}, timeout=30
        )
        assert many.status_code == 413
        assert httpx.post(f"{url}/predict", json=transaction(1)).status_code == 200


def test_keys(tmp_path):
    example_bundle(tmp_path / "champion")
    (tmp_path / "keys").write_text("shop:0123456789abcdef\n")
    with servers.service(tmp_path, variables={"FRAUD_API_KEYS_FILE": str(tmp_path / "keys")}) as (url, _):

        def ask(**headers: str) -> tuple[int, str]:
            answer = httpx.post(f"{url}/predict", json=EXAMPLE, headers=headers)
            return answer.status_code, answer.json().get("problems", [{}])[0].get("reason")

        assert ask() == (401, "missing") == ask(Authorization="0123456789abcdef")
        assert ask(**{"X-API-Key": "0123456789abcdeF"}) == (401, "unknown")
        assert ask(**{"X-API-Key": "0123456789abcdef"}) == (200, None)


@pytest.mark.parametrize("policy", ["fail", "degrade"])
def test_store_away(tmp_path, policy):
    """Redis goes and comes back; in between the answer is 503, or one that says that it does without."""
    example_bundle(tmp_path / "champion")
    port = servers.free_port()
    with (
        servers.redis(tmp_path, port) as redis_url,
        servers.service(tmp_path, store__url=redis_url, store__timeout=0.3, serve__on_store_error=policy) as (url, _),
    ):
        assert httpx.post(f"{url}/predict", json=transaction(1)).json()["history"] is True
        subprocess.run(["redis-cli", "-p", str(port), "shutdown", "nosave"], check=False)
        away = httpx.post(f"{url}/predict", json=transaction(2))
        metrics = httpx.get(f"{url}/metrics").text
        assert "fraud_store_errors_total 1.0" in metrics
        if policy == "fail":
            assert (away.status_code, away.json()["problems"][0]["field"]) == (503, "store")
        else:
            assert (away.status_code, away.json()["history"]) == (
                200,
                False,
            ) and "fraud_degraded_decisions_total 1.0" in metrics
        assert servers.status(f"{url}/healthz") == 200 and servers.status(f"{url}/readyz") == 503
        with servers.redis(tmp_path, port):
            back = httpx.post(f"{url}/predict", json=transaction(3))
            assert (back.status_code, back.json()["history"]) == (200, True)


def test_stop_finishes_what_is_in_flight(tmp_path):
    """SIGTERM while half of a request has arrived: it is answered, and the process ends with 0."""
    example_bundle(tmp_path / "champion")
    with servers.service(tmp_path) as (url, process):
        content = json.dumps(EXAMPLE).encode()
        with socket.create_connection((servers.HOST, int(url.rsplit(":", 1)[1]))) as half:
            half.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(content) + content[:20])
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            half.sendall(content[20:])
            half.settimeout(5)
            assert half.recv(4096).startswith(b"HTTP/1.1 200")
        assert process.wait(10) == 0


def test_does_what_its_document_says(tmp_path):
    example_bundle(tmp_path / "champion")
    key = "0123456789abcdef"
    with servers.service(tmp_path, variables={"FRAUD_API_KEYS": f"anna@write:{key}"}) as (url, _):
        conforms(f"{url}/openapi.json", url, key)


def test_hung_store_keeps_no_probe_waiting(tmp_path):
    """Redis is there and says nothing, and decisions pile up: the process is alive, and says what it counts."""
    example_bundle(tmp_path / "champion")
    port = servers.free_port()
    with (
        servers.redis(tmp_path, port) as redis_url,
        servers.service(tmp_path, store__url=redis_url, store__timeout=0.5) as (url, _),
    ):
        pid = int(
            next(
                line
                for line in subprocess.run(
                    ["redis-cli", "-p", str(port), "info", "server"], capture_output=True, text=True
                ).stdout.splitlines()
                if line.startswith("process_id")
            ).split(":")[1]
        )
        os.kill(pid, signal.SIGSTOP)
        try:

            async def probe() -> list[float]:
                async with httpx.AsyncClient(
                    base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)
                ) as client:
                    waiting = [asyncio.create_task(client.post("/predict", json=transaction(i))) for i in range(200)]
                    await asyncio.sleep(0.5)
                    spent = []
                    for path in ("/healthz", "/metrics", "/model"):
                        began = time.monotonic()
                        assert (await client.get(path)).status_code == 200
                        spent.append(time.monotonic() - began)
                    assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {503}
                    return spent

            assert max(asyncio.run(probe())) < 1.5
        finally:
            os.kill(pid, signal.SIGCONT)


def test_endless_headers(tmp_path):
    """They are refused after 64 kB, not kept."""
    example_bundle(tmp_path / "champion")
    with (
        servers.service(tmp_path) as (url, _),
        socket.create_connection((servers.HOST, int(url.rsplit(":", 1)[1]))) as endless,
    ):
        endless.settimeout(5)
        endless.sendall(POST + b"")
        with contextlib.suppress(ConnectionError):
            for i in range(200):
                endless.sendall(b"X-%d: %s\r\n" % (i, b"a" * 1000))
        with contextlib.suppress(ConnectionError):
            assert endless.recv(100).startswith(b"HTTP/1.1 431")
        assert httpx.post(f"{url}/predict", json=transaction(1)).status_code == 200


def test_moments_at_the_end_of_the_calendar(tmp_path):
    """A model that knows dates: a moment that no clock can reach is a 422 that names the field."""
    example_bundle(tmp_path / "champion", epoch="2026-01-05T00:00")
    with servers.service(tmp_path) as (url, _):
        for moment in ("9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+12:00", "1767607200"):
            answer = httpx.post(f"{url}/predict", json={**EXAMPLE, "step": None, "timestamp": moment})
            assert (answer.status_code, answer.json()["problems"][0]["field"]) == (422, "timestamp")
        conforms(f"{url}/openapi.json", url, "none")


def test_a_time_far_ahead_erases_nobody(tmp_path):
    """A unix time in `step`, say: it is refused, and the store still knows everybody."""
    example_bundle(tmp_path / "champion")
    with servers.redis(tmp_path) as redis_url:
        for place in (redis_url, "memory://"):
            with servers.service(tmp_path, store__url=place) as (url, _):
                assert httpx.post(f"{url}/predict", json=transaction(1)).status_code == 200
                far = httpx.post(f"{url}/predict", json=transaction(2, step=9_000_000))
                assert (far.status_code, far.json()["problems"][0]["field"]) == (422, "time")
                assert httpx.post(
                    f"{url}/feedback", json={"labels": [{"transaction_id": "t1", "is_fraud": True}]}
                ).json() == {"recorded": 1, "unknown": []}


def test_a_snapshot_that_cannot_be_written_is_no_good_end(tmp_path):
    """Whoever stops the service learns that its memory was not kept."""
    example_bundle(tmp_path / "champion")
    (tmp_path / "store").mkdir()
    with servers.service(tmp_path, store__url=f"memory://{tmp_path}/store/kept.npz") as (url, process):
        assert httpx.post(f"{url}/predict", json=EXAMPLE).status_code == 200
        shutil.rmtree(tmp_path / "store")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
    assert "the snapshot was not written" in (tmp_path / "api.log").read_text()
