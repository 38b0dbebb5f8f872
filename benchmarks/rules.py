"""What fifty rules with ten list look-ups add to a decision, beside `eval` of the same in Python and cel-python."""

import argparse
import sys
from pathlib import Path
from statistics import median
from time import process_time

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))

from measure import machine, say, write_json  # noqa: E402

from fraud_pkg.core.rules import Rule, RuleSet, ask_rules  # noqa: E402
from fraud_pkg.core.settings import Settings  # noqa: E402
from fraud_pkg.features.payment import Payment  # noqa: E402
from fraud_pkg.serve.rules import Book, Rulings  # noqa: E402
from fraud_pkg.store.lists import Entry, Held, ListData, Lists  # noqa: E402

RULES, LOOKUPS, LIST_SIZE = 50, 10, 10_000
FEATURES = (
    "sender_out_count_1h",
    "sender_out_sum_24h",
    "receiver_in_count_24h",
    "receiver_in_mean_7d",
    "sender_balance",
)


def fifty_rules() -> list[Rule]:
    """None of them matches, so that all are asked; every fifth asks a list too."""
    rules = []
    for i in range(RULES):
        feature, other = FEATURES[i % len(FEATURES)], FEATURES[(i + 1) % len(FEATURES)]
        text = f'type == "TRANSFER" && amount > {5000 + i}.0 && ({feature} > {100 + i}.0 || {other} > {900 + i}.0)'
        if i % (RULES // LOOKUPS) == 0:
            text = f"{'receiver' if i % 2 else 'sender'} in lists.list_{i // (RULES // LOOKUPS)} || {text}"
        rules.append(Rule(name=f"rule_{i}", action="review", expression=text))
    return rules


def ten_lists() -> Lists:
    """Lists of ten thousand accounts each."""
    return Lists(
        {
            f"list_{n}": ListData("account", {f"X{n}_{i}": Entry(until=4e9) for i in range(LIST_SIZE)})
            for n in range(LOOKUPS)
        }
    )


def payment_of(number: int) -> Payment:
    return Payment(
        f"t{number}",
        1_700_000_000 + number,
        1_250_000,
        {"sender": f"C{number}", "receiver": f"D{number}", "type": "TRANSFER"},
        sender_balance=20.0,
    )


def microseconds(decide, payments: int, rounds: int) -> list[float]:
    """Of the processor, for one decision, in each round: others may want the machine meanwhile."""
    found = []
    for _ in range(rounds):
        began = process_time()
        for number in range(payments):
            decide(number)
        found.append((process_time() - began) / payments * 1e6)
    return found


def as_python(text: str) -> str:
    """The same expression for `eval`."""
    words = text.replace("&&", " and ").replace("||", " or ")
    for n in range(LOOKUPS):
        words = words.replace(f"lists.list_{n} ", f"list_{n} ")
    return words


def with_eval(rules: list[Rule], lists: Lists):
    """Compiled Python, each rule by itself as here: fast, and able to do anything that Python can."""
    programs = [compile(as_python(rule.expression), rule.name, "eval") for rule in rules]
    sets = {name: set(data.entries) for name, data in lists.lists.items()}

    def decide(values: dict) -> list[bool]:
        names = sets | values
        found = []
        for program in programs:
            try:
                found.append(bool(eval(program, {"__builtins__": {}}, names)))  # noqa: S307
            except Exception:  # noqa: BLE001
                found.append(False)
        return found

    return decide


def with_cel_python(rules: list[Rule], lists: Lists):
    """The CEL implementation in pure Python."""
    import celpy
    from celpy import celtypes

    environment = celpy.Environment()
    programs = [environment.program(environment.compile(rule.expression)) for rule in rules]
    as_map = {
        celtypes.StringType(name): celtypes.MapType(
            {celtypes.StringType(value): celtypes.BoolType(True) for value in data.entries}
        )
        for name, data in lists.lists.items()
    }
    known = celtypes.MapType(as_map)

    def decide(values: dict) -> list[bool]:
        activation = {name: celpy.json_to_cel(value) for name, value in values.items()} | {"lists": known}
        return [bool(program.evaluate(activation)) for program in programs]

    return decide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    began = machine()
    payments, rounds = (200, 3) if arguments.quick else (2000, 15)
    rules, lists, contract = fifty_rules(), ten_lists(), Settings().contract
    asked = Rulings(Book(RuleSet(rules), Held(1, lists, "", "")), contract, None)
    names, features = asked.values.features, [1.5] * len(asked.values.features)
    examples = [payment_of(number) for number in range(payments)]
    values = [
        {name: asked.values.of(payment, features, 0.2)[name] for name in asked.book.rules.names} for payment in examples
    ]
    assert not any(ask_rules(asked.book.rules, one, lists, 1.7e9).failed for one in values[:10]), names
    python, cel_python = with_eval(rules, lists), with_cel_python(rules, lists)
    assert not any(python(values[0])) and not any(cel_python(values[0]))
    ways = {
        "here: values, look-ups, 50 rules": lambda i: asked.of([examples[i]], [features], [0.2]),
        "eval of the same in Python": lambda i: python(values[i]),
        "cel-python": lambda i: cel_python(values[i]),
    }
    rows = []
    for name, decide in ways.items():
        few = 20 if name == "cel-python" else payments
        found = microseconds(decide, few, 3 if name == "cel-python" else rounds)
        rows.append([name, f"{median(found):.1f}", f"{min(found):.1f} to {max(found):.1f}"])
        say(f"{name}: {rows[-1][1]} us ({rows[-1][2]})")
    table = {
        "title": f"{RULES} rules with {LOOKUPS} look-ups in lists of {LIST_SIZE:,}: what they add to a decision",
        "columns": ["", "us a decision (median of rounds)", "lowest to highest"],
        "rows": rows,
        "note": "None matches, so all are asked. Processor time; eval and cel-python get the values ready made.",
    }
    write_json(arguments.json, began, [table])


if __name__ == "__main__":
    main()
