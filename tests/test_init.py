"""`fraud init`: from a file as its owner has it to settings that a run takes."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT, SHARED, shared

from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.settings import load_settings
from fraud_pkg.data.acquire import acquire
from fraud_pkg.data.init import Start, answered, change_file, differing, propose, start_from
from fraud_pkg.data.proposal import Proposal
from fraud_pkg.data.proposal_text import proposal_text
from fraud_pkg.data.sources import open_data
from fraud_pkg.data.trial import Doubt, proposed_settings

OWN = SHARED.parent / "cases/own-data"
DAY = 86_400


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the project's settings.ini."""
    shutil.copy(PROJECT / "settings.ini", tmp_path)
    return tmp_path


def current(project: Path):
    return load_settings(file=project / "settings.ini", cli={}, environ={})


def looked_at(project: Path, source: Path | str, **said: str) -> Proposal:
    """What is proposed; settings that were said with __ for the dot."""
    start = start_from(str(source), current(project), {key.replace("__", "."): value for key, value in said.items()})
    opened, _ = open_data(proposed_settings(start.file, start.values))
    return propose(opened, start)


def taken(made: Proposal) -> dict[str, str]:
    """Column -> what it is taken for: a column of the core, a kind with its derivation, or left out."""
    attributes = {e.column: f"{e.attribute.kind} {e.attribute.derive}".strip() for e in made.taken if e.attribute}
    return {each.column: attributes.get(each.column, each.as_what) for each in made.taken}


def write(project: Path, made: Proposal) -> None:
    (project / "settings.ini").write_bytes(change_file(made, current(project))[1].encode())


class Shape:
    """Columns of a made-up log of n payments, as public data sets have them."""

    def __init__(self, n: int = 3000, days: int = 60, rate: float = 0.05, seed: int = 7):
        self.n, self.rng = n, np.random.default_rng(seed)
        self.fraud = self.rng.random(n) < rate
        self.seconds = np.sort(self.rng.integers(0, days * DAY, n))

    def pick(self, count: int, first: int = 0) -> np.ndarray:
        return self.rng.integers(first, first + count, self.n)

    def when(self, start: str = "2020-01-01") -> list[str]:
        moments = np.datetime64(start) + self.seconds.astype("timedelta64[s]")
        return [str(moment).replace("T", " ") for moment in moments]

    @property
    def amount(self) -> list[str]:
        return [f"{a:.2f}" for a in self.rng.gamma(2, 30, self.n) + 1 + 100 * self.fraud]

    @property
    def label(self) -> list[str]:
        return [str(int(f)) for f in self.fraud]


def save(path: Path, columns: dict) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def sparkov() -> dict:
    log, card = Shape(), Shape().pick(120)
    numbers = [f"4{i:014}" for i in range(120)]
    return {
        "": range(log.n), "trans_date_trans_time": log.when("2019-01-01"), "cc_num": [numbers[c] for c in card],
        "merchant": [f"fraud_Shop {m}" for m in log.pick(60)], "category": [f"kind_{k}" for k in log.pick(14)],
        "amt": log.amount, "first": [f"Ann{c}" for c in card], "last": [f"Lee{c}" for c in card],
        "gender": ["MF"[g] for g in card % 2], "street": [f"{c} Main Street" for c in card],
        "city": [f"City {c}" for c in card], "state": [("CA", "NY", "TX", "WA")[s] for s in card % 4],
        "lat": [f"{30 + c / 10:.4f}" for c in card], "long": [f"{-90 - c / 10:.4f}" for c in card],
        "city_pop": [str(1000 + 7 * c) for c in card], "job": [f"Job {j}" for j in card % 40],
        "dob": [f"{1950 + c % 50}-03-0{1 + c % 9}" for c in card],
        "trans_num": [f"{i:032x}" for i in log.pick(1 << 60)],
        "unix_time": [str(1_325_376_018 + s) for s in log.seconds],
        "merch_lat": [f"{v:.6f}" for v in log.rng.uniform(30, 45, log.n)],
        "merch_long": [f"{v:.6f}" for v in log.rng.uniform(-120, -80, log.n)], "is_fraud": log.label,
    }  # fmt: skip


def ieee() -> dict:
    log = Shape()
    return {
        "TransactionID": range(2_987_000, 2_987_000 + log.n), "isFraud": log.label,
        "TransactionDT": [str(86_400 + s) for s in log.seconds], "TransactionAmt": log.amount,
        "ProductCD": ["WHCSR"[p] for p in log.pick(5)], "card1": [str(c) for c in log.pick(200, 1000)],
        "card4": [("visa", "mastercard", "")[c] for c in log.pick(3)], "addr1": [f"{a}.0" for a in log.pick(40, 100)],
        "P_emaildomain": [("gmail.com", "yahoo.com", "")[e] for e in log.pick(3)],
        **{f"V{i}": [f"{v:.4f}" for v in log.rng.normal(size=log.n)] for i in range(1, 6)},
    }  # fmt: skip


