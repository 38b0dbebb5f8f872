"""Each guide of docs/howto is run as it stands: its shell blocks, one after another, in a finished project. What needs
more than this machine says so above the block: `<!-- not run: REASON -->`.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import servers
from conftest import PROJECT, SMALL, Workspace

from fraud_pkg.core.settings import load_settings
from fraud_pkg.data.simulate import simulate

GUIDES = PROJECT / "docs/howto"
BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```(?P<kind>[a-z]*)\n(?P<text>.*?)^```$", re.M | re.S)

# `fraud` as a guide means it: PUBLIC is the key that `fraud keys new` printed last, and a service stays while the guide
# goes on.
FRAUD = """#!/bin/bash
set -eo pipefail
public=$(cat "$GUIDE/public" 2>/dev/null || true)
[ -z "${FRAUD_AUDIT_KEYS:-}" ] || export FRAUD_AUDIT_KEYS=${FRAUD_AUDIT_KEYS//PUBLIC/$public}
fraud=("$PYTHON" -m fraud_pkg.cli "${@//PUBLIC/$public}")
case "$1 ${2:-}" in
"keys new")
    "${fraud[@]}" | tee "$GUIDE/said"
    sed -n 's/^public key: //p' "$GUIDE/said" >"$GUIDE/public" ;;
serve*)
    nohup "${fraud[@]}" >"$GUIDE/serve.log" 2>&1 &
    echo $! >>"$GUIDE/served"
    for _ in $(seq 120); do
        /usr/bin/env curl -s -o /dev/null "http://127.0.0.1:$FRAUD_SERVE_PORT/healthz" && exit 0
        kill -0 $! 2>/dev/null || { cat "$GUIDE/serve.log" >&2; exit 1; }
        sleep 0.5
    done
    exit 1 ;;
*) exec "${fraud[@]}" ;;
esac
"""
CURL = """curl() { command curl --fail-with-body "${@//127.0.0.1:8000/127.0.0.1:$FRAUD_SERVE_PORT}"; }
"""


def blocks(guide: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(guide.read_text(encoding="utf-8")))


def run_of(guide: Path) -> list[str]:
    """The shell blocks of a guide that are run."""
    return [block["text"] for block in blocks(guide) if block["kind"] == "sh" and not block["why"]]


def payments(project: Workspace) -> None:
    """payments.csv, as somebody else's system writes it: dates with the day first, names of its own."""
    wanted = {key: str(value) for key, value in SMALL.items() if key.startswith("simulate.")}
    log = simulate(load_settings(environ={}, cli=wanted).simulate).to_pandas()
    when = (pd.Timestamp("2025-01-01") + pd.to_timedelta(log.time, unit="s")).dt.strftime("%d/%m/%Y %H:%M:%S")
    columns = {"id": log.transaction_id, "when": when, "amount": log.amount, "customer": log.sender,
               "merchant": log.receiver, "device": log.device, "fraud": log.is_fraud}  # fmt: skip
    anew(project)
    log.assign(**columns)[list(columns)].to_csv(project.root / "payments.csv", index=False)


def anew(project: Workspace) -> None:
    """A project that has not run yet: a registry does not move with its folder."""
    for name in ("data", "models", "mlartifacts"):
        shutil.rmtree(project.root / name)
    for name in ("mlflow.db", "dvc.lock"):
        (project.root / name).unlink()


def two_champions(project: Workspace) -> None:
    """A former champion, which a rollback needs: of three trees, so that the next one beats it."""
    anew(project)
    project.fraud("run", train__contenders="xgboost", xgboost__rounds=3)
    project.fraud("run", train__contenders="xgboost")


def served(project: Workspace) -> None:
    """A service that is up when the guide begins."""
    subprocess.run(["fraud", "serve"], cwd=project.root, env=project.environment(), check=True)


def nothing(project: Workspace) -> None:
    pass


# What a guide takes for granted.
BEFORE: dict[str, Callable[[Workspace], None]] = {
    "access": nothing,
    "approvals": nothing,
    "audit": nothing,
    "cases": nothing,
    "incident": served,
    "keys": nothing,
    "own-data": payments,
    "personal-data": anew,
    "rollback": two_champions,
    "rules": nothing,
}


def test_every_block_is_run_or_says_why_not():
    guides = sorted(GUIDES.glob("*.md"))
    for guide in guides:
        for block in blocks(guide):
            assert block["kind"], f"{guide.name}: a block without a language: {block['text'][:60]!r}"
            for test in re.findall(r"tests/\w+\.py", block["why"] or ""):
                assert (PROJECT / test).is_file(), f"{guide.name}: {test}"
    assert {guide.stem for guide in guides if run_of(guide)} == set(BEFORE)


@pytest.mark.long(reason="runs what each guide says, a pipeline in two of them")
@pytest.mark.parametrize("name", BEFORE)
def test_a_guide_is_right_as_it_stands(name, finished, tmp_path):
    root, bin_folder = tmp_path / "project", tmp_path / "bin"
    shutil.copytree(finished.root, root, symlinks=True)
    bin_folder.mkdir()
    (bin_folder / "fraud").write_text(FRAUD)
    (bin_folder / "fraud").chmod(0o755)
    port = servers.free_port()
    environ = {
        "GUIDE": str(tmp_path), "HOME": str(tmp_path / "home"), "PYTHON": sys.executable, "FRAUD_ROOT": str(root),
        "FRAUD_SERVE_PORT": str(port),
    }  # fmt: skip

    class Project(Workspace):
        def environment(self, **overrides) -> dict[str, str]:
            made = super().environment(**overrides)
            return made | {"PATH": f"{bin_folder}{os.pathsep}{made['PATH']}"}

    project = Project(root, finished.overrides, environ)
    (tmp_path / "home").mkdir()
    try:
        BEFORE[name](project)
        script = "set -euo pipefail\n" + CURL + "\n".join(run_of(GUIDES / f"{name}.md"))
        done = subprocess.run(
            ["bash", "-c", script], cwd=root, env=project.environment(), capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    finally:
        if (tmp_path / "served").is_file():
            for number in (tmp_path / "served").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGTERM)
