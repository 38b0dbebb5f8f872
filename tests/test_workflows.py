"""What GitHub and AWS would be told, without either: workflows, infrastructure, supply chain."""

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import servers
import yaml
from conftest import PROJECT
from tools import environment, go_main, go_program, missing, terraform_init

WORKFLOWS = sorted((PROJECT / ".github/workflows").glob("*.yml"))
SCRIPTS = PROJECT / ".github/scripts"
BIN = Path(sys.executable).parent
JOBS = [(path.name, name, job) for path in WORKFLOWS for name, job in yaml.safe_load(path.read_text())["jobs"].items()]
STEPS = [(f"{file}: {name}", step) for file, name, job in JOBS for step in job.get("steps", ())]


def run(*command, ok: bool = True, **more) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, **more)
    assert done.returncode == 0 or not ok, (
        f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done


def script(name: str):
    """A script of the workflows, as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> Path:
    return environment("hooks", "workflows.lock")


# Workflows


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", "workflows/*.yml"),
        ("vendor.dependabot", "dependabot.yml"),
        ("vendor.github-issue-forms", "ISSUE_TEMPLATE/[!c]*.yml"),
        ("vendor.github-issue-config", "ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_schemas(schema, pattern):
    files = list((PROJECT / ".github").glob(pattern))
    assert files
    run(BIN / "check-jsonschema", "--builtin-schema", schema, *files)


def test_actionlint():
    """Expressions, contexts, inputs of actions, and shellcheck over every `run`."""
    servers.program("shellcheck", "shellcheck")
    run(go_program("github.com/rhysd/actionlint/cmd/actionlint@v1.7.7"), "-color=false", *WORKFLOWS)


def test_zizmor(hooks):
    """No finding; what is ignored says why."""
    run(hooks / "zizmor", "--offline", "--no-progress", PROJECT / ".github")
    ignored = [line for path in WORKFLOWS for line in path.read_text().splitlines() if "zizmor: ignore" in line]
    assert all(re.search(r"# zizmor: ignore\[[a-z-]+\] .{20,}", line) for line in ignored)
    assert not list((PROJECT / ".github").glob("zizmor.y*ml"))


def test_actions_are_pinned_and_permissions_are_least():
    pins = {}
    for path in WORKFLOWS:
        for line in re.findall(r"uses: (?!\./)(.*)", path.read_text()):
            action, commit = re.fullmatch(r"([\w./-]+)@([0-9a-f]{40} # v[\d.]+)", line).groups()
            assert pins.setdefault(action, commit) == commit, f"{path.name}: {action} is pinned twice"
        assert yaml.safe_load(path.read_text())["permissions"] in ({}, {"contents": "read"})
    for file, name, job in JOBS:
        assert "uses" in job or "timeout-minutes" in job, f"{file}: {name}"
    writing = {
        (file, name): {scope for scope, level in job.get("permissions", {}).items() if level == "write"}
        for file, name, job in JOBS
    }
    assert {place: scopes for place, scopes in writing.items() if scopes} == {
        ("ci.yml", "comment"): {"pull-requests"},
        ("cd.yml", "ci"): {"pull-requests"},
        ("cd.yml", "images"): {"packages", "id-token"},
        ("cd.yml", "lambda"): {"id-token"},
        ("pages.yml", "deploy"): {"pages", "id-token"},
        ("release.yml", "build"): {"id-token", "attestations"},
        ("release.yml", "publish"): {"contents"},
    }
    for place, step in STEPS:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False, place
            assert place not in ("ci.yml: comment", "release.yml: publish"), f"{place} runs nothing of the repository"


def test_variables_and_secrets_are_told():
    """A fork has to set what the table says, and nothing else; what Terraform knows it says."""
    table = (PROJECT / "docs/releasing.md").read_text()
    text = "\n".join(path.read_text() for path in WORKFLOWS)
    used = {name for name in re.findall(r"(?:vars|secrets)\.([A-Z_]+)", text)}
    told = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    assert used <= told, used - told
    outputs = set(re.findall(r'^output "([A-Z_]+)"', (PROJECT / "infra/aws/outputs.tf").read_text(), re.MULTILINE))
    assert outputs <= used | {"FRAUD_CHAMPION_URL"} and {"AWS_DEPLOY_ROLES", "FRAUD_MODELS_BUCKET"} <= outputs


# The steps of ci.yml, here

ROW = {
    "name": "xgboost",
    "kind": "contender",
    "version": "6b43b72b7114",
    "metrics": {"average_precision": {"value": 0.376, "low": 0.245, "high": 0.496}},
}
BAKE_OFF = {"champion": "6b43b72b7114", "rows": [ROW]}
PIPELINE = "The pipeline on a small simulation"  # what tests/test_pipeline.py runs too


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clean clone, with the environment that is there."""
    if not (PROJECT / ".venv/.ready").exists() or run("git", "-C", PROJECT, "rev-parse", ok=False).returncode:
        pytest.skip("needs a git repository and the .venv that make setup makes")
    folder = tmp_path_factory.mktemp("clone") / "project"
    run("git", "clone", "--quiet", PROJECT, folder)
    long_ago = (PROJECT / ".venv/.ready").stat().st_mtime - 60
    for file in run("git", "ls-files", cwd=folder).stdout.splitlines():
        os.utime(folder / file, (long_ago, long_ago))  # so that make finds .venv ready
    (folder / ".venv").symlink_to(PROJECT / ".venv")
    (folder / ".git/info/exclude").write_text("/.venv\n")
    return folder


def commands_of(folder: Path, job: str, scratch: Path) -> list[str]:
    """Runs the `run` steps of a job of ci.yml in order, as a runner does; the names of those that ran."""
    files = {name: scratch / name for name in ("GITHUB_ENV", "GITHUB_PATH", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.touch()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("FRAUD_", "GITHUB_"))} | {
        "CI": "true",
        "PYTHONPATH": str(folder),
    }
    environ |= {name: str(file) for name, file in files.items()}
    ran = []
    for step in yaml.safe_load((folder / ".github/workflows/ci.yml").read_text())["jobs"][job]["steps"]:
        if "run" not in step:
            continue
        path = os.pathsep.join([*reversed(files["GITHUB_PATH"].read_text().split("\n")[:-1]), os.environ["PATH"]])
        more = dict(line.split("=", 1) for line in files["GITHUB_ENV"].read_text().splitlines())
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environ | more | step.get("env", {}) | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, f"{step['name']}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        ran.append(step["name"])
    return ran


def test_the_bake_off_as_a_table(tmp_path):
    found = tmp_path / "reports/bakeoff/bakeoff.json"
    found.parent.mkdir(parents=True)
    found.write_text(json.dumps(BAKE_OFF))
    table = run(sys.executable, SCRIPTS / "bake_off.py", cwd=tmp_path).stdout
    assert "xgboost *" in table and "average precision" in table


@pytest.mark.long(reason="a set-up, the checks and a pipeline on a clone; make test runs the same things one by one")
def test_every_step_of_ci_runs_on_a_clean_clone(clone, tmp_path):
    ran = commands_of(clone, "check", tmp_path)
    assert ran[:3] == ["Set up", "Lint", "Generated files are what the notebooks say"]
    assert PIPELINE in ran and ran[-1] == "The bake-off"
    table = (clone / "bake-off.txt").read_text()
    assert "xgboost" in table and "average precision" in table
    assert table in (tmp_path / "GITHUB_STEP_SUMMARY").read_text()


def test_the_comment_stays_in_its_block(tmp_path):
    """What a pull request's code puts into its table is text, and not too much of it."""
    step = next(step for place, step in STEPS if place == "ci.yml: comment" and "run" in step)
    (tmp_path / "bake-off.txt").write_text(
        "xgboost 0.4\n```\n@everyone ![](https://example.org/x.png)\n" + "x" * 50_000
    )
    (tmp_path / "gh").write_text('#!/bin/sh\necho "$@" > said\n')
    (tmp_path / "gh").chmod(0o755)
    run(
        "bash",
        "-eo",
        "pipefail",
        "-c",
        step["run"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "NUMBER": "7"},
    )
    comment = (tmp_path / "comment.md").read_text()
    assert comment.count("```") == 2 and comment.endswith("```\n") and len(comment) < 21_000
    assert (tmp_path / "said").read_text() == "pr comment 7 --body-file comment.md --edit-last --create-if-none\n"


@pytest.mark.long(reason="every file scanned for secrets, a minute; each commit scans its own")
def test_pre_commit(hooks, clone, tmp_path):
    """Every hook on a clean clone: over every file but the notebooks, which are large, and over one of these."""
    files = [
        file
        for file in run("git", "ls-files", cwd=clone).stdout.splitlines()
        if not file.endswith(".ipynb") or file == "nbs/features/01_kernel.ipynb"
    ]
    environ = os.environ | {"PRE_COMMIT_HOME": str(tmp_path), "PYTHONPATH": str(clone)}
    done = run(hooks / "pre-commit", "run", "--color", "never", "--files", *files, cwd=clone, env=environ, ok=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("Passed") == 4
    (clone / "leak.py").write_text('aws = "AKIA' + "IOSFODNN7EXAMPL2" + '"\n')
    found = run(hooks / "detect-secrets-hook", "--baseline", ".secrets.baseline", "leak.py", cwd=clone, ok=False)
    assert found.returncode == 1 and "AWS Access Key" in found.stdout


# Infrastructure

INFRA = PROJECT / "infra/aws"
GIVEN = ("-var", "region=eu-central-1", "-var", "repository=owner/name", "-var", "name=acme")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The configuration as it is, initialised."""
    folder = tmp_path_factory.mktemp("terraform")
    shutil.copytree(INFRA, folder / "aws", ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    return folder / "aws", terraform_init(folder / "aws", folder / "rc")


def test_terraform_is_valid(checked):
    folder, environ = checked
    run("terraform", f"-chdir={folder}", "fmt", "-check", "-recursive", "-diff", env=environ)
    run("terraform", f"-chdir={folder}", "validate", "-no-color", env=environ)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repository", "owner/*"),
        ("branch", "*"),
        ("name", "Acme"),
        ("region", "europe"),
        ("stages", '["DEV"]'),
        ("code_signing", "on"),
    ],
)
def test_terraform_refuses(checked, tmp_path, name, value):
    shutil.copy(INFRA / "variables.tf", tmp_path)  # variables need no provider
    given = {"region": "eu-central-1", "repository": "owner/name", "name": "acme"} | {name: value}
    words = [word for pair in given.items() for word in ("-var", "=".join(pair))]
    done = run("terraform", f"-chdir={tmp_path}", "plan", "-no-color", "-input=false", *words, env=checked[1], ok=False)
    assert done.returncode == 1 and "Expected" in done.stderr and f'variable "{name}"' in done.stderr, done.stderr


@pytest.fixture(scope="module")
def account(checked, tmp_path_factory):
    """An account (moto) to which the configuration has been applied; the environment that leads there, and the
    outputs.
    """
    folder, environ = checked
    applied = tmp_path_factory.mktemp("applied")
    shutil.copytree(folder, applied, dirs_exist_ok=True, symlinks=True)
    (applied / "bucket/lifecycle.tf").unlink()  # the provider waits a minute for a lifecycle to settle
    (applied / "override.tf").write_text('provider "aws" {\n  s3_use_path_style = true\n}\n')
    with servers.moto(tmp_path_factory.mktemp("moto")) as aws:
        run(
            "terraform",
            f"-chdir={applied}",
            "apply",
            "-no-color",
            "-auto-approve",
            "-input=false",
            *GIVEN,
            env=environ | aws,
        )
        again = run(
            "terraform",
            f"-chdir={applied}",
            "plan",
            "-no-color",
            "-detailed-exitcode",
            "-input=false",
            *GIVEN,
            env=environ | aws,
        )
        assert "No changes" in again.stdout
        outputs = json.loads(run("terraform", f"-chdir={applied}", "output", "-json", env=environ).stdout)
        yield aws, {name: found["value"] for name, found in outputs.items()}


@pytest.fixture
def client(account, monkeypatch):
    """boto3 in that account."""
    import boto3

    for name, value in account[0].items():
        monkeypatch.setenv(name, value)
    return boto3.client


def test_buckets_are_closed(client, account):
    s3 = client("s3")
    for bucket in ("fraud-models-acme", "fraud-dvc-acme"):
        assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
        assert all(s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"].values())
        assert (
            s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"][0][
                "ApplyServerSideEncryptionByDefault"
            ]["SSEAlgorithm"]
            == "AES256"
        )
        (statement,) = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
        assert statement["Effect"] == "Deny" and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert account[1]["FRAUD_CHAMPION_URL"] == "s3://fraud-models-acme/champion"


def test_store_is_the_one_the_package_makes(client):
    """Key and time to live are those of `create_table`, and the store takes it as it is."""
    from fraud_pkg.store.dynamodb import create_table
    from fraud_pkg.store.open import open_store

    create_table("made")
    dynamodb = client("dynamodb")

    def shape(table):
        found = dynamodb.describe_table(TableName=table)["Table"]
        life = dynamodb.describe_time_to_live(TableName=table)["TimeToLiveDescription"]
        keys = [sorted(map(str, found[part])) for part in ("KeySchema", "AttributeDefinitions")]
        return keys, found["BillingModeSummary"]["BillingMode"], life["TimeToLiveStatus"], life["AttributeName"]

    for stage in ("dev", "prod"):
        assert shape(f"fraud-store-{stage}") == shape("made")
        open_store(f"dynamodb://fraud-store-{stage}", 720, 5).ping()


def test_functions_can_log(client):
    """The group that a function writes to is there: its policy lets it make streams, and no group."""
    groups = {
        found["logGroupName"]: found["retentionInDays"] for found in client("logs").describe_log_groups()["logGroups"]
    }
    for stage in ("dev", "prod"):
        (statement,) = (
            s
            for s in json.loads((PROJECT / f"chalice_app/.chalice/policy-{stage}.json").read_text())["Statement"]
            if s["Sid"] == "Logs"
        )
        assert groups[statement["Resource"].split(":log-group:")[1].removesuffix(":*")] == 90


def test_images_keep_their_tags(client):
    for found in client("ecr").describe_repositories()["repositories"]:
        assert found["imageTagMutability"] == "IMMUTABLE" and found["imageScanningConfiguration"]["scanOnPush"]


def policy(client, role: str) -> list[dict]:
    iam = client("iam")
    (name,) = iam.list_role_policies(RoleName=role)["PolicyNames"]
    found = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
    return (json.loads(found) if isinstance(found, str) else found)["Statement"]


def test_roles_are_for_one_repository(client):
    """Its branch may push images, its environments may deploy; no pull request, no other repository."""
    iam = client("iam")
    subjects = {
        "fraud-ci-images": {"repo:owner/name:ref:refs/heads/main"},
        "fraud-ci-deploy-dev": {"repo:owner/name:environment:dev"},
        "fraud-ci-deploy-prod": {"repo:owner/name:environment:prod"},
    }
    for role, expected in subjects.items():
        (statement,) = iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]["Statement"]
        assert list(statement["Condition"]) == ["StringEquals"]
        condition = statement["Condition"]["StringEquals"]
        found = condition["token.actions.githubusercontent.com:sub"]
        assert ({found} if isinstance(found, str) else set(found)) == expected
        assert condition["token.actions.githubusercontent.com:aud"] == "sts.amazonaws.com"
        for rule in policy(client, role):
            assert not any("*" in action for action in rule["Action"])
            assert rule["Resource"] != "*" or rule["Action"] == ["ecr:GetAuthorizationToken"]
    actions = {action for rule in policy(client, "fraud-ci-deploy-prod") for action in rule["Action"]}
    assert not {
        action
        for action in actions
        if re.search(r"iam:(Create|Attach|Delete|Update)|Delete(Function|Table|Object|Bucket)$", action)
    }


def boundary(client, stage: str) -> str:
    return f"arn:aws:iam::{client('sts').get_caller_identity()['Account']}:policy/fraud-function-boundary-{stage}"


def allowed_by(client, arn: str) -> list[dict]:
    return client("iam").get_policy_version(PolicyArn=arn, VersionId="v1")["PolicyVersion"]["Document"]["Statement"]


def allows(rules: list[dict], action: str, resource: str) -> bool:
    return any(
        action in rule["Action"] and any(fnmatchcase(resource, pattern) for pattern in listed(rule["Resource"]))
        for rule in rules
    )


def listed(resources: str | list[str]) -> list[str]:
    return [resources] if isinstance(resources, str) else resources


@pytest.mark.parametrize("stage", ["dev", "prod"])
def test_functions_stay_within_their_boundary(client, stage):
    """The boundary allows what the stage's policy asks for, and its deploy role may write no policy without it."""
    arn = boundary(client, stage)
    role = client("iam").get_role(RoleName=f"fraud-{stage}-api_handler")["Role"]
    assert role["PermissionsBoundary"]["PermissionsBoundaryArn"] == arn
    (rule,) = (rule for rule in policy(client, f"fraud-ci-deploy-{stage}") if "iam:PutRolePolicy" in rule["Action"])
    assert rule["Condition"] == {"StringEquals": {"iam:PermissionsBoundary": arn}}
    rules = allowed_by(client, arn)
    for asked in json.loads((PROJECT / f"chalice_app/.chalice/policy-{stage}.json").read_text())["Statement"]:
        for action, resource in itertools.product(asked["Action"], listed(asked["Resource"])):
            named = resource.replace(":*:*:", ":eu-central-1:123456789012:").replace(
                "fraud-models-*", "fraud-models-acme"
            )
            assert allows(rules, action, named), f"{stage}: {action} on {named}"


@pytest.mark.parametrize(("stage", "other"), [("dev", "prod"), ("prod", "dev")])
def test_a_stage_reaches_no_other(client, stage, other):
    """Neither who deploys it nor its function: code, policies, bundles, state, keys, store and logs of the other."""
    deploys, function = policy(client, f"fraud-ci-deploy-{stage}"), allowed_by(client, boundary(client, stage))
    here = "eu-central-1:123456789012"
    of = {
        "lambda:UpdateFunctionCode": f"arn:aws:lambda:{here}:function:fraud-%s",
        "iam:PutRolePolicy": "arn:aws:iam::123456789012:role/fraud-%s-api_handler",
        "iam:PassRole": "arn:aws:iam::123456789012:role/fraud-%s-api_handler",
        "s3:PutObject": "arn:aws:s3:::fraud-models-acme/%s/x/model.onnx",
        "s3:GetObject": "arn:aws:s3:::fraud-models-acme/state/%s.json",
        "logs:PutRetentionPolicy": f"arn:aws:logs:{here}:log-group:/aws/lambda/fraud-%s",
        "dynamodb:DescribeTable": f"arn:aws:dynamodb:{here}:table/fraud-store-%s",
    }
    for action, resource in of.items():
        assert allows(deploys, action, resource % stage) and not allows(deploys, action, resource % other), action
    assert not allows(deploys, "s3:PutObject", "arn:aws:s3:::fraud-models-acme/champion/manifest.json")
    for action, resource in {
        "ssm:GetParameter": f"arn:aws:ssm:{here}:parameter/fraud/%s/api-keys",
        "dynamodb:PutItem": f"arn:aws:dynamodb:{here}:table/fraud-store-%s",
        "s3:GetObject": "arn:aws:s3:::fraud-models-acme/%s/x/model.onnx",
    }.items():
        assert allows(function, action, resource % stage) and not allows(function, action, resource % other), action


RECORD = """
import sys
from botocore.client import BaseClient
call = BaseClient._make_api_call
def recorded(self, operation, arguments):
    print("called", self.meta.service_model.service_id, operation, flush=True)
    return call(self, operation, arguments)
BaseClient._make_api_call = recorded
from chalice.cli import main
main()
"""
VERBS = {"Get": "GET", "Import": "POST", "Create": "POST", "Put": "PUT", "Update": "PATCH"}


def test_deploy_role_may_do_what_chalice_does(client, account, tmp_path):
    """Both deployments of a stage, the first and the next, with the role that Terraform made for the function."""
    app = tmp_path / "app"
    (app / ".chalice").mkdir(parents=True)
    for name in ("config.json", "policy-dev.json"):
        shutil.copy(PROJECT / "chalice_app/.chalice" / name, app / ".chalice")
    (app / "app.py").write_text(
        'from chalice import Chalice\napp = Chalice(app_name="fraud")\n'
        '@app.route("/healthz")\ndef alive():\n    return {}\n'
    )
    called = set()
    for answer in ("{}", "{'again': 1}"):
        (app / "app.py").write_text((app / "app.py").read_text().replace("{}", answer))
        done = run(
            sys.executable,
            "-c",
            RECORD,
            "--project-dir",
            app,
            "deploy",
            "--stage",
            "dev",
            "--no-autogen-policy",
            cwd=app,
            env=os.environ | account[0],
        )
        lines = done.stdout.replace("API Gateway", "apigateway").replace("CloudWatch Logs", "logs").splitlines()
        called |= {tuple(line.split()[1:]) for line in lines if line.startswith("called ")}
    allowed = {action for rule in policy(client, "fraud-ci-deploy-dev") for action in rule["Action"]}
    needed = {
        f"apigateway:{VERBS[re.match('[A-Z][a-z]+', operation)[0]]}"
        if service == "apigateway"
        else f"{service.lower()}:{operation}"
        for service, operation in called
    }
    assert needed <= allowed, needed - allowed
    assert {
        "lambda:CreateFunction",
        "lambda:UpdateFunctionCode",
        "iam:PutRolePolicy",
        "apigateway:POST",
        "apigateway:PUT",
    } <= needed


@pytest.mark.long(reason="a plan and an apply more; make test validates the configuration")
def test_aws_asks_for_signed_code(checked, account, client, tmp_path):
    """Planned, as moto has no code signing configurations: one for each stage, by its own profile, and no deploy role
    may take it from the function. moto has profiles, so those are made.
    """
    folder, environ = checked
    planned = tmp_path / "planned"
    shutil.copytree(folder, planned, symlinks=True)
    command = ["terraform", f"-chdir={planned}"]
    given = [*GIVEN, "-var", "code_signing=Enforce"]
    run(*command, "plan", "-no-color", "-input=false", "-out=plan", *given, env=environ | account[0])
    shown = json.loads(run(*command, "show", "-json", "plan", env=environ | account[0]).stdout)
    made = {change["address"]: change["change"]["after"] for change in shown["resource_changes"]}
    expressions = {
        found["address"]: found.get("expressions") for found in shown["configuration"]["root_module"]["resources"]
    }
    for stage in ("dev", "prod"):
        config = made[f'aws_lambda_code_signing_config.package["{stage}"]']
        assert config["policies"] == [{"untrusted_artifact_on_deployment": "Enforce"}]
        profile = made[f'aws_signer_signing_profile.package["{stage}"]']
        assert (profile["name"], profile["platform_id"]) == (f"fraud_{stage}", "AWSLambda-SHA384-ECDSA")
        actions = {action for rule in policy(client, f"fraud-ci-deploy-{stage}") for action in rule["Action"]}
        assert not {action for action in actions if "CodeSigning" in action or action.startswith("signer:")}
    (publishers,) = expressions["aws_lambda_code_signing_config.package"]["allowed_publishers"]
    assert "aws_signer_signing_profile.package" in publishers["signing_profile_version_arns"]["references"]
    target = ["-target=aws_signer_signing_profile.package", "-auto-approve", "-input=false", "-no-color"]
    run(*command, "apply", *target, *given, env=environ | account[0])
    assert client("signer").get_signing_profile(profileName="fraud_prod")["platformId"] == "AWSLambda-SHA384-ECDSA"


def test_a_stage_is_packed_signed_and_deployed_as_it_was_signed():
    """The key is there for the step that packs alone; what is deployed is that folder."""
    steps = {
        step.get("id") or step["name"]: step for place, step in STEPS if place == "cd.yml: lambda" and "run" in step
    }
    packs = next(step for step in steps.values() if "fraud deploy package" in step["run"])
    place = packs["run"].split()[3]
    assert steps["deploy"]["run"] == f'fraud deploy lambda --stage "$STAGE" --package {place}'
    assert list(packs["env"]) == ["FRAUD_SIGNING_KEY"] and "FRAUD_PACKAGE_KEY" in packs["env"]["FRAUD_SIGNING_KEY"]
    assert [name for name, step in steps.items() if "KEY" in str(step.get("env", ""))] == [packs["name"], "smoke"]
    (kept,) = (step for step in (step for place, step in STEPS if place == "cd.yml: lambda") if "artifact" in str(step))
    assert kept["with"]["path"].splitlines() == [
        "${{ runner.temp }}/package/sbom.cdx.json",
        "${{ runner.temp }}/package/deployment.sig",
    ]


def test_checkov_has_nothing_against_it(tmp_path):
    """Every rule passes, or the configuration says why it does not apply."""
    done = run(
        environment("checkov", "checkov.lock") / "checkov",
        "--directory",
        INFRA,
        "--framework",
        "terraform",
        "--skip-download",
        "--compact",
        "--output",
        "json",
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        ok=False,
    )
    results = json.loads(done.stdout)["results"]
    assert (
        not [f"{check['resource']}: {check['check_id']} {check['check_name']}" for check in results["failed_checks"]]
        and done.returncode == 0
    )
    assert len(results["passed_checks"]) > 80 and not results["parsing_errors"]
    assert all(len(check["check_result"]["suppress_comment"]) > 30 for check in results["skipped_checks"])


def test_only_images_that_cd_has_signed_are_admitted():
    """The policy for Kyverno names the images of the overlay and the workflow that signs."""
    policy = yaml.safe_load((PROJECT / "k8s/admission/kyverno/signed-images.yaml").read_text())
    overlay = yaml.safe_load((PROJECT / "k8s/overlays/production/kustomization.yaml").read_text())
    verify, named = policy["spec"]["rules"]
    assert policy["spec"]["validationFailureAction"] == "Enforce" and policy["spec"]["failurePolicy"] == "Fail"
    for rule in (verify, named):
        (match,) = rule["match"]["any"]
        assert match["resources"] == {"kinds": ["Pod"], "namespaces": ["fraud", "fraud-jobs"]}
    (check,) = verify["verifyImages"]
    signed = {f"{image['newName']}*" for image in overlay["images"] if image["name"].startswith("fraud-")}
    assert signed == set(check["imageReferences"])
    assert check["required"] and check["verifyDigest"]
    attestors = [*check["attestors"], *(one for said in check["attestations"] for one in said["attestors"])]
    keyless = [entry["keyless"] for attestor in attestors for entry in attestor["entries"]]
    documented = (PROJECT / "docs/releasing.md").read_text()
    assert len(keyless) == 2 and all(one["subject"] in documented and one["issuer"] in documented for one in keyless)
    (each,) = named["validate"]["foreach"]
    (pattern,) = re.findall(r"regex_match\('(.*?)', ", each["deny"]["conditions"]["any"][0]["key"])
    (ours,) = re.findall(r"regex_match\('(.*?)', ", each["preconditions"]["all"][0]["key"])
    good = f"REGISTRY/fraud-api@sha256:{'0' * 64}"
    assert re.search(ours, good) and re.search(pattern, good)
    for wrong in ("fraud-api:latest", f"evil.example/fraud-api@sha256:{'0' * 64}", "REGISTRY/fraud-jobs:1"):
        assert re.search(ours, wrong) and not re.search(pattern, wrong)
    assert not re.search(ours, "docker.io/library/redis:8")


KYVERNO = "github.com/kyverno/kyverno@v1.13.4"
KYVERNO_SUM = "h1:2zUi+eszlisLdCir+WIf2NtuUfFPvJtjUNpewdtLjVw="


@pytest.mark.long(reason="Kyverno's command line is built from its module, the first time ten minutes of two cores")
def test_kyverno_refuses_what_cd_has_not_signed(tmp_path):
    """Kyverno itself, without a cluster: the policy is valid, refuses names that are not ours to use, and lets in no
    image of ours whose signature nobody can verify.
    """
    kyverno = go_main(KYVERNO, "cmd/cli/kubectl-kyverno", KYVERNO_SUM)
    policy = (PROJECT / "k8s/admission/kyverno/signed-images.yaml").read_text()
    (tmp_path / "policy.yaml").write_text(policy.replace("REGISTRY", "registry.example").replace("OWNER/NAME", "a/b"))
    digest = f"@sha256:{'0' * 64}"
    good, wrong = f"registry.example/fraud-jobs{digest}", [{"name": "more", "image": "fraud-jobs:0.1.0"}]

    def pod(name: str, image: str, namespace: str = "fraud-jobs", **spec: list) -> dict:
        metadata = {"name": name, "namespace": namespace}
        spec = {"containers": [{"name": "main", "image": image}], **spec}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}

    pods = [
        pod("unsigned", good),
        pod("tagged", "registry.example/fraud-api:0.1.0", "fraud"),
        pod("bare", "fraud-api:0.1.0"),
        pod("foreign", f"evil.example/fraud-api{digest}"),
        pod("init", good, initContainers=wrong),
        pod("added", good, ephemeralContainers=wrong),
        pod("other", "docker.io/library/redis:8"),
        pod("elsewhere", "fraud-api:0.1.0", "default"),
    ]
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump_all(pods))
    command = [kyverno, "apply", tmp_path / "policy.yaml", "--resource", tmp_path / "pods.yaml", "--detailed-results"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    refused = set()
    for name, lines in re.findall(r"resource \S+/Pod/(\S+) failed:\n((?:\d+ - .*\n)+)", done.stdout):
        refused |= {(rule, name) for rule in re.findall(r"^\d+ - (\S+) ", lines, re.MULTILINE)}
    named = {("nothing-else-of-ours", name) for name in ("tagged", "bare", "foreign", "init", "added")}
    assert refused == named | {("signed-by-cd", name) for name in ("unsigned", "tagged", "init", "added")}, done.stdout
    assert done.returncode == 1 and "error: 0" in done.stdout


def test_argo_holds_the_cluster_to_the_overlay():
    project, application = yaml.safe_load_all((PROJECT / "k8s/argocd/application.yaml").read_text())
    source = application["spec"]["source"]
    assert (PROJECT / source["path"] / "kustomization.yaml").is_file() and [source["repoURL"]] == project["spec"][
        "sourceRepos"
    ]
    if not shutil.which("kubectl"):
        missing("kubectl is not installed")
    objects = list(yaml.safe_load_all(run("kubectl", "kustomize", PROJECT / source["path"]).stdout))
    places = {one["namespace"] for one in project["spec"]["destinations"]}
    assert {item["metadata"].get("namespace", "fraud") for item in objects} == places == {"fraud", "fraud-jobs"}
    assert {item["kind"] for item in objects if "namespace" not in item["metadata"]} <= {
        item["kind"] for item in project["spec"]["clusterResourceWhitelist"]
    }


# What cd.yml does around a deployment


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """The script, in a folder of its own."""
    module = script("lambda_stage")
    monkeypatch.setattr(module, "ROOT", tmp_path / "project")
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("SMOKE_WAIT", "0")
    module.deployed_file("dev").parent.mkdir(parents=True)
    return module


def test_what_chalice_knows_goes_to_the_next_runner(stage, client):
    s3, bucket = client("s3"), "models"  # moto refuses what is not over TLS to the one that Terraform made
    s3.create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    with pytest.raises(SystemExit, match="s3://models/nothing/manifest.json: NoSuchKey; a champion is expected there"):
        stage.fetch("dev", bucket, f"s3://{bucket}/nothing")
    for name in ("manifest.json", "model.onnx", "reference.parquet"):
        s3.put_object(Bucket=bucket, Key=f"champion/{name}", Body=name.encode())
    stage.fetch("dev", bucket, f"s3://{bucket}/champion")
    assert (
        not stage.deployed_file("dev").exists()
        and (stage.ROOT / "models/champion/model.onnx").read_text() == "model.onnx"
    )
    stage.deployed_file("dev").write_text("known")
    stage.store("dev", bucket)
    stage.deployed_file("dev").unlink()
    stage.fetch("dev", bucket, f"s3://{bucket}/champion")
    assert stage.deployed_file("dev").read_text() == "known"


def zipped(folder: Path, text: str) -> bytes:
    (folder / text).mkdir(parents=True)
    (folder / text / "app.py").write_text(text)
    return Path(shutil.make_archive(str(folder / f"{text}-zip"), "zip", folder / text)).read_bytes()


def test_a_failed_deployment_is_taken_back(stage, client, tmp_path, monkeypatch):
    functions, former, new = client("lambda"), zipped(tmp_path, "former"), zipped(tmp_path, "new")
    role = client("iam").get_role(RoleName="fraud-prod-api_handler")["Role"]["Arn"]
    stage.keep("prod")  # nothing there yet
    with pytest.raises(SystemExit, match="no former function"):
        stage.restore("prod")
    functions.create_function(
        FunctionName="fraud-prod",
        Runtime="python3.12",
        Role=role,
        Handler="app.app",
        Code={"ZipFile": former},
        MemorySize=512,
        Environment={"Variables": {"A": "1"}},
    )
    before = functions.get_function(FunctionName="fraud-prod")["Configuration"]
    found = tmp_path / "former.zip"
    found.write_bytes(former)
    get = stage.urllib.request.urlopen
    monkeypatch.setattr(
        stage.urllib.request, "urlopen", lambda url, timeout: get(found.as_uri())
    )  # moto's link to the code leads nowhere
    stage.keep("prod")
    functions.update_function_code(FunctionName="fraud-prod", ZipFile=new)
    functions.update_function_configuration(
        FunctionName="fraud-prod", MemorySize=1024, Environment={"Variables": {"A": "2"}}
    )
    assert functions.get_function(FunctionName="fraud-prod")["Configuration"]["CodeSha256"] != before["CodeSha256"]
    stage.restore("prod")
    after = functions.get_function(FunctionName="fraud-prod")["Configuration"]
    assert {key: after[key] for key in ("CodeSha256", "MemorySize", "Environment")} == {
        key: before[key] for key in ("CodeSha256", "MemorySize", "Environment")
    }


class Stage(BaseHTTPRequestHandler):
    """A deployed stage, which fails the first time it is asked."""

    model, decision, asked = "6b43b72b7114", "allow", 0

    def do_GET(self):
        type(self).asked += 1
        body = {
            "/api/healthz": {"status": "alive"},
            "/api/readyz": {"model": self.model},
            "/api/predict": {"decision": self.decision},
        }[self.path]
        self.send_response(
            503
            if type(self).asked == 1
            else 401
            if self.path == "/api/predict" and self.headers["X-API-Key"] != "key"
            else 200
        )
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_POST(self):
        assert json.loads(self.rfile.read(int(self.headers["Content-Length"])))["transaction_id"] == "smoke"
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"model": "another"}, "serves model another; expected 6b43b72b7114"),
        ({"decision": "perhaps"}, "decision is 'perhaps'"),
    ],
)
def test_smoke(stage, monkeypatch, tmp_path, changes, said):
    handler = type("Handler", (Stage,), changes)
    with ThreadingHTTPServer((servers.HOST, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://{servers.HOST}:{server.server_port}/api"
        stage.deployed_file("dev").write_text(
            json.dumps({"resources": [{"resource_type": "rest_api", "rest_api_url": f"{url}/"}]})
        )
        (stage.ROOT / "models/champion").mkdir(parents=True)
        (stage.ROOT / "models/champion/manifest.json").write_text('{"version": "6b43b72b7114"}')
        monkeypatch.setenv("FRAUD_API_KEY", "key")
        monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "output"))
        try:
            if said:
                with pytest.raises(SystemExit, match=said):
                    stage.smoke("dev")
            else:
                stage.smoke("dev")
                assert (tmp_path / "output").read_text() == f"url={url}\n"
        finally:
            server.shutdown()


