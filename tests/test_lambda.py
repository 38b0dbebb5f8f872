"""The Lambda twin, deployed to AWS on loopback, fetched back, and driven by Lambda's own runtime client beside the
FastAPI twin.
"""

import base64
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import boto3
import httpx
import lambda_runtime
import numpy as np
import pyarrow.parquet as pq
import pytest
import servers
from openapi import conforms

from fraud_pkg.serve.lambda_package import runtime
from fraud_pkg.store.dynamodb import create_table
from fraud_pkg.store.memory import MemoryStore, save_snapshot
from fraud_pkg.core.contract import SIMULATED
from fraud_pkg.core.signatures import new_key
from fraud_pkg.features.payment import OnlinePayments
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.wire import EXAMPLE, Wire
from fraud_pkg.store.tiles import retention_of

KEYS, KEY = "shop:0123456789abcdef", {"X-API-Key": "0123456789abcdef"}


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """AWS on loopback, in this process's environment too."""
    with servers.moto(tmp_path_factory.mktemp("moto")) as environ, pytest.MonkeyPatch.context() as patch:
        for name, value in environ.items():
            patch.setenv(name, value)
        boto3.client("ssm").put_parameter(Name="/fraud/dev/api-keys", Value=KEYS, Type="SecureString")
        yield environ


@pytest.fixture(scope="module")
def project(workspace, finished, aws):
    """A workspace with a true champion and the stage dev deployed from it."""
    made = workspace()
    shutil.copytree(finished.root / "models/champion", made.root / "models/champion")
    made.printed = made.fraud("deploy", "lambda", "--stage", "dev").stdout
    return made


def configuration(stage: str) -> dict:
    return boto3.client("lambda").get_function_configuration(FunctionName=f"fraud-{stage}")


def fetched(project, stage: str) -> Path:
    """The package that AWS has, found by its hash among those that were built: moto cannot hand out the bytes."""
    wanted = base64.b64decode(configuration(stage)["CodeSha256"]).hex()
    found = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path
        for path in (project.root / "chalice_app/.chalice/deployments").rglob("*.zip")
    }
    return found[wanted]


@pytest.fixture(scope="module")
def unpacked(project, tmp_path_factory) -> Path:
    return lambda_runtime.unpack(fetched(project, "dev"), tmp_path_factory.mktemp("lambda"))


@pytest.fixture
def function(aws, unpacked, tmp_path):
    """Starts an instance as the stage configures it; keyword arguments change its environment."""

    def start(**changes: str):
        return lambda_runtime.instance(
            unpacked, {**aws, **configuration("dev")["Environment"]["Variables"], **changes}, tmp_path / "lambda.log"
        )

    return start


def test_deployed_as_declared(project):
    """Function, role, table, routes and limits are those of .chalice/config.json, and nothing more."""
    found, stage = configuration("dev"), project.json("chalice_app/.chalice/config.json")["stages"]["dev"]
    assert (found["MemorySize"], found["Timeout"], found["Handler"]) == (stage["lambda_memory_size"], 10, "app.app")
    assert found["Environment"]["Variables"]["FRAUD_STORE_URL"] == "dynamodb://fraud-store-dev"
    assert "KEYS" not in {name for name, value in found["Environment"]["Variables"].items() if KEYS in value}
    assert (
        boto3.client("lambda").get_function_concurrency(FunctionName="fraud-dev")["ReservedConcurrentExecutions"]
        == stage["reserved_concurrency"]
    )
    iam, role = boto3.client("iam"), found["Role"].rsplit("/", 1)[-1]
    (name,) = iam.list_role_policies(RoleName=role)["PolicyNames"]
    assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
    assert iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"] == project.json(
        "chalice_app/.chalice/policy-dev.json"
    )
    gateway = boto3.client("apigateway")
    (made,) = (item for item in gateway.get_rest_apis()["items"] if item["name"] == "fraud")
    routes = {
        item["path"]: set(item.get("resourceMethods", {}))
        for item in gateway.get_resources(restApiId=made["id"], limit=100)["items"]
    }
    assert {path: methods for path, methods in routes.items() if methods} == {
        path: {method} for path, method in lambda_runtime.ROUTES.items()
    }
    assert (
        boto3.client("dynamodb").describe_table(TableName="fraud-store-dev")["Table"]["BillingModeSummary"][
            "BillingMode"
        ]
        == "PAY_PER_REQUEST"
    )
    assert fetched(project, "dev").stat().st_size < 30_000_000
    assert "https://" in project.printed and "The online store's table is new" in project.printed


