"""The pipeline on data that this project did not make."""

import pytest
from conftest import shared

pytestmark = pytest.mark.external

HANDBOOK = {
    "columns__tx_id": "TRANSACTION_ID",
    "columns__timestamp": "TX_DATETIME",
    "columns__sender": "CUSTOMER_ID",
    "columns__receiver": "TERMINAL_ID",
    "columns__amount": "TX_AMOUNT",
    "columns__is_fraud": "TX_FRAUD",
    "columns__scenario": "TX_FRAUD_SCENARIO",
    "data__sender_prefix": "C",
    "data__receiver_prefix": "M",
}


def average_precision(space) -> dict[str, float]:
    return {
        row["name"]: row["metrics"]["average_precision"]["value"]
        for row in space.json("reports/bakeoff/bakeoff.json")["rows"]
    }


def test_paysim_head(workspace):
    """Eight hours, 81 frauds: a label delay of an hour, and the rule that gives PaySim away."""
    space = workspace(
        data__source=shared("paysim_head.csv"),
        features__engine="local",
        features__windows="1, 24",
        features__label_delay=1,
        split__test_hours=2,
        split__validation_hours=1,
        gate__min_average_precision=0.01,
    )
    space.fraud("run")
    raw = space.json("data/raw/manifest.json")
    assert (raw["rows"], raw["quarantined"], raw["first_step"], raw["last_step"]) == (19_999, 0, 1, 8)
    assert average_precision(space)["rule"] > 0.5
    assert (space.root / "reports/index.html").is_file()


@pytest.mark.long(reason="968,731 real transactions through the whole pipeline")
def test_handbook(workspace):
    """Another schema through [columns]: timestamps, no balances, no types."""
    space = workspace(data__source=shared("handbook_until_2018-07-10.parquet"), tensorflow__epochs=1, **HANDBOOK)
    space.fraud("run")
    raw = space.json("data/raw/manifest.json")
    assert (raw["rows"], raw["quarantined"], raw["epoch"][:10]) == (968_731, 0, "2018-03-26")
    found = average_precision(space)
    assert found["xgboost"] > 0.4 and found["xgboost"] > found["xgboost_without_history"] > found["rule"]
