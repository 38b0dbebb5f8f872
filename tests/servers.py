"""Real servers on loopback, each on a free port, each ended by the one that started it."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HOST = "127.0.0.1"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


def program(name: str, package: str) -> str:
    """Where a server's program is; without it the test is skipped, or fails where CI says that nothing may be skipped."""
    if found := shutil.which(name):
        return found
    message = f"{name} is not installed: sudo apt-get install {package}"
    pytest.fail(message) if os.environ.get("CI") == "true" else pytest.skip(message)


def answers(port: int) -> Callable[[], bool]:
    """Whether something takes connections."""
    def check() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return True
        return False
    return check


def status(url: str, **headers: str) -> int:
    """The HTTP status of a GET, 0 when nothing answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def running(command: list[str], ready: Callable[[], bool], log: Path, seconds: float = 30, **more) -> Iterator[subprocess.Popen]:
    """Starts a server, waits until it is ready, and stops it afterwards; what it said is in `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **more)
    try:
        end = time.monotonic() + seconds
        while not ready():
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"{command[0]} was not ready after {seconds} s:\n{log.read_text()[-3000:]}"
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def redis(folder: Path, port: int | None = None) -> Iterator[str]:
    """A Redis server; yields its URL."""
    port = port or free_port()
    command = [program("redis-server", "redis-server"), "--port", str(port), "--bind", HOST, "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with running(command, answers(port), folder / "redis.log"):
        yield f"redis://{HOST}:{port}/0"


AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "eu-central-1", "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[dict[str, str]]:
    """AWS on loopback; yields the environment that leads there."""
    port = free_port()
    with running([sys.executable, str(Path(__file__).with_name("moto_aws.py")), "-H", HOST, "-p", str(port)], answers(port), folder / "moto.log"):
        yield AWS | {"AWS_ENDPOINT_URL": f"http://{HOST}:{port}"}
