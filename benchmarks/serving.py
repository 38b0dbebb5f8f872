"""One decision in process, over HTTP and in Lambda, each beside a peer in the same run. What is measured and how to
read it: benchmarks/README.md.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

HERE, PROJECT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"  # scikit-learn decides on one row faster without a second thread

import lambda_runtime  # noqa: E402
import peers  # noqa: E402
import servers  # noqa: E402
from measure import machine, say, write_json  # noqa: E402

from fraud_pkg.core.contract import DEFAULT_ENTITIES, HOUR, MINUTE, Contract  # noqa: E402
from fraud_pkg.core.errors import FraudError  # noqa: E402
from fraud_pkg.core.settings import Settings, load_settings  # noqa: E402
from fraud_pkg.features.histories import LogTable, log_histories  # noqa: E402
from fraud_pkg.model.bundle import MODEL, Bundle, load_bundle  # noqa: E402
from fraud_pkg.serve.auth import parse_key  # noqa: E402
from fraud_pkg.serve.fill import fill_store  # noqa: E402
from fraud_pkg.serve.rules import ActiveRules  # noqa: E402
from fraud_pkg.serve.scorer import Scorer  # noqa: E402
from fraud_pkg.serve.service import Service  # noqa: E402
from fraud_pkg.store.dynamodb import create_table  # noqa: E402
from fraud_pkg.store.memory import MemoryStore, save_snapshot  # noqa: E402
from fraud_pkg.store.open import open_store  # noqa: E402
from fraud_pkg.store.tiles import History, LoadableStore, Retention, pack_history, retention_of  # noqa: E402

KEY = "a-key-for-this-run"
KEYS = {"FRAUD_API_KEYS": f"benchmark@decide+label+metrics:{KEY}"}
HEADERS = {"content-type": "application/json", "x-api-key": KEY}
COLUMNS = ("time", "type", "amount", "sender", "sender_balance", "receiver", "receiver_balance")  # beside the id
PAYSIM, WIDE = "PaySim's contract", "six entities, five windows, eight attributes"
DECLARED: dict[str, dict] = {PAYSIM: {"entities": dict(DEFAULT_ENTITIES)}, WIDE: {}}  # in settings, of the same log
PARTS = ("process", "http", "lambda")


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rows: int  # transactions that are simulated: history, training, and a stream of live ones
    trees: int  # at most, where a bundle has to be trained
    rounds: int  # in each of which everybody has a turn
    slow_calls: int  # of a peer, in a round
    seconds: int  # of load, in a round
    starts: int  # of a Lambda instance
    invocations: int  # of a warm one


FULL = Plan(rows=60_000, trees=200, rounds=5, slow_calls=100, seconds=2, starts=9, invocations=3000)
QUICK = Plan(rows=20_000, trees=60, rounds=1, slow_calls=40, seconds=1, starts=3, invocations=600)


@dataclass(frozen=True)
class Row:
    """A line of the table: ours beside one peer; the first figure of each decides."""

    what: str
    ours: dict[str, float]
    peer: str = ""
    theirs: dict[str, float] | None = None
    aim: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        if not self.theirs:
            return None
        first = next(iter(self.ours))
        return self.ours[first] / self.theirs[first]


@dataclass(frozen=True)
class World:
    """What everybody decides about."""

    name: str  # of its contract, in DECLARED
    root: Path  # of settings.ini and of everything that is made
    settings: Settings
    bundle: Path
    source: str  # of the bundle, in words
    snapshot: Path  # the store at the moment when the live stream begins
    past: pa.Table  # the raw table up to then
    stream: list[dict]  # live transactions, without ids
    pipeline: Path  # scikit-learn's


# The world: simulated accounts, a bundle, a store that remembers.


def simulated(settings: Settings) -> pa.Table:
    """The raw table."""
    from fraud_pkg.data.acquire import acquire

    return pq.read_table(settings.data_dir / "raw" / acquire(settings)["file"])


def trained(settings: Settings) -> Path:
    """A bundle from the simulated transactions."""
    from fraud_pkg.features.table import build_features
    from fraud_pkg.model.bakeoff import evaluate_contender
    from fraud_pkg.train.samples import load_periods
    from fraud_pkg.train.xgboost import train_xgboost

    build_features(settings)
    periods = load_periods(settings)
    evaluate_contender(train_xgboost(periods.train, periods.validation, settings, tell=say), periods, settings)
    return settings.models_dir / "xgboost"


def live_through(store: LoadableStore, past: pa.Table, contract: Contract) -> None:
    """Fills the store with the past, as far as it remembers."""
    fill_store(store, LogTable(past, contract, retention_of(contract)), "past")


def request(row: dict, contract: Contract) -> dict:
    """A row of the raw table as a request says it, without an id."""
    attributes = [name for attribute in contract.attributes for name in attribute.stored]
    return {name: row[name] for name in (*COLUMNS, *attributes) if row[name] is not None}


def settings_of(root: Path, plan: Plan, declared: dict) -> Settings:
    overrides = {
        "simulate.rows": plan.rows,
        "simulate.days": 60,
        "simulate.fraud_rate": 0.01,
        "features.engine": "local",
        "xgboost.rounds": plan.trees,
        "evaluate.resamples": 20,
        "monitor.reference_rows": 5000,
    }
    return load_settings(cli=overrides | declared, file=root / "settings.ini", environ={})


def fitting(given: Path | None, contract: Contract) -> Bundle | None:
    """The bundle that was given, where it has this contract."""
    bundle = load_bundle(given) if given else None
    return bundle if bundle and bundle.manifest.contract == contract else None


def prepare(root: Path, plan: Plan, given: Path | None, name: str = PAYSIM) -> World:
    """Simulates, trains what has to be trained, and lets the store live through the past."""
    root.mkdir(exist_ok=True)
    shutil.copy(PROJECT / "settings.ini", root)
    settings = settings_of(root, plan, DECLARED[name])
    contract, bundle = settings.contract, fitting(given, settings.contract)
    say(f"simulating {plan.rows:,} transactions, {name}")
    raw = simulated(settings)
    if not bundle:
        say(f"training a model of at most {plan.trees} trees, about a minute (--bundle FOLDER takes one that is there)")
    origin = f"from {given}" if bundle else f"trained by this program on {plan.rows:,} simulated transactions"
    bundle = bundle or load_bundle(trained(settings))
    manifest, hour = bundle.manifest, raw["time"].to_numpy() // HOUR
    begin = int(np.searchsorted(hour, hour[-1] - settings.split.test_hours, side="right"))
    past, future = raw.slice(0, begin), raw.slice(begin).to_pylist()
    store = MemoryStore(retention_of(contract))
    live_through(store, past, contract)
    save_snapshot(store, root / "store.npz")
    say("training the scikit-learn pipeline")
    peers.train(past.to_pylist(), past["is_fraud"].to_pylist(), plan.trees, str(root / "pipeline.joblib"))
    size = (bundle.folder / MODEL).stat().st_size / 1000
    described = f"{name}, {manifest.name}, {len(manifest.features)} features, {size:,.0f} kB"
    source = f"{manifest.version} ({described}), {origin}"
    stream = [request(row, contract) for row in future]
    return World(
        name, root, settings, bundle.folder, source, root / "store.npz", past, stream, root / "pipeline.joblib"
    )


def in_turns(stream: list[dict], rounds: int) -> Iterator[list[dict]]:
    """The stream in so many consecutive pieces: time goes on from round to round, and every transaction is new."""
    size = len(stream) // rounds
    yield from (stream[i * size : (i + 1) * size] for i in range(rounds))


# Figures.


def spread(nanoseconds: Iterable[int]) -> dict[str, float]:
    """Median and 99th percentile in microseconds."""
    p50, p99 = np.percentile(list(nanoseconds), [50, 99]) / 1000
    return {"p50": float(p50), "p99": float(p99)}


def middle(measured: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    return {name: median(one[name] for one in measured) for name in measured[0]}


def timed(call: Callable, arguments: Iterable) -> list[tuple[int, object]]:
    """Nanoseconds and result of each call."""
    found = []
    for argument in arguments:
        began = time.perf_counter_ns()
        result = call(argument)
        found.append((time.perf_counter_ns() - began, result))
    return found


def alert(decision: dict) -> str:
    return "allow" if decision["decision"] == "allow" else "alert"


# In process.


def bodies(piece: list[dict], run: str) -> list[bytes]:
    return [json.dumps({"transaction_id": f"{run}-{i}", **row}).encode() for i, row in enumerate(piece)]


def opened(world: World, url: str) -> Service:
    """The service of both endpoints, with the store at `url`."""
    scorer = Scorer(load_bundle(world.bundle), world.settings.serve, ActiveRules())
    service = Service(world.settings.serve, open_store(url, scorer.retention, 5), [parse_key(f"benchmark:{KEY}")])
    service.use(scorer)
    return service


def pyfunc(world: World):
    """The same ONNX model, as MLflow loads any model."""
    import mlflow
    import onnx

    place = world.root / "pyfunc"
    mlflow.onnx.save_model(
        onnx.load(world.bundle / MODEL),
        place,
        pip_requirements=["onnxruntime"],
        onnx_execution_providers=["CPUExecutionProvider"],
        onnx_session_options={"intra_op_num_threads": 1, "inter_op_num_threads": 1},
    )
    return mlflow.pyfunc.load_model(str(place))


def decide(service: Service, piece: list[dict], run: str, kept: dict[str, list[int]]) -> list[np.ndarray]:
    """Decides a piece of the stream, from bytes to bytes; times by what was decided go into `kept`. The features that
    it decided on.
    """
    features = []
    for spent, answer in timed(lambda body: service.answer("POST", "/predict", HEADERS, body), bodies(piece, run)):
        if answer.status != 200:
            raise FraudError(f"expected decisions; got {answer.status} {answer.body.decode()}")
        kept.setdefault(alert(answer.scored.decisions[0]), []).append(spent)
        features.append(answer.scored.x)
    return features


def from_json(model) -> Callable[[bytes], bytes]:
    """What a service around an MLflow model does: features that are ready, as JSON, to a probability as JSON."""
    import pandas as pd

    def answer(body: bytes) -> bytes:
        return json.dumps(
            {"fraud_probability": float(np.ravel(model.predict(pd.DataFrame([json.loads(body)], dtype=np.float32)))[0])}
        ).encode()

    return answer


def in_process(world: World, plan: Plan, redis_url: str, name: str) -> tuple[list[Row], dict[str, float]]:
    """Whole decisions beside what the peers do with bytes; the model alone beside MLflow's. And all decisions."""
    import pandas as pd

    say(f"in process, {name}")
    memory, redis, mlflow, sklearn = (
        opened(world, f"memory://{world.snapshot}"),
        opened(world, redis_url),
        pyfunc(world),
        peers.scorer(str(world.pipeline)),
    )
    live_through(redis.store, world.past, world.settings.contract)
    bundle, names, ours, shared, kept = (
        memory.scorer.bundle,
        memory.scorer.manifest.features,
        {},
        {},
        {name: [] for name in ("alone", "pyfunc alone", "pyfunc", "sklearn")},
    )

    def keep(name: str, call: Callable, arguments: Iterable) -> None:
        kept[name] += [spent for spent, _ in timed(call, arguments)]

    for number, piece in enumerate(in_turns(world.stream, plan.rounds)):
        features = decide(memory, piece, f"m{number}", ours)
        decide(redis, piece[: len(piece) // 2], f"r{number}", shared)
        few = features[: plan.slow_calls]
        frames = [pd.DataFrame(x, columns=names) for x in few]
        keep("alone", bundle.probability, features)
        keep("pyfunc alone", mlflow.predict, frames)
        keep("pyfunc", from_json(mlflow), [frame.iloc[0].to_json().encode() for frame in frames])
        keep(
            "sklearn",
            lambda body: json.dumps(sklearn(json.loads(body))).encode(),
            bodies(piece[: plan.slow_calls], "s"),
        )
    figures = {what: spread(times) for what, times in kept.items()}
    most = 120 if name == PAYSIM else None
    rows = [
        *decision_rows(f"memory store, {name}", ours, figures, most),
        *decision_rows(f"Redis store, {name}", shared, figures, 400 if name == PAYSIM else None),
        Row(
            f"the model alone, features given, {name}",
            figures["alone"],
            "mlflow pyfunc, same model, data frame given",
            figures["pyfunc alone"],
        ),
    ]
    return rows, spread(spent for times in ours.values() for spent in times)


def decision_rows(
    place: str, times: dict[str, list[int]], peer: dict[str, dict[str, float]], most: float | None
) -> list[Row]:
    """Decisions with one store: all of the stream, and by what was decided; `most` is the aim in microseconds."""
    every = [spent for kind in times.values() for spent in kind]
    kinds = {
        f"decision, all ({len(times['alert']) / len(every):.0%} alerts)": every,
        "decision, allow": times["allow"],
        "decision, alert, with reasons": times["alert"],
    }
    rows = []
    for what, spent in kinds.items():
        found = spread(spent)
        aim = most and (1.5 * most if what.endswith("reasons") else most)  # reasons: half an allow
        judged = {"aim": f"< {aim:.0f} us", "met": found["p50"] < aim} if aim else {}
        label = f"{what}; {place}"
        rows.append(Row(label, found, "mlflow pyfunc, same model, features given", peer["pyfunc"], **judged))
        if spent is every:
            rows.append(Row(label, found, "scikit-learn pipeline, no history", peer["sklearn"]))
    return rows


def both_contracts(worlds: dict[str, World], plan: Plan, redis_url: str) -> list[Row]:
    """Decisions by each contract, each in a database of its own, and what the wide one costs."""
    rows, every = [], {}
    for database, (name, world) in enumerate(worlds.items()):
        url = f"{redis_url.rsplit('/', 1)[0]}/{database + 1}"
        found, every[name] = in_process(world, plan, url, name)
        rows += found
    cheap = every[WIDE]["p50"] <= 2.5 * every[PAYSIM]["p50"]
    what = f"decision, all; memory store, {WIDE}"
    return [*rows, Row(what, every[WIDE], f"the same by {PAYSIM}", every[PAYSIM], "<= 2.50", cheap)]


# A read of the store.


def busiest(until: int, retention: Retention) -> bytes:
    """The packed history of an entity that had a payment every second until then."""
    history = History()
    for time_ in range(0, until, MINUTE):
        history.add(time_, (60, 60 * 500, 0, 0, 0, 0), retention)
        history.last = time_
    return pack_history(history)


def ordinary(world: World, retention: Retention) -> tuple[str, int]:
    """The key of the entity whose history is of the middle size, and its bytes."""
    log = LogTable(world.past, world.settings.contract, retention)
    sizes = {key: len(packed) for part in log_histories(log) for key, packed in part.items()}
    key = sorted(sizes, key=lambda one: (sizes[one], one))[len(sizes) // 2]
    return key, sizes[key]


def read_row(place: str, store: LoadableStore, world: World, calls: int) -> Row:
    """A busy entity's history beside an ordinary one's, from the same store, in turns."""
    retention = retention_of(world.settings.contract)
    live_through(store, world.past, world.settings.contract)
    packed, (usual, size) = busiest(int(world.past["time"][-1].as_py()), retention), ordinary(world, retention)
    store.load({"account:busy": packed}, {}, (), frozenset(), "busy")
    kept: dict[str, list[int]] = {"account:busy": [], usual: []}
    for _ in range(calls):
        for key, spent in kept.items():
            spent += [nanoseconds for nanoseconds, _ in timed(lambda key: store.read([key], [], []), [key])]
    busy, other = spread(kept["account:busy"]), spread(kept[usual])
    what = f"store read, a payment every second ({len(packed):,} bytes); {place}"
    label = f"the same, an ordinary entity ({size:,} bytes)"
    return Row(what, busy, label, other, "<= 1.50", busy["p50"] <= 1.5 * other["p50"])


def store_reads(world: World, plan: Plan, redis_url: str) -> list[Row]:
    """What a read costs where an entity is busy. DynamoDB is an emulator in Python on this machine."""
    say("store reads")
    retention, url = retention_of(world.settings.contract), f"{redis_url.rsplit('/', 1)[0]}/3"
    calls = 10 * plan.slow_calls
    rows = [read_row("memory store", MemoryStore(retention), world, calls)]
    rows.append(read_row("Redis store", open_store(url, retention, 5), world, calls))
    with servers.moto(world.root) as aws, mock.patch.dict(os.environ, aws):
        create_table("reads")
        few = replace(world, past=world.past.slice(len(world.past) - 300))  # the emulator takes a while for each
        rows.append(read_row("DynamoDB store (moto)", open_store("dynamodb://reads", retention, 5), few, calls // 4))
    return rows


# HTTP.


def clean(**more: str) -> dict[str, str]:
    """This environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FRAUD_")} | more


def pinned(cpu: int, *command: str) -> list[str]:
    """The command on one core, so that server and client do not push each other around; where there is one core only,
    as it is.
    """
    cores = sorted(os.sched_getaffinity(0))
    return [*(["taskset", "-c", str(cores[cpu])] if len(cores) > 1 else []), *command]


@dataclass
class Endpoint:
    """A server that runs, and how much of the stream it has had."""

    port: int
    process: psutil.Process
    sent: int = 0
    run: str = "h"  # begins the ids of its payments

    @property
    def url(self) -> str:
        return f"http://{servers.HOST}:{self.port}"

    def cpu(self) -> float:
        """Seconds that it has computed."""
        times = self.process.cpu_times()
        return times.user + times.system


def service_environ(world: World, **more: str) -> dict[str, str]:
    """Variables of the service, with the past in its memory unless they say otherwise."""
    snapshot = world.root / f"http-{servers.free_port()}.npz"  # a copy: the service writes it when it ends
    return clean(
        **KEYS
        | {
            "PYTHONPATH": str(PROJECT),
            "FRAUD_ROOT": str(world.root),
            "FRAUD_SERVE_BUNDLE": str(world.bundle),
            "FRAUD_CASES_URL": "",
            "FRAUD_SERVE_FILL": "no",
            "FRAUD_SET": json.dumps(DECLARED[world.name]),
            "FRAUD_STORE_URL": f"memory://{shutil.copy(world.snapshot, snapshot)}",
        }
        | more
    )


@contextlib.contextmanager
def endpoint(
    name: str, command: Sequence[str], port: int, world: World, environ: dict[str, str], pin: bool = True
) -> Iterator[Endpoint]:
    """A server of one worker, kept to the first processor unless `pin` says no."""
    whole = [sys.executable, *command]
    started = servers.running(
        pinned(0, *whole) if pin else whole,
        servers.answers(port),
        world.root / f"{name}.log",
        seconds=60,
        env=environ,
    )
    with started as process:
        yield Endpoint(port, psutil.Process(process.pid))


@contextlib.contextmanager
def our_service(world: World, name: str = "ours", pin: bool = True, **more: str) -> Iterator[Endpoint]:
    port = servers.free_port()
    environ = service_environ(world, FRAUD_SERVE_PORT=str(port), **more)
    with endpoint(name, ["-m", "fraud_pkg.serve.server"], port, world, environ, pin) as found:
        yield found


@contextlib.contextmanager
def endpoints(world: World) -> Iterator[dict[str, Endpoint]]:
    """Our service and the peers, each a process with one worker."""
    with contextlib.ExitStack() as stack:
        found = {"ours": stack.enter_context(our_service(world))}
        for name in ("constant", "typed", "sklearn"):
            port = servers.free_port()
            command = [str(HERE / "peers.py"), name, str(port), str(world.pipeline)]
            found[name] = stack.enter_context(endpoint(name, command, port, world, clean(PYTHONPATH=str(PROJECT))))
        yield found


def as_lines(world: World) -> str:
    """The stream as `load.lua` reads it: the time, and the rest of a request without its id."""
    return "".join(
        f"{row['time']}\t{json.dumps({name: row[name] for name in row if name != 'time'})[1:]}\n"
        for row in world.stream
    )


def load(endpoint: Endpoint, lines: Path, connections: int, seconds: int) -> dict[str, float]:
    """As many requests as `connections` can make that wait for their answers."""
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(HERE / "load.lua")]
    command = ["wrk", *options, endpoint.url, "--", str(lines), str(endpoint.sent), KEY, endpoint.run]
    return figures_of(endpoint, command, connections)


def steady(endpoint: Endpoint, lines: Path, rate: float, seconds: int) -> dict[str, float]:
    """So many requests a second, whether or not those before were answered."""
    arguments = [endpoint.url, str(lines), str(endpoint.sent), KEY, endpoint.run, f"{rate:.0f}", str(seconds), "32"]
    return figures_of(endpoint, [sys.executable, str(HERE / "paced.py"), *arguments], 0)


def figures_of(endpoint: Endpoint, command: list[str], in_flight: int) -> dict[str, float]:
    """Requests per second, median and 99th percentile in microseconds, processor time of one, while a client on the
    last processor runs; raises `FraudError` unless all are answered with 200.
    """
    before = endpoint.cpu()
    done = subprocess.run(pinned(-1, *command), capture_output=True, text=True)
    if done.returncode:
        raise FraudError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["failed"]:
        raise FraudError(f"{found['failed']} of {found['requests']} requests to port {endpoint.port} failed")
    endpoint.sent += found["requests"] + in_flight  # those in flight at the end were sent too
    return {
        "per_second": found["requests"] / found["seconds"],
        "p50": found["p50"],
        "p99": found["p99"],
        "cpu": (endpoint.cpu() - before) / found["requests"] * 1e6,
    }


def turn(endpoint: Endpoint, lines: Path, connections: int, seconds: int) -> dict[str, float]:
    """`load` after a second that does not count: while others had their turn, the processor's caches forgot this
    one.
    """
    load(endpoint, lines, connections, 1)
    return load(endpoint, lines, connections, seconds)


def alerts(port: int) -> float:
    """The share of alerts among a service's decisions so far."""
    asked = urllib.request.Request(f"http://{servers.HOST}:{port}/metrics", headers=HEADERS)
    with urllib.request.urlopen(asked) as response:
        counts = {
            kind: float(count)
            for kind, count in re.findall(r'fraud_decisions_total{decision="(\w+)"} (\S+)', response.read().decode())
        }
    return 1 - counts["allow"] / sum(counts.values())


def over_http(world: World, plan: Plan) -> list[Row]:
    """The twin and its peers under the same load, in turns."""
    lines = world.root / "stream.txt"
    lines.write_text(as_lines(world), encoding="utf-8")
    labels = {
        "constant": "FastAPI, a constant",
        "typed": "FastAPI, a constant, request and answer typed",
        "sklearn": "scikit-learn pipeline behind FastAPI",
    }
    rows = []
    with endpoints(world) as found:
        for connections in (1, 32):
            what = f"HTTP, {connections} connection{'s' * (connections > 1)}"
            say(what)
            rounds = [
                {name: turn(endpoint, lines, connections, plan.seconds) for name, endpoint in found.items()}
                for _ in range(plan.rounds)
            ]
            figures = {name: middle([one[name] for one in rounds]) for name in found}
            ours = figures.pop("ours")
            least = 0.45 if connections == 1 else 0.6
            reached = ours["per_second"] >= least * figures["typed"]["per_second"]
            rows += [
                Row(what, ours, labels[name], figure, *((f">= {least:.2f}", reached) if name == "typed" else ()))
                for name, figure in figures.items()
            ]
        half = ours["per_second"] / 2
        say(f"HTTP, half of that: {half:,.0f}/s")
        late = middle([steady(found["ours"], lines, half, 2 * plan.seconds) for _ in range(plan.rounds)])
        what = "HTTP, at half the rate of 32 connections, from when it was due"
        rows.append(Row(what, late, aim="p99 < 5 ms", met=late["p99"] < 5_000))
        say(f"  {found['ours'].sent:,} decisions, {alerts(found['ours'].port):.0%} of them alerts")
    return rows


# Lambda.


def event(row: dict, run: str) -> dict:
    """A transaction as API Gateway passes it on."""
    return lambda_runtime.event(
        "POST",
        "/predict",
        {"Content-Type": "application/json", "X-API-Key": KEY},
        json.dumps({"transaction_id": run, **row}).encode(),
    )


@contextlib.contextmanager
def instance(folder: Path, environ: dict[str, str]) -> Iterator[lambda_runtime.Function]:
    """A running instance of a function; raises `FraudError` with its last words when it does not answer."""
    log = folder / "instance.log"
    try:
        with lambda_runtime.instance(folder, environ, log) as function:
            function.server.handle_error = lambda *_: None  # an instance that is stopped resets its connection
            yield function
    except queue.Empty:
        raise FraudError(
            f"no answer from the function; it said: {(log.read_text().splitlines() or ['nothing'])[-1][:300]}"
        ) from None


def answered(function: lambda_runtime.Function, row: dict, run: str) -> dict:
    """A function's answer to a transaction; raises `FraudError` for any other than 200."""
    answer = function.invoke(event(row, run))
    if answer.get("statusCode") != 200:
        raise FraudError(f"expected a decision from the function; got {json.dumps(answer)[:300]}")
    return answer


def packed(world: World) -> Path:
    """The package of stage dev, unpacked, and beside it what Lambda's runtime provides."""
    from fraud_pkg.serve.lambda_package import package

    say("packing the Lambda")
    project = world.root / "project"
    shutil.copytree(
        PROJECT / "chalice_app",
        project / "chalice_app",
        ignore=shutil.ignore_patterns("vendor", "deployments", "deployed", "__pycache__"),
    )
    shutil.copytree(world.bundle, project / "models/champion")
    settings = load_settings(cli={}, file=shutil.copy(PROJECT / "settings.ini", project), environ={})
    with mock.patch.dict(os.environ, servers.AWS):  # chalice wants a region, though nothing goes there
        zipped = package(settings, "dev", world.root / "package")
    return lambda_runtime.unpack(zipped, world.root / "lambda")


def function_of(peer: str, world: World, provided: Path) -> Path:
    """The same for a handler of peers.py, which may use this environment's packages."""
    folder = world.root / f"lambda-{peer}"
    (folder / "task").mkdir(parents=True)
    shutil.copy(HERE / "peers.py", folder / "task")
    (folder / "task/app.py").write_text(
        f"import sys\n\nsys.path.append({str(Path(np.__file__).parents[1])!r})\nfrom peers import {peer} as app\n",
        encoding="utf-8",
    )
    (folder / "provided").symlink_to(provided)
    return folder


def with_clock(folder: Path) -> Path:
    """The function with a handler around its own one that tells how long that took."""
    task = folder / "task"
    (task / "app.py").rename(task / "inner.py")
    shutil.copy(HERE / "peers.py", task)
    (task / "app.py").write_text("from peers import timed as app\n", encoding="utf-8")
    return folder


def cold_start(folder: Path, environ: dict[str, str], row: dict) -> float:
    """Milliseconds from the start of the process to its first answer; the event waits for it."""
    began = time.perf_counter()
    with instance(folder, environ) as function:
        answered(function, row, "cold")
        return (time.perf_counter() - began) * 1000


def warm(function: lambda_runtime.Function, piece: list[dict], run: str) -> list[tuple[dict, int]]:
    """What each invocation answered, and the nanoseconds that its handler took."""
    answers = [answered(function, row, f"{run}-{i}") for i, row in enumerate(piece)]
    return [(json.loads(answer["body"]), int(answer["headers"]["Nanoseconds"])) for answer in answers]


def cold_rows(folders: dict[str, Path], environ: dict[str, str], world: World, plan: Plan) -> list[Row]:
    say("Lambda, cold starts")
    found = {name: [] for name in folders}
    for _ in range(plan.starts):
        for name, folder in folders.items():
            found[name].append(cold_start(folder, environ, world.stream[0]))
    figures = {name: {"p50_ms": median(times), "worst_ms": max(times)} for name, times in found.items()}
    return [
        Row(
            "Lambda, cold start",
            figures["ours"],
            "a handler that returns a constant",
            figures["constant"],
            "< 250 ms",
            figures["ours"]["p50_ms"] < 250,
        ),
        Row("Lambda, cold start", figures["ours"], "scikit-learn pipeline in a handler", figures["pipeline"]),
    ]


def warm_rows(ours: Path, peer: Path, environ: dict[str, str], world: World, plan: Plan) -> list[Row]:
    say("Lambda, warm")
    spent, theirs = {}, []
    lived = {**environ, "FRAUD_STORE_URL": f"memory://{world.snapshot}"}
    with instance(ours, lived) as function, instance(peer, lived) as other:
        for one in (function, other):
            answered(one, world.stream[0], "first")
        for number, piece in enumerate(in_turns(world.stream[1 : 1 + plan.invocations], plan.rounds)):
            for decision, nanoseconds in warm(function, piece, f"l{number}"):
                spent.setdefault(alert(decision), []).append(nanoseconds)
            theirs += [nanoseconds for _, nanoseconds in warm(other, piece[: plan.slow_calls], f"l{number}")]
    figures = {kind: spread(times) for kind, times in spent.items()}
    return [
        Row(
            f"Lambda, warm handler, {words}; memory store",
            figures[kind],
            "scikit-learn pipeline in a handler",
            spread(theirs),
            "< 250 us",
            figures[kind]["p50"] < 250,
        )
        for kind, words in (("allow", "allow"), ("alert", "alert, with reasons"))
    ]


def dynamodb_row(ours: Path, environ: dict[str, str], world: World) -> Row:
    """The same handler with the store that it is deployed with; the server is an emulator in Python on this machine, so
    this is no figure for AWS.
    """
    say("Lambda, warm, DynamoDB store on moto")
    with servers.moto(world.root) as aws:
        with mock.patch.dict(os.environ, aws):
            create_table("benchmark")
        lived = {**environ, **aws, "FRAUD_STORE_URL": "dynamodb://benchmark", "FRAUD_STORE_TIMEOUT": "5"}
        with instance(ours, lived) as function:
            answered(function, world.stream[0], "first")  # it connects
            times = spread([nanoseconds for _, nanoseconds in warm(function, world.stream[1:101], "d")])
    return Row("Lambda, warm handler; DynamoDB store", times, "(moto on this machine: an emulator, not AWS)")


def in_lambda(world: World, plan: Plan) -> list[Row]:
    """The package as it is deployed, driven by AWS' own runtime client."""
    ours = packed(world)
    peer = {name: function_of(name, world, ours / "provided") for name in ("constant", "pipeline")}
    environ = {
        **KEYS,
        "FRAUD_STORE_URL": "memory://",
        "FRAUD_SERVE_RELOAD_SECONDS": "60",
        "PEER_MODEL": str(world.pipeline),
        "OMP_NUM_THREADS": "1",
    }
    cold = cold_rows({"ours": ours, **peer}, environ, world, plan)
    ours, pipeline = with_clock(ours), with_clock(peer["pipeline"])
    return [*cold, *warm_rows(ours, pipeline, environ, world, plan), dynamodb_row(ours, environ, world)]


# The table.


def text(figures: dict[str, float] | None) -> str:
    """Figures for people."""
    if not figures:
        return ""
    if "per_second" in figures:
        rate, cpu = f"{figures['per_second']:8,.0f}/s", f"cpu {figures['cpu']:,.0f} us"
        return f"{rate}  p50 {figures['p50'] / 1000:6.2f} ms  p99 {figures['p99'] / 1000:6.2f} ms  {cpu}"
    if "p50_ms" in figures:
        return f"{figures['p50_ms']:8,.0f} ms  worst {figures['worst_ms']:,.0f} ms"
    return f"{figures['p50']:8,.0f} us  p99 {figures['p99']:,.0f} us"


def table(rows: list[Row], source: str) -> dict:
    """Ours and the peer's side by side."""
    head = ("what", "ours", "peer", "peer's", "ours / peer", "aim")
    verdict = {None: "", True: "met", False: "MISSED"}
    lines = [
        [
            row.what,
            text(row.ours),
            row.peer,
            text(row.theirs),
            f"{row.ratio:.2f}" if row.theirs else "",
            f"{row.aim} {verdict[row.met]}".strip(),
        ]
        for row in rows
    ]
    return {"title": "Decisions", "note": f"Models: {source}.", "columns": list(head), "rows": lines}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything, about a minute: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures there too")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FOLDER",
        help="the model; otherwise models/champion, or one trained here when there is none",
    )
    parser.add_argument("--only", choices=PARTS, help="one part of the table")
    return parser.parse_args()


def needed(parts: Iterable[str]) -> None:
    """Ends with one line when a program is missing."""
    for part, program, package in (
        ("process", "redis-server", "redis-server"),
        ("http", "wrk", "wrk"),
        ("http", "taskset", "util-linux"),
    ):
        if part in parts and not shutil.which(program):
            sys.exit(f"error: {program} is not installed: sudo apt-get install {package}")


def measure(part: str, worlds: dict[str, World], plan: Plan) -> list[Row]:
    """The rows of a part."""
    if part == "http":
        return over_http(worlds[PAYSIM], plan)
    if part == "lambda":
        return in_lambda(worlds[PAYSIM], plan)
    with servers.redis(worlds[PAYSIM].root) as url:
        return [*both_contracts(worlds, plan, url), *store_reads(worlds[PAYSIM], plan, url)]


def main() -> None:
    given = arguments()
    parts = [given.only] if given.only else PARTS
    needed(parts)
    champion, plan = PROJECT / "models/champion", QUICK if given.quick else FULL
    bundle = given.bundle.resolve() if given.bundle else champion if champion.is_dir() else None
    began, found, rows, failed = time.monotonic(), machine(), [], []
    with tempfile.TemporaryDirectory() as root:
        try:
            names = list(DECLARED) if "process" in parts else [PAYSIM]
            worlds = {name: prepare(Path(root) / str(i), plan, bundle, name) for i, name in enumerate(names)}
        except FraudError as error:
            sys.exit(f"error: {error}")
        for part in parts:  # what one part cannot do does not cost the others' figures
            try:
                rows += measure(part, worlds, plan)
            except FraudError as error:
                failed.append(f"error: {part}: {error}")
    say(f"took {time.monotonic() - began:.0f} s")
    write_json(given.json, found, [table(rows, "; ".join(world.source for world in worlds.values()))])
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
