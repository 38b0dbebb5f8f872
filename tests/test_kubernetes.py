"""`k8s/` on a real Kubernetes: what the server accepts, `make minikube`, and what becomes of payments while pods
restart, grow in number, are evicted, lose the store or get another champion; who reaches whom; what accounts may do;
jobs.

The images of Redis, Kafka, PostgreSQL and busybox are stand-ins of Debian's programs (tests/kubernetes/images), and the
service's image stands in for that of the jobs, which has 6 GB: what is seen of jobs is all but their work
(test_image.py runs that).
"""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import kubernetes
import pytest
import yaml
from kubernetes import until
from test_k8s import CONSUMERS, PROJECT, SERVING_IN, TRAINING_IN, container, of_kind, open_ways, pods, workloads
from test_k8s import render as render

from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import EXAMPLE

pytestmark = pytest.mark.long(
    reason="a real Kubernetes, ten minutes; the first time its programs (six) and images (four) are built"
)
OVERLAYS = [
    ("overlays/minikube", ()),
    ("overlays/minikube", ("canary", "degrade", "keda", "monitoring", "pushgateway", "jobs", "spark", "mlflow")),
    ("overlays/production", ()),
    ("overlays/production", ("canary", "degrade", "keda", "jobs", "spark", "mlflow")),
]
OPERATORS = {
    "keda.sh": ("scaledobjects", "triggerauthentications"),
    "monitoring.coreos.com": ("servicemonitors", "podmonitors", "prometheusrules", "alertmanagerconfigs"),
}
CHAMPION = "/data/fraud-models"
SECOND = EXAMPLE | {"transaction_id": "second", "amount": 10.0}  # of a customer whom the store then knows


# The server's own word


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[kubernetes.Cluster]:
    """A node with the operators' kinds and our namespaces, and nothing in them."""
    folder = tmp_path_factory.mktemp("kubernetes")
    with kubernetes.cluster(folder) as made:
        for group, kinds in OPERATORS.items():
            for kind in kinds:
                made.kubectl("create", "--filename", kubernetes.programs() / f"crds/{group}_{kind}.yaml")
                established = ("kubectl", "wait", "--for=condition=Established", f"crd/{kind}.{group}")
                # kubectl does not wait for one that has no conditions yet
                until(lambda: made.run(*established, ok=False).returncode == 0, 30, established)  # noqa: B023
        made.kubectl("apply", "--server-side", "--filename", PROJECT / "k8s/base/namespaces.yaml")
        yield made


def accepted(cluster: kubernetes.Cluster, objects, ok: bool = True) -> subprocess.CompletedProcess:
    """What the server says about objects that it does not keep: schema, admission, Pod Security."""
    asked = ("kubectl", "apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
    return cluster.run(*asked, "--filename", "-", input=yaml.safe_dump_all(objects), ok=ok)


@pytest.mark.parametrize(
    ("overlay", "components"), OVERLAYS, ids=[" ".join((Path(name).name, *more)) for name, more in OVERLAYS]
)
def test_every_object_is_accepted(cluster, render, overlay, components):
    """Without a warning; also those of KEDA and of the Prometheus operator, by the kinds that these publish."""
    objects = render(overlay, components)
    said = accepted(cluster, objects)
    assert not said.stderr
    assert said.stdout.count("serverside-applied (server dry run)") == len(objects)


@pytest.mark.parametrize(
    ("kind", "place", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "containers", 0, "imagePullPolice"), "Always"),
        ("ScaledObject", ("spec", "pollingIntervall"), 15),
        ("ServiceMonitor", ("spec", "endpoints", 0, "interval"), "often"),
        ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "exp"), "vector(1)"),
        ("NetworkPolicy", ("spec", "policyTypes", 0), "Inwards"),
    ],
)
def test_a_mistake_is_not_accepted(cluster, render, kind, place, value):
    """The same question finds a misspelt field and an impossible value."""
    [item, *_] = json.loads(json.dumps(of_kind(render(*OVERLAYS[1]), kind)))
    node = item
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    said = accepted(cluster, [item], ok=False)
    assert said.returncode == 1 and (str(place[-1]) in said.stderr or str(value) in said.stderr), said.stderr


