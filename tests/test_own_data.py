"""Files as people have them: each is read as its row says, or refused with the cause and the setting."""

from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import SHARED

from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.settings import load_settings
from fraud_pkg.data import acquire as module
from fraud_pkg.data.acquire import acquire

pytestmark = pytest.mark.external

FILES = SHARED.parent / "cases" / "own-data"
NAMED = {
    "columns.transaction_id": "id",
    "columns.timestamp": "when",
    "columns.sender": "payer",
    "columns.receiver": "payee",
    "columns.amount": "amount",
    "columns.is_fraud": "fraud",
}
BASE = {
    "rows": 300,
    "senders": 40,
    "receivers": 25,
    "frauds": 16,
    "amount": 10_389.78,
    "first": "2024-03-04T08:00:00",
    "last": "2024-03-12T00:23:00",
    "quarantined": 0,
    "unlabelled": 0,
}
DAYS = {"first": "2024-03-04T00:00:00", "last": "2024-03-12T00:00:00"}
BERLIN = {"first": "2024-03-04T07:00:00", "last": "2024-03-11T23:23:00"}
STEPS = {"columns.timestamp": "", "columns.step": "when"}
ACCOUNTS = {"columns.sender": "Account", "columns.receiver": "Account.1"}

AS_THE_BASE = [
    "00_base.csv",
    "01_semicolon_decimal_comma.csv",
    "03_dollar.csv",
    "04_yes_no.csv",
    "04b_y_n.csv",
    "04c_words.csv",
    "04g_minus_one.csv",
    "05_utf16_bom.csv",
    "06_latin1.csv",
    "09b_slashes_ymd.csv",
    "09c_german.csv",
    "09e_bigquery_utc.csv",
    "09g_no_leading_zero.csv",
    "09h_epoch_seconds.csv",
    "09j_ampm.csv",
    "09k_compact.csv",
    "16_newest_first.csv",
    "16b_shuffled.csv",
    "18_two_members.zip",
    "18b_csv_and_readme.zip",
    "19_csv.tar.gz",
    "19b.csv.bz2",
    "19d.csv.zst",
    "20g_tab.tsv",
    "20i_lines.json",
    "20l_apostrophes.csv",
    "20o_comment_lines.csv",
    "21_null_words.csv",
    "24b_float_noise.csv",
    "24c_float32_noise.csv",
    "28_uuid_ids.csv",
    "28b_ids_19_digits.csv",
    "29_long_names.csv",
    "30_plus_signs.csv",
    "52b_parts",
    "53_arrow.feather",
    "54b_float32.parquet",
    "61d_duckdb.csv",
    "61e_duckdb_zstd_csv.csv.zst",
    "read-today/04e_python_bool.csv",
    "read-today/04f_float_label.csv",
    "read-today/07_utf8_bom.csv",
    "read-today/09l_nanos_z.csv",
    "read-today/17_multi_member.csv.gz",
    "read-today/20e_crlf.csv",
    "read-today/20f_cr_only.csv",
    "read-today/20j_all_quoted.csv",
    "read-today/20k_header_spaces.csv",
    "read-today/20q_newline_in_field.csv",
    "read-today/40_plain.parquet",
    "read-today/41_large_string.parquet",
    "read-today/42_string_view.parquet",
    "read-today/43_dictionary.parquet",
    "read-today/44b_decimal256.parquet",
    "read-today/44c_decimal_amount_only.parquet",
    "read-today/45d_int96.parquet",
    "read-today/46_uint64.parquet",
    "read-today/47b_float_ids_16_digits.parquet",
    "read-today/48_bool_label.parquet",
    "read-today/48b_string_label.parquet",
    "read-today/50_pandas_index.parquet",
    "read-today/60_polars.parquet",
    "read-today/60c_polars.csv",
    "read-today/60d_polars_bool.csv",
    "read-today/61_duckdb.parquet",
    "read-today/61b_duckdb_types.parquet",
]

