"""The manifests as kustomize renders them: strict schemas, names that meet, settings that load, servers and consumers
that start; and `make minikube` up to Minikube itself.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import jsonschema
import kubernetes_validate
import pytest
import servers
import yaml
from kafka import KafkaProducer
from sqlalchemy.engine import make_url
from test_cases import cases_of
from tools import environment

from fraud_pkg.store.open import open_store
from fraud_pkg.core.contract import Contract
from fraud_pkg.store.tiles import Posting, StoreError, Transaction, retention_of
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.auth import digest_of, load_keys
from fraud_pkg.serve.service import OPEN
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.core.pseudonyms import load_pseudonyms
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.stream.health import Health, StreamMetrics
from fraud_pkg.stream.kafka import client_options
from fraud_pkg.stream.worker import LAST_WAIT

PROJECT = Path(__file__).resolve().parents[1]
VERSION = "1.32"  # of Kubernetes
RETENTION = retention_of(Contract())
OVERLAYS = ("base", "overlays/minikube", "overlays/production")
WITH_COMPONENTS = (
    "overlays/minikube",
    "overlays/production",
)  # once more, with a canary, the other policy for a store that is away, and KEDA
OPTIONAL = ("canary", "degrade", "keda")
TRAINING = ("jobs", "spark", "mlflow")
SERVING_IN, TRAINING_IN = "fraud", "fraud-jobs"  # the namespaces
RENDERED = [(name, ()) for name in OVERLAYS] + [(name, OPTIONAL) for name in WITH_COMPONENTS]
every_overlay = pytest.mark.parametrize(
    "overlay, components", RENDERED, ids=[" ".join((name, *more)) for name, more in RENDERED]
)
# What the Secrets hold, by name: `k8s/minikube.sh` makes the first three, docs/kubernetes.md says how.
MINIKUBE_SECRETS = {
    "fraud-api-keys": {"api-keys"},
    "fraud-store": {"url", "password"},
    "fraud-cases": {"url", "password"},
}
SECRETS = MINIKUBE_SECRETS | {
    "fraud-cases": {"url", "password", "check-key"},
    "fraud-kafka": {"user", "password"},
    "fraud-signing-key": {"pem"},
    "fraud-audit": {"url", "accounts-url", "pem"},
    "fraud-privacy": {"keys"},
    "fraud-pushgateway": {"web.yml", "user", "password"},
    "fraud-mlflow": {"admin", "jobs", "forms"},
    "fraud-metrics": {"key"},
    "fraud-alerts": {"page", "ticket"},
}
STORING = {"fraud-stream", "fraud-stream-labels"}  # consumers that ask the store
FOLLOWER = "fraud-stream-cases"
CONSUMERS = STORING | {FOLLOWER}
SERVERS = {"fraud-redis", "fraud-kafka", "fraud-postgres", "fraud-pushgateway", "fraud-mlflow"}


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    """Renders an overlay, with more components where they are named; every object once."""
    copy = tmp_path_factory.mktemp("kustomize") / "k8s"
    kubectl = servers.program("kubectl", "kubernetes-client")
    shutil.copytree(PROJECT / "k8s", copy)
    (copy / "overlays/with").mkdir()

    @cache
    def rendered(overlay: str, components: tuple[str, ...] = ()) -> tuple[dict, ...]:
        folder = copy / overlay
        if components:  # as a user does it: one more line each
            folder = copy / f"{overlay}-{'-'.join(components)}"
            shutil.copytree(copy / overlay, folder)
            content = yaml.safe_load((folder / "kustomization.yaml").read_text())
            content["components"] += [f"../../components/{name}" for name in components]
            (folder / "kustomization.yaml").write_text(yaml.safe_dump(content))
        done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return tuple(yaml.safe_load_all(done.stdout))

    return rendered


def of_kind(objects, *kinds: str) -> list[dict]:
    return [item for item in objects if item["kind"] in kinds]


def workloads(objects) -> dict[str, dict]:
    """The pod templates by the name of what makes pods of them."""
    return {
        item["metadata"]["name"]: item["spec"]["template"] for item in of_kind(objects, "Deployment", "StatefulSet")
    }


def api_pods(objects) -> dict[str, dict]:
    return {name: template for name, template in workloads(objects).items() if name.startswith("fraud-api")}


def consumers(objects) -> dict[str, dict]:
    return {name: template for name, template in workloads(objects).items() if name in CONSUMERS}


def container(template: dict) -> dict:
    [only] = template["spec"]["containers"]
    return only


def pods(objects, namespace: str | None = None) -> dict[str, dict]:
    """Those of jobs as well, of one namespace where it is named. No two of ours share a name."""
    found = {}
    for item in of_kind(objects, "Deployment", "StatefulSet", "CronJob"):
        if namespace in (None, item["metadata"]["namespace"]):
            made = item["spec"]["jobTemplate"]["spec"] if item["kind"] == "CronJob" else item["spec"]
            assert item["metadata"]["name"] not in found
            found[item["metadata"]["name"]] = made["template"]
    return found


def selected(selector: dict, objects, namespace: str = SERVING_IN) -> set[str]:
    """What in the namespace makes pods that carry these labels."""
    assert selector.keys() <= {"matchLabels", "matchExpressions"}
    wanted = selector.get("matchLabels", {}).items()
    among = {expression["key"]: expression["values"] for expression in selector.get("matchExpressions", [])}
    assert all(expression["operator"] == "In" for expression in selector.get("matchExpressions", []))
    labels = {name: template["metadata"]["labels"] for name, template in pods(objects, namespace).items()}
    return {
        name
        for name, own in labels.items()
        if wanted <= own.items() and all(own.get(key) in values for key, values in among.items())
    }


def port_names(names: set[str], objects) -> list[set[str]]:
    """Of each of these, what its ports are called."""
    return [{port["name"] for port in container(pods(objects)[name]).get("ports", [])} for name in names]


def closed(schema):
    """The schema with unknown fields refused, as `kubectl apply` refuses them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    more = (
        {"additionalProperties": False}
        if isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
        else {}
    )
    return {key: closed(value) for key, value in schema.items()} | more


def custom_resources() -> Iterator[tuple[str, dict]]:
    """The schemas of what operators define."""
    folder = Path(__file__).parent / "kubernetes"
    monitor = closed(json.loads((folder / "servicemonitor.json").read_text()))
    monitor["properties"]["metadata"] = {}
    yield "ServiceMonitor", monitor
    # A PodMonitor's list of endpoints has another name; what we use of it is the same.
    spec = monitor["properties"]["spec"]
    used = spec["properties"] | {"podMetricsEndpoints": spec["properties"]["endpoints"]}
    pods = spec | {
        "properties": {name: schema for name, schema in used.items() if name not in ("endpoints", "targetLabels")},
        "required": ["podMetricsEndpoints", "selector"],
    }
    yield "PodMonitor", monitor | {"properties": monitor["properties"] | {"spec": pods}}
    keda = json.loads((folder / "keda.json").read_text())
    yield from ((kind, closed(keda[kind])) for kind in ("ScaledObject", "TriggerAuthentication"))
    alerts = json.loads((folder / "alerts.json").read_text())
    yield from ((kind, closed(alerts[kind])) for kind in ("PrometheusRule", "AlertmanagerConfig"))


CUSTOM = dict(custom_resources())