# Which images may start


def pod_of(name: str, namespace: str, image: str, **spec) -> dict:
    """A pod of ours with another image, which no node has."""
    made = caller(name, namespace)
    container(made)["image"] = image
    made["spec"] |= spec
    return made


def test_images_start_by_their_digest_only(cluster, render):
    """`k8s/admission`, by the API server itself: of the registry and by a digest, in both namespaces and whoever asks,
    for init containers and those that are added to a pod; what runs already can be changed and ended.
    """
    digest, registry = f"@sha256:{'0' * 64}", "registry.example"
    good, folder = f"{registry}/fraud-jobs{digest}", cluster.folder / "admission"
    shutil.copytree(PROJECT / "k8s/admission", folder)
    policy = folder / "image-digests.yaml"
    policy.write_text(policy.read_text().replace("REGISTRY", registry))
    for name, image in (("before", "fraud-api:0.1.0"), ("debugged", good)):
        cluster.kubectl("apply", "--filename", "-", given=json.dumps(pod_of(name, TRAINING_IN, image)))
    applied = cluster.run("kubectl", "apply", "--kustomize", folder)
    assert not applied.stderr  # no warning: every expression has the types that it needs

    def refused(*objects: dict) -> bool:
        said = accepted(cluster, objects, ok=False)
        assert said.returncode == 0 or f"expected images of {registry} by their digest" in said.stderr, said.stderr
        return said.returncode == 1

    tagged = pod_of("tagged", SERVING_IN, f"{registry}/fraud-api:0.1.0")
    try:
        until(lambda: refused(tagged), 30, "the policy holds a moment after it is there")
        warned = cluster.get("validatingadmissionpolicy", "fraud-image-digests")
        assert not warned["status"].get("typeChecking", {}).get("expressionWarnings")
        for namespace in (SERVING_IN, TRAINING_IN):
            assert not refused(pod_of("good", namespace, good))
            for image in (
                "fraud-jobs:0.1.0",
                f"{registry}/fraud-jobs",
                f"{registry}/fraud-jobs@sha256:{'0' * 63}",
                f"{registry}.evil.example/fraud-jobs{digest}",
                f"docker.io/library/fraud-jobs{digest}",
            ):
                assert refused(pod_of("bad", namespace, image)), image
        first = container(pod_of("first", SERVING_IN, "fraud-api:0.1.0"))
        assert refused(pod_of("bad", SERVING_IN, good, initContainers=[first | {"name": "first"}]))
        assert not refused(pod_of("elsewhere", "default", "fraud-api:0.1.0"))
        production = json.loads(
            json.dumps(render(*OVERLAYS[3])).replace("REGISTRY/", f"{registry}/")
        )  # all that the overlay starts
        for name, template in pods(production).items():
            place = TRAINING_IN if name in pods(production, TRAINING_IN) else SERVING_IN
            item = {"apiVersion": "v1", "kind": "Pod"} | json.loads(json.dumps(template))
            item["metadata"] |= {"name": name, "namespace": place}
            item["spec"].pop("serviceAccountName", None)  # none is there yet
            assert not refused(item), name
        debug = ("kubectl", "debug", "--namespace", TRAINING_IN, "pod/debugged", "--profile=restricted", "--quiet")
        said = cluster.run(*debug, "--image=docker.io/library/busybox:1.37.0", ok=False)
        assert said.returncode == 1 and "expected images of" in said.stderr, said.stderr
        cluster.run(*debug, f"--image={registry}/tools{digest}")
        change = ("kubectl", "--namespace", TRAINING_IN)
        said = cluster.run(*change, "set", "image", "pod/debugged", "main=fraud-api:0.1.0", ok=False)
        assert said.returncode == 1 and "expected images of" in said.stderr, said.stderr
        cluster.run(*change, "label", "pod/before", "touched=yes")
        cluster.run(*change, "delete", "pod", "before", "debugged", "--timeout=30s")
    finally:
        cluster.kubectl("delete", "--kustomize", folder)
    until(lambda: not refused(tagged), 30)


