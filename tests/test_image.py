"""The serving image, built with buildah and started as the Deployment for Minikube declares it: command, user,
read-only root file system, environment, mounts.

The test asks what the kubelet asks. Two things are not as in a cluster: the pod shares this machine's network, so
its port is one that is free here, and no cgroup limits it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import servers
import yaml
from sqlalchemy.engine import make_url

from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.core.settings import load_settings
from fraud_pkg.stream.health import Health, StreamMetrics
from fraud_pkg.stream.kafka import client_options
from fraud_pkg.stream.worker import LAST_WAIT

PROJECT = Path(__file__).resolve().parents[1]
STAND_IN = "localhost/fraud-test/python:3.11-slim-bookworm"
TRUSTED = "/etc/ssl/certs/ca-certificates.crt"
KEY = "0123456789abcdef"


# Building


def base_image() -> str:
    """FRAUD_TEST_BASE_IMAGE, such as docker.io/library/python:3.11-slim-bookworm; without it a stand-in that needs no
    image registry.
    """
    if given := os.environ.get("FRAUD_TEST_BASE_IMAGE"):
        return given
    if subprocess.run(
        [servers.program("buildah", "buildah"), "inspect", "--type", "image", STAND_IN], capture_output=True
    ).returncode:
        servers.program("debootstrap", "debootstrap")
        done = subprocess.run(
            ["bash", str(PROJECT / "tests/base_image.sh"), STAND_IN], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, done.stderr[-2000:]
    return STAND_IN


def build(name: str, dockerfile: str, *options: str, context: Path = PROJECT) -> str:
    """Builds an image as `make image` does without Docker; also here, where a build may neither make namespaces of its
    own nor trust other certificates than this machine's.
    """
    command = [
        servers.program("buildah", "buildah"),
        "build",
        "--format",
        "docker",
        "--layers",
        "--isolation",
        "chroot",
        "--network",
        "host",
        "--volume",
        f"{TRUSTED}:{TRUSTED}:ro",
        "--build-arg",
        f"PYTHON_IMAGE={base_image()}",
        "--build-arg",
        "VERSION=test",
        "--tag",
        name,
        "--file",
        dockerfile,
        *options,
        ".",
    ]
    done = subprocess.run(command, cwd=context, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return name


@pytest.fixture(scope="module")
def image() -> str:
    return build("localhost/fraud-test/api", "Dockerfile")


def inspect(image: str) -> dict:
    return json.loads(
        subprocess.run(
            [servers.program("podman", "podman"), "image", "inspect", image], capture_output=True, text=True, check=True
        ).stdout
    )[0]


# Running


def podman(*arguments: str) -> list[str]:
    """A podman command. Where cgroups 1 and 2 are mixed the runtime refuses to start anything; in a mount namespace of
    its own it sees only the first kind.
    """
    command = [servers.program("podman", "podman"), "--runtime", servers.program("crun", "crun"), *arguments]
    mixed = Path("/sys/fs/cgroup/unified")
    return (
        ["unshare", "--mount", "sh", "-c", f'umount {mixed} && exec "$@"', "sh", *command]
        if mixed.is_mount()
        else command
    )


def podman_run(*arguments: str) -> list[str]:
    """A `podman run` command. Its own limits may be above what this machine grants, and its health checks want
    systemd.
    """
    return podman(
        "run",
        "--rm",
        "--cgroups=disabled",
        "--network=host",
        "--no-healthcheck",
        "--ulimit=nofile=4096:4096",
        "--ulimit=nproc=4096:4096",
        *arguments,
    )


def output(*command: str, timeout: float = 60) -> tuple[int, str]:
    """Exit status of a command, and what it said."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    return done.returncode, done.stdout


# The pod


