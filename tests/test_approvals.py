"""Where two have to approve, what one person changes alone does not decide: champion, rules, lists, successor."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import httpx
import pytest
import servers
from test_cases import payment

from fraud_pkg.core.rules import parse_rules
from fraud_pkg.core.settings import Settings, load_settings
from fraud_pkg.core.signatures import APPROVAL, CHAMPION, Approved, Signer, Statement, approvers, load_signer, new_key
from fraud_pkg.model.bundle import MANIFEST, SIGNATURE, load_bundle, sign_bundle, signed_sequence
from fraud_pkg.model.example import example_bundle, example_contender, example_sample
from fraud_pkg.model.registry import promote, waiting_candidates
from fraud_pkg.pipeline import retrain as retraining
from fraud_pkg.pipeline.run import Run
from fraud_pkg.store.lists import Entry, add_entries, append_line, publish_rules, remove_entries
from fraud_pkg.store.proposals import give_opinion, open_changes

AT = "2026-01-05T10:00:00+00:00"
RULES = "rules: [{name: %s, action: block, if: amount > 1.0}]"


@dataclass
class Team:
    """Two persons (one of them with two keys), the key that signs champions, and settings that ask both."""

    root: Path
    signers: dict[str, Signer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (self.root / "settings.ini").touch()
        for name in ("prod", "anna", "anna2", "ben"):
            new_key(self.root / f"{name}.pem", servers.PROJECT)
            self.signers[name] = load_signer({"FRAUD_SIGNING_KEY_FILE": str(self.root / f"{name}.pem")})

    @property
    def overrides(self) -> dict[str, object]:
        keys = {name: signer.public for name, signer in self.signers.items()}
        people = f"anna:{keys['anna']}, anna:{keys['anna2']}, ben:{keys['ben']}"
        return {
            "trust.keys": f"prod:{keys['prod']}",
            "trust.approvals": 2,
            "trust.approvers": people,
            "rules.changes": self.root / "changes.jsonl",
            "rules.file": "store",
            "serve.bundle": self.root / "champion",
        }

    def settings(self, **more: object) -> Settings:
        cli = {key: str(value) for key, value in (self.overrides | servers.named(more)).items()}
        return load_settings(file=self.root / "settings.ini", environ={}, cli=cli)

    def approve(self, number: int, *who: str) -> None:
        config = self.settings()
        for name in who:
            give_opinion(open_changes(config), approvers(config), number, self.signers[name])

    def champion(self, bias: float) -> tuple[Path, Approved]:
        """A bundle, and what would be approved of it now."""
        folder = self.root / f"bundle{bias}"
        example_bundle(folder, bias=bias)
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        sequence = max(int(time.time() * 1000), signed_sequence(self.root / "champion") + 1)
        return folder, Approved(Statement(CHAMPION, digest, sequence, sequence + 60_000, "0" * 64), ())

    def signed(self, approved: Approved, *who: str, at: int = 0) -> Approved:
        text = approved.statement.text
        return approved._replace(signatures=tuple(self.signers[name].sign(text, APPROVAL, sequence=at) for name in who))

    def put(self, folder: Path, approved: Approved | None) -> None:
        """What somebody does who holds the signing key and may write where services look."""
        sign_bundle(folder, CHAMPION, self.signers["prod"], signed_sequence(self.root / "champion"), approved)
        self.copy(folder)

    def copy(self, folder: Path) -> None:
        new = Path(shutil.copytree(folder, self.root / "champion.part"))
        shutil.rmtree(self.root / "champion", ignore_errors=True)
        new.rename(self.root / "champion")


@pytest.fixture
def team(tmp_path) -> Team:
    return Team(tmp_path)


@contextlib.contextmanager
def serving(team: Team, **more: object) -> Iterator[str]:
    with servers.service(team.root, **{k.replace(".", "__"): v for k, v in team.overrides.items()}, **more) as (url, _):
        yield url


def version(url: str) -> str:
    return httpx.get(f"{url}/model").json()["version"]


def said(team: Team, text: str) -> None:
    servers.until(lambda: text in (team.root / "api.log").read_text(), what=f"{text} in the service's log")


def names(url: str) -> tuple[Sequence[str], Mapping]:
    found = httpx.get(f"{url}/rules").json()
    return [rule["name"] for rule in found["rules"]], found["lists"]


def test_a_champion_that_one_person_signs_does_not_decide(team):
    first, approved = team.champion(-8.0)
    team.put(first, team.signed(approved, "anna", "ben"))
    kept = load_bundle(team.root / "champion").manifest.version
    with serving(team) as url:
        second, asked = team.champion(-5.0)
        ways = {
            "approved by nobody; expected 2 more of anna, ben": None,
            "approved by anna; expected 1 more of ben": team.signed(asked, "anna"),
            "approved is another content": team.signed(approved, "anna", "ben"),
        }
        for reason, approvals in ways.items():
            team.put(second, approvals)
            said(team, reason)
            assert version(url) == kept
        team.put(second, team.signed(asked, "anna", "anna2", "prod"))  # one person twice, and a machine
        said(team, "manifest.json: approved by anna; expected 1 more of ben")
        assert version(url) == kept
        team.put(second, team.signed(asked, "anna", "ben"))
        taken = load_bundle(second).manifest.version
        servers.until(lambda: version(url) == taken)
        team.copy(first)  # as it was approved before
        said(team, "a newer one has replaced it")
        sign_bundle(first, CHAMPION, team.signers["prod"])
        (first / SIGNATURE).write_bytes((first / SIGNATURE).read_bytes() + team.signed(approved, "anna", "ben").text)
        team.copy(first)  # signed anew, above an approval that is used up
        said(team, "approved is another sequence")
        assert version(url) == taken


def test_a_service_that_starts_later_knows_when_a_champion_was_promoted(team):
    """Approved eight days ago, for seven. What was promoted in that time decides, whenever a service starts."""
    day, now = 86_400_000, int(time.time() * 1000)
    then = now - 8 * day

    def approved_then(bias: float, sequence: int) -> tuple[Path, Approved]:
        folder, asked = team.champion(bias)
        statement = asked.statement._replace(sequence=sequence, until=now - day)
        return folder, team.signed(Approved(statement, ()), "anna", "ben", at=then)

    folder, approvals = approved_then(-8.0, then)
    signed = folder / SIGNATURE

    def sign(promoted: int) -> bytes:
        sign_bundle(folder, CHAMPION, team.signers["prod"], approved=approvals, promoted=promoted)
        return signed.read_bytes()

    late = sign(now)
    unstamped = team.signers["prod"].sign((folder / MANIFEST).read_bytes(), CHAMPION, sequence=then)
    ways = {
        "when its approvals had ended": late,  # who has the key, and old approvals
        "its signature does not fit": late.replace(b"promoted %d" % now, b"promoted %d" % then),  # who has no key
        "which is in the future": sign(now + day),
        "it is an older one); sign it anew: fraud approvals adopt": unstamped + approvals.text,
        "approved by nobody; expected 2 more": sign(then - day),  # promoted first, and approved then
    }
    with serving(team, ready=False) as url:
        for reason, text in ways.items():
            signed.write_bytes(text)
            team.copy(folder)
            said(team, reason)
            assert httpx.get(f"{url}/readyz").status_code == 503
        sign(then)
        team.copy(folder)
        kept = load_bundle(folder).manifest.version
        servers.until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        assert version(url) == kept
        second, approvals_of_second = approved_then(-5.0, then + 1)
        sign_bundle(second, CHAMPION, team.signers["prod"], approved=approvals_of_second, promoted=then + 1)
        team.copy(second)  # an earlier moment than the true one, which a service at work does not believe
        said(team, "was not promoted in the time")
        assert version(url) == kept
    team.copy(folder)  # the former champion, once another one has been approved and promoted
    with serving(team, ready=False, trust__least_sequence=then + 1) as url:
        said(team, "a newer one has replaced it")
        assert httpx.get(f"{url}/readyz").status_code == 503
        team.copy(second)
        servers.until(lambda: httpx.get(f"{url}/readyz").status_code == 200)


def test_rules_and_lists_of_one_person_do_not_hold(team):
    folder, approved = team.champion(-8.0)
    team.put(folder, team.signed(approved, "anna", "ben"))
    config, log = team.settings(), open_changes(team.settings())
    asked = approvers(config)
    with serving(team) as url:
        publish_rules(log, parse_rules(RULES % "alone", ""), "anna", AT)  # past the command, straight into the store
        said(team, "too few persons have approved")
        number = publish_rules(log, parse_rules(RULES % "both", ""), "anna", AT, approvers=asked).number
        team.approve(number, "anna")
        with pytest.raises(Exception, match="anna has approved it already"):
            team.approve(number, "anna2")
        assert names(url) == ([], {})
        answer = httpx.post(f"{url}/lists", json={"name": "mules", "add": [{"value": "C2"}]}).json()
        (listed,) = answer["proposals"]
        assert names(url) == ([], {})
        decide = httpx.post(f"{url}/predict", json=payment("p1", amount=5.0)).json()
        assert decide["decision"] == "allow"
        team.approve(number, "ben")
        team.approve(listed, "ben", "anna2")
        servers.until(
            lambda: names(url) == (["both"], {"mules": {"kind": "text", "values": 1}}), what=lambda: names(url)
        )
        assert httpx.post(f"{url}/predict", json=payment("p2", amount=5.0)).json()["decision"] == "block"
    with serving(team) as url:  # the same after a restart
        assert names(url)[0] == ["both"]


def test_what_was_changed_after_its_approval_does_not_hold(team):
    """Whoever may write into the log alters content, or brings lines with signatures to another place."""
    config = team.settings()
    log, asked, file = open_changes(config), approvers(config), team.root / "changes.jsonl"

    def held():
        return append_line(open_changes(config), lambda held: None, asked)

    number = add_entries(log, "mules", {"C1": Entry()}, "anna", AT, approvers=asked).number
    team.approve(number, "anna", "ben")
    lines = file.read_bytes().splitlines(keepends=True)
    assert list(held().lists.lists["mules"].entries) == ["C1"]
    for altered in (
        [lines[0].replace(b"C1", b"C7"), *lines[1:]],
        [lines[0].replace(b'"until":', b'"until":9'), *lines[1:]],
        [b'{"at":"x","by":"x","kind":"add","list":"other"}\n', *lines],
    ):
        file.write_bytes(b"".join(altered))
        assert "mules" not in held().lists.lists
    file.write_bytes(b"".join(lines))
    gone = append_line(log, lambda held: None, asked)
    assert "mules" in gone.lists.lists
    removal = remove_entries(log, "mules", ["C1"], "anna", AT, approvers=asked).number
    team.approve(removal, "anna", "ben")
    with file.open("ab") as opened:  # what was approved once, once more
        opened.write(b"".join(lines))
    assert not held().lists.lists["mules"].entries


def test_the_command_line_proposes_approves_and_shows_what_waits(team):
    folder, approved = team.champion(-8.0)
    team.put(folder, team.signed(approved, "anna", "ben"))
    (team.root / "rules.yaml").write_text(RULES % "both")

    def fraud(*words: str, who: str = "", ok: bool = True) -> str:
        given = team.overrides | {
            "paths.models": team.root / "models",
        }
        given |= {"audit.url": f"sqlite:///{team.root}/audit.db"}
        variables = {"FRAUD_APPROVAL_KEY_FILE": str(team.root / f"{who}.pem")} if who else {}
        done = subprocess.run(
            [sys.executable, "-m", "fraud_pkg.cli", *words],
            env=servers.environment(given, team.root, **variables),
            cwd=team.root,
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    with serving(team) as url:
        shown = fraud("rules", "publish", "rules.yaml", who="anna")
        assert "proposal 1 waits: approved by anna; expected 1 more of ben" in shown
        shown = fraud("approvals")
        assert '+ {"name":"both","action":"block","if":"amount > 1.0"}' in shown and "approved by anna" in shown
        assert "FRAUD_APPROVAL_KEY_FILE" in fraud("approvals", "approve", "1", who="prod", ok=False)
        assert names(url)[0] == []
        assert fraud("approvals", "approve", "1", who="ben") == "proposal 1: holds\n"
        servers.until(lambda: names(url)[0] == ["both"])
        fraud("lists", "add", "mules", "C2")
        assert "rejected by ben" in fraud("approvals", "reject", "4", who="ben")
        assert "does not wait" in fraud("approvals", "approve", "4", who="anna", ok=False)
    fraud("audit", "export", str(team.root / "audit.jsonl"))
    notes = [json.loads(line) for line in (team.root / "audit.jsonl").read_text().splitlines()]
    noted = [(note["kind"], note["who"]) for note in notes if note["kind"] == "approval"]
    assert noted == [("approval", "ben"), ("approval", "ben")]
    assert "propose" in str([note["content"] for note in notes if note["kind"] == "rules"])


def test_a_successor_waits_for_two_persons(team, monkeypatch):
    """What a retraining brings passes the checks, is proposed, and decides from the run after both approved it."""
    config = team.settings(paths__models=team.root / "models", evaluate__resamples=100)
    test = example_sample(8000, first_step=600, seed=2)
    contenders = [
        example_contender(team.root / f"c{n}", weights, config, validation_precision=precision)
        for n, (weights, precision) in enumerate([((1.0, 1.5), 0.2), ((2.0, 0.3), 0.6)])
    ]
    monkeypatch.setenv("FRAUD_SIGNING_KEY_FILE", str(team.root / "prod.pem"))
    with pytest.raises(Exception, match="no champion yet: .* passed, and proposal 1 waits for 2 persons"):
        promote(config, test, contenders[0])
    team.approve(1, "anna", "ben")
    assert retraining.promote_approved(config).action == "promotion"
    before = load_bundle(team.root / "models/champion").manifest.version

    def pipeline(settings: Settings, **options: object) -> Run:
        promote(config, test, contenders[1])
        run = mock.Mock(spec=Run, error=None, seconds=1.0, average_precision=0.5)
        run.champion = load_bundle(team.root / "models/champion").manifest.version
        return run

    monkeypatch.setattr(retraining, "run_pipeline", pipeline)
    monkeypatch.setattr(retraining, "newest_step", lambda folder: 1000)
    monkeypatch.setattr(retraining, "retraining_settings", lambda settings, failing: settings)
    outcome = retraining.retrain(config)
    assert not outcome.promoted and outcome.after == before
    assert outcome.gate.passed and "waits for 2 persons" in outcome.gate.reasons[-1].detail
    (number,) = waiting_candidates(config)
    healthy = mock.Mock(verdict="healthy", checks=[], reasons=[])
    for name in ("watch", "write_live_rules", "refresh_page"):
        monkeypatch.setattr(retraining, name, lambda settings: healthy)
    for who, champion in (("anna", before), ("ben", load_bundle(contenders[1]).manifest.version)):
        team.approve(number, who)
        retraining.watch_and_retrain(config)
        assert load_bundle(team.root / "models/champion").manifest.version == champion
    assert os.environ["FRAUD_SIGNING_KEY_FILE"] and not waiting_candidates(config)
