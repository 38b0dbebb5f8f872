"""Acquire on data that this project did not make, and on the bad days of a disk."""

import gzip
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fraud_pkg.data import acquire as module
from fraud_pkg.data.acquire import acquire
from fraud_pkg.core.checks import arrow_schema
from fraud_pkg.core.contract import Contract
from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.settings import Settings, load_settings, project_root

HEADER = (
    "step,type,amount,nameOrig,oldbalanceOrg,newbalanceOrig,"
    "nameDest,oldbalanceDest,newbalanceDest,isFraud,isFlaggedFraud\n"
)
DATED = HEADER.replace("step", "timestamp")
ROW = "1,PAYMENT,9839.64,C1,170136,160296.36,M1,0,0,0,0\n"
HANDBOOK = {
    "columns.transaction_id": "TRANSACTION_ID",
    "columns.timestamp": "TX_DATETIME",
    "columns.sender": "CUSTOMER_ID",
    "columns.receiver": "TERMINAL_ID",
    "columns.amount": "TX_AMOUNT",
    "columns.is_fraud": "TX_FRAUD",
    "columns.scenario": "TX_FRAUD_SCENARIO",
    "data.sender_prefix": "C",
    "data.receiver_prefix": "M",
}


def project(folder: Path, source: Path | str, **cli) -> Settings:
    folder.mkdir(exist_ok=True)
    (folder / "settings.ini").touch()
    return load_settings(file=folder / "settings.ini", cli={"data.source": str(source)} | cli, environ={})


def shared(name: str) -> Path:
    folder = Path(os.environ.get("FRAUD_SHARED_DATA") or project_root().parent / "shared" / "data")
    if not (folder / name).is_file():
        pytest.skip(f"{folder / name} is not there; set FRAUD_SHARED_DATA to the folder that holds it")
    return folder / name