# make minikube


@dataclass
class Deployed:
    """The project as `make minikube` has brought it."""

    cluster: kubernetes.Cluster
    project: Path  # a copy
    said: str = ""

    def minikube(self) -> str:
        """Runs k8s/minikube.sh, as it stands, on the node; what it says on standard output."""
        path = f"{kubernetes.HERE / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        done = self.cluster.run(
            *("env", f"--chdir={self.project}", f"PATH={path}", "bash", "k8s/minikube.sh"), seconds=900
        )
        assert "Warning" not in done.stderr, done.stderr
        return done.stdout

    def champion(self, bias: float, name: str = "champion") -> str:
        """Another model in models/`name` of the copy; its version."""
        shutil.rmtree(self.project / "models" / name, ignore_errors=True)
        return example_bundle(self.project / "models" / name, bias=bias).manifest.version

    def bring(self, name: str = "champion") -> None:
        """A bundle to the node, whole and at once, as the script does it."""
        move = """
            set -e
            cd "$1" && rm -rf new old && cp -R "$2" new && chmod -R a+rX new
            [ ! -e "$3" ] || mv "$3" old
            mv new "$3"
        """
        self.cluster.run("sh", "-c", move, "sh", CHAMPION, self.project / "models" / name, name)

    def api(self, path: str, body: dict | None = None) -> dict:
        """An answer of the service, asked on the node by the Service's address."""
        address = self.cluster.get("service", "fraud-api")["spec"]["clusterIP"]
        sent = ("--data", json.dumps(body)) if body else ()
        header = f"X-API-Key: {self.key}"
        asked = ("curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "20", "--header", "@-", *sent)
        return json.loads(self.cluster.run(*asked, f"http://{address}{path}", input=header).stdout)

    @property
    def key(self) -> str:
        return kubernetes.api_key(self.cluster.get("secret", "fraud-api-keys")["data"]["api-keys"])

    @contextlib.contextmanager
    def replicas(self, least: int, most: int) -> Iterator[None]:
        """That many pods of the service, whatever the autoscaler thinks; then its own numbers again."""
        before = self.cluster.get("hpa", "fraud-api")["spec"]

        def limits(least: int, most: int) -> None:
            patch = {"spec": {"minReplicas": least, "maxReplicas": most}}
            self.cluster.kubectl("patch", "hpa", "fraud-api", "--patch", json.dumps(patch))

        limits(least, most)
        try:
            until(
                lambda: least <= len(self.cluster.pods("fraud-api")) <= most and self.all_ready(),
                180,
                self.cluster.state,
            )
            yield
        finally:
            limits(before["minReplicas"], before["maxReplicas"])

    def all_ready(self) -> bool:
        return len(self.cluster.ready("fraud-api")) == len(self.cluster.pods("fraud-api"))


@pytest.fixture(scope="module")
def deployed(cluster, tmp_path_factory) -> Deployed:
    project = tmp_path_factory.mktemp("minikube")
    shutil.copytree(PROJECT / "k8s", project / "k8s")
    shutil.copy(PROJECT / "settings.ini", project)
    # From nothing, as `make minikube` finds it.
    cluster.kubectl("delete", "namespace", SERVING_IN, TRAINING_IN, "--timeout=60s")
    made = Deployed(cluster, project)
    made.champion(-8.0)
    made.said = made.minikube()
    return made


def test_minikube(deployed):
    """From nothing to a first decision, a decision of the stream, and a record of each that is blocked."""
    answer = json.loads(deployed.said.split("== a first transaction\n")[1].splitlines()[0])
    assert (answer["transaction_id"], answer["decision"]) == (EXAMPLE["transaction_id"], "block")
    script = """
import sys
from kafka import KafkaProducer
producer = KafkaProducer(bootstrap_servers="fraud-kafka.fraud.svc:19092")
producer.send("transactions", sys.argv[1].encode()).get(timeout=20)
"""
    [pod] = deployed.cluster.ready("fraud-stream")
    deployed.cluster.python(pod, script, json.dumps(EXAMPLE | {"transaction_id": "of-the-stream"}))
    wanted = {EXAMPLE["transaction_id"], "of-the-stream"}
    until(lambda: cases(deployed) == wanted, 60, lambda: cases(deployed))
    assert deployed.cluster.restarts("fraud-api") == 0
    for name in CONSUMERS:
        # One that finds no broker or no database yet ends with a line, and is started again: on a busy machine twice.
        restarts = deployed.cluster.restarts(name)
        assert restarts <= 3, name
        if restarts:
            [pod] = deployed.cluster.pods(name)
            said = deployed.cluster.kubectl("logs", "--previous", "--tail=1", pod["metadata"]["name"])
            assert said.startswith("error: "), f"{name}: {said}"


def cases(deployed: Deployed) -> set[str]:
    return {case["transaction_id"] for case in deployed.api("/cases?state=all")["cases"]}


def test_minikube_again(deployed):
    """On two processors, of which Minikube's own pods ask for 1.1: all pods roll beside the old ones, no payment fails,
    keys, store and cases stay.
    """
    cluster = deployed.cluster
    names = ("fraud-api", *CONSUMERS)
    key, before = deployed.key, {name: cluster.ready(name) for name in names}
    version = deployed.champion(-8.5)
    load = cluster.without_failure(deployed.minikube)
    assert load.models.keys() >= {version} and deployed.key == key
    assert all(set(before[name]).isdisjoint(cluster.ready(name)) for name in names)
    assert deployed.api("/predict", SECOND)["known_entities"] and EXAMPLE["transaction_id"] in cases(deployed)


# Under load


def test_rolling_restart(deployed):
    cluster = deployed.cluster

    def restart() -> None:
        before = set(cluster.ready("fraud-api"))
        cluster.kubectl("rollout", "restart", "deployment/fraud-api")
        cluster.rolled_out("deployment/fraud-api")
        until(lambda: before.isdisjoint(cluster.ready("fraud-api")))
        cluster.kubectl("wait", "--for=delete", "--timeout=90s", *(f"pod/{name}" for name in before), ok=False)

    with deployed.replicas(1, 1):
        cluster.without_failure(restart)


def test_new_champion(deployed):
    """Taken over by the pods that run; one that is damaged is refused, and the champion stays."""
    cluster = deployed.cluster

    def bring(version: str) -> None:
        deployed.bring()
        until(lambda: deployed.api("/model")["version"] == version)

    def damage() -> None:
        [model] = (deployed.project / "models/champion").glob("*.onnx")
        model.write_bytes(model.read_bytes()[:-1])
        deployed.bring()
        until(lambda: "refused" in logs(cluster, "fraud-api"), what=lambda: logs(cluster, "fraud-api"))

    with deployed.replicas(1, 1):
        pods = set(cluster.ready("fraud-api"))
        version = deployed.champion(-9.0)
        load = cluster.without_failure(lambda: bring(version))
        assert load.models.get(version)
        deployed.champion(-9.5)
        load = cluster.without_failure(damage)
        assert load.models.keys() == {version}
        assert set(cluster.ready("fraud-api")) == pods and cluster.restarts("fraud-api") == 0
    deployed.champion(-9.0)
    deployed.bring()


def logs(cluster: kubernetes.Cluster, name: str) -> str:
    return cluster.kubectl("logs", "--selector", f"app.kubernetes.io/name={name}", "--tail=200")


def test_autoscaler(deployed):
    """A second pod as soon as one has more to do than 300 thousandths of a processor."""
    cluster = deployed.cluster

    def grow() -> None:
        with deployed.replicas(1, 1):
            pass
        until(lambda: len(cluster.ready("fraud-api")) == 2, 150, lambda: hpa(cluster))

    cluster.without_failure(grow, rate=300)
    assert "SuccessfulRescale" in hpa(cluster)


def hpa(cluster: kubernetes.Cluster) -> str:
    return cluster.kubectl("describe", "hpa", "fraud-api")


def test_eviction_and_drain(deployed):
    """The budget lets one pod go at a time: a drain waits where no other node takes a pod, and no payment fails."""
    cluster = deployed.cluster
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction"}

    def evict(name: str) -> subprocess.CompletedProcess:
        body = json.dumps(eviction | {"metadata": {"name": name, "namespace": "fraud"}})
        path = f"/api/v1/namespaces/fraud/pods/{name}/eviction"
        return cluster.run("kubectl", "create", "--raw", path, "--filename", "-", input=body, ok=False)

    def evict_both() -> None:
        first, second = cluster.ready("fraud-api")
        assert evict(first).returncode == 0
        refused = evict(second)
        assert refused.returncode == 1 and "disruption budget" in refused.stderr, refused.stderr
        until(lambda: len(cluster.ready("fraud-api")) == 2, 90, cluster.state)

    def drain() -> None:
        ours = "--pod-selector=app.kubernetes.io/name=fraud-api"
        drained = ("kubectl", "drain", "minikube", ours, "--delete-emptydir-data", "--timeout=20s")
        done = cluster.run(*drained, ok=False)
        assert done.returncode == 1 and "disruption budget" in done.stderr, done.stderr
        assert len(cluster.ready("fraud-api")) == 1  # the other has no node
        cluster.kubectl("uncordon", "minikube")
        until(lambda: len(cluster.ready("fraud-api")) == 2, 90, cluster.state)

    with deployed.replicas(2, 2):
        cluster.without_failure(evict_both)
        cluster.without_failure(drain)


# Probes


def test_store_away(deployed):
    """No pod is ready, none is restarted; all of them are as soon as it is back, and it has forgotten nothing."""
    cluster = deployed.cluster
    names = ("fraud-api", "fraud-stream", "fraud-stream-labels")
    with deployed.replicas(1, 1):
        before = {name: (set(cluster.ready(name)), cluster.restarts(name)) for name in names}
        cluster.kubectl("scale", "statefulset/fraud-redis", "--replicas=0")
        try:
            until(lambda: not cluster.ready("fraud-api"), 120, cluster.state)
            slices = cluster.get("endpointslices", "--selector", "kubernetes.io/service-name=fraud-api")["items"]
            assert not any(end["conditions"]["ready"] for part in slices for end in part.get("endpoints") or [])
            time.sleep(35)  # three times a liveness probe, and time to spare
        finally:
            cluster.kubectl("scale", "statefulset/fraud-redis", "--replicas=1")
        until(lambda: all(cluster.ready(name) for name in names), 120, cluster.state)
        assert {name: (set(cluster.ready(name)), cluster.restarts(name)) for name in names} == before
    assert deployed.api("/predict", SECOND)["known_entities"]


# A canary


def test_canary(deployed, render):
    """A slow start is waited for, without a bundle it is alive and not ready, with one it has its share."""
    cluster = deployed.cluster
    with_canary = render("overlays/minikube", ("canary",))
    [canary] = [item for item in of_kind(with_canary, "Deployment") if item["metadata"]["name"] == "fraud-api-canary"]
    canary = json.loads(json.dumps(canary))
    main = container(canary["spec"]["template"])
    main["image"] = container(cluster.get("deployment", "fraud-api")["spec"]["template"])["image"]
    main["command"] = ["sh", "-c", 'sleep 40; exec "$@"', "sh", *main["command"]]  # longer than liveness would wait for
    with deployed.replicas(1, 1):
        cluster.kubectl("apply", "--filename", "-", given=json.dumps(canary))
        try:
            track = ("--selector", "track=canary")

            def state() -> dict:
                found = [pod["status"].get("containerStatuses") for pod in cluster.get("pods", *track)["items"]]
                return (found[0] if found and found[0] else [{}])[0]

            until(lambda: state().get("started"), 120, cluster.state)
            time.sleep(12)  # two readiness probes
            assert not state()["ready"] and state()["restartCount"] == 0
            challenger = deployed.champion(-10.0, "challenger")
            deployed.bring("challenger")
            until(lambda: state()["ready"], 60, cluster.state)
            assert state()["restartCount"] == 0
            with cluster.load(60) as load:
                time.sleep(10)
            decided = load.answers["200"]
            # One of two pods: within five standard deviations of a half.
            assert decided > 400 and abs(load.models[challenger] - decided / 2) < 5 * decided**0.5 / 2, load
        finally:
            cluster.kubectl("delete", "deployment", "fraud-api-canary", "--wait=true")


# Who reaches whom

TRY = """
import concurrent.futures, json, socket, sys
def reached(target):
    try:
        socket.create_connection(target, timeout=3).close()
        return True
    except OSError:
        return False
targets = json.loads(sys.argv[1])
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    print(json.dumps(list(pool.map(reached, targets))))
"""


def caller(name: str, namespace: str, ports: tuple[dict, ...] = (), **labels: str) -> dict:
    """A pod that does nothing, or listens to one port, as restricted as ours."""
    closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    main = {"name": "main", "image": kubernetes.API_IMAGE, "imagePullPolicy": "Never", "securityContext": closed}
    user = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    command = ["sleep", "3600"]
    if ports:
        command = ["python3", "-m", "http.server", str(ports[0]["containerPort"]), "--directory", "/tmp"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "securityContext": user,
            "containers": [main | {"command": command, "ports": list(ports)}],
        },
    }


