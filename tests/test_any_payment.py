"""A bundle whose contract has attributes and entities of its own, as clients of the service meet it."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import payments
import pytest
import servers
from openapi import conforms
from payments import CONTRACT

from fraud_pkg.core.contract import DAY, HOUR, Contract, contract_from
from fraud_pkg.features.definitions import feature_names

SAID = {
    "transaction_id": "a1",
    "time": 10 * DAY,
    "type": "TRANSFER",
    "Amount": 12.5,
    "Customer": "C1",
    "Merchant": "M1",
    "device": "device_1",
    "Card No": "4111111111111111",
    "ip": "10.1.2.3",
    "merchant_type": "mcc_1",
    "risk": 0.25,
    "fee": 1.5,
    "online": True,
    "Customer since": 3 * DAY,
    "lat": 48.2,
    "lon": 16.4,
}


def said(name: str, **changes) -> dict:
    """A payment in the source's names, without what is changed to None."""
    return {key: value for key, value in {**SAID, "transaction_id": name, **changes}.items() if value is not None}


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("any")
    payments.bundle(folder / "champion")
    with servers.service(folder) as (url, _), httpx.Client(base_url=url, timeout=30) as client:
        yield client


def decided(client: httpx.Client, *transactions: dict) -> list[dict]:
    """Decisions with features by name."""
    answer = client.post("/predict/batch", json={"transactions": list(transactions), "features": True})
    assert answer.status_code == 200, answer.text
    names = feature_names(CONTRACT)
    return [
        {**decision, "features": dict(zip(names, decision["features"], strict=True))}
        for decision in answer.json()["decisions"]
    ]


def problems(client: httpx.Client, transaction: dict) -> dict[str, str]:
    """Why a payment is refused, by field."""
    answer = client.post("/predict", json=transaction)
    assert answer.status_code == 422, answer.text
    return {problem["field"]: problem["reason"] for problem in answer.json()["problems"]}


def test_in_the_names_of_the_data(client):
    """A request as the data has it, and the same in the contract's names: the same features, and one history."""
    own = said("own", Customer="C-own")
    renamed = {"Amount": "amount", "Customer": "sender", "Merchant": "receiver", "lat": "shop_latitude"}
    renamed |= {"Card No": "card", "ip": "network", "merchant_type": "mcc", "Customer since": "since"}
    renamed |= {"lon": "shop_longitude"}
    plain = {renamed.get(name, name): value for name, value in said("plain", Customer="C-own").items()}
    first, second = decided(client, own, plain)
    for name in ("amount", "device", "mcc", "risk", "fee", "online", "since_age_days"):
        assert first["features"][name] == second["features"][name]
    assert first["features"]["since_age_days"] == 7 and first["features"]["risk"] == 0.25
    assert (first["features"]["sender_out_count_10m"], second["features"]["sender_out_count_10m"]) == (0, 1)
    assert (first["features"]["payee_count_24h"], second["features"]["payee_count_24h"]) == (0, 1)
    assert second["features"]["card_km_from_last"] == 0


def test_a_derived_category_joins_what_it_names(client):
    """Two cards of one kind, two addresses of one network: one history each."""
    moment = 20 * DAY
    first = said("d1", time=moment, ip="172.16.5.1", Customer="D1", Merchant="D2", **{"Card No": "5200001111"})
    second = said("d2", time=moment + 60, ip="172.16.5.9", Customer="D3", Merchant="D4", **{"Card No": "5200002222"})
    features = [decision["features"] for decision in decided(client, first, second)]
    assert [row["card_count_10m"] for row in features] == [0, 1]


@pytest.mark.parametrize("name", ["colour", "Colour\N{SNOWMAN}", "is_fraud", "nameOrig"])
def test_an_undeclared_field_is_refused_by_name(client, name):
    found = problems(client, said("x1", **{name: "red"}))
    assert list(found) == [name]
    expected = {"is_fraud": "is known only after", "nameOrig": "unknown field; sender (Customer) is meant?"}
    assert found[name].startswith(expected.get(name, "unknown field; known are"))