def manifests() -> list[dict]:
    """What Minikube gets."""
    kubectl = servers.program("kubectl", "kubernetes-client")
    return list(
        yaml.safe_load_all(
            subprocess.run(
                [kubectl, "kustomize", str(PROJECT / "k8s/overlays/minikube")],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    )


def of(objects: list[dict], kind: str, name: str) -> dict:
    return next(o for o in objects if (o["kind"], o["metadata"]["name"]) == (kind, name))


@dataclass
class Pod:
    """A Deployment's pod, as a container runtime is told to start it."""

    objects: list[dict]
    secrets: dict[str, dict[str, str]]  # what the manifests only refer to
    folder: Path  # for what is mounted
    port: int  # in place of the declared one

    @property
    def url(self) -> str:
        return f"http://{servers.HOST}:{self.port}"

    def __post_init__(self) -> None:
        self.spec = of(self.objects, "Deployment", "fraud-api")["spec"]["template"]["spec"]
        self.container = next(c for c in self.spec["containers"] if c["name"] == "fraud")
        self.models = self.folder / "models"
        self.models.mkdir()

    def files(self, volume: dict) -> Path:
        """A folder with the content of a ConfigMap or a Secret, readable by whom the manifest says."""
        source = volume.get("configMap") or volume["secret"]
        content = (
            of(self.objects, "ConfigMap", source["name"])["data"]
            if "configMap" in volume
            else self.secrets[source["secretName"]]
        )
        place = self.folder / volume["name"]
        place.mkdir()
        for name, text in content.items():
            (place / name).write_text(text, encoding="utf-8")
            if os.geteuid() == 0:
                os.chown(place / name, 0, self.spec["securityContext"]["fsGroup"])
                (place / name).chmod(source.get("defaultMode", 0o644))
        return place

    def mount(self, mount: dict) -> str:
        volume = next(v for v in self.spec["volumes"] if v["name"] == mount["name"])
        if "emptyDir" in volume:
            size = volume["emptyDir"]["sizeLimit"].removesuffix("i").lower()
            return f"--tmpfs={mount['mountPath']}:mode=1777,size={size}"
        place = self.models if "persistentVolumeClaim" in volume else self.files(volume)
        return f"--volume={place}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}"

    def environ(self) -> dict[str, str]:
        references = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in self.container["env"] if "valueFrom" in e}
        given = {
            name: self.secrets[ref["name"]][ref["key"]]
            for name, ref in references.items()
            if ref["name"] in self.secrets or not ref.get("optional")
        }
        declared = {e["name"]: e["value"] for e in self.container["env"] if "value" in e} | given
        port = next(p["containerPort"] for p in self.container["ports"] if p["name"] == "http")
        assert declared["FRAUD_SERVE_PORT"] == str(port)  # the port that the Service and the probes mean
        return declared | {"FRAUD_SERVE_PORT": str(self.port)}

    def command(self, name: str, image: str) -> list[str]:
        security = self.spec["securityContext"] | self.container["securityContext"]
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}  # podman's default too
        flags = [
            f"--user={security['runAsUser']}:{security['runAsGroup']}",
            f"--group-add={security['fsGroup']}",
            *(f"--cap-drop={c}" for c in security["capabilities"]["drop"]),
        ]
        if not security["allowPrivilegeEscalation"]:
            flags.append("--security-opt=no-new-privileges")
        if security["readOnlyRootFilesystem"]:
            flags += ["--read-only", "--read-only-tmpfs=false"]
        flags += [self.mount(m) for m in self.container["volumeMounts"]] + [
            f"--env={key}={value}" for key, value in self.environ().items()
        ]
        return podman_run(
            f"--name={name}",
            *flags,
            f"--entrypoint={json.dumps(self.container['command'])}",
            image,
            *self.container.get("args", ()),
        )

    def probe(self, kind: str) -> bool:
        """Whether a probe succeeds now, as the kubelet sends it."""
        declared = self.container[f"{kind}Probe"]
        assert declared["httpGet"]["port"] == "http"
        with contextlib.suppress(httpx.HTTPError):
            return (
                httpx.get(
                    f"{self.url}{declared['httpGet']['path']}", timeout=declared.get("timeoutSeconds", 1)
                ).status_code
                < 400
            )
        return False


