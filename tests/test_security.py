"""What others write is data: shared remotes, bundles, models, archives. Each test is an attack that worked once.

docs/threat-model.md names these tests beside the threats that they guard.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest
from conftest import PROJECT
from onnx import TensorProto, helper
from starlette.testclient import TestClient

from fraud_pkg.core.errors import FraudError
from fraud_pkg.core.files import staging_file
from fraud_pkg.core.pseudonyms import load_pseudonyms
from fraud_pkg.core.settings import load_settings
from fraud_pkg.core.signatures import CHAMPION, CONTENDER, load_signer, new_key, verifier
from fraud_pkg.model.bundle import (
    MANIFEST,
    MODEL,
    SIGNATURE,
    BundleError,
    Model,
    load_bundle,
    manifest_hash,
    manifest_text,
    sha256_hex,
    sign_bundle,
)
from fraud_pkg.model.dvc_remote import RemoteError, bring_stages, dvc, push_artifacts, read_lock, recall
from fraud_pkg.model.example import example_bundle
from fraud_pkg.model.locations import bundle_mark, fetch_bundle
from fraud_pkg.serve.api import create_app
from fraud_pkg.serve.metrics import Metrics
from fraud_pkg.serve.service import Service
from fraud_pkg.store.journal import JournaledStore
from fraud_pkg.store.memory import MemoryStore, save_snapshot
from fraud_pkg.store.open import open_store
from fraud_pkg.store.tiles import retention_of
from fraud_pkg.stream.decide import ServiceClient, open_pool


@pytest.fixture
def settings(tmp_path):
    """Settings of a project in a folder of its own; keyword arguments are settings."""

    def made(**values):
        (tmp_path / "settings.ini").touch()
        cli = {name.replace("__", "."): value for name, value in values.items()}
        return load_settings(file=tmp_path / "settings.ini", environ={}, cli=cli)

    return made


@pytest.fixture
def signer(tmp_path):
    """A signer whose key lies outside of the project."""
    (tmp_path / "secrets").mkdir()
    new_key(tmp_path / "secrets/key.pem", tmp_path / "project")
    return load_signer({"FRAUD_SIGNING_KEY_FILE": str(tmp_path / "secrets/key.pem")})


# --- the shared remote


COMMAND = "mkdir -p data && echo 1 > data/rows"
PLAN = [{"name": "acquire", "cmd": COMMAND, "deps": ["source.txt"], "params": ["train"], "outs": ["data"]}]


def machine(root: Path, store: Path):
    """A clone of a project of one stage, whose remote others can write to."""
    (root / ".dvc").mkdir(parents=True)
    (root / "settings.ini").touch()
    (root / ".dvc/config").write_text(
        f"[core]\n    no_scm = true\n    remote = store\n['remote \"store\"']\n    url = {store}\n"
    )
    (root / "source.txt").write_text("1")
    (root / "params.json").write_text('{"train": {"seed": 7}}')
    stage = {
        "cmd": COMMAND,
        "deps": ["source.txt"],
        "params": [{"params.json": ["train"]}],
        "outs": [{"data": {"persist": True}}],
    }
    (root / "dvc.yaml").write_text(json.dumps({"stages": {"acquire": stage}}))
    return load_settings(file=root / "settings.ini", environ={})


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """An honest machine beside the remote to which it has pushed."""
    folder = tmp_path_factory.mktemp("pushed")
    honest = machine(folder / "honest", folder / "store")
    dvc(["repro"], honest)
    push_artifacts(honest)
    return folder


@pytest.fixture
def remote(pushed, tmp_path):
    """What an honest machine has pushed: the folder of the remote."""
    shutil.copytree(pushed / "store", tmp_path / "store")
    return tmp_path / "store"


def stored(store: Path, content: bytes, suffix: str = "") -> str:
    """Puts a content into a remote under its MD5, as DVC does."""
    digest = hashlib.md5(content).hexdigest()
    file = store / "files/md5" / digest[:2] / (digest[2:] + suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return digest + suffix


@pytest.mark.parametrize("path", ["../dvc.py", "{tmp}/absolute"])  # all others: nbs/core/17_listings.ipynb
def test_a_listing_cannot_leave_its_folder(remote, tmp_path, path):
    """Who may write to the remote made `fraud run --pull` write dvc.py into the project, and run it."""
    [answer] = remote.glob("stages/*/*.json")
    entry = json.loads(answer.read_text())
    evil = stored(remote, b"raise SystemExit('code of the attacker')")
    listing = [{"md5": evil, "relpath": path.format(tmp=tmp_path)}]
    entry["outs"][0] |= {"md5": stored(remote, json.dumps(listing).encode(), ".dir"), "nfiles": 1}
    answer.write_text(json.dumps(entry))
    victim = machine(tmp_path / "victim", remote)
    before = sorted(file for file in tmp_path.rglob("*.py"))
    assert recall(PLAN, victim) == ["acquire"]
    with pytest.raises(RemoteError, match="leads out of its folder; nothing of it was checked out"):
        bring_stages(["acquire"], victim)
    assert sorted(file for file in tmp_path.rglob("*.py")) == before and read_lock(victim) == {}
    assert not (victim.root / "data").exists() and not (tmp_path / "absolute").exists()


def test_a_module_in_the_project_is_not_dvc(remote, tmp_path):
    """However it came there: `python -m dvc`, started in the project, does not run it."""
    victim = machine(tmp_path / "victim", remote)
    (victim.root / "dvc.py").write_text("raise SystemExit('code of the attacker')")
    assert recall(PLAN, victim) == ["acquire"]
    bring_stages(["acquire"], victim)
    assert (victim.root / "data/rows").read_text() == "1\n"


def test_every_interpreter_starts_without_the_working_directory():
    """`-m` puts the working directory before all packages, unless `-P` says otherwise."""
    started = []
    for file in (PROJECT / "fraud_pkg").rglob("*.py"):
        started += re.findall(r"sys\.executable, .{0,8}?\"-m\"", file.read_text(encoding="utf-8"))
    assert started and all('"-P"' in words for words in started), started
    for image in ("Dockerfile", "Dockerfile.jobs"):
        assert "PYTHONSAFEPATH=1" in (PROJECT / image).read_text(encoding="utf-8")


def test_an_answer_is_taken_from_trusted_signers_only(remote, tmp_path, signer, monkeypatch):
    """Who may write to the remote answers a question with outputs of his own."""
    victim = machine(tmp_path / "victim", remote)
    strict = victim.model_copy(update={"trust": victim.trust.model_copy(update={"keys": (f"ci:{signer.public}",)})})
    with pytest.raises(RemoteError, match="not signed; expected a signature by a key"):
        recall(PLAN, strict)
    monkeypatch.setenv("FRAUD_SIGNING_KEY_FILE", str(tmp_path / "secrets/key.pem"))
    honest = machine(tmp_path / "honest", remote)
    recall(PLAN, honest)
    bring_stages(["acquire"], honest)
    push_artifacts(honest.model_copy(update={"trust": strict.trust}))
    [answer] = remote.glob("stages/*/*.json")
    content = answer.read_text()
    answer.write_text(content.replace('"size": 2', '"size": 3'))
    with pytest.raises(RemoteError, match="its signature does not fit"):
        recall(PLAN, strict)
    answer.write_text(content)
    assert recall(PLAN, strict) == ["acquire"]


# --- bundles


def forged(folder: Path, **changes) -> None:
    """Changes the manifest of a bundle as anybody can who may write to its place: its hash is computed anew."""
    content = json.loads((folder / MANIFEST).read_bytes()) | changes
    content["files"] = content["files"] | {MODEL: sha256_hex((folder / MODEL).read_bytes())}
    content["version"] = content["files"][MODEL][:12]
    content["files"][MANIFEST] = manifest_hash(content)
    (folder / MANIFEST).write_bytes(manifest_text(content))


def test_a_forged_bundle_is_refused_where_keys_are_trusted(settings, signer, tmp_path):
    """A policy that allows every payment, with hashes that match."""
    folder = example_bundle(tmp_path / "bundle").folder
    check = verifier(settings(trust__keys=f"prod-1:{signer.public}"), CHAMPION)
    sign_bundle(folder, CHAMPION, signer)
    honest = fetch_bundle(folder, verifier=check).manifest
    forged(folder, policy=json.loads((folder / MANIFEST).read_bytes())["policy"] | {"review_cost": 1e9})
    assert load_bundle(folder).manifest.version == honest.version  # the hash is its own word
    with pytest.raises(BundleError, match="its signature does not fit"):
        fetch_bundle(folder, verifier=check)
    (folder / SIGNATURE).unlink()
    with pytest.raises(BundleError, match="not signed"):
        fetch_bundle(folder, verifier=check)


def test_a_bundle_that_passed_no_checks_does_not_decide(settings, signer, tmp_path):
    """A contender has a signature too: it comes from a training of ours, and was perhaps refused."""
    folder = example_bundle(tmp_path / "bundle").folder
    trusting = settings(trust__keys=f"prod-1:{signer.public}")
    sign_bundle(folder, CONTENDER, signer)
    fetch_bundle(folder, verifier=verifier(trusting, CONTENDER))
    with pytest.raises(BundleError, match="signed as contender; expected champion"):
        fetch_bundle(folder, verifier=verifier(trusting, CHAMPION))


def test_a_former_champion_does_not_come_back(settings, signer, tmp_path):
    """Nor after a restart, where the highest sequence is kept."""
    folder = example_bundle(tmp_path / "bundle").folder
    trusting = settings(trust__keys=f"prod-1:{signer.public}", trust__state="highest")
    sign_bundle(folder, CHAMPION, signer)
    former = (folder / SIGNATURE).read_bytes()
    sign_bundle(folder, CHAMPION, signer, after=int(former.split()[7]))
    fetch_bundle(folder, verifier=verifier(trusting, CHAMPION, remembers=True))
    (folder / SIGNATURE).write_bytes(former)
    with pytest.raises(BundleError, match="a newer one has replaced it"):
        fetch_bundle(folder, verifier=verifier(trusting, CHAMPION, remembers=True))


def test_production_starts_with_keys_only(settings):
    with pytest.raises(FraudError, match="required = yes: expected .trust. keys"):
        verifier(settings(trust__required="yes"), CHAMPION)
    deployments = [file.read_text() for file in (PROJECT / "k8s/overlays/production").glob("bundle*.yaml")]
    assert len(deployments) == 2 and all("FRAUD_TRUST_REQUIRED" in text for text in deployments)
    stages = json.loads((PROJECT / "chalice_app/.chalice/config.json").read_text())["stages"]
    assert stages["prod"]["environment_variables"]["FRAUD_TRUST_REQUIRED"] == "yes"


def test_production_starts_with_pseudonyms_only(settings):
    with pytest.raises(FraudError, match=r"required = yes: expected \[privacy\] pseudonymise"):
        load_pseudonyms(settings(privacy__required="yes"), {})
    with pytest.raises(FraudError, match="FRAUD_PRIVACY_KEY"):
        load_pseudonyms(settings(privacy__pseudonymise="accounts"), {})
    for name in ("privacy", "jobs"):
        text = (PROJECT / f"k8s/overlays/production/{name}.yaml").read_text()
        assert "FRAUD_PRIVACY_REQUIRED" in text and "FRAUD_PRIVACY_KEY" in text
    stages = json.loads((PROJECT / "chalice_app/.chalice/config.json").read_text())["stages"]
    assert stages["prod"]["environment_variables"]["FRAUD_PRIVACY_REQUIRED"] == "yes"


# --- models


def reading_model(location: str, length: int, width: int = 3) -> bytes:
    """A model whose probability is a byte of a file, the one that the first feature says, divided by 256."""
    weights = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[length], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        weights.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Cast", ["w"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["features", "zero"], ["first"], axis=1),
        helper.make_node("Cast", ["first"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["bytes", "index"], ["byte"], axis=0),
        helper.make_node("Div", ["byte", "most"], ["probability"]),
    ]
    constants = [
        weights,
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("most", TensorProto.FLOAT, [1], [256.0]),
    ]
    graph = helper.make_graph(
        nodes,
        "reader",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, width])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT, [None, 1])],
        constants,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 15)]).SerializeToString()


LOCATIONS = ("api-keys", "../api-keys", "{tmp}/api-keys", "a/../api-keys", "link", "*/_ORT_MEM_ADDR_/*")


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_model_reads_no_other_file(tmp_path, monkeypatch, location):
    """A bundle that passed every check handed out the service's keys, a byte an answer."""
    (tmp_path / "api-keys").write_text("shop:THE-KEY-OF-THE-SHOP")
    (tmp_path / "link").symlink_to("api-keys")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    content = reading_model(location.format(tmp=tmp_path), 24)
    onnx.checker.check_model(onnx.ModelProto.FromString(content)) if location == "api-keys" else None
    with pytest.raises(BundleError, match="the values of a tensor are in another file"):
        Model(content, 3)
    folder = example_bundle(tmp_path / "bundle").folder
    width = len(load_bundle(folder).manifest.features)
    (folder / MODEL).write_bytes(reading_model(location.format(tmp=tmp_path), 24, width))
    forged(folder)
    with pytest.raises(BundleError, match="the values of a tensor are in another file"):
        load_bundle(folder)


