"""The pipeline on data that this project did not make."""

import pytest
from conftest import shared

from fraud_pkg.model.bundle import load_bundle

pytestmark = pytest.mark.external

HANDBOOK = {
    "columns__transaction_id": "TRANSACTION_ID",
    "columns__timestamp": "TX_DATETIME",
    "columns__sender": "CUSTOMER_ID",
    "columns__receiver": "TERMINAL_ID",
    "columns__amount": "TX_AMOUNT",
    "columns__is_fraud": "TX_FRAUD",
    "columns__scenario": "TX_FRAUD_SCENARIO",
    "data__sender_prefix": "C",
    "data__receiver_prefix": "M",
}


# Card, store, amount in many currencies, a place, and whatever else its owner wrote down; sorted by store, not by time.
CARDS = {
    "columns__transaction_id": "id",
    "columns__timestamp": "datetime",
    "columns__sender": "card_id",
    "columns__receiver": "store_id",
    "columns__is_fraud": "fraud",
    "data__sender_prefix": "C",
    "data__receiver_prefix": "S",
    "attributes__present": 'flag column=customer_present label="Customer present"',
    "attributes__expires": "category column=expiration_date",
    "attributes__provider": "category",
    "attributes__store": "place column=lat,lng",
    "attributes__region": "category",
    "attributes__country": "category",
    "entities__sender": "sender history=account partner=receiver statistics=all",
    "entities__country": "country windows=7d,30d",
    "entities__provider": "provider partner=currency windows=7d",
    "entities__known_store": "sender+receiver windows=30d statistics=count,ratio,last_seen",
}


def average_precision(space, file: str = "reports/bakeoff/bakeoff.json") -> dict[str, float]:
    return {row["name"]: row["metrics"]["average_precision"]["value"] for row in space.json(file)["rows"]}


@pytest.mark.long(reason="a training on a log that test_acquire reads and test_benchmarks makes features of")
def test_paysim_head(workspace):
    """Eight hours, 81 frauds: labels that are known at once, and the rule that gives PaySim away."""
    space = workspace(
        data__source=shared("paysim_head.csv"),
        features__engine="local",
        features__windows="1h, 24h",
        features__label_delay=0,
        split__test_hours=2,
        split__validation_hours=1,
        gate__min_average_precision=0.01,
        train__contenders="xgboost",
        train__ablation=False,
    )
    space.fraud("run", "--job", "train_xgboost")
    raw = space.json("data/raw/manifest.json")
    assert (raw["rows"], raw["quarantined"], raw["first_step"], raw["last_step"]) == (19_999, 0, 1, 8)
    assert average_precision(space, "data/scores/xgboost/bakeoff.json")["rule"] > 0.5


@pytest.fixture(scope="module")
def cards(workspace):
    """A file as its owner has it: every column declared, none thrown away."""
    return workspace(
        data__source=shared("fraud_transactions_evalml.csv.gz"),
        features__engine="local",
        tensorflow__epochs=1,
        train__ablation=False,
        pipeline__push=False,
        **CARDS,
    )


@pytest.mark.long(reason="99,992 payments with 28 columns; test_init.py reads them")
def test_cards_with_attributes(cards):
    """From the file to a bundle; the amount alone would not do."""
    cards.fraud("run", "--job", "train_xgboost")
    raw, contender = cards.json("data/raw/manifest.json"), load_bundle(cards.root / "models/xgboost").manifest
    assert (raw["rows"], raw["quarantined"]) == (99_992, 0)
    assert [entity.name for entity in contender.contract.entities] == [
        "sender",
        "receiver",
        "country",
        "provider",
        "known_store",
    ]
    assert {"currency", "expires", "provider", "region", "country"} <= contender.vocabulary.keys()
    assert {"present", "sender_km_per_hour", "country_fraud_share_7d", "known_store_count_30d"} <= {*contender.features}
    found = average_precision(cards, "data/scores/xgboost/bakeoff.json")
    assert found["xgboost"] > 0.7 and found["xgboost"] > found["plain_xgboost"] - 0.02, found


@pytest.mark.long(reason="the jobs after the training are the same for any data; test_pipeline runs them all")
def test_cards_to_the_report(cards):
    """The whole pipeline with these columns."""
    cards.fraud("run")
    champion = load_bundle(cards.root / "models/champion").manifest
    assert champion.contract == load_bundle(cards.root / "models/xgboost").manifest.contract
    assert (cards.root / "reports/index.html").is_file()


@pytest.mark.long(reason="968,731 real transactions through the whole pipeline")
def test_handbook(workspace):
    """Another schema through [columns]: timestamps, no balances, no types."""
    space = workspace(data__source=shared("handbook_until_2018-07-10.parquet"), tensorflow__epochs=1, **HANDBOOK)
    space.fraud("run")
    raw = space.json("data/raw/manifest.json")
    assert (raw["rows"], raw["quarantined"], raw["epoch"][:10]) == (968_731, 0, "2018-03-26")
    found = average_precision(space)
    assert found["xgboost"] > 0.4 and found["xgboost"] > found["xgboost_without_history"] > found["rule"]