def test_network_policies(deployed, render):
    """Between all pods of both namespaces, and from elsewhere, exactly what test_k8s.py reads in the policies gets
    through. One job stands for all, and in place of the registry and the Pushgateway something listens.
    """
    cluster = deployed.cluster
    objects = render("overlays/minikube", ("pushgateway", "jobs", "mlflow"))
    between, from_outside, to_outside = open_ways(objects)
    cluster.kubectl("apply", "--filename", "-", given=yaml.safe_dump_all(of_kind(objects, "NetworkPolicy")))
    outsiders = (
        ("ingress-nginx", "ingress-nginx"),
        ("default", "default"),
        (SERVING_IN, "stranger"),
        (TRAINING_IN, "stranger"),
    )
    training = {name: pods(objects)[name] for name in ("fraud-watch", "fraud-pushgateway", "fraud-mlflow")}
    templates = workloads(objects) | training
    cluster.kubectl("create", "namespace", "ingress-nginx")
    made = [caller(name, namespace) for namespace, name in outsiders]
    for name, template in training.items():
        ports = tuple(container(template).get("ports", ()))
        made.append(caller(name, TRAINING_IN, ports, **template["metadata"]["labels"]))
    for item in made:
        namespace, name = item["metadata"]["namespace"], item["metadata"]["name"]
        cluster.kubectl("apply", "--filename", "-", given=json.dumps(item))
        cluster.kubectl("wait", "--namespace", namespace, "--for=condition=Ready", f"pod/{name}", "--timeout=60s")
    places = {name: TRAINING_IN if name in training else SERVING_IN for name in templates}
    there = {name: cluster.pods(name, places[name])[0] for name in templates}
    doors = [
        (name, port["name"], (there[name]["status"]["podIP"], port["containerPort"]))
        for name, template in templates.items()
        for port in container(template).get("ports", ())
    ]
    doors.append(("kube-dns", 53, ("10.96.0.10", 53)))
    doors.append(("kubernetes", 443, ("10.96.0.1", 443)))
    targets = json.dumps([target for *_, target in doors])

    def reached(pod: str, namespace: str) -> set[tuple]:
        asked = ("exec", "--namespace", namespace, pod, "--", "python3", "-c", TRY, targets)
        return {door[:2] for door, there in zip(doors, json.loads(cluster.kubectl(*asked)), strict=True) if there}

    def closed(pod: str, wanted: set[tuple], namespace: str, own: frozenset = frozenset()) -> None:
        """Policies hold a moment after the pod is there."""
        until(lambda: reached(pod, namespace) - own == wanted - own, 20, lambda: f"{pod}: {reached(pod, namespace)}")

    for name, pod in there.items():
        wanted = {(server, port) for client, server, port in between if client == name}
        wanted |= {("kube-dns", port) for client, port in to_outside if client == name and port == 53}
        own = {(name, port["name"]) for port in container(templates[name]).get("ports", ())}
        closed(pod["metadata"]["name"], wanted, places[name], frozenset(own))
    assert ("fraud-watch", "fraud-kafka", "kafka") in between  # the one way across
    everywhere = {("kube-dns", 53), ("kubernetes", 443)}
    taken = {(server, port) for namespace, server, port in from_outside if namespace == "ingress-nginx"}
    closed("ingress-nginx", taken | everywhere, "ingress-nginx")
    closed("default", everywhere, "default")
    for namespace in (SERVING_IN, TRAINING_IN):
        closed("stranger", set(), namespace)
    for item in made:
        cluster.kubectl("delete", "pod", item["metadata"]["name"], "--namespace", item["metadata"]["namespace"])