def test_without_the_check_it_would(tmp_path, monkeypatch):
    """The attack works on onnxruntime as it is, so the tests above can fail."""
    import onnxruntime

    (tmp_path / "api-keys").write_text("shop:THE-KEY-OF-THE-SHOP")
    monkeypatch.chdir(tmp_path)
    session = onnxruntime.InferenceSession(reading_model("api-keys", 24), providers=["CPUExecutionProvider"])
    x = np.zeros((24, 3), np.float32)
    x[:, 0] = np.arange(24)
    assert bytes((session.run(None, {"features": x})[0].ravel() * 256).round().astype(int).tolist()) == (
        b"shop:THE-KEY-OF-THE-SHOP"
    )


# --- archives


def test_a_small_file_does_not_become_a_large_one(tmp_path):
    """0.8 MB of gzip became 805 MB in memory."""
    from fraud_pkg.data.unpack import unpack

    file = tmp_path / "bomb.csv.gz"
    with gzip.open(file, "wb", 9) as packed:
        packed.write(b"step,amount,nameOrig,nameDest,isFraud\n")
        for _ in range(48):
            packed.write(b"0" * (1 << 24))
    [part] = unpack(file, "bomb", "").parts
    with (
        pytest.raises(FraudError, match="unpacks to more than 268,435,456 bytes, over 200 times"),
        part.start() as stream,
    ):
        while stream.read(1 << 20):
            pass


