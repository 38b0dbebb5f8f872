"""Real servers on loopback, each on a free port, each ended by the one that started it."""

import base64
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg
import pytest

HOST = "127.0.0.1"
PROJECT = Path(__file__).resolve().parents[1]


def named(overrides: Mapping[str, object]) -> dict[str, object]:
    """Settings by section.key, from keyword arguments with __ for the dot."""
    return {key.replace("__", "."): value for key, value in overrides.items()}


def environment(settings: Mapping[str, object], root: Path | None = None, **variables: str) -> dict[str, str]:
    """This environment with these settings and none of its own; `root` is the project's folder, if it is not found."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
    environ["FRAUD_SERVE_FILL"] = "no"  # a test that wants it says so
    environ["FRAUD_SET"] = json.dumps({key: str(value) for key, value in settings.items()})
    environ["PYTHONPATH"] = str(PROJECT)
    return environ | ({"FRAUD_ROOT": str(root)} if root else {}) | variables


PATIENCE = 3  # a machine that tests four things at once, and is not ours alone, may take so many times as long


def until(holds: Callable[[], object], seconds: float = 10, what: object = "", pause: float = 0.05) -> None:
    """Waits until it holds; fails after `PATIENCE` times `seconds`. `what` may be a function that says what is
    missing.
    """
    end = time.monotonic() + PATIENCE * seconds
    while not holds():
        assert time.monotonic() < end, f"not in {PATIENCE * seconds:g} s: {what() if callable(what) else what}"
        time.sleep(pause)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


def program(name: str, package: str) -> str:
    """Where a server's program is; without it the test is skipped, or fails where CI says that nothing may be
    skipped.
    """
    if found := shutil.which(name):
        return found
    message = f"{name} is not installed: sudo apt-get install {package}"
    raise (pytest.fail if os.environ.get("CI") == "true" else pytest.skip).Exception(message)


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


def fetch(url: str, **headers: str) -> str:
    """The body of a GET."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as response:
        return response.read().decode()


@contextlib.contextmanager
def running(
    command: list[str], ready: Callable[[], bool], log: Path, seconds: float = 30, **more
) -> Iterator[subprocess.Popen]:
    """Starts a server, waits until it is ready, and stops it afterwards; what it said is in `log`."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **more)
    try:
        end = time.monotonic() + PATIENCE * seconds
        while not ready():
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, (
                f"{command[0]} was not ready after {PATIENCE * seconds:g} s:\n{log.read_text()[-3000:]}"
            )
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE * 15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def service(
    folder: Path, ready: bool = True, variables: Mapping[str, str] | None = None, port: int | None = None, **overrides
) -> Iterator[tuple[str, subprocess.Popen]]:
    """`python -m fraud_pkg.serve.server`; yields its URL and its process. Without `ready` it need only be alive."""
    port = port or free_port()
    url = f"http://{HOST}:{port}"
    given = {"serve.port": port, "serve.bundle": folder / "champion", "serve.reload_seconds": 0.2}
    given |= {"cases.url": ""} | named(overrides)  # a test that wants cases names a place for them
    with running(
        [sys.executable, "-m", "fraud_pkg.serve.server"],
        lambda: status(f"{url}/{'readyz' if ready else 'healthz'}") == 200,
        folder / "api.log",
        env=environment(given, PROJECT, **(variables or {})),
    ) as process:
        yield url, process


@contextlib.contextmanager
def redis(folder: Path, port: int | None = None, options: Sequence[str] = ()) -> Iterator[str]:
    """A Redis server; yields its URL."""
    port = port or free_port()
    command = [
        program("redis-server", "redis-server"),
        "--port",
        str(port),
        "--bind",
        HOST,
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(folder),
        *options,
    ]
    with running(command, answers(port), folder / "redis.log"):
        yield f"redis://{HOST}:{port}/0"


class Front:
    """One address before several servers: new connections go where `port` says, old ones stay where they are."""

    def __init__(self, port: int):
        self.port = port
        self._listener = socket.create_server((HOST, 0))
        self.address = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self.port))
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def pushgateway(folder: Path) -> Iterator[str]:
    """A Prometheus Pushgateway; yields its URL."""
    port = free_port()
    with running(
        [program("prometheus-pushgateway", "prometheus-pushgateway"), f"--web.listen-address={HOST}:{port}"],
        answers(port),
        folder / "pushgateway.log",
    ):
        yield f"http://{HOST}:{port}"


AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[dict[str, str]]:
    """AWS on loopback; yields the environment that leads there."""
    port = free_port()
    with running(
        [sys.executable, str(Path(__file__).with_name("moto_aws.py")), "-H", HOST, "-p", str(port)],
        answers(port),
        folder / "moto.log",
    ):
        yield AWS | {"AWS_ENDPOINT_URL": f"http://{HOST}:{port}"}


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL server that keeps its data below `folder`; yields a database's URL for SQLAlchemy. It refuses to run
    as root, so root lends it to the user of the Debian package.
    """
    newest = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), default=Path())
    initdb = program(str(newest / "initdb") if newest.name else "initdb", "postgresql")
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    port, home = free_port(), Path(tempfile.mkdtemp(prefix="postgres"))  # pytest's folders are closed to other users
    if as_user:
        shutil.chown(home, "postgres", "postgres")
    try:
        done = subprocess.run(
            [
                *as_user,
                initdb,
                "-D",
                str(home / "data"),
                "-U",
                "fraud",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-locale",
                "--no-sync",
            ],
            cwd=home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        command = [
            *as_user,
            str(Path(initdb).with_name("postgres")),
            "-D",
            str(home / "data"),
            "-h",
            HOST,
            "-p",
            str(port),
            "-k",
            "",
            "-F",
        ]
        with running(command, _takes_queries(port), folder / "postgres.log", cwd=home):
            yield f"postgresql+psycopg://fraud@{HOST}:{port}/postgres"
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _takes_queries(port: int) -> Callable[[], bool]:
    """Whether PostgreSQL takes queries: it listens before it does, and refuses until it has started up."""

    def check() -> bool:
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(host=HOST, port=port, user="fraud", dbname="postgres", connect_timeout=2) as connection,
        ):
            return connection.execute("SELECT 1").fetchone() == (1,)
        return False

    return check