def validate(item: dict) -> None:
    if item["kind"] in CUSTOM:
        jsonschema.validate(item, CUSTOM[item["kind"]])
    else:
        kubernetes_validate.validate(item, VERSION, strict=True)


def spoiled(item: dict) -> Iterator[dict]:
    """The object with one unknown field more, at every place that has fields of its own."""

    def at(node, path):
        if isinstance(node, dict):
            yield path
            for key, value in node.items():
                if key not in (
                    "labels",
                    "annotations",
                    "matchLabels",
                    "data",
                    "selector",
                    "limits",
                    "requests",
                    "capacity",
                    "metadata",
                ):  # names in these are free
                    yield from at(value, (*path, key))
        elif isinstance(node, list):
            for i, value in enumerate(node):
                yield from at(value, (*path, i))

    for path in at(item, ()):
        copy = json.loads(json.dumps(item))
        place = copy
        for key in path:
            place = place[key]
        place["unknownField"] = 1
        yield copy


@every_overlay
def test_schemas(render, overlay, components):
    for item in render(overlay, components):
        validate(item)


def test_unknown_fields_are_refused(render):
    """Strict means strict: a misspelt field anywhere is found."""
    count = 0
    for item in of_kind(render("overlays/production", OPTIONAL), "Deployment", "HorizontalPodAutoscaler", *CUSTOM):
        for bad in spoiled(item):
            count += 1
            with pytest.raises(jsonschema.ValidationError):
                validate(bad)
    assert count > 150
    [scaled] = json.loads(json.dumps(of_kind(render("overlays/production", OPTIONAL), "ScaledObject")))
    scaled["spec"]["triggers"][0]["metadata"] |= {"lagTreshold": "5"}
    with pytest.raises(jsonschema.ValidationError):
        validate(scaled)