# --- what leaves, and what is left lying about


class Seen(BaseHTTPRequestHandler):
    """Keeps what it was asked with; where `elsewhere` is set, it sends everybody there."""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(dict(self.headers))
        elsewhere = getattr(self.server, "elsewhere", None)
        self.send_response(307 if elsewhere else 200)
        if elsewhere:
            self.send_header("Location", f"{elsewhere}{self.path}")
        self.send_header("Content-Length", "2" if not elsewhere else "0")
        self.end_headers()
        if not elsewhere:
            self.wfile.write(b"{}")

    do_GET = do_POST = answer

    def log_message(self, *arguments):
        pass


@pytest.fixture
def redirecting():
    """The address of a server that redirects to another one, and what that other one has seen."""
    with HTTPServer(("127.0.0.1", 0), Seen) as named, HTTPServer(("127.0.0.1", 0), Seen) as other:
        named.seen, other.seen = [], []
        named.elsewhere = f"http://127.0.0.1:{other.server_port}"
        for server in (named, other):
            Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{named.server_port}", other.seen
        named.shutdown()
        other.shutdown()


def test_a_token_does_not_follow_a_redirect(redirecting, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "TOKEN-OF-MLFLOW")
    address, seen = redirecting
    with pytest.raises(FraudError, match="HTTP 307"):
        bundle_mark(f"{address}#fraud-scorer@champion")
    assert seen == []


