"""Are P50, P90 and P99 of TTFT, ITL and E2E right? The formulas against requests sent one by one through the same law.

Five replicas, from one that serves four at a time to one that serves 64, with lengths that are equal or varied, at 30,
60, 80 and 90 % of their capacity. Poisson arrivals. Simulated numbers are uncertain themselves: the standard error of
the mean TTFT, over sixteen independent runs, is printed beside it. Targets: percentiles within 10 %, means within 3 %.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from _figures import figure
from flyball.performance.percentiles import percentiles
from flyball.performance.queueing import Dissectable, Replicas, queue_model
from flyball.performance.requests import simulate

LEVELS = (50.0, 90.0, 99.0)
SHARES = {0.3: 0.04, 0.6: 0.1, 0.8: 0.8, 0.9: 1.0}  # of the capacity -> of the requests asked for
TARGET, TARGET_MEAN = 0.10, 0.03
SETS: dict[str, dict[str, float]] = {
    "13B on A100": {
        "alpha_s": 0.012, "beta_s": 5e-5, "gamma_s": 5e-7, "input_tokens": 128, "output_tokens": 512, "max_batch": 48,
        "max_queue": 32, "input_cv": 0.0, "output_cv": 1.0,
    },
    "14B on H100": {
        "alpha_s": 0.01065, "beta_s": 4.18e-5, "gamma_s": 5.77e-8, "input_tokens": 1024, "output_tokens": 512,
        "max_batch": 64, "max_queue": 64, "input_cv": 1.0, "output_cv": 1.0,
    },
    "few at a time": {
        "alpha_s": 0.005, "beta_s": 1e-4, "gamma_s": 1e-6, "input_tokens": 64, "output_tokens": 64, "max_batch": 4,
        "max_queue": 64, "input_cv": 0.5, "output_cv": 0.8,
    },
    "long prompts": {
        "alpha_s": 0.007, "beta_s": 2e-5, "gamma_s": 5e-8, "input_tokens": 8192, "output_tokens": 512, "max_batch": 32,
        "max_queue": 64, "input_cv": 0.3, "output_cv": 0.7,
    },
    "equal lengths": {
        "alpha_s": 0.008, "beta_s": 2e-5, "gamma_s": 2e-7, "input_tokens": 512, "output_tokens": 128, "max_batch": 16,
        "max_queue": 64, "input_cv": 0.0, "output_cv": 0.0,
    },
}  # fmt: skip


def case(given: dict[str, Any], share: float, requests: int, rng: np.random.Generator) -> dict[str, Any]:
    """Relative errors of one replica at one load."""
    queues = queue_model("v3").prepare(Replicas.of(**given))
    assert isinstance(queues, Dissectable)
    rate = share * queues.capacity_rps
    ours = percentiles(queues, rate, LEVELS)
    seen = simulate(queues.anatomy(), 0, float(rate[0]), requests, rng)
    return {
        "ttft": ours.ttft_s[0] / np.percentile(seen.ttft_s, LEVELS) - 1,
        "itl": ours.itl_s[0] / seen.gap_percentiles(LEVELS) - 1,
        "e2e": ours.e2e_s[0] / np.percentile(seen.e2e_s, LEVELS) - 1,
        "means": np.array([
            ours.mean_ttft_s[0] / seen.ttft_s.mean(), ours.mean_itl_s[0] / seen.mean_gap_s,
            ours.mean_e2e_s[0] / seen.e2e_s.mean(),
        ]) - 1,
        "own": seen.mean_ttft_error,
    }  # fmt: skip


def main() -> None:
    """Print every case and the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=12_000_000, help="at 90 %% of the capacity; fewer below")
    parser.add_argument("--sets", nargs="*", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"{'replica':14} {'load':>4}  {'TTFT P50 P90 P99':>19} {'ITL P50 P90 P99':>19} {'E2E P50 P90 P99':>19}  "
          f"{'means TTFT ITL E2E':>20} {'TTFT simulated':>15}")  # fmt: skip
    worst, worst_mean, own, held, cells = 0.0, 0.0, 0.0, 0, 0
    for name in options.sets:
        rng = np.random.default_rng([options.seed, list(SETS).index(name)])
        for share, factor in SHARES.items():
            errors = case(SETS[name], share, int(options.requests * factor), rng)
            shown = [" ".join(f"{100 * v:+6.1f}" for v in errors[key]) for key in ("ttft", "itl", "e2e", "means")]
            print(f"{name:14} {share:4.0%}  {'  '.join(shown)}   +- {100 * errors['own']:.1f} %", flush=True)
            tails = np.concatenate([errors[key] for key in ("ttft", "itl", "e2e")])
            worst, worst_mean = max(worst, float(abs(tails).max())), max(worst_mean, float(abs(errors["means"]).max()))
            own = max(own, errors["own"])
            held += int((abs(tails) <= TARGET).sum() + (abs(errors["means"]) <= TARGET_MEAN).sum())
            cells += len(tails) + 3
    print(f"\n{held} of {cells} numbers within their targets")
    figure(
        "percentiles_worst_error", worst, "relative error of P50, P90, P99", target=TARGET, requests=options.requests
    )
    figure(
        "percentiles_worst_mean_error", worst_mean, "relative error of means", target=TARGET_MEAN,
        worst_standard_error_of_simulation=own,
    )  # fmt: skip
    figure("percentiles_within_target", held / cells, "share of numbers")


if __name__ == "__main__":
    main()