@contextlib.contextmanager
def started(pod: Pod, image: str) -> Iterator[tuple[subprocess.Popen, Callable[..., tuple[int, str]]]]:
    """A pod that its startup probe has found started; yields its process and a way to run commands in it."""
    name, budget = (
        f"fraud-test-{os.getpid()}",
        pod.container["startupProbe"]["failureThreshold"] * pod.container["startupProbe"].get("periodSeconds", 10),
    )
    try:
        with servers.running(
            pod.command(name, image), lambda: pod.probe("startup"), pod.folder / "pod.log", seconds=budget
        ) as process:
            yield process, lambda *command: output(*podman("exec", name, *command))
    finally:
        subprocess.run(podman("rm", "--force", "--ignore", name), capture_output=True)


WRITING = """
import pathlib
for place in ("/", "/app", "/app/fraud_pkg", "/etc/fraud", "/run/secrets/fraud", "/models", "/models/champion",
"/var/tmp", "/tmp"):
    try:
        (pathlib.Path(place) / "written").write_text("x")
        print(place)
    except OSError:
        pass
"""


def test_life_of_a_pod(image, tmp_path):
    """Started, not ready without a bundle, ready with one, alive under load, unable to write, ended by SIGTERM."""
    with servers.redis(tmp_path) as store:
        pod = Pod(
            manifests(),
            {"fraud-api-keys": {"api-keys": f"shop:{KEY}\n"}, "fraud-store": {"url": store, "password": ""}},
            tmp_path,
            servers.free_port(),
        )
        with (
            started(pod, image) as (process, inside),
            httpx.Client(base_url=pod.url, headers={"X-API-Key": KEY}, timeout=10) as client,
        ):
            assert pod.probe("liveness") and not pod.probe("readiness")
            example_bundle(pod.models / "champion")
            servers.until(lambda: pod.probe("readiness"))
            assert httpx.post(f"{pod.url}/predict", json=EXAMPLE).status_code == 401
            answer = client.post("/predict", json=EXAMPLE).json()
            assert (answer["decision"], answer["history"]) == ("block", True)

            with ThreadPoolExecutor(8) as clients:
                sent = [
                    clients.submit(
                        lambda i: client.post("/predict", json={**EXAMPLE, "transaction_id": f"t{i}"}).status_code, i
                    )
                    for i in range(1000)
                ]
                while not all(request.done() for request in sent):
                    assert pod.probe("liveness") and pod.probe("readiness")
                    time.sleep(0.2)
            assert {request.result() for request in sent} == {200}

            assert inside("python", "-c", WRITING) == (0, "/tmp\n")
            _, status = inside("cat", "/proc/1/status")
            facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert facts["Uid"].split()[0] == facts["Gid"].split()[0] == "10001"
            assert (int(facts["CapEff"], 16), int(facts["CapBnd"], 16), facts["NoNewPrivs"], facts["Seccomp"]) == (
                0,
                0,
                "1",
                "2",
            )
            peak = int(facts["VmHWM"].split()[0]) / 1024
            assert peak < float(pod.container["resources"]["limits"]["memory"].removesuffix("Mi")), f"{peak:.0f} MiB"

            check = inspect(image)["Healthcheck"]["Test"]
            assert check[0] == "CMD" and inside(*check[1:])[0] == 0  # Docker's own probe

            process.send_signal(signal.SIGTERM)
            assert process.wait(pod.spec["terminationGracePeriodSeconds"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "pod.log").read_text().splitlines()]  # every line is JSON
    assert any(line["message"].startswith("champion ") for line in lines)


