"""Payments at a steady rate, until standard input ends; then what came of them, as JSON on standard output.

usage: python load.py HOST KEY RATE SECONDS [keep]    SECONDS at most; `keep` keeps connections

Without `keep` each payment has a connection of its own, so that each is sent to any of a Service's pods.
"""

import http.client
import json
import os
import queue
import select
import sys
import threading
import time
from collections import Counter

PAYMENT = {"step": 2000, "type": "TRANSFER", "amount": 12.5, "sender_balance": 1600.0, "receiver_balance": 0.0}
WORKERS = 16


class Client(threading.Thread):
    """Sends the payments of a queue, one after the other."""

    def __init__(self, host: str, key: str, keep: bool, work: queue.Queue):
        super().__init__()
        self.host, self.keep, self.work = host, keep, work
        self.headers = {"X-API-Key": key, "Content-Type": "application/json"}
        self.answers, self.models, self.failures = Counter(), Counter(), []
        self.connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None

    def connect(self) -> http.client.HTTPConnection:
        """A connection that the server has not closed; clients look before they send."""
        known = self.connection
        if known and known.sock and not select.select([known.sock], [], [], 0)[0]:
            return known
        self.close()
        self.connection = http.client.HTTPConnection(self.host, timeout=10)
        return self.connection

    def send(self, number: int) -> None:
        accounts = {"sender": f"C{number % 5000}", "receiver": f"C{5000 + number % 5000}"}
        body = PAYMENT | accounts | {"transaction_id": f"load-{os.getpid()}-{number}"}
        try:
            connection = self.connect()
            connection.request("POST", "/predict", json.dumps(body), self.headers)
            response = connection.getresponse()
            outcome, text = str(response.status), response.read().decode()
        except (OSError, http.client.HTTPException) as error:
            outcome, text = type(error).__name__, str(error)
            self.close()
        self.answers[outcome] += 1
        if outcome == "200":
            self.models[json.loads(text)["model"]] += 1
        else:
            self.failures.append(f"{outcome} {text[:200]}")
        if not self.keep:
            self.close()

    def run(self) -> None:
        while (number := self.work.get()) is not None:
            self.send(number)
        self.close()


def main(host: str, key: str, rate: str, seconds: str, keep: str = "") -> None:
    work: queue.Queue = queue.Queue()
    clients = [Client(host, key, bool(keep), work) for _ in range(WORKERS)]
    for client in clients:
        client.start()
    began, number = time.monotonic(), 0
    while time.monotonic() - began < float(seconds):
        due = began + number / float(rate) - time.monotonic()
        if select.select([sys.stdin], [], [], max(0.0, due))[0]:
            break
        work.put(number)
        number += 1
    for _ in clients:
        work.put(None)
    for client in clients:
        client.join()
    print(
        json.dumps(
            {
                "answers": sum((client.answers for client in clients), Counter()),
                "models": sum((client.models for client in clients), Counter()),
                "failures": [failure for client in clients for failure in client.failures],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