READ = {  # file -> settings, and what differs from the base
    **{name: ({}, {}) for name in AS_THE_BASE},
    "02_comma_quoted_decimal_comma.csv": ({}, {"amount": 1_038_978}),
    "31_thousands_comma.csv": ({}, {"amount": 1_038_978}),
    "08_refunds_negative.csv": ({"data.refunds": "keep"}, {}),
    "08b_parentheses.csv": ({"data.refunds": "keep"}, {}),
    "09_us_mdyy.csv": ({"data.time_format": "mdy"}, {}),
    "10_date_and_time_apart.csv": ({"columns.timestamp": "date + time"}, {}),
    "22_spaces_and_case.csv": ({}, {"receivers": 50}),  # m009 and M009: an id is what it is
    "22b_unicode_combining.csv": ({}, {"senders": 76}),
    "23_newest_unlabelled.csv": ({}, {"frauds": 12, "unlabelled": 99}),
    "24_three_decimals.csv": ({}, {"amount": 10_440.67}),
    "25_types_of_their_own.csv": ({}, {}),
    "25b_types_lower_case.csv": ({}, {}),
    "26_no_payee.csv": ({"columns.receiver": ""}, {"receivers": 0}),
    "27_header_twice.csv": (ACCOUNTS, {}),
    "52_hive": ({"data.ignore": "day"}, {}),
    "54_category_float16.parquet": ({}, {"amount": 10_389.99}),
    "54d_float32_amounts.parquet": ({}, {"amount": 384_421.86}),
    "56_duration_time.parquet": ({}, {"first": 0, "last": 663_780}),
    "61f_duckdb_small.parquet": ({}, DAYS),
    "63_seconds_as_step.csv": (STEPS | {"data.step_unit": "seconds"}, {"first": 86_400, "last": 750_180}),
    "63c_fractional_hours_as_step.csv": (STEPS, {"first": 0, "last": 663_779}),
    "64_one_wrong_year.csv": ({}, {"rows": 299, "quarantined": 1, "amount": 10_361.76}),
    "64c_one_wrong_year_at_the_end.csv": ({}, {"rows": 299, "quarantined": 1, "amount": 10_305.35}),
    "67_all_zero_amounts.csv": ({}, {"amount": 0}),
    "68_huge_amounts.csv": ({}, {"amount": 10_389_780_000_000}),
    "68b_bitcoin_amounts.csv": ({"data.amount_unit": "0.000001"}, {"amount": 10_389.62}),
    "read-today/04h_label_2.csv": ({"data.unlabelled": "2"}, {"unlabelled": 6}),
    "read-today/11_dst_fold_local_time.csv": (
        {"data.time_zone": "Europe/Berlin"},
        {"first": "2024-10-26T20:00:00", "last": "2024-10-27T12:00:00"},
    ),
    "read-today/11b_dst_with_offsets.csv": ({}, {"first": "2024-10-26T20:00:00", "last": "2024-10-27T12:00:00"}),
    "read-today/11c_dst_fold_sparse.csv": ({}, {"first": "2024-10-21T02:00:00", "last": "2024-10-29T13:00:00"}),
    "read-today/15b_exact_duplicate_rows.csv": ({"data.max_quarantined": 0.1}, {"quarantined": 30}),
    "read-today/20_text_files_concatenated.csv": ({}, {"quarantined": 1}),
    "read-today/20b_total_row.csv": ({}, {"quarantined": 1}),
    "read-today/20d_trailing_comma.csv": ({"data.ignore": "Unnamed: 6"}, {}),
    "read-today/20n_two_headers.csv": ({}, {"quarantined": 1}),
    "read-today/26b_empty_payee.csv": ({}, {"receivers": 0}),
    "read-today/26c_constant_payee.csv": ({}, {"receivers": 1}),
    "read-today/26d_self_transfers.csv": ({}, {"receivers": 40}),
    "read-today/32_inf_nan_empty_amount.csv": ({}, {"rows": 297, "quarantined": 3, "amount": 10_362.45}),
    "read-today/45_ns_berlin.parquet": ({}, BERLIN),
    "read-today/45b_date32.parquet": ({}, DAYS),
    "read-today/50b_pandas_text_index.parquet": ({"data.ignore": "__index_level_0__"}, {}),
    "read-today/55_null_typed.parquet": ({}, {"frauds": None, "unlabelled": 300}),
    "read-today/60b_polars_types.parquet": ({}, BERLIN),
    "read-today/65_no_label.csv": ({"columns.is_fraud": ""}, {"frauds": None, "unlabelled": 300}),
    "read-today/65b_no_frauds.csv": ({}, {"frauds": 0}),
}