# Jobs, and what accounts may do


@pytest.fixture(scope="module")
def jobs(deployed, render) -> dict[str, dict]:
    """The components jobs and spark beside what is there: their objects by kind and name. Of a CronJob the command is
    another, and the image is the service's.
    """
    before = render("overlays/minikube")
    more = [
        item for item in json.loads(json.dumps(render("overlays/minikube", ("jobs", "spark")))) if item not in before
    ]
    assert {item["metadata"]["namespace"] for item in more} == {TRAINING_IN, SERVING_IN}  # the broker lets jobs in
    for item in of_kind(more, "CronJob"):
        container(item["spec"]["jobTemplate"]["spec"]["template"])["command"] = ["python", "-c", JOB]
    names = {container(item["spec"]["jobTemplate"]["spec"]["template"])["image"] for item in of_kind(more, "CronJob")}
    for name in names:
        deployed.cluster.run(
            "ctr",
            "--namespace",
            "k8s.io",
            "images",
            "tag",
            "--force",
            kubernetes.API_IMAGE,
            f"docker.io/library/{name}",
        )
    deployed.cluster.kubectl("apply", "--filename", "-", given=yaml.safe_dump_all(more))
    return {f"{item['kind']} {item['metadata']['name']}": item for item in more}


JOB = """
import os, pathlib, socket, time
settings = pathlib.Path("/pipeline/settings.ini").read_text()
for attempt in range(40):  # policies know a pod a moment after it has begun
    try:
        socket.create_connection(os.environ["FRAUD_STREAM_BOOTSTRAP_SERVERS"].split(":"), timeout=10).close()
        break
    except OSError as error:
        last = error
        time.sleep(0.5)
else:
    raise last
for place in ("/volume/project/reports", "/models/of-a-job", "/tmp/job"):
    pathlib.Path(place).mkdir(parents=True, exist_ok=True)
report = pathlib.Path("/volume/project/reports/report.txt")
report.write_text(f"{len(settings)} {os.getuid()}")
print("done")
"""


