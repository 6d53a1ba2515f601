"""How long does it take to size and plan a fleet? 100, 1000 and 5000 servers on 5 accelerators, queues of 128.

Sizing is every feasible pair of a server and an accelerator, with its largest load within the targets; planning is the
choice among them within the capacity. The rival is llm-inferno's Go optimizer (`optimizer-light` v0.7.8 with
`queue-analysis`), whose times on two virtual CPUs of a shared machine are quoted, not measured here, for it needs a Go
toolchain: 184 ms for 100 servers, 9.5 to 12.5 s for 5000 (best of several runs, November 2026). The best plans known of
the integer program, from HiGHS with 60 s, are quoted beside ours as well.
"""

from __future__ import annotations

import argparse
import gzip
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from _figures import Timing, figure, machine, repeat
from flyball.adapters.fleet_files import read_fleet
from flyball.core.fleet import FleetSpec
from flyball.planner.problem import Problem, build
from flyball.planner.solvers import Solution, solver

DATA = Path(__file__).parent / "data"
GO_S = {100: 0.184, 1000: None, 5000: 9.5}
BEST_KNOWN = {  # cost per hour: one accelerator a server, and several
    100: (6972.0, 6710.0),
    1000: (78599.0, 74729.0),
    5000: (392770.0, 373711.0),
}
TIME_LIMIT_S = 60.0


class Outcome(NamedTuple):
    """A plan and how long the solver took."""

    seconds: float  # wall
    cpu_s: float
    cost: float
    gap: float | None
    served: int


def load(servers: int) -> FleetSpec:
    """A fleet, through the same reader that `flyball plan` uses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.json"
        path.write_bytes(gzip.decompress((DATA / f"bench_n{servers}_q128_cap1.json.gz").read_bytes()))
        return read_fleet(path)


def timed(problem: Problem, name: str, time_limit_s: float) -> Outcome:
    """Run one solver once, wall time."""
    start, cpu = time.perf_counter(), time.process_time()
    found = solver(name)(problem, time_limit_s=time_limit_s)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return Outcome(seconds, cpu_s, *_judged(found))


def _judged(found: Solution) -> tuple[float, float | None, int]:
    taken = [c for c in found.chosen if c is not None]
    cost = math.fsum(part.allocation.cost_per_h for c in taken for part in (c, *c.also))
    value = math.fsum(c.value for c in taken)
    gap = None if found.bound is None else max(value - found.bound, 0.0) / value
    return cost, gap, len(taken)


def main() -> None:
    """Print the tables, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each sizing")
    parser.add_argument("--heterogeneous-5000", action="store_true", help="also mix accelerators for 5000 servers")
    arguments = parser.parse_args()

    print(machine())
    print(
        f"\n{'servers':>8}{'candidates':>12}{'size s':>9}{'quartiles':>16}{'CPU s':>8}{'us each':>9}{'Go, quoted':>12}"
    )
    sized: dict[int, tuple[Problem, Timing]] = {}
    for servers, go_s in GO_S.items():
        spec = load(servers)
        problem = build(spec)
        t = repeat(lambda spec=spec: build(spec), arguments.runs)  # type: ignore[misc]
        count = sum(len(choice.candidates) for choice in problem.choices)
        quartiles = f"{t.low:.3f} to {t.high:.3f}"
        print(
            f"{servers:>8}{count:>12}{t.median:>9.3f}{quartiles:>16}{t.cpu:>8.3f}{t.median / count * 1e6:>9.1f}"
            f"{go_s or '':>12}",
            flush=True,
        )
        sized[servers] = problem, t

    print(f"\n{'servers':>8} {'solver':15}{'s':>8}{'CPU s':>8}{'cost/h':>11}{'best known':>12}{'gap':>10}{'served':>8}")
    outcomes: dict[tuple[int, str], Outcome] = {}
    for servers, (problem, _) in sized.items():
        for name in ("greedy", "approximate", "exact", "heterogeneous"):
            if name == "heterogeneous" and servers == 5000 and not arguments.heterogeneous_5000:
                continue
            o = outcomes[servers, name] = timed(problem, name, TIME_LIMIT_S)
            best = BEST_KNOWN[servers][name == "heterogeneous"]
            gap = "-" if o.gap is None else f"{o.gap:.2e}"
            took = f"{o.seconds:>8.3f}{o.cpu_s:>8.3f}"
            print(f"{servers:>8} {name:15}{took}{o.cost:>11.1f}{best:>12.1f}{gap:>10}{o.served:>8}", flush=True)

    print()
    for servers in (100, 5000):
        problem, t = sized[servers]
        o = outcomes[servers, "exact"]
        figure(
            f"size_{servers}_servers_s", t.median, "s", rival=GO_S[servers], spread=(t.low, t.high), cpu_s=t.cpu,
            rival_name="optimizer-light v0.7.8, Go, quoted", cost=o.cost, gap=o.gap, runs=arguments.runs,
            candidates=sum(len(choice.candidates) for choice in problem.choices),
        )  # fmt: skip
    for name, servers in (("exact", 5000), ("heterogeneous", 1000)):
        o = outcomes[servers, name]
        best = BEST_KNOWN[servers][name == "heterogeneous"]
        figure(
            f"{name}_{servers}_servers_s", o.seconds, "s", cpu_s=o.cpu_s, cost=o.cost, gap=o.gap, best_known_cost=best
        )


if __name__ == "__main__":
    main()
