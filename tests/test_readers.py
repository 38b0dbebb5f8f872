"""Files as people have them: in any dialect, encoding and packing, broken ones, and ones larger than memory."""

import bz2
import csv
import gzip
import io
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from conftest import PROJECT, SHARED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.settings import load_settings
from fraud_pkg.data import readers, unpack
from fraud_pkg.data.readers import ReadOptions, Source, open_source
from fraud_pkg.data.sources import open_data

OWN_DATA = SHARED.parent / "cases" / "own-data"
COLUMNS = ["id", "when", "payer", "payee", "amount", "fraud"]
OTHERS = {  # rows and columns, where they are not those of the base
    "10_date_and_time_apart.csv": (300, ["id", "payer", "payee", "amount", "fraud", "date", "time"]),
    "15b_exact_duplicate_rows.csv": (330, COLUMNS),
    "20_text_files_concatenated.csv": (301, COLUMNS),  # the second header is a row, and refused as one
    "20b_total_row.csv": (301, COLUMNS),
    "20d_trailing_comma.csv": (300, [*COLUMNS, "Unnamed: 6"]),
    "20n_two_headers.csv": (301, COLUMNS),
    "25_types_of_their_own.csv": (300, [*COLUMNS, "type"]),
    "25b_types_lower_case.csv": (300, [*COLUMNS, "type"]),
    "26_no_payee.csv": (300, ["id", "when", "payer", "amount", "fraud"]),
    "27_header_twice.csv": (300, ["id", "when", "Account", "Account.1", "amount", "fraud"]),
    "49_list_column.parquet": (300, [*COLUMNS, "geo.lat", "geo.lon"]),
    "50b_pandas_text_index.parquet": (300, [*COLUMNS, "__index_level_0__"]),
    "52_hive": (300, [*COLUMNS, "day"]),
    "65_no_label.csv": (300, COLUMNS[:-1]),
}


def table_of(source: Source) -> pa.Table:
    return pa.concat_tables(batch.table for batch in source.batches())


def opened(path: Path, **options: str) -> Source:
    return open_source(path, path.name, ReadOptions(**options))


def complaint(path: Path, **options: str) -> str:
    with pytest.raises(FraudError) as error:
        list(opened(path, **options).batches())
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.external
def test_own_data():
    if not OWN_DATA.exists():
        pytest.skip("no own-data beside the shared data")
    paths = [p for p in [*OWN_DATA.iterdir(), *(OWN_DATA / "read-today").iterdir()] if p.name[0].isdigit()]
    assert len(paths) > 100
    for path in paths:
        if path.suffix == ".xlsx":
            assert "an Excel workbook that cannot be read" in complaint(path)
            continue
        source = opened(path)
        rows, columns = OTHERS.get(path.name, (300, COLUMNS))
        batches = list(source.batches())
        assert (sum(len(b.table) for b in batches), source.schema.names) == (rows, columns), path.name
        assert not any(batch.broken for batch in batches), path.name


def packed(content: bytes, how: str) -> bytes:
    """The content as a file of this kind."""
    buffer = io.BytesIO()
    if how == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("log.csv", content)
            archive.writestr("README.txt", "What this is.")
    elif how == "tar.gz":
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo("logs/log.csv")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    else:
        codecs = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "": bytes}
        return codecs[how](content) if how in codecs else bytes(pa.compress(content, codec=how))
    return buffer.getvalue()


PACKINGS = ["", "gz", "bz2", "xz", "zstd", "zip", "tar.gz"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "cp1250"]
JUNK = ["", "# made on 2024-03-04\n", "Payments of 2024\n\n", "\n\n", "Payments\nof all branches\n"]
WORDS = st.text('abcXYZ019 .,;|\t"\\\n-#éüß', max_size=8)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_table_in_any_dialect_reads_back_equal(tmp_path, data):
    extra = data.draw(st.integers(1, 3))
    rows = data.draw(st.lists(st.tuples(*[WORDS] * extra), min_size=3, max_size=12))
    table = [[str(i), *words, f"{i}.25"] for i, words in enumerate(rows, start=1)]
    names = ["id", *(f"note {i}" for i in range(extra)), "amount"]
    apostrophes = data.draw(st.booleans())
    style = {
        "delimiter": data.draw(st.sampled_from(",;\t|")),
        "lineterminator": data.draw(st.sampled_from(["\n", "\r\n"])),
        "quoting": csv.QUOTE_ALL if apostrophes else data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        "quotechar": "'" if apostrophes else '"',
    }
    if apostrophes:
        table = [[field.replace('"', "'") for field in row] for row in table]
    text = io.StringIO(newline="")
    text.write(data.draw(st.sampled_from(JUNK)).replace("\n", style["lineterminator"]))
    csv.writer(text, **style).writerows([names, *table])
    encoding, packing = data.draw(st.sampled_from(ENCODINGS)), data.draw(st.sampled_from(PACKINGS))
    path = tmp_path / "log"
    path.write_bytes(packed(text.getvalue().encode(encoding), packing))
    source = opened(path, encoding=encoding if encoding.startswith("cp") else "")
    assert (source.schema.names, source.unit) == (names, "line")
    read = table_of(source)
    assert [list(row.values()) for row in read.to_pylist()] == table
    assert source.sample().equals(read)


