"""How many requests does the simulator serve in a second of processor time? Eight replicas, 1024 tokens in, 211 out.

Step by step, exactly, and at request level; the naive core, which takes every step by itself, is the rival in the same
run. Elsewhere, on the same load and a two-core machine (quoted, November 2026): NVIDIA Dynamo's replay in Rust 10,300,
Vidur 370, BLIS 95 to 160 requests a second step by step, vLLM-SR's fleet simulator 11,000 at request level.
"""

from __future__ import annotations

import argparse
import math
import resource
import time

from _figures import figure, machine
from flyball.performance.request_streams import Rates, poisson_process
from flyball.performance.simulator import Law, new_core

REPLICAS, RATE_RPS = 8, 40.0
NEEDED = {"steps": 20_000.0, "requests": 100_000.0}


def serve(count: int, *, detail: str, compiled: bool) -> float:
    """Requests per second of processor time, drawing the load included."""
    law = Law(alpha_s=0.009, beta_s=3e-5, gamma_s=6e-8, detail=detail)  # type: ignore[arg-type]
    load = poisson_process(Rates.of([0], [RATE_RPS]), [(1024, 211)], duration_s=count / RATE_RPS, seed=0)
    began = time.process_time()
    core = new_core(1, "least_loaded", compiled=compiled)
    for _ in range(REPLICAS):
        core.add(0, law)
    ended = 0
    while core.run(math.inf):
        part = next(load, None)
        if part is None:
            core.close()
        else:
            core.offer(part)
        ended += len(core.take()[0])
    ended += len(core.take()[0])
    core.books().check()
    return ended / (time.process_time() - began)


def main() -> None:
    """Print the table, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{REPLICAS} replicas, {RATE_RPS:g} requests/s, {arguments.requests} requests; {machine()}")
    print(f"{'core':32}{'requests per CPU second':>24}{'resident MB':>12}")
    naive = serve(2000, detail="steps", compiled=False)
    best: dict[str, list[float]] = {}
    for detail in ("steps", "requests"):
        serve(10_000, detail=detail, compiled=True)
        few = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        best[detail] = sorted(serve(arguments.requests, detail=detail, compiled=True) for _ in range(arguments.runs))
        many = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{'compiled, ' + detail:32}{best[detail][-1]:>24,.0f}{many:>12.0f}  ({few:.0f} after 10,000 requests)")
    print(f"{'naive, steps':32}{naive:>24,.0f}")
    for name, detail in (("step_exact_rps", "steps"), ("request_level_rps", "requests")):
        runs = best[detail]
        rival = naive if detail == "steps" else None
        spread, needed = (runs[0], runs[-1]), NEEDED[detail]
        figure(name, runs[-1], "requests/CPU-s", rival, spread, needed=needed, requests=arguments.requests)


if __name__ == "__main__":
    main()
