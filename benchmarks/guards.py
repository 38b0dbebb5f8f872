"""What signature, rights and limits cost a decision in process: with all of them and with none, in turns.

    python benchmarks/guards.py [--decisions 10000] [--bundle models/champion]

Prints the median processor time of a decision with all and with none, which take turns, one decision each. With all:
a signed bundle whose signature was verified, fifty keys kept as hashes, the right to decide, a bucket for the key and
one for the address behind a proxy. With none: the decision alone, by the same service and store.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from fraud_pkg.core.sections import Limits, Serve, Trust  # noqa: E402
from fraud_pkg.core.settings import Settings  # noqa: E402
from fraud_pkg.core.signatures import CHAMPION, load_signer, new_key, verifier  # noqa: E402
from fraud_pkg.model.bundle import Bundle, load_bundle, sign_bundle  # noqa: E402
from fraud_pkg.model.example import example_bundle  # noqa: E402
from fraud_pkg.serve.auth import ANYBODY, Access, Asker, Guard, parse_keys  # noqa: E402
from fraud_pkg.serve.rules import ActiveRules  # noqa: E402
from fraud_pkg.serve.scorer import Scorer  # noqa: E402
from fraud_pkg.serve.service import Answer, Service  # noqa: E402
from fraud_pkg.serve.wire import EXAMPLE  # noqa: E402
from fraud_pkg.store.limits import RequestLimits  # noqa: E402
from fraud_pkg.store.memory import MemoryStore  # noqa: E402

PATH = "/predict"
PROXY = "10.0.0.1"
Decide = Callable[[bytes], Answer]


def ways_of(bundle: Bundle) -> dict[str, Decide]:
    """One service, so that memory and caches are the same for both."""
    keys = ",".join(f"key-{number}:key-{number:02d}-0123456789abcdef" for number in range(50))
    access = Access(parse_keys(keys, "FRAUD_API_KEYS"))
    scorer = Scorer(bundle, Serve(), ActiveRules())
    service = Service(Serve(), MemoryStore(scorer.retention), access)
    service.use(scorer)
    limits = Limits(key_rate=1e9, address_rate=1e9, trusted_proxies=f"{PROXY}/32")
    guard = Guard(access, RequestLimits(limits), lambda *_: None)
    headers = {"x-api-key": "key-37-0123456789abcdef", "x-forwarded-for": "192.0.2.7"}

    def guarded(body: bytes) -> Answer:
        by = guard.admit(Asker("POST", PATH, headers, PROXY, len(body)), "decide")
        return service.answer("POST", PATH, headers, body, by)

    def bare(body: bytes) -> Answer:
        return service.answer("POST", PATH, headers, body, ANYBODY)

    return {"none": bare, "all": guarded}


def spent(decide: Decide, way: str, number: int) -> int:
    """Nanoseconds of the processor for one decision."""
    payment = EXAMPLE | {"transaction_id": f"{way}-{number}", "sender": f"C{number % 97}"}
    body = json.dumps(payment).encode()
    began = time.process_time_ns()
    answer = decide(body)
    taken = time.process_time_ns() - began
    assert answer.status == 200
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=10_000)
    parser.add_argument("--bundle", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = root / "champion"
        shutil.copytree(asked.bundle or example_bundle(root / "example").folder, folder)
        public = new_key(root / "key.pem", HERE)
        signer = load_signer({"FRAUD_SIGNING_KEY_FILE": str(root / "key.pem")})
        assert signer is not None
        sign_bundle(folder, CHAMPION, signer)
        check = verifier(Settings(trust=Trust(keys=f"prod-1:{public}")), CHAMPION)
        ways = ways_of(load_bundle(folder, verifier=check))
        times: dict[str, list[int]] = {name: [] for name in ways}
        for number in range(-500, asked.decisions):
            for way in sorted(ways, reverse=bool(number % 2)):
                taken = spent(ways[way], way, number)
                if number >= 0:  # before that, caches fill
                    times[way].append(taken)
    none, every = (statistics.median(times[way]) / 1000 for way in ("none", "all"))
    print(f"{none:.1f} us a decision with none, {every:.1f} us with all: {every / none - 1:.1%} more")


if __name__ == "__main__":
    main()