def tabformer() -> dict:
    log = Shape()
    moments = [np.datetime64("2018-01-01") + np.timedelta64(int(s), "s") for s in log.seconds]
    dates = [str(moment) for moment in moments]
    return {
        "User": log.pick(80), "Card": log.pick(4), "Year": [d[:4] for d in dates],
        "Month": [str(int(d[5:7])) for d in dates], "Day": [str(int(d[8:10])) for d in dates],
        "Time": [d[11:16] for d in dates], "Amount": [f"${a}" for a in log.amount],
        "Use Chip": [("Swipe Transaction", "Chip Transaction", "Online Transaction")[u] for u in log.pick(3)],
        "Merchant Name": [str(m) for m in log.pick(90, 3_527_213_246_127_876_000)],
        "Merchant City": [f"Town {c}" for c in log.pick(30)], "MCC": log.pick(12, 5411),
        "Is Fraud?": [("No", "Yes")[f] for f in log.fraud.astype(int)],
    }  # fmt: skip


def aml() -> dict:
    log = Shape()
    return {
        "Timestamp": [w[:16].replace("-", "/") for w in log.when("2022-09-01")], "From Bank": log.pick(12, 10),
        "Account": [f"8{a:07X}" for a in log.pick(200)], "To Bank": log.pick(12, 10),
        "Account.1": [f"8{a:07X}" for a in log.pick(200)], "Amount Received": log.amount,
        "Receiving Currency": [("US Dollar", "Euro", "Yen")[c] for c in log.pick(3)], "Amount Paid": log.amount,
        "Payment Currency": [("US Dollar", "Euro", "Yen")[c] for c in log.pick(3)],
        "Payment Format": [("Cheque", "ACH", "Wire")[p] for p in log.pick(3)], "Is Laundering": log.label,
    }  # fmt: skip


def baf() -> dict:
    log = Shape()
    return {
        "fraud_bool": log.label, "income": [f"{v:.1f}" for v in log.rng.random(log.n)],
        "customer_age": log.pick(6, 2), "velocity_6h": [f"{v:.2f}" for v in log.rng.gamma(2, 1000, log.n)],
        "payment_type": [f"A{p}" for p in log.pick(5)], "source": [("INTERNET", "TELEAPP")[s] for s in log.pick(2)],
        "device_os": [("linux", "windows", "other")[s] for s in log.pick(3)], "month": log.pick(8),
    }  # fmt: skip


def creditcard() -> dict:
    log = Shape(days=2)
    return {
        "Time": [str(s) for s in log.seconds],
        **{f"V{i}": [f"{v:.4f}" for v in log.rng.normal(size=log.n)] for i in range(1, 29)},
        "Amount": log.amount, "Class": log.label,
    }  # fmt: skip


def banksim() -> dict:
    log = Shape(6000)
    return {
        "step": np.sort(log.pick(180)),
        "customer": [f"'C{c}'" for c in log.pick(40, 1_093_826)],
        "age": [f"'{a}'" for a in log.pick(7)], "gender": [f"'{'MFE'[g]}'" for g in log.pick(3)],
        "zipcodeOri": ["'28007'"] * log.n, "merchant": [f"'M{m}'" for m in log.pick(50, 348_934)],
        "zipMerchant": ["'28007'"] * log.n, "category": [f"'es_kind{k}'" for k in log.pick(15)],
        "amount": log.amount, "fraud": log.label,
    }  # fmt: skip