@every_overlay
def test_selectors_meet_their_pods(render, overlay, components):
    objects = render(overlay, components)
    tracks = set(api_pods(objects))
    assert tracks == {"fraud-api", "fraud-api-canary"} if components else tracks == {"fraud-api"}
    assert overlay == "base" or set(consumers(objects)) == CONSUMERS
    for item in of_kind(objects, "Deployment", "StatefulSet"):  # everyone's own pods, and nobody else's
        name = item["metadata"]["name"]
        assert selected(item["spec"]["selector"], objects, item["metadata"]["namespace"]) == {name}
        for spread in item["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert selected(spread["labelSelector"], objects) == (tracks if name in tracks else {name})
    services = {service["metadata"]["name"]: service for service in of_kind(objects, "Service")}
    for name, service in services.items():
        behind = selected({"matchLabels": service["spec"]["selector"]}, objects, service["metadata"]["namespace"])
        assert behind == (tracks if name == "fraud-api" else {name.removesuffix("-brokers")})
        assert all(
            {port["targetPort"] for port in service["spec"]["ports"]} <= ports for ports in port_names(behind, objects)
        )
    for item in of_kind(objects, "StatefulSet"):  # the names that its pods go by
        assert item["spec"]["serviceName"] in services
    for budget in of_kind(objects, "PodDisruptionBudget"):
        name = budget["metadata"]["name"]
        assert (
            selected(budget["spec"]["selector"], objects) == (tracks if name == "fraud-api" else {name})
            and budget["spec"]["maxUnavailable"] == 1
        )
    for monitor in of_kind(objects, "ServiceMonitor"):
        [service] = [
            s
            for s in of_kind(objects, "Service")
            if monitor["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
            and monitor["metadata"]["namespace"] == s["metadata"]["namespace"]
        ]
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= {
            port["name"] for port in service["spec"]["ports"]
        }
        pushed = monitor["metadata"]["name"] == "fraud-pushgateway"
        assert all(
            endpoint.get("honorLabels", False) == pushed for endpoint in monitor["spec"]["endpoints"]
        )  # there the job is the one that pushed
        assert "release" in monitor["metadata"]["labels"] and monitor["spec"].get("podTargetLabels", []) == (
            [] if pushed else ["track"]
        )
    for monitor in of_kind(objects, "PodMonitor"):
        watched = selected(monitor["spec"]["selector"], objects)
        asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert (
            watched == CONSUMERS
            and all(asked <= ports for ports in port_names(watched, objects))
            and "release" in monitor["metadata"]["labels"]
        )
        assert all(
            template["metadata"]["labels"][monitor["spec"]["jobLabel"]] == name
            for name, template in consumers(objects).items()
        )
    scalers = of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    scaled = {scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers}
    assert len(scaled) == len(scalers) and scaled == ({"fraud-api", "fraud-stream"} if components else {"fraud-api"})
    # Or every `kubectl apply` would undo the autoscaler's work, and `kubectl scale`'s.
    assert not [
        d["metadata"]["name"]
        for d in of_kind(objects, "Deployment")
        if "replicas" in d["spec"] and d["metadata"]["name"] in scaled | CONSUMERS
    ]


def open_ways(objects) -> tuple[set, set, set]:
    """What the policies let through: between our pods (client, server, port), if both ends allow it; from elsewhere
    (namespace, server, port); to elsewhere (client, port).
    """
    out, taken, from_outside, to_outside = set(), set(), set(), set()
    for policy in of_kind(objects, "NetworkPolicy"):
        namespace, spec = policy["metadata"]["namespace"], policy["spec"]
        ours = selected(spec["podSelector"], objects, namespace)

        def others(peer: dict, namespace: str = namespace) -> tuple[str, set[str]]:
            """Where the other ends are, and which of ours."""
            place = peer.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": namespace}})
            [name] = place["matchLabels"].values()
            inside = name in (SERVING_IN, TRAINING_IN)
            return name, selected(peer["podSelector"], objects, name) if inside else set()

        for rule in spec.get("ingress", []):
            names = {port["port"] for port in rule["ports"]}
            for peer in rule["from"]:
                place, clients = others(peer)
                if place in (SERVING_IN, TRAINING_IN):
                    taken |= {(client, pod, name) for client in clients for pod in ours for name in names}
                else:
                    from_outside |= {(place, pod, name) for pod in ours for name in names}
        for rule in spec.get("egress", []):
            names = {port["port"] for port in rule["ports"]}
            for peer in rule["to"]:
                place, there = others(peer) if "ipBlock" not in peer else ("", set())
                if place in (SERVING_IN, TRAINING_IN):
                    out |= {(pod, server, name) for pod in ours for server in there for name in names}
                else:
                    to_outside |= {(pod, name) for pod in ours for name in names}
    return out & taken, from_outside, to_outside


def closed_to_all(objects) -> None:
    """What no policy lets through is not let through, in both namespaces."""
    everything = [item for item in of_kind(objects, "NetworkPolicy") if item["metadata"]["name"] == "default-deny"]
    assert [item["spec"] for item in everything] == [{"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}] * 2
    assert {item["metadata"]["namespace"] for item in everything} == {SERVING_IN, TRAINING_IN}


@every_overlay
def test_network_is_closed_but_for_what_is_needed(render, overlay, components):
    objects = render(overlay, components)
    closed_to_all(objects)
    elsewhere = (
        {"fraud-kafka-from-keda"} if overlay.endswith("production") else set()
    )  # the brokers are not in this cluster
    for policy in of_kind(objects, "NetworkPolicy"):
        name, namespace, spec = policy["metadata"]["name"], policy["metadata"]["namespace"], policy["spec"]
        if name == "default-deny":
            continue
        ours = selected(spec["podSelector"], objects, namespace)
        assert ours or name in elsewhere, name
        for rule in spec.get("ingress", []):
            assert rule["from"] and all(
                {port["port"] for port in rule["ports"]} <= ports for ports in port_names(ours, objects)
            ), name
        for rule in spec.get("egress", []):
            named = {port["port"] for port in rule["ports"] if isinstance(port["port"], str)}
            there = set.union(set(), *(selected(to["podSelector"], objects, namespace) for to in rule["to"] if named))
            assert (
                rule["to"]
                and bool(there) == bool(named)
                and all(named <= ports for ports in port_names(there, objects))
            ), name
    tracks, streaming = set(api_pods(objects)), set(consumers(objects))
    between, from_outside, to_outside = open_ways(objects)
    decided, outside = {("ingress-nginx", pod, "http") for pod in tracks}, {(pod, 53) for pod in tracks | streaming}
    if overlay.endswith("minikube"):
        assert between == {(pod, "fraud-redis", "redis") for pod in tracks | STORING} | {
            (pod, "fraud-kafka", "kafka") for pod in streaming
        } | {(pod, "fraud-postgres", "postgres") for pod in tracks | {FOLLOWER}}
        assert (
            from_outside == decided | ({("keda", "fraud-kafka", "kafka")} if components else set())
            and to_outside == outside
        )
    elif overlay.endswith("production"):
        assert not between and from_outside == decided | {("monitoring", pod, "http") for pod in tracks} | {
            ("monitoring", pod, "metrics") for pod in streaming
        } | {("monitoring", "fraud-pushgateway", "push")}
        aws, broker = {(pod, 443) for pod in tracks | streaming}, {(pod, 9096) for pod in streaming}
        stored = {(pod, 6379) for pod in tracks | STORING} | {(pod, 5432) for pod in tracks | streaming}
        assert to_outside == outside | aws | broker | stored
    else:
        assert not between and (from_outside, to_outside) == (decided, outside)


@every_overlay
def test_references(render, overlay, components):
    """Volumes, mounts, ConfigMaps, claims, Secrets and accounts exist under the names they are called by."""
    objects = render(overlay, components)
    every = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects}
    assert len(every) == len(objects) and {namespace for _, namespace, _ in every} == {SERVING_IN, TRAINING_IN, None}
    assert {kind for kind, namespace, _ in every if not namespace} <= {"Namespace", "PersistentVolume"}
    for name, template in workloads(objects).items():
        spec, main = template["spec"], container(template)
        place = TRAINING_IN if name in pods(objects, TRAINING_IN) else SERVING_IN
        names = {(kind, one) for kind, namespace, one in every if namespace == place}
        claims = [
            claim["metadata"]["name"]
            for s in of_kind(objects, "StatefulSet")
            if s["metadata"]["name"] == name
            for claim in s["spec"]["volumeClaimTemplates"]
        ]
        assert sorted(mount["name"] for mount in main["volumeMounts"]) == sorted(
            [volume["name"] for volume in spec["volumes"]] + claims
        )
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "secret" in volume:
                assert volume["secret"]["secretName"] in SECRETS
        for variable in main.get("env", []):
            if source := variable.get("valueFrom"):
                reference = source["secretKeyRef"]
                assert reference["key"] in SECRETS[reference["name"]]
                # Without this Secret the API has no cases; only a check of allowed payments needs its last key.
                left_out = reference["name"] == "fraud-cases" and (
                    name in api_pods(objects) or reference["key"] == "check-key"
                )
                assert reference.get("optional", False) == left_out
        if "serviceAccountName" in spec:
            assert ("ServiceAccount", spec["serviceAccountName"]) in names
        else:
            assert name in SERVERS | {"fraud-stream-labels"}  # who asks nobody outside the namespace
    for account in of_kind(objects, "TriggerAuthentication"):
        assert all(source["key"] in SECRETS[source["name"]] for source in account["spec"]["secretTargetRef"])
    for scaled in of_kind(objects, "ScaledObject"):
        assert all(
            ("TriggerAuthentication", SERVING_IN, trigger["authenticationRef"]["name"]) in every
            for trigger in scaled["spec"]["triggers"]
            if "authenticationRef" in trigger
        )
    for claim in of_kind(objects, "PersistentVolumeClaim"):
        [volume] = [
            v for v in of_kind(objects, "PersistentVolume") if v["metadata"]["name"] == claim["spec"]["volumeName"]
        ]
        ours = {key: claim["metadata"][key] for key in ("namespace", "name")}
        assert volume["spec"]["claimRef"] == ours


def asked_secrets(objects) -> set[tuple[str, str]]:
    """Namespace and name of every Secret that an object asks for, wherever in it."""
    found = set()

    def walk(node, namespace: str) -> None:
        if isinstance(node, list):
            for one in node:
                walk(one, namespace)
        elif isinstance(node, dict):
            for key, value in node.items():
                if key in ("secretKeyRef", "credentials", "urlSecret", "username", "password"):
                    found.add((namespace, value["name"]))
                elif key == "secretTargetRef":
                    found.update((namespace, one["name"]) for one in value)
                elif key == "secretName":
                    found.add((namespace, value))
                else:
                    walk(value, namespace)

    for item in objects:
        walk(item.get("spec", {}), item["metadata"].get("namespace", ""))
    return found


SHARED = {"fraud-audit", "fraud-privacy", "fraud-kafka"}  # asked for in both namespaces


def test_secrets_are_in_the_namespace_that_needs_them(render):
    """As the table of docs/kubernetes.md has them; who trains has no key of the API, no store and no cases."""
    objects = render("overlays/production", (*OPTIONAL, *TRAINING))
    asked = asked_secrets(objects) | asked_secrets(render("overlays/minikube"))
    text = (PROJECT / "docs/kubernetes.md").read_text()
    rows = re.findall(r"^\| `(fraud-[a-z-]+)` \| ([^|]+) \|", text.split("| Secret |")[1], re.MULTILINE)
    assert asked == {(place, name) for name, places in rows for place in re.findall("`([a-z-]+)`", places)}
    assert {name for place, name in asked if place == SERVING_IN} & {
        name for place, name in asked if place == TRAINING_IN
    } == SHARED
    assert {name for _, name in asked} == set(SECRETS)
    assert ("fraud", "fraud-signing-key") not in asked


@pytest.mark.parametrize("overlay", WITH_COMPONENTS)
def test_training_and_serving_are_apart(render, overlay):
    """Jobs reach the broker of the cluster and nothing else of what decides, and nothing of that reaches them; beside
    them they reach the registry and the Pushgateway.
    """
    there = () if overlay.endswith("production") else ("pushgateway", "monitoring")
    objects = render(overlay, (*there, "jobs", "mlflow"))
    closed_to_all(objects)
    training, serving = pods(objects, TRAINING_IN), pods(objects, SERVING_IN)
    servers = {"fraud-mlflow", "fraud-pushgateway"}
    jobs = set(training) - servers
    assert len(jobs) == 10 and servers <= training.keys() and {"fraud-api", *CONSUMERS} <= serving.keys()
    between, from_outside, to_outside = open_ways(objects)
    across = {way for way in between if (way[0] in training) != (way[1] in training)}
    broker = {(job, "fraud-kafka", "kafka") for job in jobs}
    assert across == (broker if overlay.endswith("minikube") else set())
    inside = {way for way in between if way[0] in training and way[1] in training}
    assert inside == {(job, "fraud-mlflow", "mlflow") for job in jobs} | {
        (job, "fraud-pushgateway", "push") for job in jobs
    }
    assert {way for way in from_outside if way[1] in training} == {("monitoring", "fraud-pushgateway", "push")}
    assert {pod for pod, _ in to_outside if pod in training} == jobs  # servers call nobody
    for item in objects:
        jobs_own = item["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "jobs"
        if jobs_own or item["metadata"]["name"] in servers:
            assert item["metadata"]["namespace"] == TRAINING_IN, item["metadata"]


def test_the_jobs_know_the_registry(render):
    """Its address, which is trusted without TLS, and the account of jobs; nobody who decides has it."""
    for overlay in WITH_COMPONENTS:
        objects = render(overlay, TRAINING)
        [service] = [item for item in of_kind(objects, "Service") if item["metadata"]["name"] == "fraud-mlflow"]
        [port] = service["spec"]["ports"]
        for item in of_kind(objects, "CronJob"):
            environ = declared_environment(item["spec"]["jobTemplate"]["spec"]["template"])
            settings = load_settings(environ=environ | {"FRAUD_ROOT": str(PROJECT / "k8s/base")})
            assert settings.registry.tracking_uri == f"http://fraud-mlflow.fraud-jobs.svc:{port['port']}"
            assert (environ["MLFLOW_TRACKING_USERNAME"], environ["MLFLOW_TRACKING_PASSWORD"]) == ("jobs", "secret")
        host = f"fraud-mlflow.fraud-jobs.svc:{port['port']}"
        assert host in container(pods(objects)["fraud-mlflow"])["command"][-1].split(",")
        assert ("fraud", "fraud-mlflow") not in asked_secrets(objects)


WRITABLE = {
    "fraud-redis": {"/data"},
    "fraud-pushgateway": {"/data"},
    "fraud-mlflow": {"/mlflow", "/tmp"},
    "fraud-postgres": {"/var/lib/postgresql/data", "/var/run/postgresql", "/tmp"},
    "fraud-api": {"/tmp", "/var/lib/fraud"},
    "fraud-api-canary": {"/tmp", "/var/lib/fraud"},
    "fraud-kafka": {"/var/lib/kafka/data", "/opt/kafka/config", "/opt/kafka/logs", "/tmp"},
}  # Kafka's and PostgreSQL's as in docker-compose.yml


@every_overlay
def test_least_privilege(render, overlay, components):
    objects = render(overlay, components if components == () else (*components, *TRAINING))
    assert not of_kind(objects, "Secret")
    spaces = {item["metadata"]["name"]: item["metadata"]["labels"] for item in of_kind(objects, "Namespace")}
    assert spaces.keys() == {SERVING_IN, TRAINING_IN}
    assert {labels["pod-security.kubernetes.io/enforce"] for labels in spaces.values()} == {"restricted"}
    for name, template in workloads(objects).items():
        spec, main = template["spec"], container(template)
        for before in spec.get("initContainers", []):  # as closed as what comes after it
            assert all(before[key] == main[key] for key in ("image", "securityContext", "volumeMounts"))
            assert before["resources"]["limits"] == main["resources"]["limits"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"] == {
            "type": "RuntimeDefault"
        }
        assert main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert main["resources"]["requests"]["memory"] == main["resources"]["limits"]["memory"]
        writable = {mount["mountPath"] for mount in main["volumeMounts"] if not mount.get("readOnly")}
        assert writable == WRITABLE.get(name, {"/tmp"})
        repository, tag = main["image"].split("/")[-1].split(":", 1)
        assert tag != "latest"
        if name not in SERVERS:
            assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]) == (10001, 10001)
            version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
            assert (
                repository == "fraud-api@sha256"
                if overlay.endswith("production")
                else (repository, tag) == ("fraud-api", version)
            )


SECRET_VALUES = {
    ("fraud-store", "url"): "redis://:secret@fraud-redis:6379/0",
    ("fraud-cases", "url"): "postgresql+psycopg://fraud@fraud-postgres:5432/fraud",
    ("fraud-cases", "password"): "secret",
    ("fraud-cases", "check-key"): "0123456789abcdef",
    ("fraud-kafka", "user"): "fraud",
    ("fraud-kafka", "password"): "secret",
    ("fraud-signing-key", "pem"): "PEM",
    ("fraud-audit", "url"): "postgresql+psycopg://audit:secret@audit-postgres:5432/audit",
    ("fraud-audit", "accounts-url"): "postgresql+psycopg://audit:secret@audit-postgres:5432/accounts",
    ("fraud-audit", "pem"): "PEM",
    ("fraud-privacy", "keys"): f"1:{'00' * 32}",
    ("fraud-pushgateway", "user"): "fraud",
    ("fraud-pushgateway", "password"): "secret",
    ("fraud-mlflow", "jobs"): "secret",
}


def declared_environment(template: dict, secrets: dict[tuple[str, str], str] = SECRET_VALUES) -> dict[str, str]:
    """What the container finds in its environment; the Secrets' values as docs/kubernetes.md has them."""
    sources = {
        variable["name"]: variable["valueFrom"]["secretKeyRef"]
        for variable in container(template)["env"]
        if "valueFrom" in variable
    }
    given = {variable["name"]: variable["value"] for variable in container(template)["env"] if "value" in variable}
    return given | {name: secrets[source["name"], source["key"]] for name, source in sources.items()}


def declared_settings(template: dict, objects, folder: Path) -> tuple[Settings, set[str]]:
    """The settings in force in the container, and which of its variables are none; unknown keys of a section are
    refused.
    """
    environ, main = declared_environment(template), container(template)
    if environ.get("FRAUD_TRUST_PLAIN_HOSTS") == "" and "FRAUD_STORE_URL" in environ:  # production's is over TLS
        environ["FRAUD_STORE_URL"] = environ["FRAUD_STORE_URL"].replace("redis://", "rediss://")
    mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    [settings_map] = [volume["configMap"]["name"] for volume in template["spec"]["volumes"] if "configMap" in volume]
    # Of the same name in both namespaces, and the same.
    [data, _] = [item["data"] for item in of_kind(objects, "ConfigMap") if item["metadata"]["name"] == settings_map]
    assert data.keys() == {"settings.ini"} and environ["FRAUD_ROOT"] == mounts["settings"]
    (folder / "settings.ini").write_text(data["settings.ini"])
    settings = load_settings(environ=environ | {"FRAUD_ROOT": str(folder)})
    used = set(settings.origins.values())
    return settings, {variable for variable in environ if f"environment {variable}" not in used}


def declared_probes(main: dict) -> dict[str, tuple[str, str]]:
    """Path and port of every probe."""
    return {
        probe: (main[f"{probe}Probe"]["httpGet"]["path"], main[f"{probe}Probe"]["httpGet"]["port"])
        for probe in ("startup", "readiness", "liveness")
    }


OF_CASES = {"PGPASSWORD", "FRAUD_CHECK_KEY"}  # variables that are no settings


@every_overlay
def test_settings_load_as_declared(render, tmp_path, overlay, components):
    objects = render(overlay, components)
    for name, template in api_pods(objects).items():
        environ, spec, main = declared_environment(template), template["spec"], container(template)
        mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
        settings, others = declared_settings(template, objects, tmp_path)
        production = overlay.endswith("production")
        keys = {"FRAUD_HEAD_KEY", "FRAUD_PRIVACY_KEY"} if production else set()
        assert others == {"FRAUD_ROOT", "FRAUD_API_KEYS_FILE", *OF_CASES, *keys}
        assert settings.privacy.required == production == bool(load_pseudonyms(settings, environ))
        assert settings.audit.required == production and bool(settings.audit.url) == production
        assert settings.cases.url == SECRET_VALUES["fraud-cases", "url"]
        assert settings.cases.labels == ("store" if overlay == "base" else "topic")  # one of them, whatever the track
        assert Path(settings.cases.outbox).parent == Path(mounts["outbox"])
        assert main["command"] == ["python", "-m", "fraud_pkg.serve.server"]
        assert settings.serve.host == "0.0.0.0" and settings.store.url.startswith(("redis://", "rediss://"))
        assert [(port["name"], port["containerPort"]) for port in main["ports"]] == [("http", settings.serve.port)]
        assert Path(environ["FRAUD_API_KEYS_FILE"]) == Path(mounts["api-keys"], "api-keys")
        wanted = "challenger" if name.endswith("canary") else "champion"
        if overlay != "base":
            assert settings.serve.bundle == (
                f"s3://BUCKET/{wanted}" if overlay.endswith("production") else f"{mounts['models']}/{wanted}"
            )
        asleep = main["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert spec["terminationGracePeriodSeconds"] >= asleep + settings.serve.drain + 5
        probes = declared_probes(main)
        assert probes["liveness"] == ("/healthz", "http")  # never about Redis
        expected = ("degrade", "/readyz", "/healthz") if components else ("fail", "/healthz", "/readyz")
        assert (settings.serve.on_store_error, probes["startup"][0], probes["readiness"][0]) == expected
        assert all(("GET", path) in OPEN for path, _ in probes.values())  # a probe has no key
        assert all(
            main[f"{probe}Probe"]["timeoutSeconds"] > settings.store.timeout
            for probe, (path, _) in probes.items()
            if path == "/readyz"
        )


@every_overlay
def test_stream_settings_load_as_declared(render, tmp_path, overlay, components):
    objects, production = render(overlay, components), overlay.endswith("production")
    services = {
        f"{service['metadata']['name']}.fraud.svc:{port['port']}"
        for service in of_kind(objects, "Service")
        for port in service["spec"]["ports"]
    }
    for name, template in consumers(objects).items():
        environ, spec, main = declared_environment(template), template["spec"], container(template)
        settings, others = declared_settings(template, objects, tmp_path)
        stream = settings.stream
        follows = name == FOLLOWER
        account = {"FRAUD_KAFKA_USER", "FRAUD_KAFKA_PASSWORD"} if production else set()
        audit = {"FRAUD_HEAD_KEY"} if production and not follows else set()
        decides = production and name == "fraud-stream"
        private = {"FRAUD_PRIVACY_KEY"} if decides else set()
        assert others == {"FRAUD_ROOT"} | account | audit | private | (OF_CASES if follows else set())
        assert settings.privacy.required == decides == bool(load_pseudonyms(settings, environ))
        assert settings.audit.required == bool(audit)
        options = client_options(stream, environ)
        if production:
            assert (options["security_protocol"], options["sasl_mechanism"], options["sasl_plain_username"]) == (
                "SASL_SSL",
                "SCRAM-SHA-512",
                "fraud",
            )
            assert (
                stream.bootstrap_servers == tuple(f"BROKER-{number}:9096" for number in (1, 2, 3))
                and stream.replication == 3
            )
        else:
            assert set(stream.bootstrap_servers) <= services and stream.replication == 1
        assert not stream.via  # many share the store
        if follows:
            assert "FRAUD_STORE_URL" not in environ  # no password of what it never asks
            assert (settings.cases.url, settings.cases.labels) == (SECRET_VALUES["fraud-cases", "url"], "topic")
        else:
            assert settings.store.url.startswith(("redis://", "rediss://"))
        assert stream.host == "0.0.0.0" and [(port["name"], port["containerPort"]) for port in main["ports"]] == [
            ("metrics", stream.port)
        ]
        assert main["command"] == [
            "python",
            "-m",
            f"fraud_pkg.stream.{'case_follow' if follows else 'worker'}",
            *(["labels"] if name.endswith("labels") else []),
        ]
        if name != "fraud-stream-labels":
            mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
            assert settings.serve.bundle == ("s3://BUCKET/champion" if production else f"{mounts['models']}/champion")
        else:
            assert not settings.bundle_place.exists()
        assert spec["terminationGracePeriodSeconds"] >= LAST_WAIT + 20
        assert declared_probes(main) == {
            "startup": ("/healthz", "metrics"),
            "readiness": ("/readyz", "metrics"),
            "liveness": ("/healthz", "metrics"),
        }
        assert all(Health(StreamMetrics()).answer(path)[0] != 404 for path in ("/healthz", "/readyz", "/metrics"))
        for scaled in of_kind(objects, "ScaledObject"):
            [trigger] = scaled["spec"]["triggers"]
            given = trigger["metadata"]
            assert (given["consumerGroup"], given["topic"], scaled["spec"]["maxReplicaCount"]) == (
                stream.group,
                stream.transactions,
                stream.partitions,
            )
            assert (
                environ[given["bootstrapServersFromEnv"]].split(",") == list(stream.bootstrap_servers)
                and int(given["lagThreshold"]) > stream.batch
            )
            secured = {"sasl": stream.sasl_mechanism.lower().replace("-", "_").replace("sha_", "sha"), "tls": "enable"}
            assert {key: given[key] for key in ("sasl", "tls") if key in given} == (secured if production else {}) and (
                "authenticationRef" in trigger
            ) == production


def test_settings_copy():
    """kustomize reads no file above its own folder; `make export` copies the settings there."""
    assert (PROJECT / "k8s/base/settings.ini").read_bytes() == (PROJECT / "settings.ini").read_bytes(), (
        "k8s/base/settings.ini is not the project's: make export"
    )


def test_changed_settings_roll_the_pods(render, tmp_path):
    shutil.copytree(PROJECT / "k8s", tmp_path / "k8s")
    with (tmp_path / "k8s/base/settings.ini").open("a") as file:
        file.write("# changed\n")
    done = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "k8s/overlays/minikube")], capture_output=True, text=True, check=True
    )
    changed, before = (
        workloads(yaml.safe_load_all(done.stdout))["fraud-api"],
        workloads(render("overlays/minikube"))["fraud-api"],
    )
    assert changed != before and changed["spec"]["volumes"] != before["spec"]["volumes"]


def mebibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Mi").removesuffix("mb").removesuffix("Gi")) * (
        1024 if quantity.endswith("Gi") else 1
    )


def test_redis_as_declared(render, tmp_path):
    """The store's own configuration and command on a real Redis: it wants the password, answers its probes, and forgets
    nothing when it is killed.
    """
    objects = render("overlays/minikube")
    server = servers.program("redis-server", "redis-server")
    main, password, port = container(workloads(objects)["fraud-redis"]), "0123456789abcdef", servers.free_port()
    [text] = [item["data"]["redis.conf"] for item in of_kind(objects, "ConfigMap") if "redis.conf" in item["data"]]
    limit = dict(line.split() for line in text.splitlines() if line.startswith("maxmemory"))["maxmemory"]
    assert mebibytes(limit) * 2 <= mebibytes(main["resources"]["limits"]["memory"])
    (tmp_path / "redis.conf").write_text(text.replace("dir /data", f"dir {tmp_path}"))
    [configured] = [mount["mountPath"] for mount in main["volumeMounts"] if mount["name"] == "config"]
    program, *arguments = [
        word.replace("$(REDISCLI_AUTH)", password).replace(f"{configured}/", f"{tmp_path}/") for word in main["command"]
    ]
    command = [server, *arguments, "--port", str(port), "--bind", servers.HOST]
    assert program == "redis-server" and [variable["name"] for variable in main["env"]] == ["REDISCLI_AUTH"]

    def probe(name: str, key: str = password) -> int:
        words = (
            " ".join(main[name]["exec"]["command"]).removeprefix("sh -c ").replace("redis-cli", f"redis-cli -p {port}")
        )
        return subprocess.run(
            ["sh", "-c", words], env=os.environ | {"REDISCLI_AUTH": key}, capture_output=True, timeout=10
        ).returncode

    def persistence() -> list[str]:
        command = ["redis-cli", "-p", str(port), "info", "persistence"]
        return subprocess.run(
            command, env=os.environ | {"REDISCLI_AUTH": password}, capture_output=True, text=True, check=True
        ).stdout.split()

    def store(key: str = password):
        return open_store(f"redis://:{key}@{servers.HOST}:{port}/0", RETENTION, 1)

    assert probe("livenessProbe") and probe("readinessProbe")
    with servers.running(command, lambda: probe("readinessProbe") == 0, tmp_path / "redis.log") as process:
        assert (probe("livenessProbe"), probe("livenessProbe", "wrong"), probe("readinessProbe", "wrong")) == (0, 0, 1)
        with pytest.raises(StoreError, match=r"(?i)password|auth"):
            store("wrong").ping()
        assert password not in Path(f"/proc/{process.pid}/cmdline").read_text()
        events = [Transaction(f"t{number}", 10, 100, (Posting(f"account:C{number}"),)) for number in range(100)]
        assert all(store().record(events))
        written = {"aof_buffer_length:0", "aof_pending_bio_fsync:0"}  # what `everysec` promises
        servers.until(lambda: written <= set(persistence()))
        process.send_signal(signal.SIGKILL)
        process.wait()
    with servers.running(command, lambda: probe("readinessProbe") == 0, tmp_path / "redis.log"):
        assert not any(store().record(events))  # it knows them all


