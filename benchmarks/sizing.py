"""How long does it take to size a fleet? 100 servers on 5 accelerators, queues of 128, 487 of 500 pairs feasible.

The rival is llm-inferno's Go optimizer (`optimizer-light` v0.7.8 with `queue-analysis`), which made the same candidates
in 184 ms on two virtual CPUs of a shared machine (best of several runs, measured in November 2026); its time is quoted,
not measured here, for it needs a Go toolchain. `--rival-s` states another.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
from dataclasses import replace
from pathlib import Path

from _figures import figure, machine, repeat
from flyball.adapters.fleet_files import read_fleet
from flyball.core.fleet import FleetSpec
from flyball.planner.plan import plan
from flyball.planner.problem import build

FLEET = Path(__file__).parent / "data" / "bench_n100_q128_cap1.json.gz"
GO_S = 0.184


def load() -> FleetSpec:
    """The fleet, through the same reader that `flyball plan` uses."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.json"
        path.write_bytes(gzip.decompress(FLEET.read_bytes()))
        return read_fleet(path)


def main() -> None:
    """Print the table, then the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--rival-s", type=float, default=GO_S, help="seconds that the Go code needs (default: quoted)")
    arguments = parser.parse_args()

    spec = load()
    free = replace(spec, unlimited=True)
    candidates = sum(len(choice.candidates) for choice in build(spec).choices)
    print(f"{len(spec.servers)} servers, {candidates} candidates; {machine()}")
    print(f"{'step':34}{'median ms':>10}{'quartiles ms':>18}{'CPU ms':>8}{'cost/h':>10}")
    sizing = repeat(lambda: build(spec), arguments.runs)
    steps = (
        ("read the file", repeat(load, arguments.runs), ""),
        ("size all candidates", sizing, ""),
        ("the same, and plan unlimited", repeat(lambda: plan(free), arguments.runs), plan(free).cost_per_h),
        ("the same, and plan exactly", repeat(lambda: plan(spec), 3), plan(spec).cost_per_h),
    )
    for name, t, cost in steps:
        quartiles = f"{t.low * 1e3:.1f} to {t.high * 1e3:.1f}"
        print(f"{name:34}{t.median * 1e3:>10.1f}{quartiles:>18}{t.cpu * 1e3:>8.1f}{cost:>10}")
    print(f"{'Go: size all candidates (quoted)':34}{arguments.rival_s * 1e3:>10.1f}")
    figure(
        "size_100_servers_s",
        sizing.median,
        "s",
        rival=arguments.rival_s,
        spread=(sizing.low, sizing.high),
        cpu_s=sizing.cpu,
        rival_name="optimizer-light v0.7.8, Go, quoted",
        candidates=candidates,
        runs=arguments.runs,
    )


if __name__ == "__main__":
    main()