def test_answers_with_its_own_store(function):
    """As deployed: keys from Systems Manager, the store in DynamoDB, one line of JSON for each request."""
    with function() as running, lambda_runtime.gateway(running) as url:
        assert (
            httpx.get(f"{url}/healthz").json() == {"status": "alive"}
            and httpx.get(f"{url}/readyz").json()["status"] == "ready"
        )
        assert httpx.post(f"{url}/predict", json=EXAMPLE).status_code == 401
        first, again = (httpx.post(f"{url}/predict", json=EXAMPLE, headers=KEY) for _ in range(2))
        assert first.status_code == 200 and first.content == again.content and first.json()["history"] is True
        told = httpx.post(
            f"{url}/feedback",
            json={"labels": [{"transaction_id": EXAMPLE["transaction_id"], "is_fraud": True}]},
            headers=KEY,
        )
        assert told.json() == {"recorded": 1, "unknown": []}
    item = boto3.client("dynamodb").get_item(
        TableName="fraud-store-dev", Key={"key": {"S": f"t#{EXAMPLE['transaction_id']}"}}
    )["Item"]
    assert item["fraud"] == {"BOOL": True}


def test_logs_are_lines_of_json(function, tmp_path):
    with function() as running, lambda_runtime.gateway(running) as url:
        httpx.post(f"{url}/predict", json={**EXAMPLE, "transaction_id": "logged"}, headers=KEY)
        time.sleep(0.2)
    lines = [json.loads(line) for line in (tmp_path / "lambda.log").read_text().splitlines() if line.startswith("{")]
    (line,) = (line for line in lines if line.get("route") == "/predict")
    assert (
        line["status"] == 200
        and line["latency"] > 0
        and line["_aws"]["CloudWatchMetrics"][0]["Namespace"] == "fraud"
        and KEY["X-API-Key"] not in json.dumps(lines)
    )


def said(row: dict) -> dict:
    """A row of the raw table as its sender would have sent it."""
    return {name: row[name] for name in SAID if row[name] is not None}


WIRE, ONLINE = Wire(SIMULATED), OnlinePayments(SIMULATED, {})
SAID = ["transaction_id", "time", "type", "amount", "sender", "sender_balance", "receiver", "receiver_balance"]
SAID += [name for attribute in SIMULATED.attributes for name in attribute.stored]


@pytest.fixture(scope="module")
def day(finished, tmp_path_factory) -> tuple[list[dict], Path]:
    """Ten thousand payments, and a snapshot of a store that remembers the ten thousand before them with their
    frauds.
    """
    raw = pq.read_table(next((finished.root / "data/raw").glob("*.parquet"))).slice(40_000, 20_000).to_pylist()
    before, now = raw[:10_000], raw[10_000:]
    store, place = MemoryStore(retention_of(SIMULATED)), tmp_path_factory.mktemp("store") / "snapshot.npz"
    store.record([ONLINE.transaction(WIRE.payment(WIRE.model.model_validate(said(row)))) for row in before])
    store.label({row["transaction_id"]: True for row in before if row["is_fraud"]})
    save_snapshot(store, place)
    return [said(row) for row in now], place


def differences(requests: list[tuple[str, str, bytes]], *urls: str) -> list[tuple]:
    """Requests whose answers from two endpoints are not byte-equal."""
    with httpx.Client(headers=KEY, timeout=30) as client:
        answers = [
            [client.request(method, url + path, content=body) for url in urls] for method, path, body in requests
        ]
    return [
        (request, *((a.status_code, a.content) for a in pair))
        for request, pair in zip(requests, answers, strict=True)
        if len({(a.status_code, a.content) for a in pair}) > 1
    ]


