"""A program's time and the peak of its memory, with all that it starts (the JVM, Python workers); machine and load in
words.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil


@dataclass(frozen=True)
class Measured:
    """One run of a program."""

    seconds: float  # from the start of the process to its end
    cpu: float  # seconds of all cores, its descendants' too: what remains comparable where others want the machine
    peak: float  # GiB, the largest sum of what it and its descendants had in memory
    printed: str  # its last line


def looked_at(process: psutil.Process, cpu: dict[int, float]) -> int:
    """Bytes of a process and its descendants, whose seconds go into `cpu`. Pages that forked workers share count once
    for each.
    """
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            with one.oneshot():
                total += one.memory_info().rss
                cpu[one.pid] = sum(one.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


def measured(command: Sequence[str], environ: dict[str, str] | None = None, every: float = 0.05) -> Measured:
    """Runs a program to its end; raises `RuntimeError` with what it said when that is not 0."""
    began, peak, cpu = time.perf_counter(), 0, {}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(every):
            try:
                peak = max(peak, looked_at(psutil.Process(process.pid), cpu))
            except psutil.NoSuchProcess:
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed, said = process.communicate()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said[-3000:]}")
    return Measured(seconds, sum(cpu.values()), peak / 2**30, printed.strip().rpartition("\n")[2])


def summary(runs: Sequence[Measured]) -> dict[str, float]:
    """Median, least and largest seconds, median cpu, and the largest peak."""
    seconds = [run.seconds for run in runs]
    return {
        "seconds": median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "cpu": median(run.cpu for run in runs),
        "peak": max(run.peak for run in runs),
    }


def write_json(place: Path | None, began: dict, tables: list[dict]) -> None:
    """Prints tables as Markdown; writes them with the machine where a place is given."""
    for one in tables:
        print(markdown(one), end="\n\n")
    if place:
        place.write_text(json.dumps({"machine": began, "tables": tables}, indent=1) + "\n", encoding="utf-8")


def markdown(table: dict) -> str:
    """A table of results as Markdown."""
    lines = [table["columns"], ["---"] * len(table["columns"]), *table["rows"]]
    return "\n".join(
        [f"**{table['title']}**", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines), "", table["note"]]
    )


def processor() -> str:
    """The processor as Linux calls it."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict:
    """What figures depend on; `load` is that of the minute before, so anything above 0.5 was somebody else."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(terse=True),
        "python": sys.version.split()[0],
        "load": round(os.getloadavg()[0], 1),
    }


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)
