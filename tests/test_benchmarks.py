"""What the benchmarks compare is equal: peers compute our features, bit for bit, on a simulated log and on one made to
be difficult; and their tables hold what was measured.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import features
import measure
import scale
import table

PEERS = {"polars": features.with_polars, "duckdb": features.with_duckdb}
CHOSEN = features.chosen("hard").features
WINDOWS, DELAY = CHOSEN.windows, CHOSEN.label_delay


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    features.make_log(folder, 15_000, "hard")
    features.ours("local", folder, "1g", "hard")
    return folder


@pytest.fixture(scope="module")
def difficult(simulated, tmp_path_factory):
    """Few accounts that meet often and pay themselves, many payments in a second, missing types and balances, much
    fraud.
    """
    folder, rng, rows = tmp_path_factory.mktemp("difficult"), np.random.default_rng(5), 3_000
    manifest = json.loads((simulated / "raw/manifest.json").read_text())
    schema = pq.read_schema(simulated / "raw" / manifest["file"])
    times = np.sort(rng.integers(0, 1_500 * 60, rows) // 7 * 7 * 60)
    missing = rng.random(rows) < 0.2
    columns = {name: pa.nulls(rows, schema.field(name).type) for name in schema.names} | {
        "row": np.arange(rows),
        "transaction_id": np.arange(rows).astype(str),
        "time": times,
        "type": pa.array(rng.choice(["TRANSFER", "CASH_OUT"], rows), mask=missing),
        "amount": rng.integers(0, 10**6, rows) / 100,
        "sender": rng.choice(list("ABCDEFG"), rows),
        "receiver": rng.choice(["M1", *"ABCDEFG"], rows),
        "sender_balance": pa.array(rng.integers(0, 3, rows) * 50.25, mask=missing),
        "is_fraud": (rng.random(rows) < 0.2).astype(int),
    }
    (folder / "raw").mkdir()
    pq.write_table(
        pa.table({name: pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names}, schema=schema),
        folder / "raw" / manifest["file"],
        row_group_size=700,
    )
    (folder / "raw/manifest.json").write_text(
        json.dumps(manifest | {"rows": rows, "first_step": int(times[0]) // 3600, "last_step": int(times[-1]) // 3600})
    )
    features.ours("local", folder, "1g", "hard")
    return folder


@pytest.mark.parametrize("log", ["simulated", "difficult"])
@pytest.mark.parametrize("peer", PEERS)
def test_peers_compute_our_features(peer, log, request):
    folder = request.getfixturevalue(log)
    target = folder / f"{peer}.parquet"
    PEERS[peer](next((folder / "raw").glob("*.parquet")), target, WINDOWS, DELAY)
    assert pq.read_schema(target).names == ["row", *features.compared_names(WINDOWS)]
    assert features.differences(folder, target, WINDOWS) == {}


def test_the_program_compares_on_the_paysim_log(tmp_path, monkeypatch):
    """Its main path with the preset that it has by default: everybody has a turn, and all values are equal."""
    result = tmp_path / "features.json"
    options = ["--rows", "5000", "--rounds", "1", "--only", "local", "polars", "duckdb", "--json", str(result)]
    monkeypatch.setattr(sys, "argv", ["features.py", *options])
    features.main()
    (table,) = json.loads(result.read_text(encoding="utf-8"))["tables"]
    assert table["title"] == "Features of 5,000 transactions (preset paysim)" and len(table["rows"]) == 3
    known = features.feature_names(features.chosen("paysim").contract)
    assert f"Ours writes {len(known)} features" in table["note"] and "sender_out_count_24h" in known
    assert not any(name.startswith("device") for name in known)


def test_a_difference_is_seen(simulated):
    target = simulated / "changed.parquet"
    features.with_polars(next((simulated / "raw").glob("*.parquet")), target, WINDOWS, DELAY)
    content = pq.read_table(target)
    changed = content["sender_out_sum_24h"].to_numpy().copy()
    changed[[3, 5]] += 1
    pq.write_table(
        content.set_column(content.column_names.index("sender_out_sum_24h"), "sender_out_sum_24h", pa.array(changed)),
        target,
    )
    assert features.differences(simulated, target, WINDOWS) == {"sender_out_sum_24h": 2}


def test_a_larger_log_is_many_towns(simulated, tmp_path):
    scale.widen(simulated, tmp_path / "wide", 45_000)
    town, wide = (pq.read_table(next((folder / "raw").glob("*.parquet"))) for folder in (simulated, tmp_path / "wide"))
    assert len(wide) == 3 * len(town) and wide.schema == town.schema
    assert (np.diff(wide["time"].to_numpy()) >= 0).all() and (wide["row"].to_numpy() == np.arange(len(wide))).all()
    assert len(set(wide["transaction_id"].to_pylist())) == len(wide)
    for name in ("sender", "device"):
        known = [set(log[name].drop_null().to_pylist()) for log in (town, wide)]
        assert len(known[1]) == 3 * len(known[0])
    features.ours("local", tmp_path / "wide", "1g", "hard")


def test_growth_is_fitted():
    points = [(rows, 5 + 3 * rows / 1e6) for rows in (500_000, 1_000_000, 2_000_000, 4_000_000)]
    constant, slope, exponent = scale.fitted(points)
    assert (constant, slope) == (pytest.approx(5), pytest.approx(3)) and 0.6 < exponent < 1


def test_what_a_program_takes():
    run = measure.measured(
        [sys.executable, "-c", "x = bytearray(200 << 20); import time; time.sleep(0.3); print('noise'); print('last')"]
    )
    assert run.printed == "last" and 0.19 < run.peak < 0.6 and run.seconds > 0.3
    with pytest.raises(RuntimeError, match="ended with 3"):
        measure.measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_tables_come_together(tmp_path, monkeypatch):
    one = {"title": "T", "note": "N.", "columns": ["", "s"], "rows": [["a", "1.0"]]}
    files = [tmp_path / "x.json", tmp_path / "not measured.json"]
    measure.write_json(files[0], measure.machine(), [one])
    found = table.together(files)
    assert (
        found["tables"][0]["rows"] == one["rows"]
        and found["tables"][0]["note"].startswith(f"N. {table.in_words(found['machine'])}, load at the start ")
        and "load" not in found["machine"]
    )
    assert "| a | 1.0 |" in measure.markdown(found["tables"][0])
    measure.write_json(files[1], measure.machine() | {"cores": 999}, [one])
    with pytest.raises(SystemExit, match="different machines"):
        table.together(files)
    before = {"machine": found["machine"], "tables": [one | {"rows": []}, one | {"title": "Other"}]}
    assert [kept["title"] for kept in table.together(files[:1], before)["tables"]] == ["T", "Other"]
    assert table.together(files[:1], before)["tables"][0]["rows"] == one["rows"]


PROGRAMS = re.search(r"^BENCHMARKS = (.*)$", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[
    1
].split()


@pytest.mark.long(reason="each benchmark once, on little data: minutes each")
@pytest.mark.parametrize("name", PROGRAMS)
def test_it_runs(name, tmp_path):
    if not shutil.which("wrk"):
        pytest.skip("wrk is missing (Debian package wrk)")
    environ = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, str(PROJECT / f"benchmarks/{name}.py"), "--quick", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["machine"] and all(one["rows"] for one in found["tables"])


def test_the_page_on_scale_has_the_latest_figures():
    results = json.loads((PROJECT / "benchmarks/results.json").read_text(encoding="utf-8"))
    page = table.SCALE.read_text(encoding="utf-8")
    assert table.with_tables(page, results) == page, "run python benchmarks/table.py"
    titles = {"tables": [{"title": "Growth", "note": "n", "columns": ["a"], "rows": [["1"]]}]}
    assert "| 1 |" in table.with_tables(f"x {table.BEGIN} old {table.END} y", titles)
    assert "old" not in table.with_tables(f"x {table.BEGIN} old {table.END} y", titles)


def test_the_readme_has_the_latest_figures():
    results = json.loads((PROJECT / "benchmarks/results.json").read_text(encoding="utf-8"))
    assert table.headlines(results) in (PROJECT / "README.md").read_text(encoding="utf-8"), (
        "put this into nbs/index.ipynb, and run make export:\n" + table.headlines(results)
    )
    found = json.loads((PROJECT / "benchmarks/handbook.json").read_text(encoding="utf-8"))
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert table.detection(found) in readme, table.detection(found)
    end, said = (
        int(re.search(pattern, text)[1].replace(",", ""))
        for pattern, text in (
            (r"it ends at ([\d,]+) payments/s", table.SCALE.read_text(encoding="utf-8")),
            (r"beyond about ([\d,]+) payments/s on one Redis primary", readme),
        )
    )
    assert said == round(end, -2), f"docs/scale.md says {end}"
    rows = [
        ["here: 50 rules", "57.0", "55.1 to 60.2"],
        ["eval of", "18.0", "17 to 19"],
        ["cel-python", "40000.0", "1 to 2"],
    ]
    rules = {"title": "50 rules with 10 look-ups", "rows": rows}
    assert "| 57.0 us | `eval` of the same in Python: 18.0 us; cel-python: 40000.0 us |" in table.headlines(
        {"tables": [rules]}
    )
    some = [one for one in results["tables"] if one["title"].startswith("Training")]
    assert len(table.headlines({"tables": some}).splitlines()) == 3  # what was not measured is not in it