def test_a_key_and_payments_do_not_follow_a_redirect(redirecting):
    address, seen = redirecting
    client = ServiceClient(address, open_pool("SHOPSHOPSHOPSHOP", 5))
    with pytest.raises(FraudError, match="redirects elsewhere .307."):
        client.call("POST", "/feedback", b"{}")
    assert seen == []


def test_no_message_tells_a_password(settings, tmp_path):
    """Neither an error nor `fraud settings`, whatever the address is of."""
    for url in ("redis+tls://:S3CRET@redis:6379/0", "postgres://u:S3CRET@db/x"):
        with pytest.raises(FraudError) as caught:
            open_store(url, retention_of(settings().contract))
        assert "S3CRET" not in str(caught.value) and "S3CRET" not in repr(caught.value)
    with pytest.raises(FraudError) as caught:
        made = settings(registry__tracking_uri="postgresql://u:S3CRET@db/mlflow", serve__bundle="registry://champion")
        assert made.bundle_place == ""
    assert "S3CRET" not in str(caught.value)
    with pytest.raises(FraudError) as caught:
        bundle_mark("http://user:S3CRET@127.0.0.1:9#fraud-scorer@champion")
    assert "S3CRET" not in str(caught.value)
    plain = "[store]\nurl = redis://:S3CRET@redis:6379/0\n"
    (tmp_path / "settings.ini").write_text(plain + "[trust]\nplain_hosts = redis\n")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), "FRAUD_ROOT": str(tmp_path)}
    for words in (["settings"], ["settings", "--json"]):
        command = [sys.executable, "-P", "-m", "fraud_pkg.cli", *words]
        shown = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
        assert "redis://:***@redis" in shown and "S3CRET" not in shown


