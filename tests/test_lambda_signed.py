"""A package for Lambda is the one that was signed, and the function decides by what enough persons have approved."""

import base64
import hashlib
import json
import shutil
import time
import zipfile
from pathlib import Path

import boto3
import httpx
import lambda_runtime
import pytest
import servers

from fraud_pkg.core.rules import parse_rules
from fraud_pkg.core.signatures import (
    APPROVAL,
    CHAMPION,
    Approved,
    Approvers,
    Signer,
    Statement,
    TrustedKey,
    load_signer,
    new_key,
)
from fraud_pkg.model.bundle import MANIFEST, SIGNATURE, load_bundle, sign_bundle
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.bill import BILL
from fraud_pkg.serve.lambda_deploy import SIGNED, ZIP
from fraud_pkg.serve.lambda_package import runtime
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.store.dynamodb import create_table
from fraud_pkg.store.lists import publish_rules
from fraud_pkg.store.open import open_store
from fraud_pkg.store.proposals import give_opinion

pytestmark = pytest.mark.long(reason="packages for Lambda are built; notebooks 11, 20 and 21 of serve have the checks")
KEYS, KEY = "shop:0123456789abcdef", {"X-API-Key": "0123456789abcdef"}
AT = "2026-01-05T10:00:00+00:00"


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """AWS on loopback, in this process's environment too."""
    with servers.moto(tmp_path_factory.mktemp("moto")) as environ, pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        for name, value in (("api-keys", KEYS), ("privacy-key", f"k1:{'ab' * 32}")):
            boto3.client("ssm").put_parameter(Name=f"/fraud/prod/{name}", Value=value, Type="SecureString")
        yield environ


@pytest.fixture(scope="module")
def signers(tmp_path_factory) -> dict[str, Signer]:
    """The key of who promotes, that of the workflow that deploys, and two persons'."""
    folder, made = tmp_path_factory.mktemp("keys"), {}
    for name in ("prod", "cd", "anna", "ben"):
        new_key(folder / f"{name}.pem", servers.PROJECT)
        made[name] = load_signer({"FRAUD_SIGNING_KEY_FILE": str(folder / f"{name}.pem")})
        made[name].file = str(folder / f"{name}.pem")
    return made


@pytest.fixture(scope="module")
def project(workspace, aws, signers):
    """A workspace whose champion `prod` has signed; packages are the workflow's to sign. Rules are in the store."""
    made = workspace(
        trust__keys=f"prod:{signers['prod'].public}",
        trust__package_keys=f"cd:{signers['cd'].public}",
        rules__file="store",
    )
    example_bundle(made.root / "models/champion")
    sign_bundle(made.root / "models/champion", CHAMPION, signers["prod"])
    return made


@pytest.fixture(scope="module")
def built(project, tmp_path_factory) -> Path:
    """What a build machine without any key writes for prod."""
    out = tmp_path_factory.mktemp("built") / "out"
    said = project.fraud("deploy", "package", str(out), "--stage", "prod").stdout
    assert "MB, not signed)" in said
    return out


