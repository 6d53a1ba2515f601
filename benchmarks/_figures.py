"""What the benchmarks share: repeated timing, and figures as JSON lines that name machine and commit."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Timing(NamedTuple):
    """Times of several runs, in seconds."""

    median: float  # wall
    low: float  # first quartile
    high: float  # third quartile
    cpu: float  # least processor time of a run: what remains when others use the machine as well


def repeat(run: Callable[[], object], runs: int = 7) -> Timing:
    """Time a function, after one run that is not counted."""
    run()
    walls, cpus = [], []
    for _ in range(max(runs, 2)):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    low, median, high = statistics.quantiles(walls, n=4, method="inclusive")
    return Timing(median, low, high, min(cpus))


def machine() -> str:
    """The processor and how many cores of it there are."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def commit() -> str | None:
    """The commit measured; None outside a checkout."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def figure(
    name: str,
    value: float,
    unit: str,
    rival: float | None = None,
    spread: tuple[float, float] | None = None,
    **extra: object,
) -> None:
    """Print one JSON line; `ratio` is value / rival, `spread` the quartiles of the value."""
    line = {
        "name": name,
        "value": value,
        "unit": unit,
        "rival": rival,
        "ratio": value / rival if rival else None,
        "spread": spread,
        "machine": machine(),
        "commit": commit(),
    }
    print(json.dumps(line | extra), flush=True)