def as_requests(transactions: list[dict], batch: int) -> list[tuple[str, str, bytes]]:
    """One by one, or in batches."""
    if batch == 1:
        return [("POST", "/predict", json.dumps(t).encode()) for t in transactions]
    return [
        ("POST", "/predict/batch", json.dumps({"transactions": transactions[i : i + batch]}).encode())
        for i in range(0, len(transactions), batch)
    ]


@pytest.mark.parametrize(
    "count", [2_000, pytest.param(10_000, marks=pytest.mark.long(reason="the same with ten thousand bodies"))]
)
def test_bodies_are_byte_equal(project, function, day, tmp_path, count):
    """The same store to start from, a fifth of the transactions one by one, the others in batches, reasons for each."""
    transactions, snapshot = day[0][:count], day[1]
    with (
        function(FRAUD_STORE_URL=f"memory://{snapshot}", FRAUD_SERVE_EXPLAIN="all") as running,
        lambda_runtime.gateway(running) as here,
        servers.service(
            project.root / "models",
            variables={"FRAUD_API_KEYS": KEYS},
            store__url=f"memory://{snapshot}",
            serve__explain="all",
        ) as (there, _),
    ):
        requests = as_requests(transactions[: count // 5], 1) + as_requests(transactions[count // 5 :], 100)
        assert differences(requests, here, there) == []
        model = httpx.get(f"{there}/model", headers=KEY).json()
        fresh = httpx.post(f"{there}/predict/batch", headers=KEY, json={"transactions": transactions[:500]}).json()[
            "decisions"
        ]
    assert (
        model["version"] == project.json("models/champion/manifest.json")["version"]
        and len({d["fraud_probability"] for d in fresh}) > 50
    )
    assert all(len(d["reasons"]) == 3 for d in fresh)


def test_bodies_are_byte_equal_with_dynamodb(project, function, day, tmp_path):
    """Each endpoint with a table of its own."""
    transactions, _ = day
    create_table("other")
    with (
        function() as running,
        lambda_runtime.gateway(running) as here,
        servers.service(
            project.root / "models", variables={"FRAUD_API_KEYS": KEYS}, store__url="dynamodb://other", store__timeout=5
        ) as (there, _),
    ):
        assert differences(as_requests(transactions[:40], 1) + as_requests(transactions[40:240], 50), here, there) == []


BAD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b"{}",
    json.dumps({**EXAMPLE, "amount": -1}).encode(),
    json.dumps({**EXAMPLE, "amount": "12"}).encode(),
    json.dumps({**EXAMPLE, "amount": 1e300}).encode(),
    json.dumps({**EXAMPLE, "amount": float("nan")}).encode(),
    json.dumps({**EXAMPLE, "amount": float("inf")}).encode(),
    json.dumps({**EXAMPLE, "amount": 1.234}).encode(),
    json.dumps({**EXAMPLE, "type": "G" * 257}).encode(),
    json.dumps({**EXAMPLE, "device": [1]}).encode(),
    json.dumps({**EXAMPLE, "online": "yes"}).encode(),
    json.dumps({**EXAMPLE, "since": "2026-01-05T10:00:00"}).encode(),
    json.dumps({**EXAMPLE, "place_latitude": 95.0, "place_longitude": 16.0}).encode(),
    json.dumps({**EXAMPLE, "place_latitude": 48.0}).encode(),
    json.dumps({**EXAMPLE, "network": "n" * 10_000_000}).encode(),
    json.dumps({**EXAMPLE, "extra": 1}).encode(),
    json.dumps({**EXAMPLE, "step": 1.5}).encode(),
    json.dumps({**EXAMPLE, "step": None}).encode(),
    json.dumps({**EXAMPLE, "timestamp": "2026-01-05T10:00:00"}).encode(),
    json.dumps({**EXAMPLE, "sender": ""}).encode(),
    json.dumps({**EXAMPLE, "receiver": "é" * 65}).encode(),
    b'{"a":' * 5_000,
    json.dumps({"transactions": [EXAMPLE] * 1_001}).encode(),
    json.dumps({"transactions": [EXAMPLE, EXAMPLE]}).encode(),
    json.dumps({"transactions": []}).encode(),
    json.dumps({"labels": [{"transaction_id": "x", "is_fraud": 1}]}).encode(),
    b" " * 2_000_000,
]


def test_bad_input_gets_the_same_answer(project, function):
    """A 4xx that names field and reason, from both endpoints alike, and both go on."""
    with (
        function(FRAUD_STORE_URL="memory://") as running,
        lambda_runtime.gateway(running) as here,
        servers.service(project.root / "models", variables={"FRAUD_API_KEYS": KEYS}, serve__max_batch="100") as (
            there,
            _,
        ),
    ):
        requests = [("POST", path, body) for path in ("/predict", "/predict/batch", "/feedback") for body in BAD]
        assert differences(requests, here, there) == []
        answers = [httpx.post(here + path, content=body, headers=KEY) for _, path, body in requests]
        assert all(
            400 <= answer.status_code < 500
            and answer.json()["problems"][0].keys() == {"field", "reason"}
            and b"Traceback" not in answer.content
            for answer in answers
        )
        for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": "Bearer 0123456789abcdef"}):
            assert (
                httpx.post(f"{here}/predict", json=EXAMPLE, headers=headers).content
                == httpx.post(f"{there}/predict", json=EXAMPLE, headers=headers).content
            )
        assert httpx.post(f"{here}/predict", json=EXAMPLE, headers=KEY).status_code == 200


def test_does_what_the_other_door_documents(project, function, tmp_path):
    """One document for both. API Gateway answers 403 before the function where a service answers 405."""
    with (
        function(FRAUD_STORE_URL="memory://") as running,
        lambda_runtime.gateway(running) as here,
        servers.service(project.root / "models", variables={"FRAUD_API_KEYS": KEYS}, serve__max_batch="100") as (
            there,
            _,
        ),
    ):
        document = httpx.get(f"{there}/openapi.json", headers=KEY).json()
        for path in ("/history", "/rules", "/lists", "/access"):  # for people, at the service alone
            del document["paths"][path]
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        conforms(str(tmp_path / "openapi.json"), here, KEY["X-API-Key"], "unsupported_method")


def test_store_away(function, tmp_path):
    """A table that does not exist: 503, or an answer that says that it does without."""
    with function(FRAUD_STORE_URL="dynamodb://nowhere") as running, lambda_runtime.gateway(running) as url:
        answer = httpx.post(f"{url}/predict", json=EXAMPLE, headers=KEY)
        assert (answer.status_code, answer.json()["problems"][0]["field"]) == (503, "store") and httpx.get(
            f"{url}/readyz"
        ).status_code == 503
    with (
        function(FRAUD_STORE_URL="dynamodb://nowhere", FRAUD_SERVE_ON_STORE_ERROR="degrade") as running,
        lambda_runtime.gateway(running) as url,
    ):
        answer = httpx.post(f"{url}/predict", json=EXAMPLE, headers=KEY)
        assert (answer.status_code, answer.json()["history"]) == (200, False)
        time.sleep(0.2)
    assert (
        '"degraded":1' in (tmp_path / "lambda.log").read_text() and "nowhere" in (tmp_path / "lambda.log").read_text()
    )  # why is for us, not for the client


def test_largest_batch_within_the_timeout(function, day):
    """The most transactions that a stage takes in one request, with its store in DynamoDB."""
    transactions, _ = day
    with function() as running, lambda_runtime.gateway(running) as url:
        began = time.monotonic()
        answer = httpx.post(
            f"{url}/predict/batch", json={"transactions": transactions[1_000:1_100]}, headers=KEY, timeout=30
        )
        assert (
            answer.status_code == 200
            and len(answer.json()["decisions"]) == 100
            and time.monotonic() - began < configuration("dev")["Timeout"]
        )


@pytest.mark.long(reason="four deployments more; the first one is looked at in make test")
def test_redeploy_second_stage_and_removal(project, tmp_path):
    """A new champion changes the package, an equal one does not; prod stands beside dev; what is removed leaves its
    data.
    """
    before = configuration("dev")["CodeSha256"]
    again = project.fraud("deploy", "lambda", "--stage", "dev").stdout
    assert configuration("dev")["CodeSha256"] == before and "The online store's table is new" not in again
    example_bundle(project.root / "models/champion")
    project.fraud("deploy", "lambda", "--stage", "dev")
    assert configuration("dev")["CodeSha256"] != before
    refused = project.fraud("deploy", "lambda", "--stage", "prod", ok=False)
    assert "takes signed bundles only" in refused.stderr
    public = new_key(tmp_path / "key.pem", project.root)
    project.environ["FRAUD_SIGNING_KEY_FILE"] = str(tmp_path / "key.pem")
    unsigned = project.fraud("deploy", "lambda", "--stage", "prod", ok=False, trust__keys=f"prod-1:{public}")
    assert "not signed" in unsigned.stderr
    project.fraud("keys", "sign", "models/champion")
    project.fraud("deploy", "lambda", "--stage", "prod", trust__keys=f"prod-1:{public}")
    assert configuration("prod")["MemorySize"] > configuration("dev")["MemorySize"]
    project.fraud("deploy", "remove", "--stage", "dev")
    names = {function["FunctionName"] for function in boto3.client("lambda").list_functions()["Functions"]}
    assert names == {"fraud-prod"} and len(boto3.client("apigateway").get_rest_apis()["items"]) == 1
    assert set(boto3.client("dynamodb").list_tables()["TableNames"]) >= {"fraud-store-dev", "fraud-store-prod"}


def test_champion_from_a_bucket(project, aws, tmp_path):
    """With --bundle-url the package holds no model; it takes the one from the bucket whose hash it knows, and no
    other.
    """
    s3 = boto3.client("s3")
    s3.create_bucket(
        Bucket="fraud-models-test", CreateBucketConfiguration={"LocationConstraint": os.environ["AWS_DEFAULT_REGION"]}
    )
    project.fraud(
        "deploy", "package", str(tmp_path / "out"), "--stage", "dev", "--bundle-url", "s3://fraud-models-test/dev"
    )
    folder = lambda_runtime.unpack(tmp_path / "out/deployment.zip", tmp_path)
    assert not list((tmp_path / "task").rglob("model.onnx"))
    environ = {**aws, "FRAUD_STORE_URL": "memory://", "FRAUD_API_KEYS": KEYS}
    with lambda_runtime.instance(folder, environ, tmp_path / "log") as running, lambda_runtime.gateway(running) as url:
        assert (
            httpx.get(f"{url}/model", headers=KEY).json()["version"]
            == project.json("models/champion/manifest.json")["version"]
        )
    (key,) = (
        item["Key"]
        for item in s3.list_objects_v2(Bucket="fraud-models-test")["Contents"]
        if item["Key"].endswith("model.onnx")
    )
    content = np.frombuffer(s3.get_object(Bucket="fraud-models-test", Key=key)["Body"].read(), np.uint8).copy()
    content[len(content) // 2] ^= 1
    s3.put_object(Bucket="fraud-models-test", Key=key, Body=content.tobytes())
    with lambda_runtime.instance(folder, environ, tmp_path / "log2") as running, lambda_runtime.gateway(running) as url:
        refused = httpx.post(f"{url}/predict", json=EXAMPLE, headers=KEY)
        assert (refused.status_code, refused.json()["problems"][0]["field"]) == (
            503,
            "model",
        ) and "hash does not match" in (tmp_path / "log2").read_text()


def test_missing_library_fails_the_build(project, tmp_path, library="numpy"):
    """A lock from which one library went, and a release that does not exist: no package, one line that names it."""
    lock = project.root / f"chalice_app/python{runtime()}.lock"
    text = lock.read_text()
    try:
        lines = text.splitlines(keepends=True)
        begin = next(i for i, line in enumerate(lines) if line.startswith(f"{library}=="))
        end = next(i for i, line in enumerate(lines) if i > begin and not line.startswith(" "))
        lock.write_text("".join(lines[:begin] + lines[end:]))
        failed = project.fraud("deploy", "package", str(tmp_path / "out"), ok=False)
        assert failed.returncode == 1 and f"{library} missing in the package" in failed.stderr
        lock.write_text(text.replace(f"{library}==", f"{library}==99."))
        failed = project.fraud("deploy", "package", str(tmp_path / "out"), ok=False)
        assert failed.returncode == 1 and library in failed.stderr and "Traceback" not in failed.stderr
    finally:
        lock.write_text(text)
