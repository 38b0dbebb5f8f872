"""A DynamoDB that keeps to the rules which are documented for it, in virtual time: so many processes at once, and the
same result each time, however busy the machine is.

- A transaction holds its items while it is worked on; another one that wants one of them is cancelled at once
  (TransactionConflict), and so is a single write.
- A condition that does not hold cancels it (ConditionalCheckFailed).
- A key takes 1,000 write units and gives 3,000 read units a second; a transactional write takes two for each kB that
  has begun, a consistent read one for each 4 kB. Beyond that writes are refused (ThrottlingError), reads left undone
  (UnprocessedKeys). What is spared is not saved up: DynamoDB promises no bursts.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from botocore.exceptions import ClientError
from greenlet import getcurrent, greenlet

WRITE_UNITS, READ_UNITS = 1000, 3000  # a second
READ_SECONDS, WRITE_SECONDS = 0.004, 0.010


class Clock:
    """Virtual time: who sleeps lets others work, and time is when the next one wakes up."""

    def __init__(self):
        self.now = 0.0
        self._waiting: list[tuple[float, int, greenlet]] = []
        self._numbers = itertools.count()
        self._hub = getcurrent()

    def sleep(self, seconds: float) -> None:
        self._wake(self.now + seconds, getcurrent())
        self._hub.switch()

    def _wake(self, moment: float, who: greenlet) -> None:
        heapq.heappush(self._waiting, (moment, next(self._numbers), who))

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """All of them at once, until the last is done."""
        for task in tasks:
            self._wake(self.now, greenlet(task, self._hub))
        while self._waiting:
            self.now, _, who = heapq.heappop(self._waiting)
            who.switch()

    @property
    def module(self) -> SimpleNamespace:
        """In the place of the module `time`."""
        return SimpleNamespace(sleep=self.sleep, monotonic=lambda: self.now, time=lambda: 1.8e9 + self.now)


class Budget:
    """Units of one key that are left of this second."""

    def __init__(self, clock: Clock, a_second: int):
        self._clock, self._a_second, self._left, self._at = clock, a_second, float(a_second), 0.0

    def take(self, units: int) -> bool:
        added = (self._clock.now - self._at) * self._a_second
        self._left, self._at = min(self._a_second, self._left + added), self._clock.now
        if units > self._left:
            return False
        self._left -= units
        return True


class TransactionCanceledException(ClientError):
    """As the client library calls it."""


def refused(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": ""}}, "UpdateItem")


def size_of(attributes: Mapping[str, Any]) -> int:
    values = [value for typed in attributes.values() for value in typed.values()]
    return sum(map(len, attributes)) + sum(len(value) if isinstance(value, (str, bytes)) else 1 for value in values)


class Table:
    """What a client of one table has of a boto3 client."""

    exceptions = SimpleNamespace(TransactionCanceledException=TransactionCanceledException)

    def __init__(self, clock: Clock):
        self.clock, self.items = clock, dict[str, dict]()
        self.reasons = dict[str, int]()
        self._held = set[str]()
        self._writes, self._reads = dict[str, Budget](), dict[str, Budget]()

    def batch_get_item(self, RequestItems: dict) -> dict:
        ((table, wanted),) = RequestItems.items()
        self.clock.sleep(READ_SECONDS)
        found, undone = [], []
        for key in wanted["Keys"]:
            name = key["key"]["S"]
            item = self.items.get(name)
            units = max(1, -(-size_of(item or {}) // 4096))
            if not self._reads.setdefault(name, Budget(self.clock, READ_UNITS)).take(units):
                undone.append(key)
            elif item:
                found.append(dict(item))
        more = {table: wanted | {"Keys": undone}} if undone else {}
        return {"Responses": {table: found}, "UnprocessedKeys": more}

    def _reason(self, action: Mapping) -> str:
        ((_, content),) = action.items()
        name = self._name(content)
        if name in self._held:
            return "TransactionConflict"
        if not self._holds(content, self.items.get(name, {})):
            return "ConditionalCheckFailed"
        units = 2 * -(-size_of(content.get("Item") or self.items.get(name, {"key": {"S": name}})) // 1024)
        return "None" if self._units(name).take(units) else "ThrottlingError"

    def _units(self, name: str) -> Budget:
        return self._writes.setdefault(name, Budget(self.clock, WRITE_UNITS))

    @staticmethod
    def _name(content: Mapping) -> str:
        return (content.get("Key") or content["Item"])["key"]["S"]

    @staticmethod
    def _holds(content: Mapping, item: Mapping) -> bool:
        """The conditions that the store uses, and no other."""
        condition, values = content.get("ConditionExpression"), content.get("ExpressionAttributeValues", {})
        holds = {
            None: lambda: True,
            "attribute_not_exists(#k)": lambda: not item,
            "attribute_exists(#k)": lambda: bool(item),
            "version = :v": lambda: item.get("version") == values[":v"],
            "attribute_not_exists(newest) OR newest < :t": lambda: (
                "newest" not in item or int(item["newest"]["N"]) < int(values[":t"]["N"])
            ),
        }
        return holds[condition]()

    def _apply(self, content: Mapping) -> None:
        name, values = self._name(content), content.get("ExpressionAttributeValues", {})
        if "Item" in content:
            self.items[name] = dict(content["Item"])
            return
        item = self.items.setdefault(name, {"key": {"S": name}})
        word = field = ""
        for part in content["UpdateExpression"].replace(",", " ").replace("=", " ").split():
            if part in ("SET", "ADD", "REMOVE"):
                word = part
            elif word == "REMOVE":
                item.pop(part, None)
            elif not part.startswith(":"):
                field = part
            elif word == "SET":
                item[field] = values[part]
            else:
                item[field] = {"N": str(int(item.get(field, {"N": "0"})["N"]) + int(values[part]["N"]))}

    def transact_write_items(self, TransactItems: list[dict]) -> dict:
        reasons = [self._reason(action) for action in TransactItems]
        for reason in reasons:
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if set(reasons) != {"None"}:
            self.clock.sleep(READ_SECONDS)
            codes = [{"Code": reason} for reason in reasons]
            raise TransactionCanceledException({"CancellationReasons": codes}, "TransactWriteItems")
        contents = [content for action in TransactItems for content in action.values()]
        names = {self._name(content) for content in contents}
        self._held |= names
        self.clock.sleep(WRITE_SECONDS)
        for content in contents:
            self._apply(content)
        self._held -= names
        return {}

    def update_item(self, **content: Any) -> dict:
        name = self._name(content)
        if name in self._held:
            raise refused("TransactionConflictException")
        if not self._holds(content, self.items.get(name, {})):
            raise refused("ConditionalCheckFailedException")
        if not self._units(name).take(-(-size_of(self.items.get(name, {"key": {"S": name}})) // 1024)):
            raise refused("ThrottlingException")
        self._apply(content)
        self.clock.sleep(READ_SECONDS)
        return {}
