"""The walk of docs/howto/rules.md and cases.md, by their commands: a wave that the champion misses, a rule that was
tested on it, live within seconds, its cases worked, and a challenger that learned from what people found.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
import yaml
from conftest import Workspace
from test_loop import ended

from fraud_pkg.core.contract import DAY, SIMULATED_ATTRIBUTES, SIMULATED_ENTITIES
from fraud_pkg.core.sections import Simulate
from fraud_pkg.core.settings import load_settings
from fraud_pkg.data.lake import read_decisions
from fraud_pkg.data.simulate import simulate
from fraud_pkg.model.bundle import load_bundle
from fraud_pkg.train.samples import load_period

# Days of the champion's log, of the wave before the rule, and with it.
BASE, WAVE, RULED = 30, 5, 9
NEW = "structuring"
ANNA, RULER = "anna-0123456789abcdef", "boss-0123456789abcdef"
KEYS = f"anna@cases:{ANNA},boss@rules:{RULER}"
SETTINGS = {
    "features.engine": "local",
    **{f"attributes.{name}": line for name, line in SIMULATED_ATTRIBUTES.items()},
    "entities.device": SIMULATED_ENTITIES["device"],
    "features.windows": "24h, 7d",
    "features.label_delay": "1d",
    "split.test_hours": 72,
    "split.validation_hours": 48,
    "xgboost.rounds": 80,
    "train.contenders": "xgboost",
    "train.threads": 1,
    "train.ablation": False,
    "evaluate.resamples": 50,
    "decision.control_share": 0,
    "pipeline.push": False,
    "stream.partitions": 1,
    "stream.port": 0,
    "rules.file": "rules.yaml",
    "cases.labels": "topic",
    "serve.fill": True,
}


class Walk:
    """A project with its stream, its service and its queue."""

    def __init__(self, project: Workspace, log: Path):
        self.project, self.log = project, log
        self.settings = load_settings(cli=project.overrides, file=project.root / "settings.ini", environ={})
        self.url = ""

    @contextlib.contextmanager
    def running(self, *arguments: str, **more) -> Iterator[subprocess.Popen]:
        environ = servers.environment(
            self.project.overrides | servers.named(more), PYTHONUNBUFFERED="1", FRAUD_API_KEYS=KEYS
        )
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fraud_pkg.cli", *arguments],
                cwd=self.project.root,
                env=environ,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
            ended(process)
        finally:
            process.kill()

    def wait(self, holds, seconds: float = 120) -> None:
        servers.until(holds, seconds, lambda: self.log.read_text()[-4000:])

    @property
    def lake(self) -> Path:
        return self.project.root / "data/decisions"

    def produce(self, days: pa.Table, name: str, *options: str) -> None:
        """Payments into the topic, and what was decided of them into the lake."""
        pq.write_table(days, self.project.root / name)
        before = self.decided()
        self.project.fraud("stream", "produce", name, *options)

        def arrived() -> bool:
            self.project.fraud("stream", "sink", "--until-end")
            return self.decided() >= before + len(days)

        self.wait(arrived, 300)

    def decided(self) -> int:
        return sum(pq.read_metadata(file).num_rows for file in self.lake.glob("day=*/*.parquet"))

    def rules(self) -> list[dict]:
        """Those that the service decides by."""
        answer = httpx.get(f"{self.url}/rules", headers={"X-API-Key": RULER}, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()["rules"]

    def labelled(self) -> set[str]:
        """What the lake has labels of, once the sink has written all."""
        self.project.fraud("stream", "sink", "--until-end")
        files = (self.lake / "labels").glob("*.parquet")
        return {name for file in files for name in pq.read_table(file)["transaction_id"].to_pylist()}

    def asked(self, **query) -> dict:
        answer = httpx.get(f"{self.url}/cases", params=query, headers={"X-API-Key": ANNA}, timeout=30)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def act(self, **body) -> None:
        answer = httpx.post(f"{self.url}/cases", json=body, headers={"X-API-Key": ANNA}, timeout=30)
        assert answer.status_code == 200 and answer.json()["refused"] == [], answer.text

    def work_all(self, fraud: set[str]) -> dict[str, bool]:
        """Takes and closes every open case by what is true; returns `{transaction: fraud}`."""
        found: dict[str, bool] = {}
        while cases := self.asked(state="open", order="loss", limit=100)["cases"]:
            numbers = [case["id"] for case in cases]
            self.act(action="take", cases=numbers)
            for outcome in ("fraud", "honest"):
                own = [case["id"] for case in cases if (case["transaction_id"] in fraud) == (outcome == "fraud")]
                if own:
                    self.act(action="close", cases=own, outcome=outcome)
            found |= {case["transaction_id"]: case["transaction_id"] in fraud for case in cases}
        return found


@pytest.fixture
def log() -> pa.Table:
    days = BASE + WAVE + RULED
    return simulate(
        Simulate(rows=700 * days, days=days, fraud_rate=0.02, seed=7, drift_step=24 * BASE, drift_scenario=NEW)
    )


@pytest.fixture
def walk(workspace, tmp_path, log) -> Iterator[Walk]:
    project = workspace()
    pq.write_table(days_of(log, 0, BASE), tmp_path / "base.parquet")
    project.overrides = SETTINGS | {"data.source": str(tmp_path / "base.parquet")}
    project.root.joinpath("rules.yaml").write_text("rules: []\n")
    with servers.kafka(tmp_path) as address:
        project.overrides["stream.bootstrap_servers"] = address
        made = Walk(project, tmp_path / "log")
        project.fraud("run", "--job", "promote")
        port = servers.free_port()
        made.url = f"http://{servers.HOST}:{port}"
        with (
            made.running("stream", "score"),
            made.running("serve", serve__port=port),
            made.running("cases", "follow"),
        ):
            made.wait(lambda: servers.status(f"{made.url}/readyz") == 200)
            made.wait(lambda: made.log.read_text().count(" reading ") >= 1)
            yield made


def days_of(log: pa.Table, first: int, end: int) -> pa.Table:
    time = log["time"].to_numpy()
    return log.filter(pa.array((time >= first * DAY) & (time < end * DAY)))


def recall(walk: Walk, wave: set[str], first: int, end: int) -> float:
    """The share of the wave that was stopped on these days."""
    table = read_decisions(walk.lake, ["transaction_id", "decision"], 24 * first, 24 * end)
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    return float(np.mean([decision != "allow" for name, decision in rows if name in wave]))


def suggested_and_tested(walk: Walk, capsys) -> list[dict]:
    """The rules that `fraud rules suggest` proposes, checked and tested, made live; returns them."""
    suggested = walk.project.fraud("rules", "suggest", "--weeks", "1").stdout
    rules = yaml.safe_load(suggested)["rules"]
    assert rules and all(rule["mode"] == "shadow" for rule in rules), suggested
    chosen = walk.project.root / "chosen.yaml"
    chosen.write_text(yaml.safe_dump({"rules": [rule | {"mode": "live"} for rule in rules]}))
    assert "sound" in walk.project.fraud("rules", "check", "chosen.yaml").stdout
    tested = walk.project.fraud("rules", "test", "chosen.yaml", "--weeks", "1").stdout
    assert all(rule["name"] in tested for rule in rules)
    with capsys.disabled():
        print(f"\n{suggested}\n{tested}")
    chosen.rename(walk.project.root / "rules.yaml")
    return rules


@pytest.mark.long(reason="two trainings and two weeks of a stream, about six minutes")
def test_from_a_wave_to_a_challenger_that_knows_it(walk, log, capsys):
    names = np.array(log["transaction_id"].to_pylist(), object)
    fraud = set(names[log["is_fraud"].to_numpy() == 1])
    wave = set(names[np.array(log["scenario"].to_pylist(), object) == NEW])
    begun, end = BASE + WAVE, BASE + WAVE + RULED
    first = load_bundle(walk.project.root / "models/champion")

    walk.produce(days_of(log, BASE, begun), "wave.parquet", "--labels")
    rules = suggested_and_tested(walk, capsys)
    began = time.monotonic()
    walk.wait(lambda: [rule["name"] for rule in walk.rules()] == [rule["name"] for rule in rules], 60)
    seconds = time.monotonic() - began  # the stream looks before its next batch

    walk.produce(days_of(log, begun, end), "ruled.parquet")
    missed, held = recall(walk, wave, BASE, begun), recall(walk, wave, begun, end)
    assert held > missed + 0.1, (missed, held)
    table = read_decisions(walk.lake, ["transaction_id", "decision", "rule"], 24 * begun, 24 * end).to_pylist()
    reviewed = {row["transaction_id"] for row in table if row["decision"] == "review"}
    by_rule = {row["transaction_id"] for row in table if row["rule"]}
    assert by_rule and {row["rule"] for row in table if row["rule"]} <= {rule["name"] for rule in rules}
    walk.wait(lambda: walk.asked(state="open")["count"] >= len(reviewed))
    closed = walk.work_all(fraud)
    assert reviewed <= closed.keys()
    walk.wait(lambda: closed.keys() <= walk.labelled())

    walk.project.fraud("run", data__decisions="data/decisions")
    walk.settings = walk.settings.model_copy(update={"root": walk.project.root})
    train, challenger = load_period(walk.settings, "train"), load_bundle(walk.project.root / "models/xgboost")
    assert challenger.manifest.data["fingerprint"] == walk.project.json("data/raw/manifest.json")["fingerprint"]
    rows = [place for place, name in enumerate(train.transaction_id) if name in closed]
    learned = train.take(np.array(rows))
    assert [bool(y) for y in learned.y] == [closed[name] for name in learned.transaction_id]
    caught = learned.take((learned.y == 1) & np.isin(learned.transaction_id, [*by_rule]))
    assert len(caught) >= 5
    before, after = (
        float(np.median(model.probability(caught.select(model.manifest.features, model.manifest.vocabulary))))
        for model in (first, challenger)
    )
    assert after > before
    with capsys.disabled():
        print(f"recall of the wave {missed:.0%} before the rule, {held:.0%} with it; live after {seconds:.1f} s")
        print(f"{len(by_rule)} decided by it; {len(closed)} cases closed, {sum(closed.values())} of them fraud")
        print(f"{len(learned)} of them in training, {len(caught)} frauds by the rule: {before:.3f}, then {after:.3f}")
        print(walk.project.json("reports/bakeoff/verdict.json"))