REFUSED = {  # file -> settings, words of the one line
    "08_refunds_negative.csv": ({}, ["amount: below 0 (25", "[data] refunds"]),
    "09_us_mdyy.csv": ({}, ["day/month/year", "month/day/year", "[data] time_format = dmy, or mdy"]),
    "14_ids_scientific.csv": ({}, ["4.47004E+15", "300 of 300 ids are lost", "would become 5"]),
    "62_excel_like.xlsx": ({}, ["an Excel workbook", "save it as CSV"]),
    "63_seconds_as_step.csv": (STEPS, ["from 86,400 to 750,180", "76 years if these are hours", "[data] step_unit"]),
    "68b_bitcoin_amounts.csv": ({}, ["amount: less than a cent (300", "[data] amount_unit"]),
    "read-today/15_duplicate_ids.csv": ({}, ["transaction_id: seen before (30"]),
    "read-today/47_float_ids_nan.parquet": ({}, ["sender: missing (6"]),
    "read-today/49_list_column.parquet": ({}, ["unknown columns", "geo.lat", "[data] ignore"]),
    "read-today/66_nul_bytes.csv": ({}, ["receiver: a NUL byte (5"]),
}


@pytest.fixture
def taken(tmp_path, monkeypatch):
    """Brings a file into a project of its own."""
    monkeypatch.setattr(module, "_write_profile", lambda *_: None)  # a picture a file takes longer than all the rest
    (tmp_path / "settings.ini").touch()

    def take(name: str, **changes):
        if not (FILES / name).exists():
            pytest.skip(f"{name} is not in {FILES}; FRAUD_SHARED_DATA names another folder")
        values = NAMED | {"data.source": str(FILES / name)} | changes
        return acquire(load_settings(file=tmp_path / "settings.ini", cli=values, environ={}))

    return take


def moment(manifest: dict, seconds: int):
    """When that was, where the data have dates."""
    if manifest["epoch"] is None:
        return seconds
    return (datetime.fromisoformat(manifest["epoch"]) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize("name", READ)
def test_is_read(taken, tmp_path, name):
    changes, expected = READ[name]
    manifest = taken(name, **changes)
    table = pq.read_table(Path(tmp_path) / "data/raw" / manifest["file"])
    found = {
        "rows": table.num_rows,
        "senders": pc.count_distinct(table["sender"]).as_py(),
        "receivers": pc.count_distinct(table["receiver"]).as_py(),
        "frauds": pc.sum(table["is_fraud"]).as_py(),
        "amount": pytest.approx(pc.sum(table["amount"]).as_py(), abs=0.005, rel=1e-12),
        "first": moment(manifest, table["time"][0].as_py()),
        "last": moment(manifest, table["time"][-1].as_py()),
        "quarantined": manifest["quarantined"],
        "unlabelled": table["is_fraud"].null_count,
    }
    assert BASE | expected == found
    assert all(told["read"] for told in manifest["readings"].values())


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(taken, name):
    changes, words = REFUSED[name]
    with pytest.raises(FraudError) as error:
        taken(name, **changes)
    assert len(str(error.value).splitlines()) == 1
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_every_file_has_its_row():
    if not FILES.is_dir():
        pytest.skip(f"{FILES} is not there; FRAUD_SHARED_DATA names another folder")
    files = {path.name for path in FILES.iterdir()} | {f"read-today/{p.name}" for p in (FILES / "read-today").iterdir()}
    assert files - {"README.md", "read-today"} == READ.keys() | REFUSED.keys()
