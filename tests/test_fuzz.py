"""Every parser of foreign bytes gets bytes that somebody has spoilt: it reads them or says in one line what is wrong.

Each begins with bytes that are right, and spoils them in a few places. What hypothesis finds is smaller than what it
tried; `FRAUD_FUZZ` multiplies the number of tries.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.rules import parse_rules
from fraud_pkg.core.signatures import CHAMPION, load_signer, new_key, read_signature
from fraud_pkg.data.readers import ReadOptions, open_source
from fraud_pkg.model.bundle import (
    MANIFEST,
    SIGNATURE,
    BundleError,
    load_bundle,
    manifest_hash,
    manifest_text,
    sha256_hex,
    sign_bundle,
)
from fraud_pkg.model.example import EXAMPLE_CONTRACT, example_bundle
from fraud_pkg.serve.wire import EXAMPLE, RequestReader
from fraud_pkg.stream import messages

pytestmark = pytest.mark.long(reason="some minutes of spoilt bytes for every parser")
TRIES = int(os.environ.get("FRAUD_FUZZ", "1"))


@st.composite
def spoilt(draw, whole: bytes, most: int = 6) -> bytes:
    """The bytes after some edits: a byte, a run, a number, a cut, a part twice."""
    content = bytearray(whole)
    for _edit in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["byte", "bit", "drop", "insert", "cut", "twice", "number", "text"]))
        length = draw(st.integers(1, 64))
        if not content or kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "byte":
            content[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x0A]))
        elif kind == "bit":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "drop":
            del content[at : at + length]
        elif kind == "cut":
            del content[at:]
        elif kind == "twice":
            content[at:at] = content[at : at + length]
        elif kind == "number":
            content[at : at + 4] = draw(
                st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"9999"])
            )
        else:
            content[at:at] = draw(
                st.sampled_from([b"null", b"1e999", b'""', b"[" * 500, b"NaN", b"\xed\xa0\x80", b"\r\n"])
            )
    return bytes(content)


def tried(examples: int):
    """A property that takes files, tried so many times."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples * TRIES, deadline=None, database=None, suppress_health_check=checks)


def one_line(error: FraudError) -> None:
    assert str(error) and len(str(error)) < 3000, str(error)[:500]


def refused_or_read(read: Callable[[], object], refusal: type[FraudError] = FraudError) -> None:
    """Either, and any other error is a failure."""
    try:
        read()
    except refusal as error:
        one_line(error)


# What comes by HTTP and Kafka

READER = RequestReader(EXAMPLE_CONTRACT)
KNOWN = messages.messages_of(EXAMPLE_CONTRACT)
PAYMENT = {name: EXAMPLE.get(name) for name in KNOWN.record.model_fields["transaction"].annotation.model_fields}
DECISION = {
    "transaction_id": "a-1",
    "fraud_probability": 0.93,
    "decision": "block",
    "costs": {"allow": 1413.6, "review": 146.4, "block": 3.5},
    "prices": {"review": 30.0, "block": 5.0},
    **dict.fromkeys(("limit", "rule", "control")),
    "tags": ["some"],
    "shadow_rules": [],
    "rules": "0",
    "reasons": [{"feature": "type", "value": "TRANSFER", "contribution": 2.5}],
    "history": True,
    "known_entities": 2,
    "model": "0123456789ab",
}
MESSAGE = SimpleNamespace(topic="transactions", partition=0, offset=17)
RECORD = messages.scored_record(DECISION, 7_200_000, PAYMENT, KNOWN.fingerprint, [0.5] * KNOWN.features, MESSAGE)


def read_decision(value: bytes) -> None:
    messages.read_scored_record(value)
    messages.read_source(value)


RULES = b"""
rules:
- {name: some, action: review, if: amount > 1.0 && sender in list.blocked, note: why}
- {name: night, action: tag, if: hour < 6}
"""
MESSAGES: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "a payment in JSON": (
        json.dumps({"schema": 1, **EXAMPLE}).encode(),
        lambda value: messages.read_transaction(value, READER),
    ),
    "a payment in Avro": (
        KNOWN.transaction_format.write(dict.fromkeys(READER.accepted) | EXAMPLE),
        lambda value: messages.read_transaction(value, READER),
    ),
    "a request": (json.dumps(EXAMPLE).encode(), READER.parse),
    "a label in JSON": (messages.label_message("a-1", True, "json"), messages.read_label),
    "a label in Avro": (messages.label_message("a-1", True, "avro"), messages.read_label),
    "a decision in JSON": (messages.write_record(RECORD, "json", KNOWN), read_decision),
    "a decision in Avro": (messages.write_record(RECORD, "avro", KNOWN), read_decision),
    "rules": (RULES, lambda value: parse_rules(value.decode("utf-8", "replace"), "rules.yaml")),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    whole, read = MESSAGES[name]
    read(whole)

    @tried(3000)
    @given(spoilt(whole))
    def holds(value: bytes) -> None:
        refused_or_read(lambda: read(value))

    holds()


# Files of payments

ROWS = {
    "id": [f"p{i}" for i in range(40)],
    "when": [f"2026-03-{1 + i % 28:02} 10:00:00" for i in range(40)],
    "payer": [f"C{i % 7}" for i in range(40)],
    "amount": [f"{i}.25" for i in range(40)],
    "fraud": [str(i % 2) for i in range(40)],
}


def csv() -> bytes:
    lines = [",".join(ROWS), *(",".join(row) for row in zip(*ROWS.values(), strict=True))]
    return ("\n".join(lines) + "\n").encode()


def json_lines() -> bytes:
    rows = [dict(zip(ROWS, row, strict=True)) for row in zip(*ROWS.values(), strict=True)]
    return "\n".join(map(json.dumps, rows)).encode()