ROWS = st.sampled_from(  # text of a row and its fields
    [
        ("1,PAYMENT,5", 3),
        ('1,"PAYMENT",5', 3),
        ('1,"PAY\nMENT",5', 3),
        ("1,PAYMENT", 2),
        ("1,PAYMENT,5,6", 4),
        ('"1,PAYMENT",5', 2),
        ("", 0),
        (",,", 0),
    ]
)


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(ROWS, min_size=1, max_size=30), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_every_line_is_accounted_for(tmp_path, rows, newline, ends, small):
    """Written with the number of each line kept, also where nearly every row meets the end of a block."""
    texts = ["step,type,amount", *[text.replace("\n", newline) for text, _ in rows]]
    whole, broken, line, row = [], [], 2, 0
    for text, width in rows:
        whole += [(line, row)] if width == 3 else []
        broken += [(line, text)] if width in (2, 4) else []
        line, row = line + 1 + text.count("\n"), row + (width > 0)
    (tmp_path / "log.csv").write_bytes(newline.join(texts + [""] * ends).encode())
    with pytest.MonkeyPatch.context() as patch:
        for module in (readers, unpack):
            patch.setattr(module, "BLOCK", 32 if small else 1 << 20)
        source = opened(tmp_path / "log.csv")
        if not whole and not broken:
            return
        batches = list(source.batches())
    places = [place for b in batches for place in zip(b.line.tolist(), b.row.tolist(), strict=True)]
    assert places == whole
    assert [(b.line, b.text) for batch in batches for b in batch.broken] == broken


