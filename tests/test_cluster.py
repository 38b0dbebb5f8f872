"""The same work on a cluster: a Spark master with two workers of a machine's own kind, and a Kubernetes of one node."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import PROJECT, Workspace
from kubelet import kubernetes
from servers import SparkCluster, free_port, program, spark_cluster

from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.model.mlflow_model import model_rows
from fraud_pkg.core.settings import load_settings

CLUSTER = pytest.mark.long(reason="a Spark cluster: five minutes of two cores")

ON = {"features__engine": "spark", "features__spark_memory": "1g"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with spark_cluster(tmp_path_factory.mktemp("spark")) as started:
        yield started


@pytest.fixture(scope="module")
def apart(finished) -> Workspace:
    """The finished workspace, whose commands write to folders of their own."""
    for name in ("raw", "features"):
        shutil.copytree(finished.root / "data" / name, finished.root / "apart" / name)
    return Workspace(
        finished.root,
        finished.overrides | {"paths.data": "apart", "paths.models": "apart_models", "paths.reports": "apart_reports"},
    )


@pytest.fixture(scope="module")
def lake(finished) -> Path:
    """The raw table in three files, in no order of time."""
    raw = pq.read_table(next((finished.root / "data/raw").glob("*.parquet"))).drop_columns(
        ["sender_balance_after", "receiver_balance_after"]
    )
    folder, third = finished.root / "lake", len(raw) // 3
    folder.mkdir()
    for name, start in (("a", third), ("b", 2 * third), ("c", 0)):
        pq.write_table(raw.slice(start, third if start < 2 * third else None), folder / f"{name}.parquet")
    return folder


@pytest.fixture(scope="module")
def scored(finished, lake) -> Workspace:
    """What the local engine makes of the lake."""
    finished.fraud("score", "lake", "scored", features__engine="local")
    return finished


def parts(folder: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in sorted(folder.glob("part-*.parquet"))}
    assert found
    return found


@CLUSTER
def test_features(finished, apart, cluster):
    """The parts of a cluster are those of local[2], byte for byte."""
    shutil.rmtree(finished.root / "apart/features")
    apart.fraud("features", **ON, features__spark_master=cluster.url, features__partitions=5)
    assert parts(finished.root / "apart/features") == parts(finished.root / "data/features")
    assert all("Finished task" in cluster.log(worker) for worker in (0, 1))


@CLUSTER
def test_training(finished, apart, cluster):
    """Trees that two workers grew are as good as those of one process, and their bundle is of the same kind."""
    apart.fraud(
        "jobs",
        "run",
        "train_xgboost",
        **ON,
        features__spark_master=cluster.url,
        train__engine="spark",
        train__ablation="false",
    )
    alone, together = (load_bundle(finished.root / place / "xgboost").manifest for place in ("models", "apart_models"))
    assert together.params["workers"] == 2 and "workers" not in alone.params and together.version != alone.version
    low, high = (alone.metrics["average_precision"][edge] for edge in ("low", "high"))
    assert low <= together.metrics["average_precision"]["value"] <= high
    assert together.parity < 1e-5 and together.features == alone.features
    assert together.calibration != alone.calibration and together.policy != alone.policy  # fitted to its own scores


@CLUSTER
def test_score(finished, scored, cluster):
    """The scores of a lake: those of the features job and the champion, by either engine, with where they come from."""
    told = finished.fraud("score", "lake", "scored_there", **ON, features__spark_master=cluster.url).stdout
    assert parts(finished.root / "scored_there") == parts(finished.root / "scored")
    champion, table = load_bundle(finished.root / "models/champion"), pq.read_table(finished.root / "scored_there")
    features = pq.read_table(sorted((finished.root / "data/features").glob("part-*")))
    x = model_rows(features.to_pandas(), champion.manifest)
    assert [round(p, 9) for p in champion.probability(x).tolist()] == table["fraud_probability"].to_pylist()
    manifest = finished.json("scored_there/_manifest.json")
    assert set(table["model"].to_pylist()) == {champion.manifest.version} == {manifest["model"]} and set(
        table["run"].to_pylist()
    ) == {manifest["run"]}
    first = table.slice(0, 1).to_pylist()[0]
    assert (first["source_file"], first["source_row"], first["trained_on"]) == (
        "c.parquet",
        1,
        champion.manifest.data["fingerprint"][:12],
    )
    assert f"run {manifest['run']}" in told and sum(manifest["decisions"].values()) == manifest["rows"] == len(table)


def started(workspace: Workspace, *arguments: str, **overrides) -> threading.Thread:
    """A command that runs; what came of it is the thread's `done`."""

    def run() -> None:
        thread.done = workspace.fraud(*arguments, ok=False, **overrides)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def in_the_middle(cluster: SparkCluster, worker: int, thread: threading.Thread, tasks: int, of: int) -> None:
    """Waits until a worker has done so many tasks of the newest application; both together have then done fewer than
    there are.
    """

    def done(number: int) -> int:
        logs = sorted((cluster.folder / f"worker-{number}").glob("app-*/*/stderr"), key=lambda file: file.parts[-3])
        return (
            logs[-1].read_text(errors="replace").count("Finished task")
            if logs and logs[-1].parts[-3] not in before
            else 0
        )

    before = cluster.finished()
    end = time.monotonic() + 300
    while done(worker) < tasks:
        assert thread.is_alive() and time.monotonic() < end
        time.sleep(0.02)
    assert sum(map(done, range(len(cluster.workers)))) < of and thread.is_alive()


