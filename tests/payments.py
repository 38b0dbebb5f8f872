"""Payments of a contract with every kind of attribute and six entities, as tests draw, send and tabulate them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from fraud_pkg.core.contract import DAY, HOUR, Contract, contract_from, derive_category, raw_columns
from fraud_pkg.core.sections import Columns
from fraud_pkg.core.settings import Settings
from fraud_pkg.model.example import example_bundle

ATTRIBUTES = {
    "device": "category",
    "card": 'category column="Card No" derive=prefix:6',
    "network": "category column=ip derive=network:24",
    "mcc": 'category column=merchant_type label="Merchant category"',
    "risk": "number",
    "fee": "money",
    "online": "flag",
    "since": 'moment column="Customer since"',
    "shop": "place column=lat,lon",
}
ENTITIES = {
    "device": "device partner=sender statistics=count,sum,mean,ratio,new_partners,fraud_share,last_seen",
    "card": "card partner=receiver windows=10m,24h,7d statistics=all",
    "mcc": "mcc windows=24h,7d statistics=count,ratio,fraud_share,fraud_streak",
    "payee": "sender+receiver windows=24h,7d statistics=count,last_seen,speed",
}
CONTRACT = contract_from(ATTRIBUTES, ENTITIES, windows=(10 * 60, HOUR, DAY, 7 * DAY), label_delay=2)
COLUMNS = {"amount": "Amount", "sender": "Customer", "receiver": "Merchant"}  # what the source calls them

ACCOUNTS = [f"C{number}" for number in range(4)]
DAYS = 12  # that drawn payments are spread over
moments = st.integers(0, DAYS * DAY) | st.integers(5 * DAY, 5 * DAY + HOUR)  # far apart, or within minutes


def maybe(values: st.SearchStrategy) -> st.SearchStrategy:
    """One of these, or nothing."""
    return st.none() | values


def of(*texts: str) -> st.SearchStrategy:
    return maybe(st.sampled_from(texts))


rows = st.fixed_dictionaries(
    {
        "time": moments,
        "type": of("TRANSFER", "CASH_OUT", "GIFT"),
        "cents": st.integers(0, 10**7) | st.just(10**12),
        "currency": of("currency_1", "XTS"),
        "sender": st.sampled_from(ACCOUNTS),
        "sender_balance": maybe(st.integers(0, 10**9).map(lambda cents: cents / 100)),
        "receiver": of(*ACCOUNTS),  # accounts also pay themselves
        "receiver_balance": maybe(st.just(0.0)),
        "device": of("device_1", "device_2", "device_3"),
        "card": of("4111111111", "4111112222", "5500001111"),
        "network": of("10.1.2.3", "10.1.2.77", "10.9.9.9", "2001:db8::1"),
        "mcc": of("mcc_1", "mcc_2", "5411"),
        "risk": maybe(st.floats(-1e6, 1e6, width=32)),
        "fee": maybe(st.integers(-500, 500).map(lambda cents: cents / 100)),
        "online": maybe(st.booleans()),
        "since": maybe(st.integers(-(10**8), DAYS * DAY + HOUR)),  # also after the payment
        "shop": maybe(st.tuples(st.integers(-90, 90), st.integers(-180, 180))),
        "fraud": maybe(st.booleans()),
        "late": st.integers(0, CONTRACT.label_delay * DAY) | st.integers(0, DAYS * DAY),  # until the label, in s
        "dated": st.booleans(),  # the data say when it came, as they always do beyond the delay
    }
)
PLACE = CONTRACT.places[0].stored


def request(row: Mapping[str, Any], name: str, own: bool = False) -> dict[str, Any]:
    """A drawn row as its sender would send it: in the contract's names or in the source's `own`."""
    said = {key: row[key] for key in row if key not in ("cents", "shop", "fraud", "late", "dated")}
    said |= {"transaction_id": name, "amount": row["cents"] / 100}
    said |= dict(zip(PLACE, row["shop"] or (None, None), strict=True))
    renamed = dict(COLUMNS) if own else {}
    for attribute in CONTRACT.attributes if own else ():
        renamed |= dict(zip(attribute.stored, attribute.columns, strict=True))
    return {renamed.get(key, key): value for key, value in said.items() if value is not None}


def table(drawn: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Drawn rows, in order of arrival, as `acquire` would write them; each is called by its number."""
    derived = [attribute for attribute in CONTRACT.attributes if attribute.derive]
    content: list[dict[str, Any]] = []
    for number, row in enumerate(drawn):
        made = request(row, str(number)) | {"is_fraud": None if row["fraud"] is None else int(row["fraud"])}
        if row["dated"] or row["late"] > CONTRACT.label_delay * DAY:
            made["label_time"] = row["time"] + row["late"]
        made |= {a.name: derive_category(a, made[a.name]) for a in derived if a.name in made}
        content.append(made)
    columns = {
        column.name: pa.array([row.get(column.name) for row in content]).cast(column.storage)
        for column in raw_columns(CONTRACT)
    }
    return pa.table({"row": pa.array(range(len(content)), pa.int64()), **columns})


def bundle(folder: Path, contract: Contract = CONTRACT, epoch: str | None = None, bias: float = -8.0) -> str:
    """Writes an example bundle that knows the source's names; returns its version."""
    settings = Settings(columns=Columns(**COLUMNS))
    return example_bundle(folder, bias=bias, contract=contract, epoch=epoch, settings=settings).manifest.version
