"""A real Kubernetes of one node, in network, mounts and processes of its own: what `k8s/` meets on a cluster.

Its programs are built from their Go modules, its images by buildah, each once; both stay in `CACHE`. Nothing listens in
this machine's own network: commands go in by `nsenter`. docs/decisions/kubernetes-in-tests.md says why it is so.
"""

import base64
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import servers
import yaml
from test_image import build, inspect
from tools import missing

PROJECT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).with_name("kubernetes")
CACHE = Path.home() / ".cache/fraud-tests/kubernetes"
CGROUPS = Path("/sys/fs/cgroup")
PACKAGES = {  # as in tests/tools.sh
    "containerd": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "iptables": "iptables",
    "ipset": "ipset",
    "nsenter": "util-linux",
    "openssl": "openssl",
}
API_IMAGE = "docker.io/library/fraud-api:built"


# What it is made of


def check_machine() -> None:
    """Skips where it cannot be: for good where the machine is another one, or until a package is installed."""
    if os.geteuid() != 0:
        pytest.skip("a Kubernetes node needs root: it mounts, and makes cgroups and interfaces")
    if (CGROUPS / "cgroup.controllers").exists():
        pytest.skip(
            "this machine has cgroups 2 alone; tests/kubernetes/node.sh was made for cgroups 1, and tried there"
        )
    for name, package in PACKAGES.items():
        servers.program(name, package)
    if not shutil.which("go"):
        missing("Kubernetes is built with Go 1.21 or newer, which is not installed: https://go.dev/doc/install")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One cluster at a time, in all checkouts: they share the images."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def go(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        ["go", *arguments],
        cwd=folder,
        env=os.environ | {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false -trimpath"},
        capture_output=True,
        text=True,
        timeout=5400,
    )
    assert done.returncode == 0, f"go {' '.join(arguments)}: {done.stderr[-3000:]}"


def version_flags() -> str:
    """What tells Kubernetes its version, as its own build does; without it it would be v0.0.0."""
    [(version, major, minor)] = re.findall(
        r"^\tk8s.io/kubernetes (v(\d+)\.(\d+)\.\d+)$", (HERE / "programs/go.mod").read_text(), re.MULTILINE
    )
    said = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return " ".join(["-s -w", *(f"-X {package}.{key}={value}" for package in packages for key, value in said.items())])


def programs() -> Path:
    """A folder with `bin/` (the node's programs) and `crds/` (the operators' kinds), built once for these sources: six
    minutes of two cores.
    """
    sources = [
        file
        for name in ("programs", "crds")
        for file in sorted((HERE / name).rglob("*"))
        if file.suffix in (".go", ".mod", ".sum")
    ]
    digest = hashlib.sha256()
    for file in sources:
        digest.update(f"{file.relative_to(HERE)}\n".encode() + file.read_bytes())
    built, new = CACHE / digest.hexdigest()[:16], CACHE / "new"
    if built.exists():
        return built
    shutil.rmtree(new, ignore_errors=True)
    (new / "bin").mkdir(parents=True)
    metrics_server = "sigs.k8s.io/metrics-server/cmd/metrics-server"
    parts = ("./kube", "./coredns", "./netpol", "./pause", metrics_server)
    go(HERE / "programs", "build", "-ldflags", version_flags(), "-o", f"{new}/bin/", *parts)
    kinds = (
        "github.com/kedacore/keda/v2/apis/keda/v1alpha1",
        "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1",
        "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1alpha1",
    )
    options = "crd:maxDescLen=0,ignoreUnexportedFields=true,generateEmbeddedObjectMeta=true"
    paths = [f"paths={kind}" for kind in kinds]
    go(HERE / "crds", "tool", "controller-gen", options, *paths, f"output:crd:dir={new}/crds")
    new.rename(built)
    return built


def stand_in_names() -> dict[str, str]:
    """What is built in place of an image that a manifest names, by its stage in tests/kubernetes/images/Dockerfile."""
    manifests = {
        "redis": "redis/stateful-set.yaml",
        "kafka": "kafka/stateful-set.yaml",
        "postgres": "postgres/stateful-set.yaml",
        "shell": "jobs/reader.yaml",
    }
    return {
        stage: re.search(r"^ +image: (\S+)$", (PROJECT / "k8s/components" / file).read_text(), re.MULTILINE)[1]
        for stage, file in manifests.items()
    }