def test_no_page_runs_scripts_of_other_hosts(settings, tmp_path):
    """/docs and /redoc took theirs from a CDN, at the origin where keys are typed."""
    made = settings()
    app = create_app(Service(made.serve, MemoryStore(retention_of(made.contract)), {}), Metrics())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [200, 404]
        page = client.get("/docs")
        assert not re.search(r"https?://|<script(?![^>]* src=\"/docs/)|<style|style=", page.text)
        assert "script-src 'self';" in page.headers["content-security-policy"]
        assert client.get("/openapi.json").status_code == 200


def test_files_with_accounts_are_their_owners(settings, tmp_path):
    """Snapshots and the stream's journal were readable by every account of the machine."""
    retention = retention_of(settings().contract)
    before = os.umask(0o022)
    try:
        save_snapshot(MemoryStore(retention), tmp_path / "store.npz")
        JournaledStore(tmp_path / "stream", retention).close()
        with staging_file(tmp_path / "part.parquet", durable=True, private=True) as part:
            part.write_bytes(b"rows")
    finally:
        os.umask(before)
    files = [tmp_path / "store.npz", tmp_path / "part.parquet", *(tmp_path / "stream").glob("journal.sqlite*")]
    assert len(files) >= 3 and {oct(file.stat().st_mode & 0o777) for file in files} == {"0o600"}


# --- what a reader of code finds