@every_overlay
def test_database_of_cases_as_declared(render, overlay, components):
    """The address in the Secret is that of the Service, and the user and the database are those that are made."""
    objects = render(overlay, components)
    if "fraud-postgres" not in workloads(objects):
        assert overlay != "overlays/minikube"
        return
    environ, main = (
        declared_environment(workloads(objects)["fraud-postgres"]),
        container(workloads(objects)["fraud-postgres"]),
    )
    address = make_url(SECRET_VALUES["fraud-cases", "url"])
    [service] = [item for item in of_kind(objects, "Service") if item["metadata"]["name"] == address.host]
    assert [port["port"] for port in service["spec"]["ports"]] == [address.port]
    assert (environ["POSTGRES_USER"], environ["POSTGRES_DB"]) == (address.username, address.database)
    assert address.password is None and environ["POSTGRES_PASSWORD"] == SECRET_VALUES["fraud-cases", "password"]
    composed = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]["postgres"]
    assert main["image"].endswith("/" + composed["image"])
    [data] = [mount["mountPath"] for mount in main["volumeMounts"] if mount["name"] == "data"]
    assert environ["PGDATA"] == composed["environment"]["PGDATA"] and Path(environ["PGDATA"]).parent == Path(data)


def moved(text: str, places: dict[str, str]) -> str:
    """The text with what is declared replaced by where it is here; each of these occurs."""
    assert all(place in text for place in places), text
    return re.sub("|".join(map(re.escape, places)), lambda found: places[found[0]], text)


