"""What does it cost to serve one model's mix of request sizes, and how soon is that known? 31 instances of Melange's.

The rival is Melange (Griggs and others, 2024): its own costs and the optima of HiGHS within its formulation, recorded
when its code was run (CBC, up to 13.6 s, once without an end after 150 s), are quoted beside ours, which are measured.
"""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from pathlib import Path

from _figures import figure, machine
from flyball.adapters.bucket_files import buckets_from
from flyball.adapters.fields import Fields
from flyball.planner.buckets import plan_buckets

DATA = Path(__file__).parent / "data" / "melange.json.gz"


def main() -> None:
    """Print the table, then the figures."""
    print(machine())
    print(f"{'instance':38}{'Melange':>9}{'slices':>9}{'optimum':>9}{'s':>7}{'divided':>9}{'optimum':>9}{'s':>7}")
    slowest, cpu, worst, cheaper = 0.0, 0.0, 0.0, 0
    for case in json.loads(gzip.decompress(DATA.read_bytes())):
        sliced = buckets_from(Fields(case["input"], case["name"]))
        figures = ""
        for problem, known in (
            (sliced, case["slices_cost"]),
            (replace(sliced, slices=None), case["divisible_cost"]),
        ):
            wall, processor = time.perf_counter(), time.process_time()
            found = plan_buckets(problem)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            slowest, cpu, worst = max(slowest, wall), max(cpu, processor), max(worst, found.cost_per_h - known)
            figures += f"{found.cost_per_h:>9.3f}{known:>9.3f}{wall:>7.3f}"
        cheaper += found.cost_per_h < (case["melange_cost"] or float("inf")) - 1e-6
        print(f"{case['name']:38}{case['melange_cost'] or float('nan'):>9.3f}{figures}", flush=True)
    print(f"\nabove the recorded optimum at most {worst:.2g}; divided, cheaper than Melange in {cheaper} instances")
    figure("melange_slowest_s", slowest, "s", cpu_s=cpu, rival=13.6, rival_name="CBC, quoted", above_optimum=worst)


if __name__ == "__main__":
    main()