def test_image_as_docker_sees_it(image):
    """User, command, health check, labels, and a size that shows when something large slips in."""
    facts = inspect(image)
    assert (
        facts["User"] == "10001:10001"
        and facts["Config"]["Cmd"] == ["python", "-m", "fraud_pkg.serve.server"]
        and not facts["Config"].get("Entrypoint")
    )
    assert (
        facts["Healthcheck"]["Test"][0] == "CMD"
        and facts["Config"]["Labels"]["org.opencontainers.image.version"] == "test"
    )
    own = facts["Size"] - inspect(base_image())["Size"]
    print(f"{facts['Size'] / 1e6:.0f} MB, {own / 1e6:.0f} MB of it above the base image")
    # 42 MB are zstandard, fastavro and lz4 (topics may be compressed with anything), 49 SQLAlchemy, Alembic and the
    # driver of PostgreSQL, 27 cel with the command line in its package, 17 cryptography.
    assert own < 345e6


SEARCH = """
for tool in pip pip3 uv gcc cc make ld git; do command -v $tool; done
find / -xdev -type f -perm /6000
find / -xdev -type d \\( -name pip -o -name ensurepip -o -name setuptools \\)
find /app -perm /022 ! -type l
exit 0
"""


def test_nothing_in_it_installs_compiles_or_changes_user(image):
    assert output(*podman_run("--user=0", image, "sh", "-c", SEARCH)) == (0, "")


def test_what_was_trimmed_is_not_missed(image):
    """Every library loads, and every AWS service that is called."""
    script = (
        "import boto3, hiredis, kafka, redis, uvloop\n"
        "for name in ('s3', 'dynamodb', 'ssm', 'sts'): boto3.client(name, region_name='eu-central-1')\n"
        "print('all there')"
    )
    assert output(*podman_run("--read-only", image, "python", "-c", script)) == (0, "all there\n")


def test_without_keys_it_does_not_start(image):
    code, said = output(*podman_run("--read-only", image))
    *log, error, _ = said.split("\n")
    assert code == 1 and error.startswith("error: expected API keys") and "Traceback" not in said
    assert all(json.loads(line)["level"] == "INFO" for line in log), log


# Docker Compose


# By service, what is started after python -m.
CONSUMERS = {
    "stream": ["fraud_pkg.stream.worker"],
    "stream-labels": ["fraud_pkg.stream.worker", "labels"],
    "stream-cases": ["fraud_pkg.stream.case_follow"],
}


