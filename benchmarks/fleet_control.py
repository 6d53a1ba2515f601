"""Which policy keeps the promise on the fewest GPU-hours? Ours, the field's and fixed counts, on eight loads.

One model; a step takes 9 ms + .03 ms a token + 6e-5 ms a cached token read; at most 256 sequences, 8192 tokens a step
and 524,288 KV tokens. Promised to each request: TTFT <= 200 ms and a mean gap <= 15 ms. Every policy starts from one
replica and sees the same windows; new replicas are ready after 60, 120 or 480 s; requests go to the least loaded.
GPU-hours count starting and draining replicas. A policy *reaches* the promise with an attainment of 95 % or more.

Loads of one hour: `ramp` 2 to 16 requests/s; `step` 4, then 12; `burst` 3, and 16 for three minutes in ten; the two
Azure traces; `flat` and `sine`. `diurnal`: two days of ServeGen's 14, scaled to a peak of 16. Lengths are those of the
Azure conversation trace but for the code trace. Seed 0 of a recorded load is the recording; other seeds shift each
arrival by up to half a second and deal the lengths anew within each minute. Seeds of the others draw arrivals and
lengths, and of `diurnal` also the days.

Figures: TRACE_COLDSTART_attainment (ours), TRACE_COLDSTART_gpu_hours (ours over the best reactive baseline that reaches
the promise; null where none does) and TRACE_COLDSTART_actions (ours), each the mean over seeds with its 95 % interval.
Finished cells are kept in a folder and not run again (--fresh forgets them).
"""

from __future__ import annotations

import argparse
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from _figures import figure, machine
from flyball.adapters.simulated import SimulatedFleet, SimulatedServer, SimulatedWorld, govern
from flyball.core.fleet import Accelerator, FleetSpec, LatencyProfile, ServerSpec, ServiceClass, Targets
from flyball.core.slo import Slo
from flyball.performance.request_streams import Rates, plain, poisson_process
from flyball.performance.simulator import Law, Requests
from flyball.planner.analyzers import analyzer
from flyball.planner.loop import FleetLoop, LoopSettings, controller

DATA = Path(__file__).parent / "data"
ALPHA_S, BETA_S, GAMMA_S = 9e-3, 3e-5, 6e-8
TTFT_S, ITL_S, REACHED = 0.200, 0.015, 0.95
HOUR_S = 3600.0
DIURNAL_S = 48 * HOUR_S
PEAK_RPS = 16.0
COLD_STARTS = (60, 120, 480)
RECORDED = {"flat": "flat", "sine": "sine", "azure_conv": "azure_conv", "azure_code": "azure_code"}
TRACES = ("flat", "sine", "ramp", "step", "burst", "azure_conv", "azure_code", "diurnal")
BASELINES = ("hpa", "kpa", "saturation-v1", "saturation-v2", "skyserve", "inferno")
OURS = "flyball"
FIXED = "fixed-"  # and the count
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Cell(NamedTuple):
    """One run."""

    trace: str
    cold_start_s: int
    policy: str
    seed: int


class Outcome(NamedTuple):
    """What came of it."""

    attainment: float
    gpu_hours: float
    actions: int
    turns: int  # changes of direction
    cpu_s: float


@functools.cache
def rows(name: str) -> np.ndarray[Any, Any]:
    """A recorded load: arrival_s, input, output."""
    with gzip.open(DATA / f"{name}.csv.gz", "rt") as file:
        return np.array([[float(v) for v in row] for row in list(csv.reader(file))[1:]])


def lengths() -> list[tuple[int, int]]:
    """Of the Azure conversation trace."""
    return [(int(i), int(o)) for _, i, o in rows("azure_conv")]