def everything(folder: Path) -> dict[str, bytes]:
    "What a project's outputs hold, hidden leftovers included."
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix not in (".ini", ".csv")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.mark.external
def test_the_same_data_give_the_same_bytes(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        acquire(project(folder, shared("paysim_head.csv")))
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.external
def test_paysim_head(tmp_path):
    manifest = acquire(project(tmp_path, shared("paysim_head.csv")))
    assert (manifest["rows"], manifest["quarantined"], manifest["reasons"]) == (19_999, 0, {})
    assert (manifest["first_step"], manifest["last_step"], manifest["epoch"]) == (1, 8, None)
    assert (manifest["source"], manifest["sampled"], manifest["out_of_order"]) == ("paysim_head.csv", False, 0)
    contract = Contract.model_validate(manifest["contract"])
    assert contract == Contract()

    table = pq.read_table(tmp_path / "data" / "raw" / manifest["file"])
    assert table.schema.equals(arrow_schema(contract).append(pa.field("row", pa.int64())))
    assert pc.sum(table["is_fraud"]).as_py() == 81
    assert table["row"].to_pylist() == list(range(19_999))
    assert table["transaction_id"].to_pylist() == [str(i) for i in range(19_999)]
    assert table.slice(2, 1).to_pylist()[0] == {
        "transaction_id": "2",
        "time": 3600,
        "type": "TRANSFER",
        "amount": 181.0,
        "currency": None,
        "sender": "C1305486145",
        "sender_balance": 181.0,
        "sender_balance_after": 0.0,
        "receiver": "C553264065",
        "receiver_balance": 0.0,
        "receiver_balance_after": 0.0,
        "is_fraud": 1,
        "label_time": None,
        "flagged": 0,
        "scenario": None,
        "row": 2,
    }
    assert pc.max(table["receiver_balance"]).as_py() >= 1e7  # those the spreadsheet wrote in scientific notation

    profile = json.loads((tmp_path / "reports" / "data" / "profile.json").read_text())
    assert (profile["rows"], profile["frauds"]) == (19_999, 81)
    frauds = table.filter(pc.equal(table["is_fraud"], 1))
    assert set(frauds["type"].to_pylist()) == {"TRANSFER", "CASH_OUT"}
    assert {kind for kind, count in profile["types"].items() if count["frauds"]} == {"TRANSFER", "CASH_OUT"}


@pytest.mark.external
def test_every_wrapping_of_the_head_is_the_same_data(tmp_path):
    content = shared("paysim_head.csv").read_bytes()
    plain = acquire(project(tmp_path, shared("paysim_head.csv")))["fingerprint"]
    raw = pq.read_table(next((tmp_path / "data" / "raw").glob("*.parquet")))
    (tmp_path / "head.bin").write_bytes(gzip.compress(content))
    (tmp_path / "windows.csv").write_bytes(b"\xef\xbb\xbf" + content.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    pq.write_table(raw.drop_columns(["transaction_id"]), tmp_path / "head.parquet", row_group_size=777)
    for name in ("head.bin", "windows.csv", "head.parquet"):
        assert acquire(project(tmp_path, name))["fingerprint"] == plain, name


@pytest.mark.external
def test_handbook(tmp_path):
    manifest = acquire(project(tmp_path, shared("handbook_until_2018-07-10.parquet"), **HANDBOOK))
    assert (manifest["rows"], manifest["quarantined"]) == (968_731, 0)
    assert (manifest["epoch"], manifest["first_step"]) == ("2018-03-26T00:00", 144)
    assert manifest["last_step"] == 144 + 101 * 24 - 1  # 2018-04-01 to 2018-07-10, both included

    table = pq.read_table(tmp_path / "data" / "raw" / manifest["file"])
    empty = ["type", "sender_balance", "sender_balance_after", "receiver_balance", "receiver_balance_after", "flagged"]
    assert all(table[name].null_count == table.num_rows for name in empty)
    assert table["scenario"].is_valid().to_pylist() == pc.equal(table["is_fraud"], 1).to_pylist()
    assert set(table["scenario"].drop_null().unique().to_pylist()) == {"1", "2", "3"}
    assert all(name.startswith("C") for name in table["sender"].unique().to_pylist())
    assert all(name.startswith("M") for name in table["receiver"].unique().to_pylist())


@pytest.mark.external
def test_handbook_needs_prefixes_and_can_be_sampled(tmp_path):
    source = shared("handbook_until_2018-07-10.parquet")
    with pytest.raises(FraudError, match="columns CUSTOMER_ID and TERMINAL_ID are both numbered"):
        acquire(project(tmp_path, source, **{k: v for k, v in HANDBOOK.items() if k.startswith("columns")}))
    manifest = acquire(project(tmp_path, source, **HANDBOOK, **{"data.sample_size": 50_000}))
    assert manifest["sampled"] and 50_000 <= manifest["rows"] < 51_000
    kept = pq.read_table(tmp_path / "data" / "raw" / manifest["file"])["sender"].value_counts().to_pylist()
    customers = pq.read_table(source, columns=["CUSTOMER_ID"])["CUSTOMER_ID"].value_counts().to_pylist()
    counts = {f"C{c['values']}": c["counts"] for c in customers}
    assert all(counts[k["values"]] == k["counts"] for k in kept)


WITH_DEVICE = {"attributes.ip": "category derive=network:24", "attributes.shop": "place column=lat,lon"}
DEVICES = HEADER.replace("\n", ",ip,lat,lon\n") + ROW.replace("\n", ",")
BAD = {  # content of log.csv, settings, words of the one line
    "no header": (b"1\n2\n", {}, "neither CSV nor Parquet"),
    "binary": (bytes(range(256)) * 40, {}, "neither CSV nor Parquet"),
    "a page": (b"<!DOCTYPE html>, or so\n", {}, "an HTML page"),
    "empty": (b"", {}, "log.csv: empty"),
    "header only": (HEADER.encode(), {}, "a header and no rows"),
    "truncated gzip": (gzip.compress((HEADER + ROW * 999).encode())[:-20], {}, "truncated archive"),
    "half a Parquet file": (b"PAR1" + b"\0" * 99, {}, "broken Parquet file"),
    "missing column": (HEADER.replace("amount,", "").encode() + b"1\n", {}, "no column for amount"),
    "extra column": (HEADER.replace("\n", ",device\n").encode() + b"1\n", {}, "unknown column device"),
    "negative amount": (HEADER + ROW.replace("9839.64", "-1"), {}, "amount: below 0 (1, first in line 2)"),
    "a long type": (HEADER + ROW.replace("PAYMENT", "x" * 257), {}, "type: longer than 256 characters"),
    "an unknown attribute": (HEADER + ROW, {"attributes.ip": "category"}, "[attributes] ip asks for column ip"),
    "a leak": (HEADER + ROW, {"attributes.x": "flag column=isFraud"}, "known only after the decision"),
    "no address": (DEVICES + "here,1,1\n", WITH_DEVICE, "ip: not an IP address (1, first in line 2)"),
    "outside the globe": (DEVICES + "::1,91,1\n", WITH_DEVICE, "shop_latitude: above 90 (1, first in line 2)"),
    "text in a number": (HEADER + ROW.replace("9839.64", "much"), {}, "amount: not a number (1, first in line 2)"),
    "duplicate ids": (
        "transaction_id," + HEADER + ("7," + ROW) * 2,
        {},
        "transaction_id: seen before (1, first in line 3)",
    ),
    "no UTF-8": (
        (HEADER + ROW.replace("C1", "Zoë")).encode("latin-1"),
        {"data.encoding": "utf-8"},
        "sender: not UTF-8 (1, first in line 2)",
    ),
    "a NUL byte": (HEADER + ROW.replace("C1", "C\0"), {}, "sender: a NUL byte (1, first in line 2)"),
    "too few fields": (HEADER + "1,PAYMENT\n", {}, "row: fewer fields than the header (1, first in line 2)"),
    "an open quote": (HEADER + ROW + '1,"PAYMENT,5\n' + ROW * 3, {}, "row: quote not closed (4, first in line 3)"),
    "a broken moment": (
        DATED + ("2018-04-01" + ROW[1:]) * 5 + "2018-02-30" + ROW[1:],
        {},
        "timestamp: not a date and time (1, first in line 7)",
    ),
    "before the epoch": (DATED + "2018-04-01" + ROW[1:], {"data.epoch": "2020-01-01"}, "timestamp: before the epoch"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_the_old_data(tmp_path, case):
    content, cli, words = BAD[case]
    (tmp_path / "good.csv").write_text(HEADER + ROW)
    acquire(project(tmp_path, "good.csv"))
    before = everything(tmp_path)
    (tmp_path / "log.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FraudError) as error:
        acquire(project(tmp_path, "log.csv", **cli))
    assert words in str(error.value) and "log.csv" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    after = everything(tmp_path)
    if "see data/quarantine/" in str(error.value):
        (quarantined,) = [name for name in after if name.startswith("data/quarantine/")]
        assert quarantined in str(error.value)
        before, after = [{n: c for n, c in d.items() if "quarantine" not in n} for d in (before, after)]
    assert before == after


def test_any_order_and_missing_labels_are_taken(tmp_path):
    rows = ["2018-04-01 00:00:02,5,a,b,", "2018-04-01,6,a,b,1", "2018-04-01 00:00:02,7,a,,0"]
    (tmp_path / "log.csv").write_text("timestamp,amount,sender,receiver,is_fraud\n" + "\n".join(rows) + "\n")
    manifest = acquire(project(tmp_path, "log.csv"))
    assert (manifest["rows"], manifest["quarantined"], manifest["out_of_order"]) == (3, 0, 1)
    table = pq.read_table(tmp_path / "data" / "raw" / manifest["file"]).to_pydict()
    monday = 144 * 3600  # since Monday, 2018-03-26
    assert table["time"] == [monday, monday + 2, monday + 2]
    assert (table["amount"], table["is_fraud"], table["row"]) == ([6, 5, 7], [1, None, 0], [0, 1, 2])
    assert (table["transaction_id"], table["receiver"]) == (["1", "0", "2"], ["b", "b", None])


@pytest.mark.parametrize(
    "source, words",
    [
        ("nowhere.csv", "nowhere.csv: No such file"),
        (".", "no file of data; it holds settings.ini"),
        ("ftp://x/y", "expected simulate://"),
    ],
)
def test_no_file(tmp_path, source, words):
    with pytest.raises(FraudError, match=words):
        acquire(project(tmp_path, source))


def test_interrupted_while_writing(tmp_path, monkeypatch):
    (tmp_path / "log.csv").write_text(HEADER + ROW)
    acquire(project(tmp_path, "log.csv"))
    before = everything(tmp_path)
    (tmp_path / "log.csv").write_text(HEADER + ROW * 2)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_profile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        acquire(project(tmp_path, "log.csv"))
    assert everything(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 256 kB."
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def some_rows(count: int) -> str:
    "A log that does not compress well."
    rng = random.Random(7)
    row = "1,PAYMENT,{:.2f},C{},0,0,M{},0,0,0,0\n".format
    return HEADER + "".join(row(rng.random() * 1e5, rng.getrandbits(31), rng.getrandbits(31)) for _ in range(count))


def test_full_disk(tmp_path, small_disk):
    (tmp_path / "small.csv").write_text(HEADER + ROW)
    (tmp_path / "big.csv").write_text(some_rows(50_000))
    acquire(project(small_disk, tmp_path / "small.csv"))
    before = everything(small_disk)
    with pytest.raises(FraudError) as error:
        acquire(project(small_disk, tmp_path / "big.csv"))
    assert str(error.value) == f"{small_disk / 'data'}: cannot write: No space left on device; nothing was replaced"
    assert everything(small_disk) == before


def test_file_size_limit(tmp_path):
    (tmp_path / "big.csv").write_text(some_rows(50_000))
    project(tmp_path, "big.csv")
    code = (
        "from fraud_pkg.core.errors import FraudError; from fraud_pkg.core.settings import load_settings\n"
        "from fraud_pkg.data.acquire import acquire\n"
        "try: acquire(load_settings(cli={'data.source': 'big.csv'}))\n"
        "except FraudError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"FRAUD_ROOT": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert run.stdout == f"{tmp_path / 'data'}: cannot write: File too large; nothing was replaced\n", run.stderr
    assert everything(tmp_path) == {}
