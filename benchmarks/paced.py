"""Requests at a steady rate, whether or not those before were answered: `python paced.py URL LINES BEGIN KEY RUN RATE
SECONDS CONNECTIONS`. Prints how long each took from the moment when it was due, which a client that waits for answers
would not see.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

HEAD = (
    "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-API-Key: {key}\r\n"
    "Content-Length: {size}\r\n\r\n{body}"
)


def requests(lines: list[tuple[int, str]], sent: int, key: str, run: str) -> Iterator[bytes]:
    """As `load.lua` makes them."""
    period = lines[-1][0] - lines[0][0] + 1
    while True:
        time_, rest = lines[sent % len(lines)]
        at, sent = time_ + sent // len(lines) * period, sent + 1
        body = f'{{"transaction_id":"{run}-{sent}","time":{at},{rest}'
        yield HEAD.format(key=key, size=len(body.encode()), body=body).encode()


async def answer(reader: asyncio.StreamReader) -> int:
    """The status of one, whose body is read to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    await reader.readexactly(size)
    return int(head.split()[1])


async def paced(url: str, made: Iterator[bytes], rate: float, seconds: float, connections: int) -> dict[str, float]:
    place = urlsplit(url)
    waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    spent: list[float] = []
    failed = 0

    async def client() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        while True:
            due, request = await waiting.get()
            writer.write(request)
            failed += await answer(reader) != 200
            spent.append(time.perf_counter() - due)
            waiting.task_done()

    clients = [asyncio.create_task(client()) for _ in range(connections)]
    began = time.perf_counter()
    for number in range(int(rate * seconds)):
        due = began + number / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        waiting.put_nowait((due, next(made)))
    await waiting.join()
    took = time.perf_counter() - began
    for one in clients:
        one.cancel()
    p50, p99 = np.percentile(spent, [50, 99]) * 1e6
    return {"requests": len(spent), "seconds": took, "p50": p50, "p99": p99, "failed": failed}


def main(url: str, lines: str, begin: str, key: str, run: str, rate: str, seconds: str, connections: str) -> None:
    rows = [line.split("\t", 1) for line in Path(lines).read_text(encoding="utf-8").splitlines()]
    made = requests([(int(at), rest) for at, rest in rows], int(begin), key, run)
    print(json.dumps(asyncio.run(paced(url, made, float(rate), float(seconds), int(connections)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