def recorded(name: str, seed: int) -> Iterator[Requests]:
    """A recorded load, or a variation on it."""
    table = rows(name)
    arrivals, pairs = table[:, 0], table[:, 1:].astype(np.int32)
    if seed:
        rng = np.random.default_rng(seed)
        minutes = (arrivals // 60).astype(int)
        order = np.lexsort((rng.random(len(arrivals)), minutes))  # arrivals are sorted: positions stay, lengths move
        pairs = pairs[order]
        arrivals = np.sort(np.clip(arrivals + rng.uniform(-0.5, 0.5, len(arrivals)), 0, None))
    yield plain(arrivals, pairs[:, 0], pairs[:, 1])


def rates(trace: str, seed: int) -> tuple[Rates, float]:
    """The curve of a load that is drawn, and how long it lasts."""
    if trace == "ramp":
        return Rates.of([0, HOUR_S], [2, 16]), HOUR_S
    if trace == "step":
        return Rates.of([0, HOUR_S / 2, HOUR_S / 2, HOUR_S], [4, 4, 12, 12]), HOUR_S
    if trace == "burst":
        edges = [(600 * k + t, r) for k in range(6) for t, r in ((0, 3), (420, 3), (420, 16), (600, 16))]
        return Rates.of(*zip(*edges, strict=True)), HOUR_S
    curve = rows("servegen_rate")
    first = int(seed * DIURNAL_S / 600)
    part = curve[first : first + int(DIURNAL_S / 600) + 1]
    return Rates.of(part[:, 0] - part[0, 0], part[:, 1] * PEAK_RPS / curve[:, 1].max()), DIURNAL_S


def load(trace: str, seed: int) -> tuple[Iterator[Requests], float]:
    """Requests, and how long the load lasts."""
    if trace in RECORDED:
        return recorded(RECORDED[trace], seed), float(rows(RECORDED[trace])[-1, 0])
    curve, lasts_s = rates(trace, seed)
    return poisson_process(curve, lengths(), duration_s=lasts_s, seed=seed), lasts_s


def spec() -> FleetSpec:
    """What a loop is told of the fleet."""
    profile = LatencyProfile(
        model="m", accelerator="GPU", alpha_s=ALPHA_S, beta_s=BETA_S, gamma_s=GAMMA_S, max_batch=256,
        max_step_tokens=8192, queue_model="v3-engine",
    )  # fmt: skip
    return FleetSpec(
        accelerators=(Accelerator(name="GPU", type="GPU", cost_per_h=1.0),),
        profiles=(profile,),
        service_classes=(ServiceClass(name="c", targets={"m": Targets(ttft_s=TTFT_S, itl_s=ITL_S)}),),
        servers=(ServerSpec(name="chat", service_class="c", model="m", min_replicas=1),),
        unlimited=True,
    )


def governed(policy: str, cold_start_s: float) -> FleetLoop:
    """Ours with its own settings; a baseline with its authors' period and nothing of ours around it."""
    return controller("slo" if policy == OURS else policy, spec(), LoopSettings(start_up_s=cold_start_s))


def run(cell: Cell) -> Outcome:
    """One cell, from one replica that is ready (a fixed count: from all)."""
    began = time.process_time()
    requests, lasts_s = load(cell.trace, cell.seed)
    fixed = cell.policy.startswith(FIXED)
    loop = None if fixed else governed(cell.policy, cell.cold_start_s)
    law = Law(alpha_s=ALPHA_S, beta_s=BETA_S, gamma_s=GAMMA_S)
    world = SimulatedWorld(
        servers=(
            SimulatedServer(
                name="chat",
                laws={"GPU": law},
                slo=Slo(ttft_s=TTFT_S, tpot_s=ITL_S),
                start={"GPU": int(cell.policy.removeprefix(FIXED)) if fixed else 1},
            ),
        ),
        accelerators=(Accelerator(name="GPU", type="GPU", cost_per_h=1.0),),
        cold_start_s=cell.cold_start_s,
        scrape_s=5.0 if loop is None else min(5.0, loop.period_s),
    )
    fleet = SimulatedFleet(world, requests, seed=cell.seed)
    turns = govern(fleet, loop, until_s=lasts_s)
    report = fleet.finish()
    counts = [sum(t.decision.replicas["chat"].values()) for t in turns if t.decision and "chat" in t.decision.replicas]
    steps = [b - a for a, b in zip([1, *counts], counts, strict=False) if b != a]
    changes = sum((a > 0) != (b > 0) for a, b in itertools.pairwise(steps))
    cpu_s = time.process_time() - began
    return Outcome(report.attainment, report.gpu_hours, report.actions, changes, cpu_s)


@functools.cache
def version(policy: str) -> str:
    """Of the code that a policy's outcomes depend on: the simulator, and but for fixed counts the loop and its rule."""
    root = Path(sys.modules["flyball"].__file__ or "").parent
    names = ["performance/simulator*", "adapters/simulated.py"]
    if not policy.startswith(FIXED):
        parts = ("assign", "caps", "cycle", "damping", "demand", "forecast", "loop", "options", "analyzers/__init__")
        rule = type(analyzer("slo" if policy == OURS else policy)).__module__.rpartition(".")[2]
        names += [*(f"planner/{part}.py" for part in parts), f"planner/analyzers/{rule}.py"]
    files = [f for name in names for f in sorted(root.glob(name))]
    return hashlib.blake2b(b"".join(f.read_bytes() for f in files), digest_size=6).hexdigest()


class Cells:
    """Outcomes by cell, kept in a file as soon as they are known; those of other versions of the code do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[Cell, Outcome] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                cell, outcome, made_by = json.loads(line)
                if made_by == version(cell[2]):
                    self.known[Cell(*cell)] = Outcome(*outcome)

    def keep(self, cell: Cell, outcome: Outcome) -> None:
        """In memory and in the file."""
        self.known[cell] = outcome
        with self.path.open("a") as file:
            file.write(json.dumps([cell, outcome, version(cell.policy)]) + "\n")

    def run(self, wanted: list[Cell], jobs: int) -> None:
        """Run those that are not known."""
        todo = [cell for cell in wanted if cell not in self.known]
        if not todo:
            return
        with ProcessPoolExecutor(jobs) as pool:
            for done, (cell, outcome) in enumerate(zip(todo, pool.map(run, todo), strict=True), 1):
                self.keep(cell, outcome)
                print(f"\r{done} of {len(todo)} cells, last {cell}        ", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t)."""
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), T95.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))