def written(write: Callable[[pa.Table, io.BytesIO], object]) -> bytes:
    held = io.BytesIO()
    write(pa.table(ROWS), held)
    return held.getvalue()


SHEET = {  # the least that is a workbook
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Override PartName="/xl/workbook.xml" ContentType="application/vnd.openxmlformats-officedocument'
    '.spreadsheetml.sheet.main+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
    'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships">'
    '<sheets><sheet name="log" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet" '
    'Target="worksheets/sheet1.xml"/></Relationships>',
    "xl/worksheets/sheet1.xml": '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
    "<sheetData>%s</sheetData></worksheet>",
}


def workbook() -> bytes:
    table = [list(ROWS), *zip(*ROWS.values(), strict=True)]
    rows = "".join(
        f'<row r="{r}">'
        + "".join(f'<c r="{"ABCDE"[c]}{r}" t="inlineStr"><is><t>{cell}</t></is></c>' for c, cell in enumerate(row))
        + "</row>"
        for r, row in enumerate(table, start=1)
    )
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in SHEET.items():
            archive.writestr(name, content.replace("%s", rows))
    return held.getvalue()


def zipped() -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("log.csv", csv())
    return held.getvalue()


def arrow_stream() -> bytes:
    """With the words of a column by number."""
    held, table = io.BytesIO(), pa.table(ROWS)
    table = table.set_column(1, table.column_names[1], table.column(1).dictionary_encode())
    with pa.ipc.new_stream(held, table.schema) as writer:
        writer.write_table(table)
    return held.getvalue()


def tarred() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        member = tarfile.TarInfo("log.csv")
        member.size = len(csv())
        archive.addfile(member, io.BytesIO(csv()))
    return held.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "log.csv": csv,
    "log.jsonl": json_lines,
    "log.json": lambda: b"[" + json_lines().replace(b"\n", b",") + b"]",
    "log.parquet": lambda: written(pq.write_table),
    "log.arrow": lambda: written(feather.write_feather),
    "log.arrows": arrow_stream,
    "log.xlsx": workbook,
    "log.csv.gz": lambda: gzip.compress(csv()),
    "log.csv.bz2": lambda: bz2.compress(csv()),
    "log.csv.xz": lambda: lzma.compress(csv()),
    "log.zip": zipped,
    "log.tar": tarred,
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    """All rows, and every line that is none."""
    whole, path = FILES[name](), tmp_path / name

    def read(content: bytes) -> int:
        path.write_bytes(content)
        source = open_source(path, name, ReadOptions(unpacked_mb=8))
        source.sample(20)
        return sum(len(batch.table) + len(batch.broken) for batch in source.batches())

    assert read(whole) == 40

    @tried(600)
    @given(spoilt(whole))
    def holds(content: bytes) -> None:
        refused_or_read(lambda: read(content))

    holds()


# Bundles


@pytest.fixture
def bundle(tmp_path) -> Path:
    folder = tmp_path / "bundle"
    example_bundle(folder)
    new_key(tmp_path / "key.pem", Path("/nowhere"))
    sign_bundle(folder, CHAMPION, load_signer({"FRAUD_SIGNING_KEY_FILE": str(tmp_path / "key.pem")}))
    return folder


def test_manifests(bundle):
    """Of which somebody has computed the hash anew, so that what it says is looked at."""
    manifest = json.loads((bundle / MANIFEST).read_text())

    def hashed(content: bytes) -> bytes:
        try:
            changed = json.loads(content)
            return manifest_text(changed | {"sha256": manifest_hash(changed)})
        except (ValueError, TypeError, AttributeError, RecursionError):
            return content

    @tried(1500)
    @given(spoilt(json.dumps(manifest).encode()))
    def holds(content: bytes) -> None:
        (bundle / MANIFEST).write_bytes(hashed(content))
        refused_or_read(lambda: load_bundle(bundle), BundleError)

    holds()


def test_signatures(bundle):
    text = (bundle / SIGNATURE).read_bytes()

    @tried(3000)
    @given(spoilt(text))
    def holds(content: bytes) -> None:
        refused_or_read(lambda: read_signature(content, "here"))

    holds()


LOADER = """
import random, sys
from pathlib import Path
import test_fuzz
test_fuzz.load_spoilt_models(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


def load_spoilt_models(folder: Path, tries: int, seed: int) -> None:
    """Models with hashes of their own, in this process: what onnxruntime makes of them must not end it."""
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    chance, manifest = random.Random(seed), json.loads((folder / MANIFEST).read_text())
    [name] = [name for name in manifest["files"] if name.endswith(".onnx")]
    whole, read = (folder / name).read_bytes(), 0
    for number in range(tries):
        content = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(content))
            content[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
        print(number, bytes(content).hex() if number == 0 else "", flush=True)
        (folder / name).write_bytes(content)
        changed = manifest | {"version": sha256_hex(bytes(content))[:12]}
        changed["files"] = manifest["files"] | {name: sha256_hex(bytes(content))}
        (folder / MANIFEST).write_bytes(manifest_text(changed | {"sha256": manifest_hash(changed)}))
        try:
            load_bundle(folder).raw(np.zeros((2, len(manifest["features"])), np.float32))
            read += 1
        except BundleError as error:
            one_line(error)
    print(f"{read} of {tries} are models still")


@pytest.mark.parametrize("seed", [1, 2])
def test_models(bundle, seed):
    """In a process of its own: a crash of the runtime would be one of the service."""
    shutil.rmtree(bundle / SIGNATURE, ignore_errors=True)
    here = str(Path(__file__).parent)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", LOADER, str(bundle), str(400 * TRIES), str(seed)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 and "are models still" in done.stdout, (done.stdout[-300:], done.stderr[-2000:])
