"""Alerts and dashboards: each alert fires when it should and not otherwise, and everything they ask for exists on a
Prometheus that watches a real service and a real stream.
"""

import contextlib
import os
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grafana
import httpx
import pytest
import servers
import sqlalchemy as sa
import typer
import yaml
from browser import browser, visit  # noqa: F401
from kafka import KafkaProducer

from fraud_pkg.core.errors import FraudError
from fraud_pkg.cli import app
from fraud_pkg.monitor.check_run import CheckRun, push_figures
from fraud_pkg.monitor.live import CheckResult, CheckSummary, JudgedWindow
from fraud_pkg.monitor.parity import ParityRecord
from fraud_pkg.model.example import example_bundle
from fraud_pkg.serve.case_store import open_cases
from fraud_pkg.serve.case_tables import CASES
from fraud_pkg.serve.cases import CasesError
from fraud_pkg.serve.wire import EXAMPLE
from fraud_pkg.core.settings import load_settings

PROJECT = Path(__file__).resolve().parents[1]
MONITORING = PROJECT / "k8s/monitoring"
RULE_FILES = sorted((MONITORING / "rules").glob("*.yml"))
RULES = [rule for file in RULE_FILES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RUNBOOKS = (PROJECT / "docs/runbooks.md").read_text(encoding="utf-8")
DOCS = RUNBOOKS + (PROJECT / "docs/monitoring.md").read_text(encoding="utf-8")


def check(program: str, package: str, *arguments: object) -> str:
    """Runs a checking program, which has to be content."""
    done = subprocess.run(
        [servers.program(program, package), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def resolved(receivers: str = f"http://{servers.HOST}:9") -> str:
    """alertmanager.yml with the receivers' addresses in place of the files that hold them, which Debian's Alertmanager
    does not read yet.
    """
    text, found = re.subn(
        r"url_file: /etc/alertmanager/receivers/(\w+)",
        rf"url: {receivers}/\1",
        (MONITORING / "alertmanager.yml").read_text(),
    )
    assert found == 2
    return text


# Files


def test_rules_and_configurations_are_valid(tmp_path):
    check("promtool", "prometheus", "check", "rules", *RULE_FILES)
    text = (PROJECT / "compose/prometheus.yml").read_text()
    for name in ("metrics-key", "alertmanager-password"):
        (tmp_path / name).touch()
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets", str(tmp_path)))
    (tmp_path / "rules").symlink_to(MONITORING / "rules")
    assert f"{len(RULE_FILES)} rule files found" in check(
        "promtool", "prometheus", "check", "config", tmp_path / "prometheus.yml"
    )
    (tmp_path / "alertmanager.yml").write_text(resolved())
    check("amtool", "prometheus-alertmanager", "check-config", tmp_path / "alertmanager.yml")


@pytest.mark.parametrize("severity", ["page", "ticket"])
def test_who_is_told(tmp_path, severity):
    (tmp_path / "alertmanager.yml").write_text(resolved())
    assert (
        check(
            "amtool",
            "prometheus-alertmanager",
            "config",
            "routes",
            "test",
            f"--config.file={tmp_path / 'alertmanager.yml'}",
            f"severity={severity}",
        ).strip()
        == severity
    )


@pytest.mark.parametrize("file", sorted((MONITORING / "tests").glob("*.yml")), ids=lambda file: file.stem)
def test_alerts_fire_when_they_should(file):
    check("promtool", "prometheus", "test", "rules", file)


def test_every_alert_is_tested_and_explained():
    tests = [
        test for file in (MONITORING / "tests").glob("*.yml") for test in yaml.safe_load(file.read_text())["tests"]
    ]
    assert {(unit["alertname"], bool(unit["exp_alerts"])) for test in tests for unit in test["alert_rule_test"]} == {
        (alert, fires) for alert in ALERTS for fires in (True, False)
    }
    headings = re.findall(r"^### (\w+)$", RUNBOOKS, re.MULTILINE)
    assert sorted(headings) == sorted(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"].keys() == {"severity"} and rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}, name
        assert rule["annotations"]["runbook_url"].endswith(f"docs/runbooks.md#{name.lower()}"), name
        section = RUNBOOKS.split(f"### {name}\n")[1].split("\n### ")[0]
        assert all(f"**{part}**" in section for part in ("What", "Hurts", "Look", "Do")), name
        assert f"({rule['labels']['severity']})" in section, name


def test_inhibitions_name_alerts():
    for rule in yaml.safe_load((MONITORING / "alertmanager.yml").read_text())["inhibit_rules"]:
        for text in rule["source_matchers"] + rule["target_matchers"]:
            assert set(re.fullmatch(r'alertname=~?"(.*)"', text)[1].split("|")) <= ALERTS.keys()


def test_commands_in_the_docs_exist():
    command, code = typer.main.get_command(app), "\n".join(re.findall(r"```sh\n.*?```|`[^`\n]+`", DOCS, re.DOTALL))
    named = set(
        re.findall(r"(?:^|[` ])(?<!-n )fraud ([a-z]+)(?: ([a-z]+))?", code, re.MULTILINE)
    )  # not `kubectl -n fraud ...`
    assert ("models", "rollback") in named
    for first, second in named:
        assert first in command.commands, first
        assert not second or second in getattr(command.commands[first], "commands", (second,)), (first, second)


def test_the_operators_rules_are_the_same(tmp_path):
    rule = yaml.safe_load((MONITORING / "prometheus-rule.yaml").read_text())["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rule))
    assert f"{len(RULES)} rules found" in check("promtool", "prometheus", "check", "rules", tmp_path / "rules.yml")
    found = [item for group in rule["groups"] for item in group["rules"]]
    assert all(item["labels"].pop("namespace") == "fraud" for item in found if "alert" in item) and found == RULES


def test_every_panel_explains_itself():
    boards = [json.loads(file.read_text()) for file in sorted((MONITORING / "dashboards").glob("*.json"))]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == 3
    for board in boards:
        [variable] = board["templating"]["list"]
        assert (variable["type"], variable["name"], variable["query"]) == (
            "datasource",
            "datasource",
            "prometheus",
        ) and board["description"]
        panels = [panel for panel in board["panels"] if panel["type"] != "row"]
        assert (
            len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
            and len({panel["title"] for panel in panels}) >= len(panels) - 1
        )
        for panel in panels:
            assert (
                panel["description"]
                and panel["targets"]
                and panel["datasource"]["uid"] == "${datasource}"
                and panel["fieldConfig"]["defaults"]["unit"]
            )


# A password, and what `htpasswd -nBC 10 fraud` makes of it.
PUSHED = "pushed-0123456789abcdef"  # pragma: allowlist secret
HASHED = "$2b$10$abcdefghijklmnopqrstuuP56B7d9WuUPldZpRUnPHgHzLLnsxlvW"  # pragma: allowlist secret


def test_pushgateway_as_declared(tmp_path, monkeypatch):
    """Its own arguments on a real one: it asks for an account, and what was pushed outlives its container."""
    [template] = [
        yaml.safe_load((PROJECT / "k8s/components/pushgateway/deployment.yaml").read_text())["spec"]["template"]["spec"]
    ]
    [main], port = template["containers"], servers.free_port()
    declared = {
        "--web.listen-address=:9091": f"--web.listen-address={servers.HOST}:{port}",
        "--persistence.file=/data/figures": f"--persistence.file={tmp_path}/figures",
        "--web.config.file=/etc/pushgateway/web.yml": f"--web.config.file={tmp_path}/web.yml",
    }
    (tmp_path / "web.yml").write_text(f"basic_auth_users:\n  fraud: {HASHED}\n")
    command = [
        servers.program("prometheus-pushgateway", "prometheus-pushgateway"),
        *(declared.get(word, word) for word in main["args"]),
    ]
    assert declared.keys() < set(main["args"]) and {mount["mountPath"] for mount in main["volumeMounts"]} == {
        "/data",
        "/etc/pushgateway",
    }
    url, account = f"http://{servers.HOST}:{port}", ("fraud", PUSHED)
    assert {main[f"{name}Probe"]["tcpSocket"]["port"] for name in ("liveness", "readiness")} == {"push"}
    (tmp_path / "settings.ini").write_text((PROJECT / "settings.ini").read_text())
    for again in (False, True):
        with servers.running(command, lambda: servers.status(f"{url}/-/ready") == 401, tmp_path / "pushgateway.log"):
            if not again:
                with pytest.raises(
                    FraudError, match="does not take figures .*and its account in FRAUD_PUSHGATEWAY_USER"
                ):
                    bad_monitor(tmp_path, url)
                monkeypatch.setenv("FRAUD_PUSHGATEWAY_USER", "fraud")
                monkeypatch.setenv("FRAUD_PUSHGATEWAY_PASSWORD", PUSHED)
                bad_monitor(tmp_path, url)
            assert (
                'fraud_monitor_verdict{instance="",job="fraud-monitor",verdict="retrain"} 1'
                in httpx.get(f"{url}/metrics", auth=account).text
            )
            assert httpx.get(f"{url}/metrics").status_code == 401


# A system that runs


@dataclass
class System:
    """Where everything is, and what receivers were told."""

    prometheus: str
    alertmanager: str
    told: list[tuple[str, dict]]
    tokens: dict[str, str | None]  # what the receivers were shown, by their path

    def query(self, expr: str) -> list[float]:
        """The values that an expression has now, those that are none left out."""
        answer = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": expr}, timeout=10).json()
        assert answer["status"] == "success", (expr, answer)
        data = answer["data"]
        samples = [data["result"]] if data["resultType"] == "scalar" else [item["value"] for item in data["result"]]
        return [float(value) for _, value in samples if value != "NaN"]


@contextlib.contextmanager
def receivers(told: list, tokens: dict[str, str | None]) -> Iterator[str]:
    """Webhooks that keep what they are told, by their path, and what the teller shows."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens[self.path.strip("/")] = self.headers["Authorization"]
            told.extend((self.path.strip("/"), alert) for alert in body["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None: ...

    server = ThreadingHTTPServer((servers.HOST, 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{servers.HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def fraud(folder: Path, *arguments: str, **overrides) -> Iterator[int]:
    """A command that answers probes and /metrics; yields its port."""
    port = servers.free_port()
    given = {
        "serve.port": port,
        "stream.port": port,
        "serve.bundle": folder / "champion",
        "serve.shadow": folder / "shadow",
        "serve.reload_seconds": 0.2,
    }
    rules = folder / "rules.yaml"
    rules.write_text(
        "rules: [{name: some, action: review, if: amount > 1.0 && amount < 1000.0}, "
        "{name: impossible, action: tag, if: 1 / (hour - hour) == 1}]"
    )
    os.utime(rules, (1, 1))  # written long ago
    given |= {"rules.file": rules} | servers.named(overrides)
    environ = servers.environment(given, folder)
    log = folder / f"{'-'.join(arguments)}-{port}.log"
    alive = f"http://{servers.HOST}:{port}/healthz"
    with servers.running(
        [sys.executable, "-m", "fraud_pkg.cli", *arguments],
        lambda: servers.status(alive) == 200,
        log,
        env=environ,
        cwd=folder,
    ):
        yield port


def bad_monitor(folder: Path, pushgateway: str) -> None:
    """A look of the monitor that asks for a new model, pushed as `fraud watch` pushes it."""
    checks = [
        CheckSummary(
            check=name, judged=5, bad=3, needed=3, alarm=True, value=0.3, threshold=0.2, by_chance=0.01, **more
        )
        for more, names in (
            ({}, ("features", "score")),
            ({"shortfall": 4.0, "alarm_from": 3.0}, ("recall", "precision")),
        )
        for name in names
    ]
    nothing = CheckResult(value=None, threshold=None, bad=None, rows=0)
    window = JudgedWindow(
        flagged=0,
        first_step=0,
        end_step=24,
        rows=0,
        others=0,
        labelled=True,
        average_precision=0.4,
        features=nothing,
        score=nothing,
        recall=nothing,
        precision=nothing,
    )
    parity = ParityRecord(rows=500, different=7, others=0.1, entities=[], examples=[])
    found = CheckRun(
        verdict="retrain", reasons=[], checks=checks, age_days=3000, labels_used=7, windows=[window], parity=parity
    )
    push_figures(
        found, load_settings(cli={"monitor.pushgateway": pushgateway}, file=folder / "settings.ini", environ={})
    )


@contextlib.contextmanager
def traffic(ports: list[int], broker: str) -> Iterator[None]:
    """Transactions, good and bad ones, to the API and into the topic, until the end of the block."""
    stop = threading.Event()

    def send() -> None:
        number = 0
        with (
            contextlib.closing(KafkaProducer(bootstrap_servers=broker, linger_ms=0)) as producer,
            httpx.Client(timeout=10) as client,
        ):
            while not stop.wait(0.05):
                number += 1
                good = {**EXAMPLE, "transaction_id": f"t{number}", "amount": 1 + 400.0 * (number % 5)}
                for port in ports:
                    client.post(f"http://{servers.HOST}:{port}/predict", json=good)
                    client.post(f"http://{servers.HOST}:{port}/predict", json={"amount": -1})
                producer.send("transactions", json.dumps(good).encode(), key=b"C1")
                if number % 5 == 0:
                    producer.send("transactions", b"no transaction", key=b"C1")
                    producer.send("decisions", b"no decision", key=b"C1")

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def scraping(targets: dict[str, list[int]], pushgateway: str, alertmanager: str, password: Path) -> str:
    """compose/prometheus.yml, every second and with where things are here."""
    content = yaml.safe_load((PROJECT / "compose/prometheus.yml").read_text())
    places = {job: [f"{servers.HOST}:{port}" for port in ports] for job, ports in targets.items()} | {
        "pushgateway": [pushgateway.removeprefix("http://")]
    }
    jobs = {job["job_name"]: job for job in content["scrape_configs"]}
    assert places.keys() - jobs.keys() == {"fraud-sink"}
    content["scrape_configs"] = [
        {
            "job_name": name,
            "honor_labels": jobs.get(name, {}).get("honor_labels", False),
            "static_configs": [{"targets": there}],
        }
        for name, there in places.items()
    ]
    content["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    [manager] = content["alerting"]["alertmanagers"]
    manager["static_configs"] = [{"targets": [alertmanager.removeprefix("http://")]}]
    assert manager["basic_auth"]["password_file"] == "/run/secrets/alertmanager-password"
    manager["basic_auth"]["password_file"] = str(password)
    return yaml.safe_dump(content)


TOKEN = "page-0123456789abcdef"  # pragma: allowlist secret


def web_of(composed: dict) -> str:
    """What Alertmanager finds where it looks for its accounts."""
    service = composed["services"]["alertmanager"]
    [given] = service["configs"]
    assert f"--web.config.file={given['target']}" in service["command"]
    assert "alertmanager-password" in composed["services"]["prometheus"]["secrets"]
    return composed["configs"][given["source"]]["content"]


def with_token(configuration: str, file: Path) -> str:
    """The configuration of Alertmanager where `page` wants a token, as docs/monitoring.md says it."""
    [told] = re.findall(r"http_config: {authorization: {credentials_file: \S+/page-token}}", DOCS)
    content = yaml.safe_load(configuration)
    [page] = [one for one in content["receivers"] if one["name"] == "page"]
    told = re.sub(r"credentials_file: [^}]+", f"credentials_file: {file}", told)
    page["webhook_configs"][0] |= yaml.safe_load(told)
    return yaml.safe_dump(content)


def close_a_case(folder: Path) -> None:
    """A person closes the first case of the first service."""
    store = open_cases(load_settings(file=folder / "settings.ini", environ={}).cases, folder)

    def first() -> list:
        with contextlib.suppress(CasesError), store.reading() as connection:
            return connection.execute(sa.select(CASES.c.id).where(CASES.c.state == "open").limit(1)).scalars().all()
        return []

    servers.until(first, 40, "a case")
    (case,) = first()
    store.take(case, "anna")
    store.finish(case, "anna", "fraud")
    store.close()


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Iterator[System]:
    """Two services (one without its store), a consumer and a sink on a broker, the monitor's figures, and who watches
    them; alerts wait for nothing.
    """
    folder, told, tokens = tmp_path_factory.mktemp("system"), [], {}
    (folder / "settings.ini").write_text((PROJECT / "settings.ini").read_text())
    (folder / "rules").mkdir()
    for file in RULE_FILES:
        (folder / "rules" / file.name).write_text(re.sub(r"for: \w+", "for: 0s", file.read_text()))
    with contextlib.ExitStack() as running:
        enter = running.enter_context
        for name in ("prometheus", "prometheus-alertmanager", "prometheus-pushgateway"):
            servers.program(name, name)
        broker, pushed, hooks = (
            enter(servers.kafka(folder)),
            enter(servers.pushgateway(folder)),
            enter(receivers(told, tokens)),
        )
        # As docker-compose.yml has both: Alertmanager the hash, Prometheus the password.
        composed = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
        web, asked = re.subn(r"\$\{FRAUD_ALERTMANAGER_HASH:[^}]*\}", HASHED, web_of(composed))
        assert asked == 1
        (folder / "alertmanager-password").write_text(PUSHED)
        (folder / "token").write_text(TOKEN)
        config = with_token(re.sub(r"group_wait: \w+", "group_wait: 1s", resolved(hooks)), folder / "token")
        manager = enter(servers.alertmanager(folder, config, web))
        stream = {"stream__bootstrap_servers": broker, "stream__partitions": 1}
        away = {
            "store__url": f"redis://{servers.HOST}:{servers.free_port()}/0",
            "store__timeout": 0.2,
            "serve__on_store_error": "degrade",
        }
        ports = {
            "fraud-api": [
                enter(fraud(folder, "serve", audit__url=f"sqlite:///{folder}/audit.db")),
                enter(fraud(folder, "serve", **away)),
            ],
            "fraud-stream": [enter(fraud(folder, "stream", "score", **stream))],
            "fraud-sink": [enter(fraud(folder, "stream", "sink", **stream))],
        }
        bad_monitor(folder, pushed)
        enter(traffic(ports["fraud-api"], broker))
        configuration = scraping(ports, pushed, manager, folder / "alertmanager-password")
        watching = enter(servers.prometheus(folder, configuration))
        found = System(watching, manager, told, tokens)
        servers.until(
            lambda: (
                found.query("sum by (reason) (fraud_stream_waits_total)")
                and found.query('fraud_requests_total{status="503"}')
            ),
            40,
            "503s and waits without a model",
        )
        example_bundle(folder / "shadow", bias=-6.0)
        example_bundle(folder / "champion")
        close_a_case(folder)
        yield found


WORDS = {
    "by",
    "without",
    "on",
    "ignoring",
    "group_left",
    "group_right",
    "and",
    "or",
    "unless",
    "bool",
    "offset",
    "inf",
    "nan",
}


def selectors(expr: str) -> set[str]:
    """The series that an expression asks for."""
    grouping = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
    bare = re.sub(rf"#.*|\[[^\]]*\]|{grouping}|\boffset\s+\w+", " ", expr)
    found = re.finditer(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?\s*(\()?", bare)
    return {
        name + (where or "")
        for name, where, call in (match.groups() for match in found)
        if not call and name.lower() not in WORDS
    }


def without_comparing(expr: str) -> str:
    """The expression with its comparisons answered by 0 or 1, instead of leaving out what does not hold."""
    parts = re.split(r"(\{[^}]*\})", expr)
    return "".join(part if part.startswith("{") else re.sub(r"(==|!=|>=|<=|>|<)", r"\1 bool", part) for part in parts)


def panel_queries() -> dict[str, str]:
    """{dashboard, panel and legend: PromQL} of every dashboard."""
    found = {}
    for file in sorted((MONITORING / "dashboards").glob("*.json")):
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                found[f"{file.stem}: {panel['title']}: {target['legendFormat']}"] = target["expr"].replace(
                    "$__rate_interval", "1m"
                )
    return found


def test_taking_expressions_apart():
    assert selectors('sum by (job) (rate(a_total{x=~"b"}[5m])) > 0.5 and on (job) up == 1 unless max(c offset 1h)') == {
        'a_total{x=~"b"}',
        "up",
        "c",
    }
    assert without_comparing('a{x!="y"} >= 2 and b == 1') == 'a{x!="y"} >= bool 2 and b == bool 1'


def test_every_expression_gives_data(system):
    """Panels, recorded series, runbooks; of alerts every series that they ask for, and both sides of what they
    compare.
    """
    asked = panel_queries() | {f"record {rule['record']}": rule["record"] for rule in RULES if "record" in rule}
    for number, block in enumerate(re.findall(r"```promql\n(.*?)```", DOCS, re.DOTALL)):
        asked |= {f"docs, block {number}: {line}": line for line in block.splitlines() if line.strip()}
    for rule in RULES:
        name = rule.get("alert") or rule["record"]
        asked |= {f"{name} asks for {selector}": selector for selector in selectors(rule["expr"])}
        if "alert" in rule and "unless" not in rule["expr"]:
            asked[f"{name} compared"] = without_comparing(rule["expr"])
    assert len(asked) > 150
    missing = dict(asked)

    def all_there() -> bool:
        for key, expr in list(missing.items()):
            if system.query(expr):
                del missing[key]
        return not missing

    servers.until(all_there, 40, missing)


BOARDS = sorted((MONITORING / "dashboards").glob("*.json"))


@pytest.mark.parametrize("file", BOARDS, ids=lambda file: file.stem)
def test_panels_have_room(file):
    """Within 24 columns, none upon another."""
    panels = [grafana.Panel(content) for content in json.loads(file.read_text())["panels"]]
    assert [panel.content["title"] for panel in panels if panel.place[0] + panel.place[2] > 24] == []
    assert grafana.overlaps(panels) == []


@pytest.mark.parametrize("file", BOARDS, ids=lambda file: file.stem)
def test_every_panel_draws_something(system, file, browser, tmp_path):  # noqa: F811
    """Each query, asked as Grafana asks it, gives series with values; legends are there and differ, and the picture of
    the board (FRAUD_SCREENSHOTS keeps it) has no panel without data.
    """
    board = json.loads(file.read_text())
    panels: list[grafana.Panel] = []

    def empty() -> list[str]:
        panels[:] = grafana.look(system.prometheus, board)
        return [panel.content["title"] for panel in panels if panel.content["type"] != "row" and not panel.series]

    servers.until(lambda: not empty(), 60, empty)
    for panel in (panel for panel in panels if panel.content["type"] != "row"):
        names = [series.name for series in panel.series]
        if panel.content["type"] in ("timeseries", "heatmap"):
            assert all(names) and len(set(names)) == len(names), (panel.content["title"], names)
        if panel.content["type"] == "stat":
            assert len(names) == 1, (panel.content["title"], names)
        # A heat map's unit is that of its axis; its values are rates.
        if panel.unit == "percentunit" and panel.content["type"] != "heatmap" and panel.content["title"] != "Shortfall":
            assert all(0 <= value <= 1 for series in panel.series for _, value in series.points), panel.content["title"]
    (tmp_path / "board.html").write_text(grafana.page(board, panels), encoding="utf-8")
    with visit(browser, (tmp_path / "board.html").as_uri(), (1480, 900)) as seen:
        assert seen.page.get_by_text("No data").count() == 0
        assert seen.page.locator("div.panel").count() == sum(panel.content["type"] != "row" for panel in panels)
        seen.screenshot(file.stem, full=True)


def test_series_that_do_not_exist_are_noticed(system):
    assert not system.query("fraud_no_such_total") and selectors("rate(fraud_no_such_total[5m]) > 0") == {
        "fraud_no_such_total"
    }


def test_rules_are_healthy(system):
    groups = httpx.get(f"{system.prometheus}/api/v1/rules").json()["data"]["groups"]
    found = {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}
    assert found.keys() == {rule.get("alert") or rule["record"] for rule in RULES} and set(found.values()) == {
        ("ok", "")
    }


def test_people_are_told(system):
    """What fires reaches the webhook of its severity, and what follows from it is muted."""
    tickets = {"FraudDeadLetters", "FraudVerdictRetrain", "FraudDrift", "FraudModelStale", "FraudSinkUnreadable"}
    missing = {("page", "FraudDegraded")} | {("ticket", name) for name in tickets}

    def all_told() -> bool:
        missing.difference_update([(place, alert["labels"]["alertname"]) for place, alert in system.told])
        return not missing

    servers.until(all_told, 40, missing)
    assert all(
        alert["labels"]["severity"] == place
        and alert["annotations"].keys() == {"summary", "description", "runbook_url"}
        for place, alert in system.told
    )

    assert system.tokens == {"page": f"Bearer {TOKEN}", "ticket": None}

    def muted() -> bool:
        alerts = httpx.get(f"{system.alertmanager}/api/v2/alerts", auth=("fraud", PUSHED)).json()
        return any(
            alert["labels"]["alertname"] == "FraudStoreErrors" and alert["status"]["inhibitedBy"] for alert in alerts
        )

    servers.until(muted, 40, "FraudStoreErrors is not muted")


def test_alertmanager_asks_for_an_account(system):
    """Nobody silences or sends an alert without one; Prometheus has it, or no receiver was told."""
    for auth in (None, ("fraud", "wrong")):
        assert httpx.get(f"{system.alertmanager}/api/v2/alerts", auth=auth).status_code == 401
        assert httpx.post(f"{system.alertmanager}/api/v2/silences", json={}, auth=auth).status_code == 401
    assert httpx.get(f"{system.alertmanager}/api/v2/status", auth=("fraud", PUSHED)).status_code == 200