@contextlib.contextmanager
def mlflow(
    folder: Path, database: str, artifacts: str, environ: dict[str, str], port: int | None = None
) -> Iterator[str]:
    """An MLflow server that hands artifacts through to `artifacts`; yields its URL. All of its processes end with it,
    and at once: a test takes it away in the middle of something.
    """
    port = port or free_port()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        HOST,
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        database,
        "--artifacts-destination",
        artifacts,
    ]
    url, environ = (
        f"http://{HOST}:{port}",
        os.environ
        | environ
        | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    with running(
        command,
        lambda: status(f"{url}/health") == 200,
        folder / "mlflow.log",
        seconds=90,
        env=environ,
        start_new_session=True,
    ) as server:
        try:
            yield url
        finally:
            os.killpg(server.pid, signal.SIGKILL)


KAFKA = """
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
controller.quorum.bootstrap.servers={host}:{controller}
log.dirs={data}
num.network.threads=2
num.io.threads=2
auto.create.topics.enable=false
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=100
group.min.session.timeout.ms=500
"""


@functools.cache
def kafka_classpath() -> str:
    """The broker's jars, fetched by Maven into its own store."""
    pom, found = Path(__file__).parent / "servers/kafka/pom.xml", Path(tempfile.mkdtemp()) / "classpath"
    done = subprocess.run(
        [
            program("mvn", "maven"),
            "-q",
            "-B",
            "-f",
            str(pom),
            "dependency:build-classpath",
            f"-Dmdep.outputFile={found}",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"maven: {done.stdout[-3000:]}{done.stderr[-1000:]}"
    return found.read_text()


@contextlib.contextmanager
def kafka(
    folder: Path, port: int | None = None, java: Sequence[str] = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
) -> Iterator[str]:
    """An Apache Kafka broker (KRaft) that keeps its data in `folder`: started there again it goes on. `java` are
    options for a short life. Yields its address.
    """
    port, data = port or free_port(), folder / "kafka"
    command = [program("java", "openjdk-17-jre-headless"), "-Xms256m", "-Xmx512m", *java, "-cp", kafka_classpath()]
    configuration = folder / "kafka.properties"
    configuration.write_text(KAFKA.format(host=HOST, port=port, controller=free_port(), data=data))
    if not data.exists():
        cluster = (
            base64.urlsafe_b64encode(b"f" + os.urandom(15)).decode().rstrip("=")
        )  # never begins with a dash, which would be an option
        done = subprocess.run(
            [*command, "kafka.tools.StorageTool", "format", "--standalone", "-t", cluster, "-c", str(configuration)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"kafka: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    with running([*command, "kafka.Kafka", str(configuration)], answers(port), folder / "kafka.log", seconds=180):
        yield f"{HOST}:{port}"


@contextlib.contextmanager
def configured(
    folder: Path, command: str, name: str, configuration: str, *options: str, ready: int = 200
) -> Iterator[str]:
    """A server of the Prometheus family, from the Debian package `command`, with its configuration in `folder`; yields
    its URL once it answers with the status `ready`.
    """
    port, file = free_port(), folder / f"{name}.yml"
    file.write_text(configuration)
    url = f"http://{HOST}:{port}"
    with running(
        [program(command, command), f"--config.file={file}", f"--web.listen-address={HOST}:{port}", *options],
        lambda: status(f"{url}/-/ready") == ready,
        folder / f"{name}.log",
    ):
        yield url


def prometheus(folder: Path, configuration: str) -> contextlib.AbstractContextManager[str]:
    """A Prometheus with this configuration; yields its URL."""
    return configured(
        folder,
        "prometheus",
        "prometheus",
        configuration,
        f"--storage.tsdb.path={folder / 'prometheus'}",
        "--log.level=warn",
    )


def alertmanager(folder: Path, configuration: str, web: str) -> contextlib.AbstractContextManager[str]:
    """An Alertmanager with this configuration, which asks for the accounts of `web`; yields its URL."""
    (folder / "web.yml").write_text(web)
    return configured(
        folder,
        "prometheus-alertmanager",
        "alertmanager",
        configuration,
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.config.file={folder / 'web.yml'}",
        "--cluster.listen-address=",
        ready=401,
    )


@dataclass
class SparkCluster:
    """A standalone master with its workers, each a process of its own."""

    folder: Path
    url: str
    state: str
    workers: list[subprocess.Popen] = field(default_factory=list)

    def look(self) -> dict:
        """What the master says of itself."""
        return json.loads(fetch(self.state))

    def log(self, worker: int) -> str:
        """What the executors of a worker have said so far."""
        return "".join(
            file.read_text(errors="replace")
            for file in sorted((self.folder / f"worker-{worker}").glob("app-*/*/stderr"))
        )

    def finished(self) -> set[str]:
        """The applications that are over."""
        return {application["id"] for application in self.look()["completedapps"]}

    def kill(self, worker: int) -> None:
        """Ends a worker and its executors as a power cut would."""
        of_it = psutil.Process(self.workers[worker].pid)
        for process in [*of_it.children(recursive=True), of_it]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.workers[worker].wait(15)


@contextlib.contextmanager
def spark_cluster(folder: Path, workers: int = 2, memory: str = "1g") -> Iterator[SparkCluster]:
    """A master and workers of one core each, from the installed pyspark."""
    import pyspark

    program("java", "openjdk-17-jre-headless")
    home, port, ui = Path(pyspark.__file__).parent, free_port(), free_port()
    # Workers run elsewhere and know nothing of this project: neither where it is nor what its settings are.
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("FRAUD_") and name != "PYTHONPATH"
    }
    environ |= {
        "SPARK_HOME": str(home),
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_LOCAL_IP": HOST,
        "SPARK_LOG_DIR": str(folder),
    }
    cluster = SparkCluster(folder, f"spark://{HOST}:{port}", f"http://{HOST}:{ui}/json/")

    def command(what: str, *options: str) -> list[str]:
        return [str(home / "bin/spark-class"), f"org.apache.spark.deploy.{what}", "--host", HOST, *options]

    with contextlib.ExitStack() as stack:
        stack.enter_context(
            running(
                command("master.Master", "--port", str(port), "--webui-port", str(ui)),
                lambda: status(cluster.state) == 200,
                folder / "master.log",
                60,
                cwd=folder,
                env=environ,
            )
        )
        for number in range(workers):
            given = command(
                "worker.Worker",
                "--cores",
                "1",
                "--memory",
                memory,
                "--webui-port",
                "0",
                "--work-dir",
                str(folder / f"worker-{number}"),
                cluster.url,
            )
            cluster.workers.append(
                stack.enter_context(
                    running(given, lambda: True, folder / f"worker-{number}.log", 60, cwd=folder, env=environ)
                )
            )
        end = time.monotonic() + 60
        while cluster.look()["aliveworkers"] < workers:
            assert time.monotonic() < end, (folder / "worker-0.log").read_text()[-3000:]
            time.sleep(0.1)
        yield cluster