def test_one_name_twice_is_refused(client):
    assert "is there under another name" in problems(client, said("x2", amount=3.0))["Amount"]


BAD = [
    ({"risk": "much"}, "risk", "number"),
    ({"fee": 2e15}, "fee", "less than or equal"),
    ({"online": "yes"}, "online", "boolean"),
    ({"online": 2}, "online", "boolean"),
    ({"Customer since": "last year"}, "Customer since", "integer"),
    ({"device": ["a"]}, "device", "string"),
    ({"device": "d" * 257}, "device", "256 characters"),
    ({"device": "a\x1fb"}, "device", "U+001F"),
    ({"ip": "here"}, "ip", "an IP address"),
    ({"lat": 91.0}, "lat", "less than or equal to 90"),
    ({"lon": -180.5}, "lon", "greater than or equal to -180"),
    ({"lat": None}, "body", "expected both shop_latitude and shop_longitude"),
    ({"Merchant": "m" * 65}, "Merchant", "64 characters"),
]


@pytest.mark.parametrize(("changes", "field", "reason"), BAD)
def test_what_cannot_be_is_refused_by_name(client, changes, field, reason):
    """An attribute of the wrong kind, a place outside the globe, half a place: and the next one is decided."""
    found = problems(client, said("bad", **changes))
    assert list(found) == [field] and reason in found[field]
    assert client.post("/predict", json=said(f"after-{field}")).status_code == 200


def test_a_category_of_ten_megabytes(client):
    answer = client.post("/predict", json=said("huge", device="d" * 10_000_000))
    assert (answer.status_code, answer.json()["problems"][0]["field"]) == (413, "body")
    assert client.post("/predict", json=said("after-huge")).status_code == 200


def test_a_moment_in_the_future_is_an_age_below_zero(client):
    (decision,) = decided(client, said("future", **{"Customer since": 12 * DAY}))
    assert decision["features"]["since_age_days"] == -2


def test_without_its_columns_an_entity_has_no_history(client):
    """No failure: its features are those of an entity that was never seen, and nobody else is its past."""
    bare = {"type": None, "Merchant": None, "device": None, "Card No": None, "ip": None, "merchant_type": None}
    bare |= {"risk": None, "fee": None, "online": None, "Customer since": None, "lat": None, "lon": None}
    first, second = decided(
        client, said("bare1", Customer="bare", **bare), said("bare2", Customer="bare", time=10 * DAY + 5, **bare)
    )
    assert (first["known_entities"], second["known_entities"]) == (0, 1)
    assert second["features"]["sender_out_count_10m"] == 1
    for entity in ("receiver_in", "device", "card", "payee", "mcc"):
        counts = {value for name, value in second["features"].items() if name.startswith(f"{entity}_count")}
        assert counts == {0}
    assert second["features"]["device_new_partner"] is None and second["features"]["device"] == 0


def test_it_says_when_nobody_knows_the_entities(client):
    new = {"Customer": "N1", "Merchant": "N2", "device": "N3", "ip": "10.99.1.1", "merchant_type": "N4"}
    first, second = (
        client.post("/predict", json=said(name, **new, **{"Card No": "999999"})).json() for name in ("n1", "n2")
    )
    assert (first["history"], first["known_entities"]) == (True, 0)
    assert (second["history"], second["known_entities"]) == (True, len(CONTRACT.entities))


def test_what_a_payment_is_can_be_asked(client):
    told = client.get("/model").json()
    assert [attribute["name"] for attribute in told["attributes"]] == [a.name for a in CONTRACT.attributes]
    assert [entity["name"] for entity in told["entities"]] == [entity.name for entity in CONTRACT.entities]
    assert told["contract"] == CONTRACT.fingerprint and told["columns"] == payments.COLUMNS
    document = json.dumps(client.get("/openapi.json").json())
    assert "shop_latitude" in document and "Card No" in document


def test_does_what_its_document_says(client):
    conforms(f"{client.base_url}/openapi.json", str(client.base_url).rstrip("/"), "none")