def test_jobs_run(deployed, jobs):
    """One by the clock and one of those that wait to be asked, with the volumes, the network and the rights that their
    manifests grant; and what they wrote, by the reader's pod.
    """
    cluster = deployed.cluster
    cron = jobs["CronJob fraud-watch"]
    assert not cron["spec"]["suspend"] and jobs["CronJob fraud-promote"]["spec"]["suspend"]
    here = ("--namespace", TRAINING_IN)
    cluster.kubectl("patch", "cronjob", "fraud-watch", *here, "--patch", '{"spec": {"schedule": "* * * * *"}}')

    def succeeded() -> list[str]:
        done = cluster.get("jobs", *here)["items"]
        return [item["metadata"]["name"] for item in done if item["status"].get("succeeded")]

    cluster.kubectl("create", "job", *here, "--from=cronjob/fraud-promote", "fraud-promote-1")
    until(
        lambda: "fraud-promote-1" in succeeded() and any(name.startswith("fraud-watch-") for name in succeeded()),
        150,
        lambda: cluster.state(TRAINING_IN) + cluster.kubectl("logs", *here, "job/fraud-promote-1", ok=False),
    )
    cluster.kubectl("patch", "cronjob", "fraud-watch", *here, "--patch", '{"spec": {"suspend": true}}')
    cluster.kubectl("apply", "--filename", PROJECT / "k8s/components/jobs/reader.yaml")
    cluster.kubectl("wait", *here, "--for=condition=Ready", "pod/fraud-jobs-reader", "--timeout=60s")
    copied = cluster.folder / "reports"
    cluster.kubectl("cp", *here, "fraud-jobs-reader:/volume/project/reports", copied)
    length = len((PROJECT / "settings.ini").read_text())
    assert (copied / "report.txt").read_text() == f"{length} 10001"
    cluster.kubectl("delete", "pod", *here, "fraud-jobs-reader", "--timeout=15s")  # not after half a minute