# Releases, pages, licences


def test_release_notes(tmp_path):
    notes = script("release_notes").notes
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [1.2.0] - 2026-01-05\n\n- new\n\n## [1.1.0] - 2026-01-01\n\n- old\n"
    )
    assert notes("v1.2.0", tmp_path) == "- new"
    with pytest.raises(SystemExit, match="the tag is v1.3.0, and pyproject.toml has version 1.2.0"):
        notes("v1.3.0", tmp_path)
    changelog.write_text("# Changelog\n\n## [Unreleased]\n\n- new\n")
    with pytest.raises(SystemExit, match=r"no section `## \[1.2.0\] - YYYY-MM-DD`"):
        notes("v1.2.0", tmp_path)


FREE = re.compile(
    r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|CC0|Unlicense|MPL|Mozilla|Zope|CNRI-Python|TCL|AFL",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"GPL|General Public|EPL|SSPL|BUSL|Commons Clause|Proprietary", re.IGNORECASE)
EXPLAINED = {
    "axe-playwright-python": "MIT, says its LICENSE file (and MPL-2.0 for the axe-core in it); "
    "finds faults of accessibility in tests, not served",
    "asyncssh": "EPL-2.0 or GPL-2.0, as it came; DVC's way to SSH remotes, not served",
    "cel-python": "Apache-2.0, says its LICENSE file; a peer of a benchmark, not served",
    "crc32c": "LGPL-2.1; a library of its own, loaded as it came; the checksums of Kafka",
    "dulwich": "Apache-2.0 or GPL-2.0: the first is taken",
    "grandalf": "GPL-2.0 or EPL-1.0; draws DVC's graph of stages in a terminal, not served",
    "huey": "MIT, says its repository; its metadata says nothing",
    "namex": "Apache-2.0, says its repository; its metadata says nothing",
    "psycopg": "LGPL-3.0; a library of its own, loaded as it came; the way of MLflow and of cases to PostgreSQL",
    "psycopg-binary": "as psycopg",
    "pygit2": "GPL-2.0 with linking exception: linking it puts no condition on us; DVC's git, not served",
    "skops": "MIT, says its repository; its metadata says only that OSI approved it",
}


def licence(found: metadata.Distribution) -> str:
    """What a distribution says of its licence."""
    classifiers = [
        line.split("::")[-1].strip()
        for line in found.metadata.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    return (
        found.metadata.get("License-Expression")
        or "; ".join(classifiers)
        or (found.metadata.get("License") or "").strip().split("\n")[0]
    )


def test_licences():
    """Whatever is installed from the lock may be used with an Apache-2.0 project; what needs a word has one."""

    def normal(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    locked = set(re.findall(r"^([a-z0-9-]+)==", (PROJECT / "requirements.lock").read_text(), re.MULTILINE))
    installed = {normal(found.metadata["Name"]): licence(found) for found in metadata.distributions()}
    doubtful = {
        name: text
        for name, text in installed.items()
        if name in locked and (COPYLEFT.search(text) or not FREE.search(text))
    }
    assert set(doubtful) <= set(EXPLAINED), {name: text for name, text in doubtful.items() if name not in EXPLAINED}
    assert set(EXPLAINED) <= locked, "an explanation without a package"
    served = set(re.findall(r"^([a-z0-9-]+)==", (PROJECT / "requirements-serve.lock").read_text(), re.MULTILINE))
    assert served & set(doubtful) <= {"crc32c", "psycopg", "psycopg-binary"}


def test_locks_name_hashes_and_no_index():
    locks = [
        *PROJECT.glob("requirements*.lock"),
        *(PROJECT / "tests").glob("*.lock"),
        *(PROJECT / "chalice_app").glob("*.lock"),
        PROJECT / ".github/build.lock",
    ]
    assert len(locks) >= 8
    for lock in locks:
        text = lock.read_text()
        assert "index-url" not in text and "://" not in text, lock.name
        assert len(re.findall(r"^[A-Za-z0-9._-]+==", text, re.MULTILINE)) == len(
            re.findall(r"^[A-Za-z0-9._-]+==[^\n]*\\\n +--hash=sha256:", text, re.MULTILINE)
        ), lock.name