EXPECTED = {
    "sparkov": (sparkov, {
        "trans_date_trans_time": "when", "cc_num": "sender", "merchant": "receiver", "category": "category",
        "amt": "amount", "is_fraud": "is_fraud", "trans_num": "transaction_id", "Unnamed: 0": "left out",
        "first": "left out",
        "last": "left out", "street": "left out", "unix_time": "left out", "dob": "moment", "merch_lat": "place",
        "merch_long": "place", "lat": "number", "state": "category", "city": "left out"}),
    "ieee": (ieee, {
        "TransactionID": "transaction_id", "isFraud": "is_fraud", "TransactionDT": "when", "TransactionAmt": "amount",
        "ProductCD": "category", "card1": "sender", "card4": "category", "P_emaildomain": "category", "V1": "number"}),
    "tabformer": (tabformer, {
        "User": "sender", "Card": "category", "Year": "when", "Month": "when", "Day": "when", "Time": "when",
        "Amount": "amount", "Use Chip": "category", "Merchant Name": "receiver", "MCC": "category",
        "Is Fraud?": "is_fraud"}),
    "aml": (aml, {
        "Timestamp": "when", "Account": "sender", "Account.1": "receiver", "Amount Paid": "amount",
        "Amount Received": "money", "Payment Currency": "currency", "Payment Format": "type",
        "Is Laundering": "is_fraud"}),
    "banksim": (banksim, {
        "step": "when", "customer": "sender", "merchant": "receiver", "category": "category", "amount": "amount",
        "fraud": "is_fraud", "zipcodeOri": "left out"}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_public_shapes(project, name):
    """Files shaped like public data sets: settings by themselves, which acquire takes as they are."""
    make, expected = EXPECTED[name]
    made = looked_at(project, save(project / f"{name}.csv", make()))
    found = taken(made)
    assert {column: found[column] for column in expected} == expected, proposal_text(made)
    assert made.found.stops == [] and made.periods and made.periods.usable
    write(project, made)
    manifest = acquire(current(project))
    assert (manifest["rows"], manifest["quarantined"]) == (len(made.table), 0)
    again = looked_at(project, project / f"{name}.csv")
    assert differing(again, current(project)) == {}


def test_units_of_counted_times(project):
    """Seconds by name and size; days, where hours would mean that everybody pays all day long."""
    assert looked_at(project, save(project / "i.csv", ieee())).found.values["data", "step_unit"] == "seconds"
    assert looked_at(project, save(project / "b.csv", banksim())).found.values["data", "step_unit"] == "days"


@pytest.mark.parametrize(
    ("make", "reasons"), [(baf, ["no column holds an amount", "no column says who pays"]), (creditcard, ["who pays"])]
)
def test_no_champion_possible(project, make, reasons):
    """All reasons at once, and what was found is shown all the same."""
    made = looked_at(project, save(project / "data.csv", make()))
    for reason in reasons:
        assert any(reason in stop for stop in made.found.stops), made.found.stops
    assert taken(made)["Class" if make is creditcard else "fraud_bool"] == "is_fraud"
    assert "Would stop the run" in proposal_text(made)


def test_leaks_are_left_out(project):
    """Known afterwards by name, or telling the label all by itself; taken when asked for."""
    log = Shape()
    columns = {
        "id": range(log.n), "when": log.when(), "payer": [f"P{p}" for p in log.pick(60)], "amount": log.amount,
        "case_state": np.where(log.fraud, "closed against", "open"),
        "dispute_date": np.where(log.fraud, "2020-06-01", ""),
        "risk": [f"{v:.3f}" for v in log.fraud * 20 + log.rng.normal(size=log.n)], "device": log.pick(90),
        "fraud": log.label,
    }  # fmt: skip
    file = save(project / "leaky.csv", columns)
    made = looked_at(project, file)
    assert {each.column for each in made.leaks} == {"case_state", "dispute_date", "risk"}
    asked = looked_at(project, file, attributes__risk="number")
    assert {each.column for each in asked.leaks} == {"case_state", "dispute_date"}
    assert asked.found.settings.contract.attributes[0].name == "risk"


def test_dates_in_doubt(project):
    """Day or month first, and no row decides: the order of the rows speaks, and an answer outweighs it."""
    log = Shape(600, days=11)
    days = [f"0{1 + s // DAY}/03/2024" if s // DAY < 9 else f"{1 + s // DAY}/03/2024" for s in log.seconds]
    columns = {"when": days, "payer": log.pick(40), "amount": log.amount, "fraud": log.label}
    file = save(project / "days.csv", columns)
    made = looked_at(project, file)
    doubts = [(doubt.key, doubt.default) for doubt in made.found.doubts]
    assert doubts == [(("data", "time_format"), "dmy"), (("decision", "alert_budget"), "1")]
    start = start_from(str(file), current(project), {})
    opened, _ = open_data(proposed_settings(start.file, start.values))
    questions: list[Doubt] = []

    def answer(doubt: Doubt) -> str:
        questions.append(doubt)
        return "mdy" if doubt.key[1] == "time_format" else doubt.default

    assert answered(opened, start, answer).found.values["data", "time_format"] == "mdy"
    assert [doubt.key[1] for doubt in questions] == ["time_format", "alert_budget"]


def test_unlabelled_end(project):
    """Where the newest payments have no labels yet, the test period reaches back to those that have."""
    log = Shape()
    label = [value if i < 0.7 * log.n else "" for i, value in enumerate(log.label)]
    columns = {"when": log.when(), "payer": log.pick(40), "amount": log.amount, "fraud": label}
    made = looked_at(project, save(project / "late.csv", columns))
    assert made.found.stops == [] and made.periods.usable
    assert any("have no label" in note for note in made.found.notes)


def test_only_what_differs_changes(project):
    """Every other byte of settings.ini stays; another source takes the attributes of the first away, and says so."""
    before = (project / "settings.ini").read_text()
    file = save(project / "one.csv", sparkov())
    write(project, looked_at(project, file))
    after = (project / "settings.ini").read_text()
    comments = [line for line in before.splitlines() if line.startswith("#") or not line.strip()]
    assert [line for line in after.splitlines() if line.startswith("#") or not line.strip()] == comments
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert "source = one.csv" in changed and len(changed) < 50
    second = save(project / "two.csv", banksim())
    made = looked_at(project, second)
    going = {key for key, value in differing(made, current(project)).items() if value is None}
    assert ("attributes", "dob") in going
    write(project, made)
    assert "dob" not in current(project).attributes and "age" in current(project).attributes


def test_said_stays(project):
    """What the owner wrote for this source is kept; a --set outweighs it."""
    file = save(project / "one.csv", banksim())
    write(project, looked_at(project, file))
    text = (project / "settings.ini").read_text().replace("\nage = ", "\nage = category label=Years\n#", 1)
    (project / "settings.ini").write_text(text)
    again = looked_at(project, file)
    assert again.found.settings.contract.attributes[0].label == "Years" and differing(again, current(project)) == {}
    other = looked_at(project, file, attributes__age="", split__test_hours="500")
    assert taken(other)["age"] == "left out" and other.found.settings.split.test_hours == 500


def test_command(workspace, tmp_path):
    """The command itself: nothing written by --dry-run, without a terminal, or where a run would stop."""
    space = workspace()
    space.overrides = {}
    file = save(space.root / "pay.csv", sparkov())
    before = (space.root / "settings.ini").read_bytes()
    shown = space.fraud("init", str(file), "--dry-run").stdout
    assert "+source = pay.csv" in shown and max(map(len, shown.split("---")[0].splitlines())) <= 100
    refused = space.fraud("init", str(file), ok=False)
    assert refused.returncode == 1 and "--yes" in refused.stderr
    stopped = space.fraud("init", str(save(space.root / "no.csv", baf())), "--yes", ok=False)
    assert stopped.returncode == 1 and "nothing was written" in stopped.stderr and "customer_age" in stopped.stdout
    assert (space.root / "settings.ini").read_bytes() == before
    wrong = space.fraud("init", str(file), "--yes", "--set", "columns.amount=nowhere", ok=False)
    assert wrong.returncode == 1 and "no column nowhere" in wrong.stderr
    assert "next: fraud run" in space.fraud("init", str(file), "--yes").stdout
    assert "says all of this already" in space.fraud("init", "pay.csv", "--yes").stdout


def test_german_export(project):
    """Compounds, a country of the customer, a date that only frauds have: each is what it is."""
    log = Shape(4000)
    reversed_on = [day[:10] if fraud else "" for day, fraud in zip(log.when(), log.fraud, strict=True)]
    columns = {
        "Vorgang": [f"V{7 * i}" for i in range(log.n)], "Buchungszeitpunkt": [f"{w}+01:00" for w in log.when()],
        "Kd.-Nr.": [f"KD-{k:05}" for k in log.pick(300)], "Händler-Nr": log.pick(80),
        "Transaktionsbetrag": [a.replace(".", ",") for a in log.amount],
        "Gerätekennung": [f"dv{d}" for d in log.pick(200)], "Land Kunde": [("DE", "AT", "CH")[c] for c in log.pick(3)],
        "Storno-Datum": reversed_on, "Betrugsfall J/N": ["NJ"[f] for f in log.fraud.astype(int)],
    }  # fmt: skip
    made = looked_at(project, save(project / "export.csv", columns))
    assert taken(made) == {
        "Vorgang": "transaction_id", "Buchungszeitpunkt": "when", "Kd.-Nr.": "sender", "Händler-Nr": "receiver",
        "Transaktionsbetrag": "amount", "Gerätekennung": "category", "Land Kunde": "category",
        "Storno-Datum": "left out", "Betrugsfall J/N": "is_fraud",
    }  # fmt: skip
    assert made.found.stops == [] and [each.column for each in made.leaks] == ["Storno-Datum"]


REAL = {
    "fraud_transactions_evalml.csv.gz": ({
        "id": "transaction_id", "card_id": "sender", "store_id": "receiver", "datetime": "when", "amount": "amount",
        "currency": "currency", "fraud": "is_fraud", "customer_present": "flag", "lat": "place", "lng": "place",
        "country": "category"}, {"data.minor_units": "yes", "data.sender_prefix": "C"}, 99_992),
    "card_not_present_afd.csv": ({
        "EVENT_LABEL": "is_fraud", "EVENT_TIMESTAMP": "when", "LABEL_TIMESTAMP": "label_time", "ENTITY_ID": "sender",
        "EVENT_ID": "transaction_id", "order_price": "amount", "payment_currency": "currency", "merchant": "receiver",
        "ip_address": "category network", "customer_email": "category domain", "customer_name": "left out",
        "billing_latitude": "place", "product_category": "category"}, {"features.label_delay": "0d"}, 1611),
    "s_ffsd.zip": ({
        "Time": "when", "Source": "sender", "Target": "receiver", "Amount": "amount", "Location": "category",
        "Type": "type", "Labels": "is_fraud"}, {"data.unlabelled": "2", "data.step_unit": "seconds"}, 77_881),
}  # fmt: skip


@pytest.mark.external
@pytest.mark.parametrize("name", REAL)
def test_real_data(project, name):
    """Settings by `init --yes` alone, and acquire takes what they say."""
    expected, values, rows = REAL[name]
    made = looked_at(project, shared(name))
    found = taken(made)
    assert {column: found[column] for column in expected} == expected, proposal_text(made)
    assert {key: made.found.values[tuple(key.split("."))] for key in values} == values
    assert made.found.stops == [] and made.periods.usable and len(made.entities) <= 6
    write(project, made)
    manifest = acquire(current(project))
    assert manifest["rows"] + manifest["quarantined"] == rows and manifest["quarantined"] <= 0.02 * rows


@pytest.mark.external
def test_registrations(project):
    """No amount: why there can be no champion, and who would be the sender."""
    made = looked_at(project, shared("registrations_afd.csv"))
    assert taken(made) == {
        "ip_address": "sender",
        "email_address": "category domain",
        "EVENT_TIMESTAMP": "when",
        "EVENT_LABEL": "is_fraud",
    }
    assert [stop[:27] for stop in made.found.stops] == ["no column holds an amount: "]
    assert made.periods.usable


# What cannot be read as it is: the message names the cause. All others hold 300 payments and 16 frauds.
STOPPED = {"14_ids_scientific.csv": "rounded numbers", "62_excel_like.xlsx": ""}
OTHER_SUMS = {
    "02_comma", "31_thous", "67_all_z", "68_huge_", "68b_bitc", "08_refun", "08b_pare", "64_one_w", "64c_one_",
    "21_null_", "54_categ", "24_three", "54d_floa",
}  # fmt: skip


@pytest.mark.external
@pytest.mark.skipif(not OWN.is_dir(), reason=f"{OWN} is not there")
@pytest.mark.usefixtures("no_pictures")
def test_own_data(project):
    """Every file of the collection by `init --yes` alone: read with the right number of rows and frauds, or refused."""
    wrong = {}
    for file in sorted(file for file in OWN.iterdir() if file.name not in ("README.md", "read-today")):
        shutil.copy(PROJECT / "settings.ini", project)
        try:
            made = looked_at(project, file)
            stops = made.found.stops
        except FraudError as error:
            stops = [str(error)]
        if file.name in STOPPED:
            if not any(STOPPED[file.name] in stop for stop in stops):
                wrong[file.name] = stops
            continue
        if stops:
            wrong[file.name] = stops
            continue
        write(project, made)
        manifest = acquire(current(project))
        table = pq.read_table(project / "data/raw" / manifest["file"])
        frauds = pc.sum(table["is_fraud"]).as_py()
        total = round(pc.sum(table["amount"]).as_py(), 2)
        rows = manifest["rows"] + manifest["quarantined"]
        expected = 12 if file.name.startswith("23_") else 16  # four of them are not labelled there
        right = rows == 300 and frauds == expected and (file.name[:8] in OTHER_SUMS or total == 10_389.78)
        if not right:
            wrong[file.name] = (rows, frauds, total)
    assert wrong == {}


def test_start_knows_its_source(project):
    start = start_from(str(project / "a.csv"), current(project), {"data.decimal": "comma"})
    assert isinstance(start, Start) and not start.known
    assert start.values["data", "source"] == "a.csv" and start.said == {("data", "decimal")}