@contextlib.contextmanager
def broker_as_declared(objects, folder: Path) -> Iterator[str]:
    """The StatefulSet's environment as the image's start script reads it, and a broker of the image's version with what
    comes of it. Only addresses and the volume are others.

    Yields the broker's address."""
    template = workloads(objects)["fraud-kafka"]
    environ, main = declared_environment(template), container(template)
    version = re.search(
        "<version>([0-9.]+)</version>\\s*</dependency>", (PROJECT / "tests/servers/kafka/pom.xml").read_text()
    )[1]
    assert main["image"] == f"docker.io/apache/kafka:{version}"
    assert main["image"].endswith(
        "/" + yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]["kafka"]["image"]
    )
    [volume] = [mount["mountPath"] for mount in main["volumeMounts"] if mount["name"] == "data"]
    [(name, port)] = [(port["name"], port["containerPort"]) for port in main["ports"]]
    inside, local, controller = (servers.free_port() for _ in range(3))
    loopback = {"localhost:9092": f"localhost:{local}"}
    listened = {
        f"INSIDE://:{port}": f"INSIDE://{servers.HOST}:{inside}",
        "localhost:9093": f"localhost:{controller}",
    } | loopback
    advertised = {f"fraud-kafka-0.fraud-kafka-brokers.fraud.svc:{port}": f"{servers.HOST}:{inside}"} | loopback
    environ |= {
        "KAFKA_LISTENERS": moved(environ["KAFKA_LISTENERS"], listened),
        "KAFKA_ADVERTISED_LISTENERS": moved(environ["KAFKA_ADVERTISED_LISTENERS"], advertised),
        "KAFKA_CONTROLLER_QUORUM_VOTERS": moved(environ["KAFKA_CONTROLLER_QUORUM_VOTERS"], {"9093": str(controller)}),
        "KAFKA_LOG_DIRS": moved(environ["KAFKA_LOG_DIRS"], {volume: str(folder / "volume")}),
    }
    heap = environ["KAFKA_HEAP_OPTS"].split()
    assert int(re.fullmatch(r"-Xmx(\d+)m", heap[-1])[1]) * 2 <= mebibytes(
        main["resources"]["limits"]["memory"]
    )  # the other half is for what a JVM needs beside its heap
    java = [servers.program("java", "openjdk-17-jre-headless"), *heap, "-cp", servers.kafka_classpath()]
    for made in ("image", "mounted", "config", "volume"):
        (folder / made).mkdir()
    for file in ("server.properties", "log4j2.yaml", "tools-log4j2.yaml"):
        (folder / "image" / file).touch()
    setup = [
        *java,
        "kafka.docker.KafkaDockerWrapper",
        "setup",
        "--default-configs-dir",
        "image",
        "--mounted-configs-dir",
        "mounted",
        "--final-configs-dir",
        "config",
    ]
    done = subprocess.run(
        setup, cwd=folder, env={"PATH": os.environ["PATH"], **environ}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(main[f"{probe}Probe"]["tcpSocket"] == {"port": name} for probe in ("startup", "liveness", "readiness"))
    with servers.running(
        [*java, "kafka.Kafka", "config/server.properties"],
        servers.answers(inside),
        folder / "kafka.log",
        seconds=60,
        cwd=folder,
    ):
        yield f"{servers.HOST}:{inside}"


def test_stream_as_declared(render, tmp_path):
    """All consumers with their declared commands and variables, and none of this machine's: ready, alive, deciding
    what is sent, with the shared store, and ended by SIGTERM.
    """
    objects = render("overlays/minikube")
    example_bundle(tmp_path / "models/champion")
    with contextlib.ExitStack() as running:
        store, broker, cases = (
            running.enter_context(servers.redis(tmp_path)),
            running.enter_context(broker_as_declared(objects, tmp_path)),
            running.enter_context(servers.postgres(tmp_path)),
        )
        secrets = SECRET_VALUES | {("fraud-store", "url"): store, ("fraud-cases", "url"): cases}
        processes, urls = {}, {}
        for name, template in consumers(objects).items():
            port, settings = servers.free_port(), declared_settings(template, objects, tmp_path)[0]
            environ = declared_environment(template, secrets)
            environ |= {
                "FRAUD_ROOT": str(tmp_path),
                "FRAUD_STREAM_HOST": servers.HOST,
                "FRAUD_STREAM_PORT": str(port),
                "FRAUD_SERVE_BUNDLE": environ["FRAUD_SERVE_BUNDLE"].replace("/models", str(tmp_path / "models")),
                "FRAUD_STREAM_BOOTSTRAP_SERVERS": moved(
                    environ["FRAUD_STREAM_BOOTSTRAP_SERVERS"], {"fraud-kafka.fraud.svc:19092": broker}
                ),
            }
            (python, *arguments), urls[name] = container(template)["command"], f"http://{servers.HOST}:{port}"
            assert python == "python"
            environ |= {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
            processes[name] = running.enter_context(
                servers.running(
                    [sys.executable, *arguments], lambda: True, tmp_path / f"{name}.log", cwd=tmp_path, env=environ
                )
            )

        def probed(name: str, kind: str) -> bool:
            assert processes[name].poll() is None, (tmp_path / f"{name}.log").read_text()
            return servers.status(urls[name] + declared_probes(container(workloads(objects)[name]))[kind][0]) == 200

        for name in processes:
            servers.until(lambda name=name: probed(name, "readiness"), 60, name)
            assert probed(name, "startup") and probed(name, "liveness")
        with contextlib.closing(KafkaProducer(bootstrap_servers=broker)) as producer:
            producer.send(settings.stream.transactions, json.dumps(EXAMPLE).encode()).get(timeout=10)
        servers.until(
            lambda: (
                'fraud_stream_messages_total{outcome="decided"} 1.0'
                in httpx.get(f"{urls['fraud-stream']}/metrics").text
            ),
            10,
        )
        # The example's model blocks it: a case for the record, which the follower makes of the decision.
        servers.until(lambda: cases_of(cases) == [EXAMPLE["transaction_id"]], 15)
        found = open_store(store, RETENTION, 1).read([], [], [EXAMPLE["transaction_id"]])
        assert found.recorded.keys() == {EXAMPLE["transaction_id"]}
        for name, process in processes.items():
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024
            assert peak < mebibytes(container(workloads(objects)[name])["resources"]["limits"]["memory"]), (
                f"{name}: {peak:.0f} MiB"
            )
            process.send_signal(signal.SIGTERM)
        assert {
            name: process.wait(workloads(objects)[name]["spec"]["terminationGracePeriodSeconds"])
            for name, process in processes.items()
        } == dict.fromkeys(CONSUMERS, 0)
    for name in CONSUMERS:  # nothing to complain of, in lines of JSON
        assert all(json.loads(line)["level"] == "INFO" for line in (tmp_path / f"{name}.log").read_text().splitlines())


@pytest.fixture(scope="module")
def checkov() -> Path:
    return environment("checkov", "checkov.lock") / "checkov"


def test_checkov(render, checkov, tmp_path):
    """Every rule passes, or the object says why it does not apply; without a network."""
    for overlay in WITH_COMPONENTS:
        objects = render(overlay, (*OPTIONAL, *TRAINING))
        (tmp_path / f"{Path(overlay).name}.yaml").write_text(yaml.safe_dump_all(objects))
    command = [
        checkov,
        "--directory",
        tmp_path,
        "--framework",
        "kubernetes",
        "--skip-download",
        "--compact",
        "--output",
        "json",
    ]
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    results = json.loads(done.stdout)["results"]
    failed = [f"{check['resource']}: {check['check_id']} {check['check_name']}" for check in results["failed_checks"]]
    assert not failed and done.returncode == 0, "\n".join(failed)
    assert len(results["passed_checks"]) > 300 and not results["parsing_errors"]
    skipped = {
        (check["resource"].split(".")[0], check["check_id"], check["check_result"]["suppress_comment"])
        for check in results["skipped_checks"]
    }
    everywhere = {
        (kind, rule)
        for kind in ("Deployment", "StatefulSet", "CronJob")
        for rule in ("CKV_K8S_15", "CKV_K8S_35", "CKV_K8S_43")
    }
    assert {(kind, rule) for kind, rule, _ in skipped} == everywhere | {
        ("StatefulSet", "CKV_K8S_40"),
        ("CronJob", "CKV_K8S_38"),
    }
    assert all(len(reason) > 20 for *_, reason in skipped)


def test_script_is_clean():
    done = subprocess.run(
        [servers.program("shellcheck", "shellcheck"), str(PROJECT / "k8s/minikube.sh")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


# Minikube itself cannot run in a test. These stand in its place, so that the script's own part is real: its order, its
# files, its Secrets, what it says when something is missing.
STAND_INS = {
    "minikube": """
        [ "$1" != config ] || exit 1
        shift 2; echo "$*" >> log
        case "$1 ${2:-}" in
            "status ") [ -e running ] ;;
            "start "*) touch running ;;
            "image build") [ -e broken ] || echo "docker.io/library/$4" >> images; exit 0 ;;
            "image ls") cat images 2>/dev/null || true ;;
            "cp "*) cp "$FROM/$2" "$HERE/node${3#/data/fraud-models}" ;;
            "ssh --")
                cd node
                eval "$(sed "s|sudo chown [^&]*&& ||; s|sudo ||g; s|/data/fraud-models|$HERE/node|g" <<< "$3")" ;;
        esac""",
    "docker": "[ -e daemon ]",
    "kubectl": """
        [ "$1" != kustomize ] || exec "$KUBECTL" kustomize "$FROM/$2"  # the real one
        [ "$1 $2" = "--context minikube" ] || { echo "another cluster: $*" >&2; exit 1; }
        shift 2
        # Objects name their namespaces, and are refused where another is named.
        if [ "$1 $2" = "apply --filename" ]; then :
        else
            case "$*" in
                "--namespace fraud "* | "--namespace fraud-jobs get secret "* | "--namespace fraud-jobs create "*)
                    shift 2 ;;
                *) echo "another namespace: $*" >&2; exit 1 ;;
            esac
        fi
        echo "$*" >> log
        case "$1 $2" in
            "get secret")
                if [ -z "${4:-}" ]; then [ -e "secret-$3" ]
                else sed -nE "s/^  api-keys: '(.*)'/\\1/p" "secret-$3"; fi ;;
            "create --filename")
                text=$(cat)
                echo "$text" > "secret-$(sed -nE 's/.*name: ([a-z-]+).*/\\1/p' <<< "$text")" ;;
            "apply --filename") [ "$3" != - ] || cat > applied ;;
            "rollout status") [ ! -e unready ] ;;
            "port-forward "*) echo "Forwarding from 127.0.0.1:$API -> 8000"; exec sleep 20 ;;
        esac""",
}
BASICS = (
    "bash",
    "basename",
    "cat",
    "chmod",
    "cp",
    "curl",
    "cut",
    "date",
    "dirname",
    "env",
    "head",
    "mkdir",
    "mv",
    "od",
    "rm",
    "sed",
    "sleep",
    "touch",
    "tr",
)


@pytest.fixture
def minikube(tmp_path):
    """The project with a champion, and a PATH that leads to the stand-ins and to nothing that could start a real
    cluster.
    """
    kubectl = servers.program("kubectl", "kubernetes-client")
    project, programs, here = tmp_path / "project", tmp_path / "programs", tmp_path / "state"
    shutil.copytree(PROJECT / "k8s", project / "k8s")
    shutil.copy(PROJECT / "settings.ini", project)
    example_bundle(project / "models/champion")
    programs.mkdir()
    (here / "node").mkdir(parents=True)
    (here / "daemon").touch()
    for name in BASICS:
        (programs / name).symlink_to(servers.program(name, name))
    for name, text in STAND_INS.items():
        (programs / name).write_text(
            f'#!{programs}/bash\nset -eu\nHERE={here}; KUBECTL={kubectl}\nFROM=$PWD; cd "$HERE"\n{text}\n'
        )
        (programs / name).chmod(0o755)

    def run(port: int = 0, **variables: str) -> subprocess.CompletedProcess:
        environ = {"PATH": str(programs), "API": str(port), **variables}
        return subprocess.run(
            [str(programs / "bash"), "k8s/minikube.sh"],
            cwd=project,
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
        )

    run.project, run.programs, run.here = project, programs, here
    return run


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr.splitlines()[-1]


def test_minikube_says_what_is_missing(minikube):
    for name, words in (
        ("docker", "docker is not installed"),
        ("kubectl", "kubectl is not installed"),
        ("minikube", "minikube is not installed"),
    ):
        (minikube.programs / name).rename(minikube.programs / f"{name}.away")
        assert last_line(minikube()).startswith(f"error: {words}; how to install it: https://")
    for name in STAND_INS:
        (minikube.programs / f"{name}.away").rename(minikube.programs / name)
    (minikube.here / "daemon").unlink()
    assert "the Docker daemon does not answer" in last_line(minikube())
    (minikube.here / "broken").touch()
    assert "the image was not built" in last_line(minikube(MINIKUBE_DRIVER="kvm2"))  # which needs no Docker
    shutil.rmtree(minikube.project / "models")
    assert last_line(minikube()) == "error: models/champion holds no champion (manifest.json); make one with: make run"


def test_minikube_makes_the_accounts_of_the_registry(minikube):
    """In the namespace of the jobs, as soon as the component is among those of the overlay."""
    overlay = minikube.project / "k8s/overlays/minikube/kustomization.yaml"
    content = yaml.safe_load(overlay.read_text())
    content["components"] += ["../../components/jobs", "../../components/mlflow"]
    overlay.write_text(yaml.safe_dump(content))
    (minikube.here / "unready").touch()
    last_line(minikube())
    secret = yaml.safe_load((minikube.here / "secret-fraud-mlflow").read_text())
    kubernetes_validate.validate(secret, VERSION, strict=True)
    assert set(secret["stringData"]) == SECRETS["fraud-mlflow"] and len(set(secret["stringData"].values())) == 3
    images = (minikube.here / "images").read_text().split()
    assert [image.rpartition("/")[2].partition(":")[0] for image in images] == ["fraud-api", "fraud-jobs"]


def test_minikube_up_to_its_door(minikube, tmp_path):
    here = minikube.here
    (here / "broken").touch()
    assert last_line(minikube()) == "error: the image was not built; what went wrong stands above"
    assert not (here / "applied").exists()
    (here / "broken").unlink()
    (here / "unready").touch()
    assert last_line(minikube()).startswith(
        "error: statefulset/fraud-redis is not ready after five minutes; see why with: kubectl "
    )
    (here / "unready").unlink()

    secrets = {name: yaml.safe_load((here / f"secret-{name}").read_text()) for name in MINIKUBE_SECRETS}
    assert {name: set(secret["stringData"]) for name, secret in secrets.items()} == MINIKUBE_SECRETS
    for secret in secrets.values():
        kubernetes_validate.validate(secret, VERSION, strict=True)
    cases = secrets["fraud-cases"]["stringData"]
    assert cases["url"] == SECRET_VALUES["fraud-cases", "url"] and len(cases["password"]) == 48
    store = secrets["fraud-store"]["stringData"]
    assert store["url"] == f"redis://:{store['password']}@fraud-redis:6379/0" and len(store["password"]) == 48
    (tmp_path / "keys").write_text(secrets["fraud-api-keys"]["stringData"]["api-keys"])
    [known] = load_keys({"FRAUD_API_KEYS_FILE": str(tmp_path / "keys")})
    key = (tmp_path / "keys").read_text().strip().partition(":")[2]
    assert digest_of(key) == known.digest

    # Again, with a service behind the address that knows the first run's keys and serves what was copied to the node.
    newer = example_bundle(minikube.project / "models/champion", bias=-13.0).manifest.version
    port = servers.free_port()
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(PROJECT),
        "FRAUD_ROOT": str(PROJECT),
        "FRAUD_SERVE_PORT": str(port),
        "FRAUD_SERVE_BUNDLE": str(here / "node/champion"),
        "FRAUD_SERVE_RELOAD_SECONDS": "0.1",
        "FRAUD_CASES_URL": "",
        "FRAUD_API_KEYS_FILE": str(tmp_path / "keys"),
    }
    with servers.running(
        [sys.executable, "-m", "fraud_pkg.serve.server"],
        lambda: servers.status(f"http://{servers.HOST}:{port}/readyz") == 200,
        tmp_path / "api.log",
        env=environ,
    ):
        done = minikube(port)
        assert done.returncode == 0, done.stdout + done.stderr
        end = time.monotonic() + 10
        while (
            httpx.get(f"http://{servers.HOST}:{port}/model", headers={"X-API-Key": key}).json()["version"] != newer
        ):  # swapped without a restart
            assert time.monotonic() < end
            time.sleep(0.05)
    assert "refused" not in (tmp_path / "api.log").read_text()
    answer = json.loads(done.stdout.split("== a first transaction\n")[1].splitlines()[0])
    assert answer["transaction_id"] == EXAMPLE["transaction_id"] and answer["decision"] in ("allow", "review", "block")
    assert {name: yaml.safe_load((here / f"secret-{name}").read_text()) for name in MINIKUBE_SECRETS} == secrets
    said = done.stdout + done.stderr
    assert (
        not any(value in said for value in (key, store["password"], cases["password"]))
        and "Again, and from your own programs" in said
    )

    log = (here / "log").read_text().splitlines()
    assert log[:2] == ["status", "start --cni=calico --addons=metrics-server"] and "addons enable metrics-server" in log
    built = (here / "images").read_text().splitlines()[-1].removeprefix("docker.io/library/")
    applied = list(yaml.safe_load_all((here / "applied").read_text()))
    assert {container(workloads(applied)[name])["image"] for name in {"fraud-api"} | CONSUMERS} == {built}
    waited = [line.split()[2] for line in log if line.startswith("rollout status")]
    assert set(waited) >= {
        f"{item['kind'].lower()}/{item['metadata']['name']}" for item in of_kind(applied, "Deployment", "StatefulSet")
    }
    assert waited.index("statefulset/fraud-kafka") < waited.index("deployment/fraud-stream")
    assert json.loads(done.stdout.split("--data '")[1].split("' http")[0]) == EXAMPLE