def images(binaries: Path, archives: Path) -> None:
    """The project's image and all others, each as an archive NAME@ID.tar, but for those that the store has."""
    context, store = archives.with_name("context"), CACHE / "store/imported"
    archives.mkdir()
    shutil.copytree(HERE / "images", context)
    for name in ("pause", "coredns", "metrics-server"):
        shutil.copy(binaries / name, context)
    (context / "libs").mkdir()
    for jar in servers.kafka_classpath().split(":"):
        shutil.copy(jar, context / "libs")
    names = {stage: f"localhost/{stage}:1" for stage in ("pause", "coredns", "metrics-server")} | stand_in_names()
    for stage, name in names.items():
        build(name, str(context / "Dockerfile"), "--target", stage, context=context)
    build("localhost/fraud-test/api", "Dockerfile")
    subprocess.run(["buildah", "tag", "localhost/fraud-test/api", API_IMAGE], check=True, capture_output=True)
    for stage, name in (names | {"api": API_IMAGE}).items():
        identity, mark = inspect(name)["Id"][:16], store / stage
        if not (mark.exists() and mark.read_text().strip() == identity):
            archive = f"docker-archive:{archives / stage}@{identity}.tar:{name}"
            subprocess.run(["buildah", "push", "--quiet", name, archive], check=True, capture_output=True, timeout=600)
    shutil.rmtree(context)


# What runs


@dataclass
class Load:
    """Payments that are sent while something happens, and what came of them."""

    answers: dict[str, int] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)  # by version, what was decided
    failures: list[str] = field(default_factory=list)

    @property
    def store_was_slow(self) -> bool:
        """Whether all that failed is the store's time-out ([store] timeout, 0.5 s), as on a machine that is busy."""
        return bool(self.failures) and all('503 {"problems":[{"field":"store"' in line for line in self.failures)