def test_rights(deployed, jobs):
    """Only the driver's account may anything, and no more than pods and what belongs to them, in its namespace."""
    cluster, spark = deployed.cluster, f"{TRAINING_IN}:fraud-spark"

    def may(account: str, verb: str, resource: str, namespace: str = TRAINING_IN) -> bool:
        what, _, part = resource.partition("/")  # kubectl takes pods/exec for the pod of that name
        asked = (
            "kubectl",
            "auth",
            "can-i",
            verb,
            what,
            f"--subresource={part}",
            f"--as=system:serviceaccount:{account}",
        )
        asked += ("--namespace", namespace)
        return cluster.run(*asked, ok=False).stdout.strip() == "yes"

    for account in ("fraud:fraud-api", "fraud:default", "fraud-jobs:fraud-jobs", "fraud-jobs:default"):
        for namespace in (SERVING_IN, TRAINING_IN):
            for what in ("pods", "secrets"):
                assert not any(may(account, verb, what, namespace) for verb in ("get", "list", "create")), account
    granted = {
        (verb, resource)
        for rule in jobs["Role fraud-spark"]["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    for verb, resource in sorted(granted):
        assert may(spark, verb, resource), (verb, resource)
        assert not may(spark, verb, resource, SERVING_IN) and not may(spark, verb, resource, "default")
    for verb, resource in (("get", "secrets"), ("create", "pods/exec"), ("create", "deployments"), ("get", "nodes")):
        assert not may(spark, verb, resource), (verb, resource)


DRIVER = """
import json, ssl, sys, urllib.error, urllib.request
place = "/var/run/secrets/kubernetes.io/serviceaccount"
headers = {"Authorization": "Bearer " + open(place + "/token").read()}
trusted = ssl.create_default_context(cafile=place + "/ca.crt")
for what in ("fraud-jobs/pods", "fraud-jobs/secrets", "fraud/pods"):
    url = "https://kubernetes.default.svc:443/api/v1/namespaces/" + what
    try:
        print(urllib.request.urlopen(urllib.request.Request(url, headers=headers), context=trusted, timeout=20).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


def test_driver_reaches_the_api_server(deployed, jobs):
    """With the policies of its components, and the address that its settings name."""
    cluster = deployed.cluster
    template = json.loads(json.dumps(jobs["CronJob fraud-features"]["spec"]["jobTemplate"]["spec"]["template"]))
    [master] = [v["value"] for v in container(template)["env"] if v["name"] == "FRAUD_FEATURES_SPARK_MASTER"]
    assert master == "k8s://https://kubernetes.default.svc:443"
    container(template)["command"] = ["python", "-c", DRIVER]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "driver", "namespace": TRAINING_IN}}
    job["spec"] = {"template": template, "backoffLimit": 0}
    cluster.kubectl("apply", "--filename", "-", given=json.dumps(job))
    said = ("logs", "--namespace", TRAINING_IN, "job/driver")
    wanted = ["200", "403", "403"]
    until(lambda: cluster.kubectl(*said, ok=False).split() == wanted, 60, lambda: cluster.kubectl(*said))


# The end


def test_everything_is_taken_away(deployed, jobs):
    """As docs/kubernetes.md says it."""
    cluster = deployed.cluster
    cluster.kubectl("delete", "--kustomize", deployed.project / "k8s/overlays/minikube", "--timeout=120s")
    for namespace in (SERVING_IN, TRAINING_IN):
        assert cluster.run("kubectl", "get", "namespace", namespace, ok=False).returncode == 1