@CLUSTER
def test_a_worker_is_killed(finished, scored, cluster):
    """kill -9 of a worker and its executor in the middle: Spark does its tasks again on the other one, and the bytes
    are the same.
    """
    work = started(
        finished, "score", "lake", "scored_anyway", **ON, features__spark_master=cluster.url, features__partitions=120
    )
    in_the_middle(cluster, 0, work, tasks=15, of=120)
    cluster.kill(0)
    work.join()
    assert work.done.returncode == 0, work.done.stderr[-3000:]
    assert cluster.look()["aliveworkers"] == 1
    assert parts(finished.root / "scored_anyway") == parts(finished.root / "scored")


def failed(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return next(line for line in done.stderr.splitlines() if line.startswith("error: "))


@CLUSTER
def test_what_is_wrong_is_said(finished, lake, cluster):
    """A master that does not answer, executors that no worker has memory for."""
    asked = dict(ON, features__spark_master=f"spark://127.0.0.1:{free_port()}")
    assert (
        "[features] spark_master = spark://127.0.0.1:"
        in (said := failed(finished.fraud("score", "lake", "nothing", ok=False, **asked)))
        and "does not answer" in said
    )
    asked |= {"features__spark_master": cluster.url, "features__spark_memory": "2g", "cluster__wait": 4}
    said = failed(finished.fraud("score", "lake", "nothing", ok=False, **asked))
    assert (
        "no worker took the job within 4 s; expected 2 with 2g of memory" in said
        and "lower [features] spark_memory" in said
    )
    assert not (finished.root / "nothing").exists()


@CLUSTER
def test_all_workers_are_lost(finished, lake, cluster):
    """The last worker dies in the middle and none comes back: the command gives up, says so, and leaves nothing half
    written.
    """
    work = started(
        finished,
        "score",
        "lake",
        "lost",
        **ON,
        features__spark_master=cluster.url,
        features__partitions=200,
        cluster__wait=4,
    )
    in_the_middle(cluster, 1, work, tasks=15, of=200)
    for number in (number for number, worker in enumerate(cluster.workers) if worker.poll() is None):
        cluster.kill(number)
    work.join()
    assert "all workers are lost, and none came back within 4 s" in failed(work.done)
    assert not (finished.root / "lost").exists() and not list(finished.root.glob(".lost.*"))


@pytest.fixture(scope="module")
def component(tmp_path_factory) -> list[dict]:
    """An overlay with the jobs and `components/spark`, rendered."""
    shutil.copytree(PROJECT / "k8s", folder := tmp_path_factory.mktemp("kustomize") / "k8s")
    (folder / "overlays/with").mkdir()
    wanted = {"resources": ["../minikube"], "components": ["../../components/jobs", "../../components/spark"]}
    (folder / "overlays/with/kustomization.yaml").write_text(yaml.safe_dump(wanted))
    done = subprocess.run(
        [program("kubectl", "kubernetes-client"), "kustomize", str(folder / "overlays/with")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@CLUSTER
def test_kubernetes(finished, apart, component, monkeypatch, tmp_path):
    """A driver asks Kubernetes for executors: what it asks for is safe and complete, and what runs in that pod does the
    work.
    """
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    shutil.rmtree(finished.root / "apart/features")
    with kubernetes(tmp_path / "node", str(finished.root)) as node:
        apart.fraud(
            "features",
            **ON,
            features__spark_master=node.url,
            cluster__workers=1,
            cluster__image="registry.example/fraud-jobs@sha256:" + "0" * 64,
        )
        (pod,) = node.pods.values()
    assert parts(finished.root / "apart/features") == parts(finished.root / "data/features")
    (role,) = [item for item in component if item["kind"] == "Role"]
    container, spec = pod["spec"]["containers"][0], pod["spec"]
    assert (
        container["image"].startswith("registry.example/fraud-jobs@")
        and container["args"] == ["executor"]
        and pod["metadata"]["namespace"] == "fraud-jobs"
    )
    assert (
        spec["serviceAccountName"] == "fraud-jobs"
        and spec["securityContext"]["runAsNonRoot"]
        and container["securityContext"]["readOnlyRootFilesystem"]
    )
    assert container["resources"]["limits"]["memory"] == "2048Mi" and container["resources"]["requests"]["cpu"] == "1"
    assert {"name": "project", "persistentVolumeClaim": {"claimName": "fraud-jobs", "readOnly": False}} in spec[
        "volumes"
    ]
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}[
        "project"
    ] == "/volume" and container["workingDir"] == "/tmp"
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert given["_SPARK_AUTH_SECRET"]  # without it no executor is let in
    granted = {(verb, resource) for rule in role["rules"] for verb in rule["verbs"] for resource in rule["resources"]}
    assert ("create", "pods") in node.asked <= granted


def test_the_component_makes_drivers(component):
    """With `components/spark` two jobs have that account, the master and a volume of many nodes; nobody else has the
    account.
    """
    (claim,) = [
        item
        for item in component
        if item["kind"] == "PersistentVolumeClaim" and item["metadata"]["name"] == "fraud-jobs"
    ]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    drivers = {}
    for item in component:
        pod = item["spec"]["jobTemplate"]["spec"]["template"]["spec"] if item["kind"] == "CronJob" else {}
        if pod.get("serviceAccountName") == "fraud-spark" and pod["automountServiceAccountToken"]:
            drivers[item["metadata"]["name"]] = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert (
        set(drivers) == {"fraud-features", "fraud-train-xgboost"}
        and drivers["fraud-train-xgboost"]["FRAUD_TRAIN_ENGINE"] == "spark"
    )
    for environ in drivers.values():
        given = load_settings(
            file=PROJECT / "k8s/base/settings.ini",
            environ={name: value for name, value in environ.items() if name.startswith("FRAUD_") and value},
        )
        assert (
            given.features.spark_master == "k8s://https://kubernetes.default.svc:443"
            and given.cluster.namespace == "fraud-jobs"
        )


def test_an_executor_without_a_driver():
    done = subprocess.run(
        [sys.executable, "-m", "fraud_pkg.cli", "executor"],
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert "no SPARK_DRIVER_URL in the environment" in failed(done)