OWN = "a fixed program with arguments of our own, and no shell"
CONTENT = "names contents, and proves nothing: answers and bundles are signed"
EXPLAINED = {  # bandit's rules, as ruff has them: all but `assert`
    (".github/scripts/lambda_stage.py", "S108"): "only where no runner names its folder",
    (".github/scripts/lambda_stage.py", "S310"): "addresses that AWS has given",
    ("fraud_pkg/cli/pipeline.py", "S310"): "the service of the settings, asked for its version",
    ("fraud_pkg/cli/pipeline.py", "S606"): "an executor of Spark, in place of this process",
    ("fraud_pkg/core/files.py", "S603"): OWN,
    ("fraud_pkg/core/files.py", "S607"): "git, as the path has it for whoever runs this",
    ("fraud_pkg/core/listings.py", "S324"): f"MD5, DVC's: {CONTENT}",
    ("fraud_pkg/data/order.py", "S608"): "columns of the contract, whose names are letters, digits and underscores",
    ("fraud_pkg/features/spark.py", "S108"): "of an executor's pod, an emptyDir of its own",
    ("fraud_pkg/features/spark.py", "S603"): OWN,
    ("fraud_pkg/model/dvc_remote.py", "S324"): f"MD5, DVC's: {CONTENT}",
    ("fraud_pkg/model/dvc_remote.py", "S603"): OWN,
    ("fraud_pkg/model/locations.py", "S310"): "http and https alone, and no redirect",
    ("fraud_pkg/model/tracking.py", "S310"): "http and https alone",
    ("fraud_pkg/pipeline/run.py", "S603"): OWN,
    ("fraud_pkg/pipeline/schedule.py", "S603"): OWN,
    ("fraud_pkg/serve/lambda_package.py", "S603"): OWN,
    ("fraud_pkg/store/redis.py", "S324"): "SHA-1, the name that Redis gives a script",
    ("fraud_pkg/stream/worker.py", "S311"): "how long a process waits before it tries again",
}


def test_no_finding_of_a_static_analyser_is_unexplained():
    """And none is explained that is not there any more; `noqa` in the code says why beside it."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "S", "--ignore", "S101"]
    places = ["fraud_pkg", "chalice_app/app.py", ".github/scripts"]
    done = subprocess.run(
        [*command, "--output-format", "json", "--no-cache", *places], cwd=PROJECT, capture_output=True, text=True
    )
    found = {(str(Path(one["filename"]).relative_to(PROJECT)), one["code"]) for one in json.loads(done.stdout)}
    assert found == EXPLAINED.keys(), found ^ EXPLAINED.keys()


# --- what the threat model says


@pytest.mark.parametrize("page", ["docs/threat-model.md", "docs/howto/security-review.md"])
def test_pages_on_security_name_tests_that_exist(page):
    text = (PROJECT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text)) | set(re.findall(r"`((?:nbs|tests|infra)/[\w/.]+)`", text))
    named = {name for name in named if not (PROJECT / name).is_file()}
    files = [*(PROJECT / "tests").glob("test_*.py"), *(PROJECT / "nbs").rglob("*.ipynb")]
    known = {name for file in files for name in re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8"))}
    assert named <= known | {file.stem for file in files}, named - known


def test_the_command_line_makes_and_trusts_keys(tmp_path):
    """The private half is its owner's alone, outside of the project, and is never shown."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project/settings.ini").write_text("[trust]\nkeys =\n")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), "FRAUD_ROOT": str(tmp_path / "project")}

    def fraud(*words: str) -> str:
        command = [sys.executable, "-P", "-m", "fraud_pkg.cli", "keys", *words]
        done = subprocess.run(command, env=environ, capture_output=True, text=True)
        return done.stdout + done.stderr

    shown = fraud("new", str(tmp_path / "key.pem"))
    public = shown.split()[2]
    private = (tmp_path / "key.pem").read_text().splitlines()[1]
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600 and private not in shown
    assert "is in the project's folder" in fraud("new", str(tmp_path / "project/key.pem"))
    assert fraud("trust", f"prod-1:{public}") == "trusted: prod-1\n"
    environ["FRAUD_SIGNING_KEY_FILE"] = str(tmp_path / "key.pem")
    assert "trusted, signs here" in fraud("list")
    shutil.copy(tmp_path / "key.pem", tmp_path / "open.pem")
    os.chmod(tmp_path / "open.pem", 0o644)
    environ["FRAUD_SIGNING_KEY_FILE"] = str(tmp_path / "open.pem")
    assert "its mode is 0644, so others can use it; expected 0600" in fraud("list")