def best_fixed(cells: Cells, trace: str, seeds: range, jobs: int) -> int:
    """The smallest fixed count that reaches the promise; the largest tried, if one more gains next to nothing."""
    before = 0.0
    for count in range(1, 13):
        wanted = [Cell(trace, 0, f"{FIXED}{count}", seed) for seed in seeds]
        cells.run(wanted, jobs)
        attained = statistics.fmean(cells.known[c].attainment for c in wanted)
        if attained >= REACHED or attained < before + 0.002:
            return count
        before = attained
    return count


def main() -> None:
    """Run what is not known, print the table, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", nargs="+", default=TRACES, choices=TRACES)
    parser.add_argument("--cold-starts", nargs="+", type=int, default=COLD_STARTS)
    parser.add_argument("--policies", nargs="+", default=(OURS, *BASELINES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cells", type=Path, default=Path(".cache") / "fleet_control", help="folder of finished cells")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    arguments.cells.mkdir(parents=True, exist_ok=True)
    path = arguments.cells / "cells.jsonl"
    if arguments.fresh:
        path.unlink(missing_ok=True)
    cells, seeds = Cells(path), range(arguments.seeds)
    wanted = [
        Cell(trace, cold, policy, seed)
        for trace in arguments.traces
        for cold in arguments.cold_starts
        for policy in arguments.policies
        for seed in seeds
    ]
    cells.run(wanted, arguments.jobs)
    report(cells, arguments, seeds)


def report(cells: Cells, arguments: argparse.Namespace, seeds: range) -> None:
    """The table and the figures."""
    print(f"{len(seeds)} seeds, means and 95 % intervals; {machine()}")
    print(f"{'load':11}{'cold':>5}  {'policy':14}{'attainment %':>16}{'GPU-hours':>16}{'actions':>9}{'turns':>7}  ")
    figures = io.StringIO()
    for trace in arguments.traces:
        count = best_fixed(cells, trace, seeds, arguments.jobs)
        for cold in arguments.cold_starts:
            means: dict[str, tuple[float, float]] = {}
            for policy in (*arguments.policies, *(f"{FIXED}{n}" for n in range(max(count - 1, 1), count + 1))):
                at = 0 if policy.startswith(FIXED) else cold
                outcomes = [cells.known[Cell(trace, at, policy, s)] for s in seeds]
                a, da = interval([100 * o.attainment for o in outcomes])
                g, dg = interval([o.gpu_hours for o in outcomes])
                n, dn = interval([float(o.actions) for o in outcomes])
                means[policy] = a / 100, g
                turned = statistics.fmean(o.turns for o in outcomes)
                told = f"{a:>9.2f} ±{da:>5.2f}{g:>9.3f} ±{dg:>5.3f}{n:>9.1f}{turned:>7.1f}"
                mark = "" if a / 100 >= REACHED else "  misses the promise"
                print(f"{trace:11}{cold:>5}  {policy:14}{told}{mark}")
                if policy == OURS:
                    ours = (a, da), (g, dg), (n, dn)
            if OURS in means:
                conclude(trace, cold, means, count, ours, figures)
    print(figures.getvalue(), end="")


Interval = tuple[float, float]


def conclude(
    trace: str,
    cold: int,
    means: dict[str, tuple[float, float]],
    count: int,
    ours: tuple[Interval, Interval, Interval],
    figures: io.StringIO,
) -> None:
    """Who is best of those that reach the promise, and our three figures."""
    reaching = {p: g for p, (a, g) in means.items() if a >= REACHED and p != OURS and not p.startswith(FIXED)}
    best = min(reaching, key=lambda p: reaching[p]) if reaching else None
    fixed_hours = means[f"{FIXED}{count}"][1]
    (a, da), (g, dg), (n, dn) = ours
    rival = f"{g / reaching[best]:.3f} of {best}'s GPU-hours" if best else "no reactive baseline reaches the promise"
    print(f"{'':16}  -> {rival}; {g / fixed_hours:.3f} of fixed-{count}'s\n")
    stdout, sys.stdout = sys.stdout, figures
    try:
        prefix = f"{trace}_{cold}"
        rivals = {p: round(v[0], 4) for p, v in means.items() if p != OURS}
        figure(f"{prefix}_attainment", a / 100, "share", spread=((a - da) / 100, (a + da) / 100), rivals=rivals)
        ratio = g / reaching[best] if best else None
        figure(f"{prefix}_gpu_hours", ratio, "ratio", spread=(g - dg, g + dg), hours=g, best=best,
               over_fixed=g / fixed_hours)  # fmt: skip
        figure(f"{prefix}_actions", n, "actions", spread=(n - dn, n + dn))
    finally:
        sys.stdout = stdout


if __name__ == "__main__":
    main()
