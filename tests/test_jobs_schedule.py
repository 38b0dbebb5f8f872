"""Jobs that start by themselves: the CronJobs as kustomize renders them into both overlays, the command of one of them
as its container would run it, and GitHub's workflow.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import servers
import test_k8s
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_k8s import PROJECT, container, mebibytes, of_kind, selected, validate

from fraud_pkg.pipeline.compile import compile_jobs, write_targets
from fraud_pkg.pipeline.schedule import LONGEST, command, with_needs
from fraud_pkg.pipeline.schedule import PROJECT as PLACE
from fraud_pkg.core.settings import load_settings

render = test_k8s.render  # a fixture
BIN = Path(sys.executable).parent
WORKFLOW = PROJECT / ".github/workflows/jobs.yml"
JOBS = compile_jobs(PROJECT / "jobs")
OVERLAYS = ("overlays/minikube", "overlays/production")
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.fixture
def objects(render, overlay) -> tuple[dict, ...]:
    return render(overlay, ("jobs",))


def templates(objects) -> dict[str, dict]:
    """The pods of the CronJobs."""
    return {
        item["metadata"]["name"]: item["spec"]["jobTemplate"]["spec"]["template"]
        for item in of_kind(objects, "CronJob")
    }


@every_overlay
def test_schemas(objects):
    for item in objects:
        validate(item)
    cron = of_kind(objects, "CronJob")[0]
    for bad in test_k8s.spoiled(cron):
        with pytest.raises(test_k8s.jsonschema.ValidationError):
            validate(bad)


def test_reader():
    """The pod that docs/kubernetes.md makes to look at the volume reads the jobs' claim and may do nothing else."""
    pod = yaml.safe_load((PROJECT / "k8s/components/jobs/reader.yaml").read_text())
    validate(pod)
    claim = yaml.safe_load((PROJECT / "k8s/components/jobs/volume-claim.yaml").read_text())["metadata"]["name"]
    assert pod["spec"]["volumes"] == [
        {"name": "project", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
    ]
    assert (
        container(pod)["securityContext"]["readOnlyRootFilesystem"] and pod["spec"]["securityContext"]["runAsNonRoot"]
    )


@every_overlay
def test_every_job_has_its_cron_job(objects):
    assert {item["metadata"]["name"] for item in of_kind(objects, "CronJob")} == {
        f"fraud-{job.name.replace('_', '-')}" for job in JOBS
    }
    for job in JOBS:
        [item] = [
            item
            for item in of_kind(objects, "CronJob")
            if item["metadata"]["name"] == f"fraud-{job.name.replace('_', '-')}"
        ]
        spec, run = item["spec"], item["spec"]["jobTemplate"]["spec"]
        main, together = container(run["template"]), with_needs(job, JOBS)
        assert (spec["suspend"], spec["schedule"]) == ((False, job.schedule) if job.schedule else (True, "0 0 1 1 *"))
        assert (spec["concurrencyPolicy"], spec["timeZone"]) == ("Forbid", "Etc/UTC") and spec[
            "startingDeadlineSeconds"
        ] > 60
        assert (
            run["activeDeadlineSeconds"] == sum(one.deadline for one in together) and run["backoffLimit"] == job.retries
        )
        assert run["podFailurePolicy"] and run["template"]["spec"]["restartPolicy"] == "Never"  # which the policy wants
        assert mebibytes(main["resources"]["limits"]["memory"]) == max(
            mebibytes(one.resources.memory) for one in together
        )
        assert main["command"] == ["python", "-m", "fraud_pkg.pipeline.schedule", *command(job)]


@every_overlay
def test_references(objects, overlay):
    names = {
        (item["kind"], item["metadata"]["name"])
        for item in objects
        if item["metadata"].get("namespace") == test_k8s.TRAINING_IN
    }
    for template in templates(objects).values():
        spec, main = template["spec"], container(template)
        assert ("ServiceAccount", spec["serviceAccountName"]) in names
        assert sorted(mount["name"] for mount in main["volumeMounts"]) == sorted(
            volume["name"] for volume in spec["volumes"]
        )
        claims = {
            volume["persistentVolumeClaim"]["claimName"]
            for volume in spec["volumes"]
            if "persistentVolumeClaim" in volume
        }
        assert all(("PersistentVolumeClaim", claim) in names for claim in claims) and "fraud-jobs" in claims
        [settings] = [volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume]
        assert ("ConfigMap", settings) in names  # with the hash of its content
        secrets = [variable["valueFrom"]["secretKeyRef"] for variable in main["env"] if "valueFrom" in variable]
        assert all(secret["key"] in test_k8s.SECRETS[secret["name"]] for secret in secrets) and bool(
            secrets
        ) == overlay.endswith("production")


@every_overlay
def test_least_privilege(objects, overlay):
    for template in templates(objects).values():
        spec, main = template["spec"], container(template)
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"] == {
            "type": "RuntimeDefault"
        }
        assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["fsGroup"]) == (10001, 10001)
        assert main["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert main["resources"]["requests"]["memory"] == main["resources"]["limits"]["memory"]
        writable = {mount["mountPath"] for mount in main["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/volume", "/tmp"} | ({"/models"} if overlay.endswith("minikube") else set())
        repository = main["image"].split("/")[-1].split(":")[0]
        assert repository == ("fraud-jobs@sha256" if overlay.endswith("production") else "fraud-jobs")
    accounts = {item["metadata"]["name"]: item for item in of_kind(objects, "ServiceAccount")}
    assert accounts["fraud-jobs"]["automountServiceAccountToken"] is False


@every_overlay
def test_settings_load_as_declared(objects, overlay, tmp_path):
    [data, _] = [item["data"] for item in of_kind(objects, "ConfigMap") if "settings.ini" in item["data"]]
    (tmp_path / "settings.ini").write_text(data["settings.ini"])
    for template in templates(objects).values():
        environ = test_k8s.declared_environment(template)
        settings = load_settings(environ=environ | {"FRAUD_ROOT": str(tmp_path)})
        assert environ["FRAUD_ROOT"] == PLACE and not settings.pipeline.push
        api = test_k8s.declared_environment(test_k8s.api_pods(objects)["fraud-api"])
        assert environ["FRAUD_CHAMPION_URL"] == api["FRAUD_SERVE_BUNDLE"]  # what is promoted is what is served
        stream = test_k8s.declared_environment(test_k8s.consumers(objects)["fraud-stream"])
        assert {
            name: environ.get(name)
            for name in environ.keys() | stream.keys()
            if "STREAM_BOOTSTRAP" in name or "KAFKA" in name
        } == {name: stream.get(name) for name in stream if "STREAM_BOOTSTRAP" in name or "KAFKA" in name}
    if overlay.endswith("minikube"):  # both are the same folder of the node
        [mount] = [mount for mount in container(template)["volumeMounts"] if mount["name"] == "models"]
        served = [
            volume
            for volume in test_k8s.api_pods(objects)["fraud-api"]["spec"]["volumes"]
            if volume["name"] == "models"
        ]
        [claim] = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in template["spec"]["volumes"]
            if volume["name"] == "models"
        ]
        assert mount["mountPath"] == "/models" and served[0]["persistentVolumeClaim"]["claimName"] == claim
        volumes = {
            item["spec"]["claimRef"]["namespace"]: item["spec"]["hostPath"]["path"]
            for item in of_kind(objects, "PersistentVolume")
        }
        assert volumes.keys() == {"fraud", "fraud-jobs"} and len(set(volumes.values())) == 1


@every_overlay
def test_network(objects, overlay):
    """Nobody reaches a job; elsewhere it reaches DNS, HTTPS and named servers (between ours: test_k8s.py)."""
    labels = [template["metadata"]["labels"].items() for template in templates(objects).values()]
    [ours] = [
        item["spec"]
        for item in of_kind(objects, "NetworkPolicy")
        if item["metadata"]["name"] != "default-deny"
        and selected(item["spec"]["podSelector"], objects, "fraud-jobs") == set(templates(objects))
    ]
    assert ours["policyTypes"] == ["Ingress", "Egress"] and "ingress" not in ours
    rules = [(to, {port["port"] for port in rule["ports"]}) for rule in ours["egress"] for to in rule["to"]]
    assert all(
        ports == {443} and to["ipBlock"]["except"] == ["169.254.169.254/32"]
        for to, ports in rules
        if to.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
    )
    budgets = of_kind(objects, "PodDisruptionBudget", "Service")
    chosen = [item["spec"]["selector"].get("matchLabels", item["spec"]["selector"]) for item in budgets]
    assert not [
        one for one in chosen if any(one.items() <= label for label in labels)
    ]  # no Service sends a job transactions


# The command, as its container runs it


def small_image(folder: Path) -> Path:
    """What the image holds at /pipeline, with two jobs of a second each: a stage that makes a champion, and a job that
    is no stage.
    """
    (folder / "jobs").mkdir(parents=True)
    (folder / ".dvc").mkdir()
    shutil.copytree(PROJECT / "fraud_pkg", folder / "fraud_pkg", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / ".dvc/config", folder / ".dvc/config")
    shutil.copy(PROJECT / ".dvcignore", folder)
    (folder / "settings.ini").write_text("[features]\nengine = local\n")
    stage = """
from unittest import mock
from fraud_pkg.model import example
from fraud_pkg.core.settings import load_settings

def write(*rest, write=example.write_bundle, **named):
    # metrics as the pipeline's bundles have them
    return write(*rest, **named | {"metrics": {"average_precision": {"value": 0.5}}})

with mock.patch.object(example, "write_bundle", write):
    example.example_bundle(load_settings().models_dir / "champion")
print("trained")
"""
    watch = (
        "import time\nfrom fraud_pkg.core.settings import load_settings\nfrom fraud_pkg.core.files import staging_dir\n"
        "with staging_dir(load_settings().reports_dir / 'watch'):\n"
        "    print('watching', flush=True)\n    time.sleep(60)"
    )
    fronts = {
        "train": "outputs: [models/champion]",
        "watch": "stage: false\nschedule: 7 * * * *\noutputs: [reports/watch]",
    }
    for name, code in {"train": stage, "watch": watch}.items():
        text = f"---\nname: {name}\n{fronts[name]}\n---\n# {name}\n> Does its part."
        cells = [new_markdown_cell(text), new_code_cell("", metadata={"tags": ["parameters"]}), new_code_cell(code)]
        (folder / f"jobs/{name}.ipynb").write_text(nbformat.writes(new_notebook(cells=cells)))
    write_targets(folder)
    return folder


@pytest.fixture
def in_container(tmp_path):
    """Runs a compiled CronJob's command with its variables and none of this machine's; only places are others. Nothing
    is written to the image.
    """
    image = small_image(tmp_path / "pipeline")
    before = {path: path.stat().st_mtime_ns for path in image.rglob("*")}
    (tmp_path / "volume").mkdir()
    (tmp_path / "tmp").mkdir()

    def start(name: str) -> subprocess.Popen:
        manifest = yaml.safe_load((image / f"k8s/jobs/{name}.yaml").read_text())
        main = container(manifest["spec"]["jobTemplate"]["spec"]["template"])
        environ = {
            variable["name"]: variable["value"].replace("/volume", f"{tmp_path}/volume") for variable in main["env"]
        }
        environ |= {
            "PATH": f"{BIN}:/usr/bin:/bin",
            "HOME": str(tmp_path / "tmp"),
            "TMPDIR": str(tmp_path / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FRAUD_CHAMPION_URL": str(tmp_path / "served/champion"),
        }
        python, *words = main["command"]
        assert python == "python"
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=image,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    yield start, tmp_path
    assert {path: path.stat().st_mtime_ns for path in image.rglob("*")} == before


def ended(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=120)[0]
    return process.returncode, said


def test_cron_jobs_as_declared(in_container):
    """On an empty volume, and again; what is trained is delivered; a job waits for another one; SIGTERM leaves nothing
    half written and nothing running.
    """
    start, tmp_path = in_container
    project, served = tmp_path / "volume/project", tmp_path / "served/champion"
    code, said = ended(start("train"))
    assert code == 0 and f"is at {served}" in said and "trained" in said, said
    assert (served / "manifest.json").read_bytes() == (project / "models/champion/manifest.json").read_bytes()
    assert (project / "dvc.lock").is_file()
    shutil.rmtree(served)  # a model taken back by hand
    code, said = ended(start("train"))  # itself in any case, as it is asked for
    assert code == 0 and "trained" in said and not served.exists(), said

    watch = start("watch")
    while not (project / "reports").is_dir() or not list((project / "reports").glob(".watch.*.part")):
        assert watch.poll() is None
        time.sleep(0.1)
    second = start("train")
    assert re.fullmatch(r"another job is at work in .*; waiting for it to end\n", second.stdout.readline())
    watch.send_signal(signal.SIGTERM)
    code, said = ended(watch)
    assert code != 0 and "watching" in said, said
    assert json.loads((project / "reports/jobs/watch.json").read_text())["status"] == "interrupted"
    assert not list((project / "reports").glob(".watch.*"))
    assert ended(second)[0] == 0
    with (project / ".turn").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more


# GitHub


def steps() -> Iterator[dict]:
    yield from yaml.safe_load(WORKFLOW.read_text())["jobs"]["run"]["steps"]


def test_workflow_schema():
    done = subprocess.run(
        [BIN / "check-jsonschema", "--builtin-schema", "vendor.github-workflows", WORKFLOW],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflow_asks_for_little():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    [job] = workflow["jobs"].values()
    assert workflow["permissions"] == {"contents": "read"} and "permissions" not in job
    assert workflow["concurrency"]["cancel-in-progress"] is False
    used = [step["uses"] for step in steps() if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", one) for one in used)
    assert [step for step in steps() if "checkout" in step.get("uses", "")][0]["with"]["persist-credentials"] is False
    assert not [
        step for step in steps() if "${{" in step.get("run", "")
    ]  # what others write reaches scripts as variables only


def test_workflow_runs_what_the_front_matter_says():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    on = workflow[True]  # YAML's `on`
    assert [one["cron"] for one in on["schedule"]] == list(dict.fromkeys(job.schedule for job in JOBS if job.schedule))
    assert on["workflow_dispatch"]["inputs"]["job"]["options"] == [job.name for job in JOBS]
    minutes = json.loads(re.search(r"fromJSON\('(.*)'\)", workflow["jobs"]["run"]["timeout-minutes"])[1])
    assert minutes.keys() == {job.name for job in JOBS} | {job.schedule for job in JOBS if job.schedule}
    assert (
        all(minutes[job.name] * 60 > sum(one.deadline for one in with_needs(job, JOBS)) for job in JOBS)
        and max(minutes.values()) <= LONGEST
    )


@pytest.mark.parametrize(
    "asked", [job.name for job in JOBS] + sorted({job.schedule for job in JOBS if job.schedule}) + ["nothing"]
)
def test_workflow_scripts_run(tmp_path, asked):
    """The step with the settings and the one that chooses, in bash as GitHub starts it, with a stand-in for Python."""
    scripts = {step["name"]: step["run"] for step in steps() if "run" in step}
    servers.program("jq", "jq")
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    variables = {"FRAUD_TRAIN_TRIALS": "3", "AWS_REGION": "eu-central-1", "FRAUD_BAD": "1\nPATH=/", "PATH": "/nowhere"}
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "ASKED": asked, "VARIABLES": json.dumps(variables)}
    environ |= {"GITHUB_ENV": str(tmp_path / "env"), "GITHUB_PATH": str(tmp_path / "path")}

    def run(name: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", scripts[name]],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=20,
        )

    assert run("Settings").returncode == 0
    assert (tmp_path / "env").read_text().splitlines() == [
        "FRAUD_TRAIN_TRIALS=3",
        "AWS_REGION=eu-central-1",
    ]
    done, wanted = run("Run"), [job for job in JOBS if asked in (job.name, job.schedule)]
    assert [line.removeprefix("-m fraud_pkg.pipeline.schedule ").split() for line in done.stdout.splitlines()] == [
        command(job) for job in wanted
    ]
    assert done.returncode == (0 if wanted else 1)


TEAM = {"FRAUD_PIPELINE_REMOTE": "s3://team/fraud", "FRAUD_REGISTRY_TRACKING_URI": "https://mlflow.example"}
LOG, STREAM = {"FRAUD_DATA_SOURCE": "s3://team/log.parquet"}, {"FRAUD_STREAM_BOOTSTRAP_SERVERS": "127.0.0.1:9092"}
BY_REMOTE = ["FRAUD_PIPELINE_PUSH=true", "FRAUD_PIPELINE_PULL=true"]


@pytest.mark.parametrize(
    ("variables", "simulated", "environment"),
    [
        ({}, "true", ["FRAUD_PIPELINE_PUSH=false"]),
        ({"FRAUD_PIPELINE_PUSH": "true"}, "true", ["FRAUD_PIPELINE_PUSH=true"]),
        (LOG, None, []),
        (STREAM, None, []),
        (LOG | {"FRAUD_PIPELINE_REMOTE": "s3://team/fraud"}, None, []),
        (LOG | TEAM, "false", BY_REMOTE),
        (STREAM | TEAM, "false", BY_REMOTE),
    ],
)
def test_payments_of_others_stay_out_of_githubs_cache(tmp_path, variables, simulated, environment):
    """Whoever can read a repository can read its cache and its artifacts: they are for simulated data alone."""
    script = next(step["run"] for step in steps() if step.get("id") == "data")
    files = {name: tmp_path / name.lower() for name in ("GITHUB_ENV", "GITHUB_OUTPUT")}
    for file in files.values():
        file.touch()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")}
    environ |= {"PATH": f"{BIN}:{os.environ['PATH']}"} | {name: str(file) for name, file in files.items()} | variables
    given = {"cwd": PROJECT, "env": environ, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script], **given)
    assert done.returncode == (0 if simulated else 1), done.stderr
    assert bool(simulated) != ("FRAUD_PIPELINE_REMOTE" in done.stderr)
    assert files["GITHUB_OUTPUT"].read_text() == (f"simulated={simulated}\n" if simulated else "")
    assert files["GITHUB_ENV"].read_text().splitlines() == environment
    kept = [step for step in steps() if re.search("actions/(cache|upload-artifact)@", step.get("uses", ""))]
    assert len(kept) == 2 and all("steps.data.outputs.simulated == 'true'" in step["if"] for step in kept)


def test_workflow_scripts_are_clean(tmp_path):
    for number, step in enumerate(step for step in steps() if "run" in step):
        (tmp_path / f"{number}.sh").write_text(f"#!/usr/bin/env bash\n{step['run']}")
    done = subprocess.run(
        [servers.program("shellcheck", "shellcheck"), *tmp_path.glob("*.sh")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