WIDER = contract_from(
    {**payments.ATTRIBUTES, "colour": "category", "weight": "number"},
    {**payments.ENTITIES, "colour": "colour windows=1h,24h statistics=count"},
    windows=CONTRACT.windows,
    label_delay=CONTRACT.label_delay,
)


async def flow(url: str, seconds: float, answers: list, body: dict) -> None:
    """Eight clients that send one payment after the other."""
    end, numbers = time.monotonic() + seconds, iter(range(10**9))
    async with httpx.AsyncClient(base_url=url, timeout=10) as client:

        async def send() -> None:
            while time.monotonic() < end:
                answer = await client.post("/predict", json={**body, "transaction_id": f"f{next(numbers)}"})
                answers.append((answer.status_code, answer.json().get("model")))

        await asyncio.gather(*(send() for _ in range(8)))


@pytest.mark.parametrize("place", ["memory", "redis"])
def test_more_attributes_while_requests_flow(tmp_path, place, request):
    """From few attributes to many while payments come: every one is answered, by both models; those of the old
    contract fit the new one. An entity that begins now is named in the answer about the model, and in the log.
    """
    store = "memory://" if place == "memory" else request.getfixturevalue("redis_url")
    before = payments.bundle(tmp_path / "champion")
    answers: list = []
    with servers.service(tmp_path, store__url=store) as (url, _):
        assert "colour" in problems(httpx.Client(base_url=url), said("early", colour="red"))

        async def swap() -> None:
            await asyncio.sleep(1)
            await asyncio.to_thread(payments.bundle, tmp_path / "champion", WIDER)

        async def both() -> None:
            await asyncio.gather(flow(url, 6, answers, said("")), swap())

        asyncio.run(both())
        told = httpx.get(f"{url}/model").json()
        late = httpx.post(f"{url}/predict", json=said("late", colour="red", weight=2.5))
        known = httpx.post(f"{url}/predict", json=said("late2", colour="red")).json()
    assert Counter(status for status, _ in answers).keys() == {200}
    assert {model for _, model in answers} == {before, told["version"]} and before != told["version"]
    assert late.status_code == 200 and told["begins_now"] == ["colour"]
    assert known["known_entities"] == len(WIDER.entities)
    assert (
        "the store does not know the history of entity colour; fraud store load" in (tmp_path / "api.log").read_text()
    )


def test_an_attribute_that_the_model_does_not_use(tmp_path):
    """Payments may say what the settings declare and no model knows yet, so that senders can begin before it decides;
    it has to be what was declared.
    """
    payments.bundle(tmp_path / "champion")
    with servers.service(tmp_path, attributes__colour="category") as (url, _), httpx.Client(base_url=url) as client:
        assert client.post("/predict", json=said("unused", colour="red")).status_code == 200
        assert list(problems(client, said("wrong", colour=[1]))) == ["colour"]
        assert list(problems(client, said("unknown", weight=5.0))) == ["weight"]


def test_dates_of_the_data(tmp_path):
    """A model that knows dates takes them for the payment and for moments."""
    payments.bundle(tmp_path / "champion", epoch="2026-01-05T00:00")
    with servers.service(tmp_path) as (url, _), httpx.Client(base_url=url) as client:
        dated = said("dated", time=None, timestamp="2026-01-15T00:00:00Z", **{"Customer since": "2026-01-08T00:00:00Z"})
        (decision,) = decided(client, dated)
        assert (decision["time"], decision["features"]["since_age_days"]) == (10 * DAY, 7)
        assert "ISO 8601" in problems(client, {**dated, "Customer since": 3 * DAY})["Customer since"]


def test_the_smallest_contract(tmp_path):
    """A sender, an amount and a time are a payment."""
    smallest = Contract(entities=Contract().entities[:1], windows=(HOUR, DAY), label_delay=0)
    payments.bundle(tmp_path / "champion", smallest)
    with servers.service(tmp_path) as (url, _):
        body = {"transaction_id": 1, "step": 5, "Amount": 9.99, "Customer": 77}
        assert httpx.post(f"{url}/predict", json=body).json()["known_entities"] == 0
        assert httpx.post(f"{url}/predict", json={**body, "transaction_id": 2}).json()["known_entities"] == 1
