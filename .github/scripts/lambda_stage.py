"""What cd.yml does around `fraud deploy lambda --stage STAGE`: fetch, keep, smoke, restore, store.

Chalice knows a stage by the file that its last deployment wrote, and a runner begins with nothing. So the file is
kept in the bucket of models;
without it the next deployment would make a second API with another URL.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(os.environ.get("RUNNER_TEMP", "/tmp")) / "kept-function"
SMOKE = {
    "transaction_id": "smoke",
    "step": 1,
    "type": "PAYMENT",
    "amount": 1.00,
    "sender": "C-smoke",
    "sender_balance": 10.00,
    "receiver": "M-smoke",
    "receiver_balance": 0.00,
}


def deployed_file(stage: str) -> Path:
    return ROOT / f"chalice_app/.chalice/deployed/{stage}.json"


def resources(stage: str) -> dict[str, dict]:
    return {found["resource_type"]: found for found in json.loads(deployed_file(stage).read_text())["resources"]}


def fetch(stage: str, bucket: str, champion_url: str) -> None:
    """The champion, and what chalice knows of the stage."""
    s3 = boto3.client("s3")
    try:
        state = s3.get_object(Bucket=bucket, Key=f"state/{stage}.json")["Body"].read()
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchKey":
            raise
        print(f"{stage}: no deployment yet")
    else:
        deployed_file(stage).parent.mkdir(parents=True, exist_ok=True)
        deployed_file(stage).write_bytes(state)
    place, _, prefix = champion_url.removeprefix("s3://").rstrip("/").partition("/")
    champion = ROOT / "models/champion"
    champion.mkdir(parents=True, exist_ok=True)
    try:
        # Verified when they are packed; the signature is there where somebody signs.
        for name in ("manifest.sig", "manifest.json", "model.onnx", "reference.parquet"):
            (champion / name).unlink(missing_ok=True)
            try:
                (champion / name).write_bytes(s3.get_object(Bucket=place, Key=f"{prefix}/{name}")["Body"].read())
            except ClientError as error:
                if name != "manifest.sig" or error.response["Error"]["Code"] != "NoSuchKey":
                    raise
    except ClientError as error:
        reason = error.response["Error"]["Code"]
        sys.exit(
            f"error: {champion_url}/{name}: {reason}; a champion is expected there: "
            f"run the workflow jobs with promote, or fraud models publish {champion_url}"
        )


def store(stage: str, bucket: str) -> None:
    """What chalice now knows of the stage, for the next deployment."""
    if deployed_file(stage).exists():
        boto3.client("s3").put_object(Bucket=bucket, Key=f"state/{stage}.json", Body=deployed_file(stage).read_bytes())


def keep(stage: str) -> None:
    """The function as it runs now: its package, model and settings are one zip."""
    KEPT.mkdir(parents=True, exist_ok=True)
    try:
        found = boto3.client("lambda").get_function(FunctionName=f"fraud-{stage}")
    except ClientError as error:
        if error.response["Error"]["Code"] != "ResourceNotFoundException":
            raise
        print(f"{stage}: no function yet, so nothing to come back to")
        return
    with urllib.request.urlopen(found["Code"]["Location"], timeout=120) as response:
        (KEPT / f"{stage}.zip").write_bytes(response.read())
    configuration = found["Configuration"]
    variables = configuration.get("Environment", {}).get("Variables", {})
    kept = {"Environment": {"Variables": variables}} | {
        key: configuration[key] for key in ("MemorySize", "Timeout", "Runtime")
    }
    (KEPT / f"{stage}.json").write_text(json.dumps(kept))


def restore(stage: str) -> None:
    """The function as `keep` found it."""
    zipped = KEPT / f"{stage}.zip"
    if not zipped.exists():
        sys.exit(
            f"error: {stage}: there is no former function to come back to; "
            f"`fraud deploy remove --stage {stage}` takes this one away"
        )
    client, name = boto3.client("lambda"), f"fraud-{stage}"
    client.update_function_configuration(FunctionName=name, **json.loads((KEPT / f"{stage}.json").read_text()))
    client.get_waiter("function_updated").wait(FunctionName=name)
    client.update_function_code(FunctionName=name, ZipFile=zipped.read_bytes())
    client.get_waiter("function_updated").wait(FunctionName=name)
    print(f"{stage}: the former function answers again")


def ask(url: str, key: str = "", body: dict | None = None, tries: int = 10) -> dict:
    """The answer of a stage, which may need a moment for its first one."""
    headers = {"Content-Type": "application/json"} | ({"X-API-Key": key} if key else {})
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return json.load(response)
        except (urllib.error.URLError, ValueError) as error:
            tries -= 1
            if not tries:
                sys.exit(f"error: {url}: {error}")
            time.sleep(float(os.environ.get("SMOKE_WAIT", "3")))


def smoke(stage: str) -> None:
    """Through the deployed URL: it lives, it serves the champion that was packed, and, with a key, it decides."""
    url = resources(stage)["rest_api"]["rest_api_url"].rstrip("/")
    version = json.loads((ROOT / "models/champion/manifest.json").read_text())["version"]
    ask(f"{url}/healthz")
    served = ask(f"{url}/readyz")["model"]
    if served != version:
        sys.exit(f"error: {url} serves model {served}; expected {version}")
    decision = "not asked for: the environment has no secret FRAUD_API_KEY"
    if key := os.environ.get("FRAUD_API_KEY"):
        decision = ask(f"{url}/predict", key, SMOKE).get("decision")
        if decision not in ("allow", "review", "block"):
            sys.exit(f"error: {url}/predict: decision is {decision!r}")
    print(f"{stage}: model {version} answers at {url}; decision {decision}")
    if output := os.environ.get("GITHUB_OUTPUT"):
        with open(output, "a", encoding="utf-8") as file:
            file.write(f"url={url}\n")


if __name__ == "__main__":
    commands = {command.__name__: command for command in (fetch, store, keep, restore, smoke)}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(f"usage: lambda_stage.py {'|'.join(commands)} STAGE ...")
    commands[sys.argv[1]](*sys.argv[2:])
