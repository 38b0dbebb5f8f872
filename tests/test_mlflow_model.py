"""`models:/fraud-scorer@champion` as people with MLflow's tools use it: what the service decides, also where the
project is not installed.
"""

import json
import os
import subprocess
import sys

import httpx
import pandas as pd
import pyarrow.parquet as pq
import pytest
import servers
from conftest import PROJECT

from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.stream.replay import RequestWriter, request_columns

MODEL = "models:/fraud-scorer@champion"
ROWS = 1_000
# In a process of its own: MLflow keeps the address of its registry for good.
SCRIPT = """
import json, os, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(os.environ["TRACKING"])
model = mlflow.pyfunc.load_model(sys.argv[1])
import fraud_pkg
table = pd.read_parquet(sys.argv[2])
model.predict(table).to_parquet(sys.argv[3])
data = mlflow.get_run(model.metadata.run_id).inputs.dataset_inputs
print(json.dumps({"package": fraud_pkg.__file__, "columns": model.metadata.signature.inputs.input_names(),
                  "data": [entry.dataset.digest for entry in data]}))
"""


@pytest.fixture(scope="module")
def answered(finished, tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """Payments of the test period, and what the service said of them, features included."""
    folder = tmp_path_factory.mktemp("service")
    raw = finished.json("data/raw/manifest.json")
    table = pq.read_table(finished.root / "data/raw" / raw["file"]).slice(raw["rows"] - ROWS)
    contract = load_bundle(finished.root / "models/champion").manifest.contract
    rows = table.select([name for name in request_columns(contract) if name in table.column_names]).to_pylist()
    writer = RequestWriter(contract, None, "json")
    payments = [json.loads(writer.write(row)) for row in rows]
    for payment in payments:
        del payment["schema"]  # of messages
    given = {"serve__bundle": finished.root / "models/champion", "serve__fill": "no"}
    with servers.service(folder, **given) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        said = client.post("/predict/batch", json={"transactions": payments, "features": True})
        assert said.status_code == 200, said.text
    return payments, said.json()["decisions"]


def test_a_thousand_rows_equal_the_service(finished, answered, tmp_path):
    """In an environment that has MLflow and the libraries, and not the project: the model brings its code."""
    payments, decisions = answered
    manifest = load_bundle(finished.root / "models/champion").manifest
    table = pd.DataFrame([decision["features"] for decision in decisions], columns=list(manifest.features))
    for name in manifest.vocabulary:
        table[name] = [payment.get(name) for payment in payments]
    table["tx_amount"] = [payment["amount"] for payment in payments]
    table.to_parquet(tmp_path / "rows.parquet")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["TRACKING"] = f"sqlite:///{finished.root / 'mlflow.db'}"
    hidden = f"import sys; sys.path[:] = [place for place in sys.path if place != {str(PROJECT)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", hidden + SCRIPT, MODEL, tmp_path / "rows.parquet", tmp_path / "said.parquet"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert not told["package"].startswith(str(PROJECT))
    assert told["columns"] == [*manifest.features, "tx_amount"]
    assert told["data"] == [manifest.data["fingerprint"][:12]]
    said = pd.read_parquet(tmp_path / "said.parquet")
    assert said["fraud_probability"].tolist() == [decision["fraud_probability"] for decision in decisions]
    assert said["decision"].tolist() == [decision["decision"] for decision in decisions]
    assert said["cost_review"].tolist() == [decision["costs"]["review"] for decision in decisions]
    assert len({*said["decision"]}) > 1