@pytest.fixture
def out(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "out"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_the_bill_lists_what_is_in_the_zip(project, built):
    bill = json.loads((built / BILL).read_text())
    with zipfile.ZipFile(built / ZIP) as package:
        there = {name: sha256(package.read(name)) for name in package.namelist()}
    parts = [(one, part) for one in bill["components"] for part in one["components"]]
    assert {part["name"]: part["hashes"][0]["content"] for _, part in parts} == there
    assert bill["metadata"]["component"]["hashes"][0]["content"] == sha256((built / ZIP).read_bytes())
    lock = (project.root / f"chalice_app/python{runtime()}.lock").read_text().splitlines()
    locked = {line.split(" ")[0].split(";")[0] for line in lock if "==" in line and not line.startswith((" ", "#"))}
    libraries = {
        one["purl"].removeprefix("pkg:pypi/").replace("@", "==") for one in bill["components"] if "purl" in one
    }
    assert {"numpy", "onnxruntime", "cryptography", "chalice"} <= {name.split("==")[0] for name in libraries}
    assert {name for name in libraries if not name.startswith("chalice==")} <= locked
    assert all(one.get("licenses") for one in bill["components"] if "purl" in one)
    ours = next(one for one in bill["components"] if one["name"] == "fraud-pkg")
    assert all(
        part["name"].startswith("fraud_pkg/") or part["name"] in ("app.py", "settings.ini")
        for part in ours["components"]
    ), [part["name"] for part in ours["components"]]


def test_the_same_input_gives_the_same_bytes(workspace, project, built, tmp_path):
    """In another folder, from another process."""
    other = workspace()
    other.overrides = project.overrides
    shutil.copytree(project.root / "models/champion", other.root / "models/champion")
    other.fraud("deploy", "package", str(tmp_path / "again"), "--stage", "prod")
    for name in (ZIP, BILL):
        assert sha256((tmp_path / "again" / name).read_bytes()) == sha256((built / name).read_bytes()), name


def test_only_what_was_signed_is_deployed(project, out, signers, tmp_path):
    """A tampered zip, a tampered bill, no signature, another key, another stage: one line, and AWS hears nothing."""

    def deploy(stage: str = "prod", ok: bool = False) -> str:
        done = project.fraud("deploy", "lambda", "--stage", stage, "--package", str(out), ok=ok)
        return done.stdout if ok else done.stderr

    def sign(who: str, stage: str = "prod") -> None:
        project.environ["FRAUD_SIGNING_KEY_FILE"] = signers[who].file
        assert "signed for" in project.fraud("keys", "sign", str(out), "--stage", stage).stdout
        del project.environ["FRAUD_SIGNING_KEY_FILE"]

    zipped, bill = (out / ZIP).read_bytes(), (out / BILL).read_bytes()
    refusals = {"unsigned": deploy()}
    sign("prod")  # trusted for champions, and not for packages
    refusals["other"] = deploy()
    sign("cd", "dev")
    refusals["stage"] = deploy()
    sign("cd")
    with zipfile.ZipFile(out / ZIP, "a") as package:
        package.writestr("sitecustomize.py", "import os")
    refusals["zip"] = deploy()
    (out / ZIP).write_bytes(zipped)
    (out / BILL).write_bytes(bill.replace(b"cryptography", b"cryptographie"))
    refusals["bill"] = deploy()
    (out / BILL).write_bytes(bill)
    expected = {
        "unsigned": "deployment.zip: not signed; stage prod takes signed packages only: fraud keys sign",
        "other": "which [trust] package_keys does not name",
        "stage": "deployment.sig: signed for stage dev; expected prod",
        "zip": "deployment.zip: was changed after it was signed",
        "bill": "sbom.cdx.json: was changed after it was signed",
    }
    for name, text in expected.items():
        assert text in refusals[name] and len(refusals[name].strip().splitlines()) == 1, refusals[name]
    assert boto3.client("lambda").list_functions()["Functions"] == []
    said = deploy(ok=True)
    assert f"signed, SHA-256 {sha256(zipped)}" in said and "URL:" in said
    code = boto3.client("lambda").get_function_configuration(FunctionName="fraud-prod")["CodeSha256"]
    assert base64.b64decode(code).hex() == sha256(zipped)
    with zipfile.ZipFile(out / ZIP, "a") as package:  # also where a function runs already
        package.writestr("sitecustomize.py", "import os")
    assert "was changed after it was signed" in deploy()


def test_one_command_builds_signs_and_deploys(project, signers):
    unsigned = project.fraud("deploy", "lambda", "--stage", "prod", ok=False)
    assert "stage prod takes signed packages only; expected FRAUD_SIGNING_KEY_FILE" in unsigned.stderr
    project.environ["FRAUD_SIGNING_KEY_FILE"] = signers["cd"].file
    assert "MB, signed" in project.fraud("deploy", "lambda", "--stage", "prod").stdout
    del project.environ["FRAUD_SIGNING_KEY_FILE"]
    checked = project.root / "chalice_app/.chalice/deployments/checked"
    assert {ZIP, BILL, SIGNED} <= {path.name for path in checked.iterdir()}


@pytest.fixture
def function(aws, project, built, signers, tmp_path):
    """An instance of the package as `prod` configures it, which asks two persons; its folder, and what starts it."""
    folder = lambda_runtime.unpack(built / ZIP, tmp_path)
    stage = project.json("chalice_app/.chalice/config.json")
    variables = stage["environment_variables"] | stage["stages"]["prod"]["environment_variables"]
    asking = {
        "FRAUD_TRUST_APPROVALS": "2",
        "FRAUD_TRUST_APPROVERS": f"anna:{signers['anna'].public}, ben:{signers['ben'].public}",
        "FRAUD_SERVE_RELOAD_SECONDS": "0.2",
        "FRAUD_STORE_URL": f"dynamodb://{tmp_path.name}",
    }
    create_table(tmp_path.name)
    return folder, lambda: lambda_runtime.instance(folder, {**aws, **variables, **asking}, tmp_path / "lambda.log")


def test_the_function_takes_a_champion_that_two_have_approved(project, function, signers, tmp_path):
    refused = project.fraud(
        "deploy",
        "package",
        str(tmp_path / "out"),
        ok=False,
        trust__approvals="2",
        trust__approvers=f"anna:{signers['anna'].public}, ben:{signers['ben'].public}",
    )
    assert "approved by nobody; expected 2 more of anna, ben" in refused.stderr  # before it is packed
    (folder, start), now = function, int(time.time() * 1000)
    champion = folder / "task/champion"
    digest = sha256((champion / MANIFEST).read_bytes())
    statement = Statement(CHAMPION, digest, now, now + 60_000, "0" * 64)

    def sign(*who: str, promoted: int | None = now) -> None:
        given = tuple(signers[name].sign(statement.text, APPROVAL) for name in who)
        text = signers["prod"].sign((champion / MANIFEST).read_bytes(), CHAMPION, sequence=now, promoted=promoted)
        (champion / SIGNATURE).write_bytes(text + Approved(statement, given).text)

    for reason, change in {
        "approved by nobody; expected 2 more of anna, ben": lambda: None,  # as it was packed
        "approved by anna; expected 1 more of ben": lambda: sign("anna"),
        "approved by ben; expected 1 more of anna": lambda: sign("ben", "cd"),
        "does not say when it was promoted": lambda: sign("anna", "ben", promoted=None),
    }.items():
        change()
        with start() as running, lambda_runtime.gateway(running) as url:
            answer = httpx.post(f"{url}/predict", json=EXAMPLE, headers=KEY)
            assert (answer.status_code, answer.json()["problems"][0]["field"]) == (503, "model")
            assert httpx.get(f"{url}/readyz").status_code == 503
        assert reason in (tmp_path / "lambda.log").read_text()
    sign("anna", "ben")
    with start() as running, lambda_runtime.gateway(running) as url:
        assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
        decided = httpx.post(f"{url}/predict", json=EXAMPLE, headers=KEY)
        assert (
            decided.status_code == 200
            and decided.json()["model"] == load_bundle(champion, deciding=True).manifest.version
        )


def test_the_function_takes_rules_that_two_have_approved(function, signers, tmp_path):
    (folder, start), now = function, int(time.time() * 1000)
    champion = folder / "task/champion"
    digest = sha256((champion / MANIFEST).read_bytes())
    statement = Statement(CHAMPION, digest, now, now + 60_000, "0" * 64)
    given = tuple(signers[name].sign(statement.text, APPROVAL) for name in ("anna", "ben"))
    sign_bundle(champion, CHAMPION, signers["prod"], approved=Approved(statement, given))
    asked = Approvers(2, [TrustedKey(name, signers[name].public, None) for name in ("anna", "ben")])
    log = open_store(f"dynamodb://{tmp_path.name}", 720, 5)
    rules = "rules: [{name: %s, action: block, if: amount > 1.0}]"

    def decision(url: str, number: int) -> tuple[str, str | None]:
        sent = {**EXAMPLE, "transaction_id": f"t{number}", "amount": 2.0}
        answer = httpx.post(f"{url}/predict", json=sent, headers=KEY).json()
        return answer["decision"], answer.get("rule")

    with start() as running, lambda_runtime.gateway(running) as url:
        assert decision(url, 1)[0] == "allow"
        publish_rules(log, parse_rules(rules % "alone", ""), "anna", AT)  # past the command, straight into the store
        number = publish_rules(log, parse_rules(rules % "both", ""), "anna", AT, approvers=asked).number
        give_opinion(log, asked, number, signers["anna"])
        assert decision(url, 2)[0] == "allow"
        time.sleep(0.5)
        assert decision(url, 3)[0] == "allow"
        give_opinion(log, asked, number, signers["ben"])
        numbers = iter(range(4, 100))
        servers.until(lambda: decision(url, next(numbers)) == ("block", "both"))
    assert "too few persons have approved" in (tmp_path / "lambda.log").read_text()
    with start() as running, lambda_runtime.gateway(running) as url:  # and an instance that starts now
        assert decision(url, 200) == ("block", "both")