@dataclass
class Cluster:
    """A node that runs, and its administrator."""

    folder: Path
    node: int  # the first process inside

    def inside(self, *command: str | Path) -> list[str]:
        """The command on the node."""
        entered = ["nsenter", "--target", str(self.node), "--net", "--mount", "--pid", "--"]
        return [*entered, "env", f"KUBECONFIG={self.folder / 'admin.conf'}", *map(str, command)]

    def run(self, *command: str | Path, ok: bool = True, seconds: float = 180, **more) -> subprocess.CompletedProcess:
        """Runs a command on the node."""
        done = subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=seconds, **more)
        said = f"{' '.join(map(str, command))[:500]}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == 0 or not ok, said
        return done

    def kubectl(self, *arguments: str | Path, given: str | None = None, **more) -> str:
        """What kubectl says, in the namespace `fraud` unless told otherwise; `given` is its standard input."""
        return self.run("kubectl", *arguments, input=given, **more).stdout

    def get(self, *arguments: str) -> dict:
        return json.loads(self.kubectl("get", *arguments, "--output", "json"))

    def pods(self, name: str, namespace: str = "fraud") -> list[dict]:
        """The pods of one of ours that are not on their way out."""
        found = self.get("pods", "--namespace", namespace, "--selector", f"app.kubernetes.io/name={name}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def ready(self, name: str) -> list[str]:
        """The names of those that get requests."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods(name)
            if any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
        ]

    def restarts(self, name: str) -> int:
        return sum(c["restartCount"] for pod in self.pods(name) for c in pod["status"].get("containerStatuses", []))

    def rolled_out(self, *names: str, seconds: int = 240) -> None:
        """Waits until each of these, such as deployment/fraud-api, is as it was declared."""
        for name in names:
            done = self.run(
                "kubectl", "rollout", "status", name, f"--timeout={seconds}s", ok=False, seconds=seconds + 30
            )
            assert done.returncode == 0, f"{name}: {done.stderr}\n{self.state()}"

    def state(self, namespace: str = "fraud") -> str:
        """What a person would look at first."""
        return self.kubectl("get", "pods,events", "--namespace", namespace, "--output", "wide", ok=False)[-6000:]

    def python(self, pod: str, script: str, *arguments: str) -> str:
        """What a Python script says in a pod."""
        return self.kubectl("exec", pod, "--", "python3", "-c", script, *arguments)

    @contextlib.contextmanager
    def load(self, rate: float, keep: bool = False, seconds: float = 240) -> Iterator[Load]:
        """Payments for the Service while the block runs; what came of them is known after it."""
        keys = self.get("secret", "fraud-api-keys")["data"]["api-keys"]
        address = self.get("service", "fraud-api")["spec"]["clusterIP"]
        script = HERE / "load.py"
        given = [address, api_key(keys), str(rate), str(seconds), *(["keep"] if keep else [])]
        sender = subprocess.Popen(
            self.inside(sys.executable, script, *given),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        load = Load()
        try:
            time.sleep(1)  # before, while and after
            yield load
            time.sleep(1)
            said, errors = sender.communicate("\n", timeout=60)
            assert sender.returncode == 0, errors
            vars(load).update(json.loads(said))
        finally:
            sender.kill()
            sender.wait()

    def without_failure(self, happens: Callable[[], None], rate: float = 60) -> Load:
        """Payments while something happens, none of which may fail. Once more if all that failed is the store's
        time-out: beside other work on this machine the pods may wait for a processor for half a second.
        """
        for last in (False, True):
            with self.load(rate) as load:
                happens()
            if last or not load.store_was_slow:
                break
        assert not load.failures and load.answers["200"] > rate, f"{load.answers}: {load.failures[:5]}"
        return load


def until(holds: Callable[[], object], seconds: float = 60, what: object = "") -> None:
    """Waits until it holds, and leaves the processors to the cluster meanwhile: a kubectl takes a tenth of a second of
    one.
    """
    servers.until(holds, seconds, what, pause=0.5)


def api_key(encoded: str) -> str:
    """The first key of the Secret."""
    return base64.b64decode(encoded).decode().splitlines()[0].partition(":")[2]


def remove_cgroups() -> None:
    """Empty ones of clusters that are over, this process' own included."""
    for folder in CGROUPS.glob("*/fraud-kubernetes-*"):
        owner = int(folder.name.rpartition("-")[2])
        if owner == os.getpid() or not psutil.pid_exists(owner):
            for inner, _, _ in os.walk(folder, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(inner)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster with names, figures for autoscalers and volumes; `folder` keeps its state and what its parts said."""
    check_machine()
    with alone():
        built = programs()
        images(built / "bin", folder / "images")
        remove_cgroups()
        make_volumes(folder)
        isolated = ["unshare", "--net", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        group = f"fraud-kubernetes-{os.getpid()}"
        script = ["bash", HERE / "node.sh", folder, built / "bin", CACHE / "store", group]
        with (folder / "node.log").open("wb") as log:
            # Killed when this process ends, however it ends; unshare itself ignores SIGTERM.
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *isolated, "--mount-proc", "--", *map(str, script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            yield started(folder, process)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            servers.until(functools.partial(no_cgroups, group), 30, "cgroups of the cluster are still in use")
            if (folder / "made-data").exists():
                Path("/data").rmdir()


def make_volumes(folder: Path) -> None:
    """Folders that every user may write to, as Minikube's provisioner makes them."""
    for item in yaml.safe_load_all((HERE / "system.yaml").read_text()):
        if item["kind"] == "PersistentVolume":
            place = folder / item["spec"]["hostPath"]["path"].removeprefix("/")
            place.mkdir(parents=True)
            place.chmod(0o777)


def no_cgroups(group: str) -> bool:
    remove_cgroups()
    return not list(CGROUPS.glob(f"*/{group}"))


def started(folder: Path, process: subprocess.Popen) -> Cluster:
    """The cluster as soon as its node is ready and names are answered."""

    def said() -> str:
        return "\n".join(f"== {file.name}\n{file.read_text()[-1500:]}" for file in sorted(folder.glob("*.log")))

    def up() -> bool:
        assert process.poll() is None, said()
        return (folder / "started").exists()

    servers.until(up, 300, said)  # the first time it takes in all images
    [node] = psutil.Process(process.pid).children()
    made = Cluster(folder, node.pid)

    def applied() -> bool:
        """Not before the namespaces have their accounts."""
        return made.run("kubectl", "apply", "--filename", HERE / "system.yaml", ok=False).returncode == 0

    servers.until(applied, 30, said)
    made.kubectl("wait", "--for=condition=Ready", "node/minikube", "--timeout=60s")
    made.kubectl("rollout", "status", "--namespace", "kube-system", "deployment/coredns", "--timeout=60s")
    return made