def test_typed_files_keep_their_types(tmp_path):
    table = pa.table(
        {
            "at": pa.array([1, None], pa.timestamp("ns", "Europe/Berlin")),
            "late": pa.array([1, 2], pa.duration("s")),
            "amount": pa.array(["1.50", "2.25"]).cast(pa.decimal128(9, 2)),
            "half": pa.array([np.float16(1.5), None]),
            "id": pa.array([bytes(16), b"\1" * 16], pa.uuid()),
            "kind": pa.array(["a", "b"]).dictionary_encode(),
            "tags": pa.array([["x"], []]),
        }
    )
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=1)
    with pa.ipc.new_file(tmp_path / "log.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("log.parquet", "log.arrow"):
        source = opened(tmp_path / name)
        assert source.found["left out"].startswith("tags (list<")
        assert source.schema.field("at").type == pa.timestamp("ns", "Europe/Berlin")
        assert source.schema.field("amount").type == pa.decimal128(9, 2)
        assert source.schema.field("half").type == pa.float32()
        assert table_of(source)["id"].to_pylist()[1] == "01010101-0101-0101-0101-010101010101"
        assert table_of(source).schema == source.schema
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert table_of(opened(tmp_path / f"{name}.gz")).equals(table_of(source))


CELL = {str: '<c r="{0}" t="inlineStr"><is><t>{1}</t></is></c>', float: '<c r="{0}"><v>{1}</v></c>'}


def workbook(rows: dict[int, list]) -> bytes:
    """The least that Excel takes: one sheet called Log, of these rows by their number."""
    cells = "".join(
        f'<row r="{r}">' + "".join(CELL[type(v)].format(f"{chr(65 + i)}{r}", v) for i, v in enumerate(row)) + "</row>"
        for r, row in rows.items()
    )
    office = "http://schemas.openxmlformats.org"
    kinds, main = f"{office}/officeDocument/2006/relationships", f"{office}/spreadsheetml/2006/main"

    def relation(kind: str, target: str) -> str:
        package = f"{office}/package/2006/relationships"
        to = f'<Relationship Id="rId1" Type="{kinds}/{kind}" Target="{target}"/>'
        return f'<Relationships xmlns="{package}">{to}</Relationships>'

    sheets = '<sheets><sheet name="Log" sheetId="1" r:id="rId1"/></sheets>'
    files = {
        "[Content_Types].xml": f'<Types xmlns="{office}/package/2006/content-types"/>',
        "_rels/.rels": relation("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{kinds}">{sheets}</workbook>',
        "xl/_rels/workbook.xml.rels": relation("worksheet", "worksheets/sheet1.xml"),
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, '<?xml version="1.0"?>' + content)
    return buffer.getvalue()


def test_a_workbook(tmp_path):
    path = tmp_path / "log.csv"  # its name does not matter
    path.write_bytes(workbook({2: ["Export"], 4: ["id", "amount"], 5: [1.0, 2.5], 7: ["x", 3.0]}))
    source = opened(path)
    assert source.found == {"format": "Excel workbook", "sheet": "Log", "header": "row 4"}
    (batch,) = source.batches()
    assert batch.table.to_pylist() == [{"id": "1", "amount": "2.5"}, {"id": "x", "amount": "3"}]
    assert batch.line.tolist() == [5, 7]
    assert table_of(opened(path, member="L*")).equals(batch.table)
    assert "no sheet matches [data] member = Other; it has Log" in complaint(path, member="Other")
    path.write_bytes(workbook({1: [1.0, 2.0], 2: [3.0, 4.0]}))
    assert "no header: the first row of sheet Log looks like data" in complaint(path)
    assert opened(path, header="0").schema.names == ["column_1", "column_2"]


def test_an_archive_that_unpacks_to_too_much(tmp_path):
    for packing in ("gz", "bz2", "xz", "zstd", "zip"):
        (tmp_path / "log").write_bytes(packed(b"step,type\n" + b"1,PAYMENT\n" * 1_000_000, packing))
        assert "unpacks to more than" in complaint(tmp_path / "log", unpacked_mb=1), packing
        assert opened(tmp_path / "log", unpacked_mb=16).schema.names == ["step", "type"]


def test_a_parquet_file_that_becomes_too_much(tmp_path):
    column = pa.array(["PAYMENT"] * 3_000_000).dictionary_encode()
    pq.write_table(pa.table({"type": column, "step": pa.repeat(1, 3_000_000)}), tmp_path / "log", compression="zstd")
    assert (tmp_path / "log").stat().st_size < 29_000
    assert "a Parquet file that becomes 6,000,000 bytes or more" in complaint(tmp_path / "log", unpacked_mb=1)
    assert opened(tmp_path / "log", unpacked_mb=6).schema.names == ["type", "step"]


def test_s3(tmp_path, monkeypatch):
    with servers.moto(tmp_path) as aws:
        for name, value in aws.items():
            monkeypatch.setenv(name, value)
        s3 = boto3.client("s3", endpoint_url=aws["AWS_ENDPOINT_URL"])
        s3.create_bucket(Bucket="logs", CreateBucketConfiguration={"LocationConstraint": aws["AWS_DEFAULT_REGION"]})
        for day in (1, 2):
            s3.put_object(Bucket="logs", Key=f"all/day={day}/part-0.csv", Body=f"step,type\n{day},PAYMENT\n".encode())
        s3.put_object(Bucket="logs", Key="all/_SUCCESS", Body=b"")

        def rows(source: str, **options: str) -> list[dict]:
            (tmp_path / "settings.ini").touch()
            cli = {"data.source": source} | {f"data.{name}": value for name, value in options.items()}
            project = load_settings(file=tmp_path / "settings.ini", cli=cli, environ={})
            return table_of(open_data(project)[0]).to_pylist()

        both = [{"step": str(day), "type": "PAYMENT", "day": str(day)} for day in (1, 2)]
        assert rows("s3://logs/all/") == rows("s3://logs/all") == rows("s3://logs/all/*/*.csv") == both
        assert rows("s3://logs/all/", member="day=2/*") == both[1:]
        assert rows("s3://logs/all/day=1/part-0.csv") == [{"step": "1", "type": "PAYMENT"}]
        with pytest.raises(FraudError, match="s3://logs/none/: no such object"):
            rows("s3://logs/none/")


READ = """
import resource, sys
from pathlib import Path
from fraud_pkg.data.readers import ReadOptions, open_source
import pyarrow.csv, pyarrow.parquet

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
source = open_source(Path(sys.argv[1]), "log", ReadOptions())
kept = []
rows = 0
for batch in source.batches():
    rows += len(batch.table)
    if sys.argv[3] == "whole":
        kept.append(batch)
print(rows)
"""


@pytest.mark.parametrize(("format", "left"), [("csv", 350), ("parquet", 200)])
def test_a_file_larger_than_memory(tmp_path, format, left):
    """More rows than there is memory (in MB) left: read batch by batch they fit, kept they do not."""
    path, block = tmp_path / "log", 1_000_000
    step = pa.array(np.arange(block) + 10**17)
    table = pa.table({"step": step, "type": pa.array([f"PAYMENT {i}" for i in range(block)]), "amount": step})
    if format == "csv":
        rows = b"".join(b"%d,PAYMENT %d,%d\n" % (i, i, i) for i in range(10**17, 10**17 + block // 4))
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(b"step,type,amount\n")
            for _ in range(40):
                file.write(rows)
        expected = 40 * block // 4
    else:
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for _ in range(8):
                writer.write_table(table, row_group_size=block // 4)
        expected = 8 * block

    def read(how: str) -> subprocess.CompletedProcess:
        environ = os.environ | {
            "PYTHONPATH": str(PROJECT),
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "MALLOC_ARENA_MAX": "1",
        }
        command = [sys.executable, "-c", READ, str(path), str(left), how]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)

    done = read("batches")
    assert (done.returncode, done.stdout.strip()) == (0, str(expected)), done.stderr[-2000:]
    assert read("whole").returncode != 0