def compose() -> dict:
    return yaml.safe_load((PROJECT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]


def test_compose_file_is_valid():
    code, said = output(
        sys.executable,
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(PROJECT / "docker-compose.yml"),
    )
    assert code == 0, said
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    images = {name: service["image"] for name, service in compose().items()}
    assert ({images[name] for name in ("api", *CONSUMERS)}, images["mlflow"]) == (
        {f"fraud-api:{version}"},
        f"fraud-jobs:{version}",
    )  # as `make image` names them
    assert all(":" in image and not image.endswith(":latest") for image in images.values())
    assert all(port.startswith("127.0.0.1:") for service in compose().values() for port in service.get("ports", ()))


def test_compose_store_starts_as_declared(tmp_path):
    """Redis takes the command line, keeps what it was told over a restart, and answers its health check."""
    service, port = compose()["redis"], servers.free_port()
    server, *options = [str(tmp_path) if word == "/data" else word for word in service["command"]]
    client, *check = service["healthcheck"]["test"][1:]
    command = [servers.program(server, "redis-server"), *options, "--bind", servers.HOST, "--port", str(port)]

    def ask(*words: str) -> tuple[int, str]:
        return output(client, "-p", str(port), *words)

    with servers.running(command, lambda: ask(*check) == (0, "PONG\n"), tmp_path / "redis.log"):
        assert ask("set", "account", "1") == (0, "OK\n")
    with servers.running(command, lambda: ask(*check) == (0, "PONG\n"), tmp_path / "redis.log"):
        assert ask("get", "account") == (0, "1\n")


@pytest.mark.parametrize("name", CONSUMERS)
def test_compose_consumers_find_what_they_need(name):
    """Settings that are known, servers that listen there and are waited for, a health check on a path and a port that
    are answered, time to stop.
    """
    services = compose()
    service, kafka, environ = (
        services[name],
        services["kafka"],
        {key: str(value) for key, value in services[name]["environment"].items()},
    )
    settings = load_settings(environ=environ | {"FRAUD_ROOT": str(PROJECT)})  # as in the image; refuses unknown keys
    assert all(
        settings.origins[key.removeprefix("FRAUD_").lower().replace("_", ".", 1)] == f"environment {key}"
        for key in environ
    )
    assert (
        service["command"] == ["python", "-m", *CONSUMERS[name]]
        and "./settings.ini:/app/settings.ini:ro" in service["volumes"]
    )
    api = services["api"]["environment"]
    if name == "stream-cases":
        assert settings.cases.url == api["FRAUD_CASES_URL"] and "FRAUD_STORE_URL" not in environ
        assert settings.cases.labels == api["FRAUD_CASES_LABELS"] == "topic"
        asked = "postgres"
    else:
        assert settings.store.url == api["FRAUD_STORE_URL"]
        asked = "redis"
    assert client_options(settings.stream, environ)["security_protocol"] == "PLAINTEXT"
    [broker] = settings.stream.bootstrap_servers
    assert (
        broker
        == dict(listener.split("://") for listener in kafka["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(","))[
            "INSIDE"
        ]
    )
    for server in (asked, "kafka", "prometheus"):
        assert set(service["networks"]) & set(services[server]["networks"]), server
    assert service["depends_on"] == {
        asked: {"condition": "service_healthy"},
        "kafka": {"condition": "service_healthy"},
    }
    assert settings.stream.host == "0.0.0.0" and not service.get("ports")  # for the networks, not for this machine
    [address] = re.findall(r"http://127.0.0.1:(\d+)(/\w+)", service["healthcheck"]["test"][-1])
    assert address == (str(settings.stream.port), "/healthz") and Health(StreamMetrics()).answer(address[1])[0] == 200
    assert int(service["stop_grace_period"].removesuffix("s")) >= LAST_WAIT + 20
    folders = [volume["target"] for volume in service["volumes"] if isinstance(volume, dict)]
    assert [str(Path(settings.serve.bundle).parent)] == folders if name != "stream-labels" else not folders


def test_compose_database_of_cases():
    """The API and the follower name the database that is there, share its network with nobody else, and the API's
    outbox is on a volume.
    """
    services = compose()
    postgres, address = services["postgres"], make_url(services["api"]["environment"]["FRAUD_CASES_URL"])
    environ = postgres["environment"]
    assert (environ["POSTGRES_USER"], environ["POSTGRES_DB"]) == (address.username, address.database)
    assert address.host == "postgres" and postgres["networks"] == ["cases"] and not postgres.get("ports")
    assert {name for name, service in services.items() if "cases" in service["networks"]} == {
        "api",
        "stream-cases",
        "postgres",
    }
    assert services["api"]["depends_on"]["postgres"] == {"condition": "service_healthy"}
    dockerfile = (PROJECT / "Dockerfile").read_text(encoding="utf-8")
    [outbox] = re.findall(r"FRAUD_CASES_OUTBOX=(\S+)", dockerfile)
    assert f"outbox:{Path(outbox).parent}" in services["api"]["volumes"]
    assert re.search(rf"install --directory --owner=fraud .* {Path(outbox).parent} ", dockerfile)


def test_compose_prometheus_asks_everybody():
    services, found = compose(), {}
    for job in yaml.safe_load((PROJECT / "compose/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]:
        looked_up = [f"{name}:{item['port']}" for item in job.get("dns_sd_configs", ()) for name in item["names"]]
        found[job["job_name"]] = [
            target for item in job.get("static_configs", ()) for target in item["targets"]
        ] + looked_up
    consumers = {
        f"fraud-{name}": [f"{name}:{services[name]['environment']['FRAUD_STREAM_PORT']}"] for name in CONSUMERS
    }
    assert (
        found
        == {"fraud-api": ["api:8000"], "pushgateway": ["pushgateway:9091"], "prometheus": ["localhost:9090"]}
        | consumers
    )


def test_compose_prometheus_takes_its_configuration():
    code, said = output(
        servers.program("promtool", "prometheus"),
        "check",
        "config",
        "--syntax-only",
        str(PROJECT / "compose/prometheus.yml"),
    )
    assert code == 0, said


# The jobs image


@pytest.mark.long(reason="building the jobs image takes minutes and 6 GB of disk")
def test_jobs_image(tmp_path):
    """The first two jobs of the pipeline, the second one with Spark, in a container that can write nothing but its
    volumes.
    """
    image = build("localhost/fraud-test/jobs", "Dockerfile.jobs")
    assert inspect(image)["Config"]["Entrypoint"] == ["fraud"] and inspect(image)["User"] == "10001:10001"
    for name in ("data", "models", "reports"):
        (tmp_path / name).mkdir(mode=0o777)
        (tmp_path / name).chmod(0o777)
    volumes = [f"--volume={tmp_path / name}:/pipeline/{name}" for name in ("data", "models", "reports")]
    settings = [
        "--env=FRAUD_SIMULATE_ROWS=20000",
        "--env=FRAUD_SIMULATE_DAYS=60",
        "--env=FRAUD_FEATURES_SPARK_MASTER=local[2]",
        "--env=FRAUD_FEATURES_SPARK_MEMORY=1g",
    ]
    for job in ("acquire", "features"):
        code, said = output(
            *podman_run(
                "--read-only",
                "--cap-drop=ALL",
                "--security-opt=no-new-privileges",
                *volumes,
                *settings,
                image,
                "jobs",
                "run",
                job,
            ),
            timeout=600,
        )
        assert code == 0 and f"job {job}: done" in said, said
    assert json.loads((tmp_path / "data/features/manifest.json").read_text(encoding="utf-8"))["rows"] == 20_000


@pytest.mark.long(reason="it needs the jobs image")
def test_cron_job_in_the_image(tmp_path):
    """A CronJob's own command and variables, with what the pod grants: a volume, /tmp, settings, and nothing else that
    can be written.
    """
    image = build("localhost/fraud-test/jobs", "Dockerfile.jobs")
    manifest = yaml.safe_load((PROJECT / "k8s/jobs/features.yaml").read_text(encoding="utf-8"))
    [main] = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume").chmod(0o777)
    (tmp_path / "settings.ini").write_text(
        "[simulate]\nrows = 20000\ndays = 60\n[features]\nspark_master = local[2]\nspark_memory = 1g\n",
        encoding="utf-8",
    )
    [place] = [mount["mountPath"] for mount in main["volumeMounts"] if mount.get("subPath") == "settings.ini"]
    volumes = [f"--volume={tmp_path / 'volume'}:/volume", f"--volume={tmp_path / 'settings.ini'}:{place}:ro"]
    environ = [f"--env={variable['name']}={variable['value']}" for variable in main["env"]]
    flags = [
        "--read-only",
        "--read-only-tmpfs=false",
        "--tmpfs=/tmp:mode=1777",
        "--cap-drop=ALL",
        "--security-opt=no-new-privileges",
        "--user=10001:10001",
        "--entrypoint=",
    ]
    code, said = output(*podman_run(*flags, *volumes, *environ, image, *main["command"]), timeout=600)
    assert code == 0 and re.search(r"features +done", said), said
    made = tmp_path / "volume/project"
    assert (
        json.loads((made / "data/features/manifest.json").read_text(encoding="utf-8"))["rows"] == 20_000
        and (made / "dvc.lock").is_file()
    )
