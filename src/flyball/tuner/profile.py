"""The latency law behind a study's windows: the profile of a configuration for `flyball plan`.

All windows of a study replay the same kind of traffic; what varies is how many requests a step may hold and how many
tokens it may compute. These two are arguments of the queue model, so every trial that differs in nothing else is an
operating point of one law. A saturated window has no mean and is left out (`performance.fit.flaw`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flyball.core.fleet import LatencyProfile
from flyball.core.knobs import Configuration, Value, generation_of
from flyball.performance.fit import Fit, OperatingPoint, fit
from flyball.performance.queueing import DEFAULT_STEP_TOKENS, queue_model
from flyball.tuner.compare import Comparison
from flyball.tuner.law import BATCH_KNOBS, LAW, STEP_KNOBS, limit, operating_point
from flyball.tuner.study import Problem
from flyball.tuner.trials import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The profile of a configuration, or why there is none."""

    sentence: str
    profile: LatencyProfile | None = None

    @property
    def identified(self) -> bool:
        """Whether the windows determine all three parameters."""
        return self.profile is not None and self.profile.identified


def export(
    problem: Problem,
    trials: Sequence[Trial],
    comparison: Comparison | None,
    values: Configuration,
    *,
    accelerator: str,
    model: str = "",
) -> Exported:
    """Fit the law of one configuration to the windows of all that differ from it in batch and step limits only."""
    whole = {**problem.lattice.base, **values}
    batch = limit(whole, BATCH_KNOBS)
    if batch is None:
        return Exported(
            sentence=f"no latency profile: the configuration states none of {', '.join(BATCH_KNOBS)} above 0, without "
            "which the law cannot tell waiting from serving"
        )
    points, flaws = [], []
    for its, metrics in _windows(trials, comparison):
        if _others(its) != _others(values):
            continue
        read = operating_point({**problem.lattice.base, **its}, metrics)
        if isinstance(read, OperatingPoint):
            points.append(read)
        else:
            flaws.append(read)
    if len(points) < 2:
        why = f" ({flaws[-1]})" if flaws else ""
        return Exported(
            sentence="no latency profile: it takes 2 windows that the engine could hold, of configurations that differ "
            f"in batch and step limits only, and {len(points)} of {len(points) + len(flaws)} can be used{why}"
        )
    found = fit(points, queue_model(LAW))
    profile = LatencyProfile(
        model=model or problem.service or "model",
        accelerator=accelerator,
        alpha_s=found.alpha_s,
        beta_s=found.beta_s,
        gamma_s=found.gamma_s,
        max_batch=batch,
        max_step_tokens=limit(whole, STEP_KNOBS) or int(DEFAULT_STEP_TOKENS),
        generation=generation_of(values),
        queue_model=LAW,
        condition_number=found.condition_number,
        log_covariance=found.log_covariance,
    )
    return Exported(profile=profile, sentence=_describe(found, len(points), len(flaws)))


def _windows(trials: Sequence[Trial], comparison: Comparison | None) -> list[tuple[Configuration, Mapping[str, float]]]:
    """Every window or mean of windows that was measured, with its configuration."""
    seen = [(trial.values, trial.metrics) for trial in trials if trial.score.failure is None]
    if comparison is None:
        return seen
    for pair in comparison.pairs:
        sides = ((comparison.default, pair.default), (comparison.challenger.values, pair.challenger))
        seen += [(its, window.metrics) for its, window in sides if window.score.failure is None]
    return seen


def _others(values: Configuration) -> dict[str, Value]:
    return {name: value for name, value in values.items() if name not in (*BATCH_KNOBS, *STEP_KNOBS)}


def _describe(found: Fit, used: int, left_out: int) -> str:
    ttft, itl = (float(np.median(np.abs(errors))) for errors in (found.ttft_errors, found.itl_errors))
    kappa = f"condition number {found.condition_number:.3g}"
    told = (
        f"{kappa}: the windows determine alpha, beta and gamma"
        if found.identified
        else f"{kappa}: NOT IDENTIFIED, the windows do not tell alpha, beta and gamma apart, so only loads like this "
        "study's can be predicted; `flyball fit` over windows of another token mix and other loads pins them down"
    )
    without = f", {left_out} left out" if left_out else ""
    return f"latency profile of {used} windows{without}, median error {ttft:.0%} of TTFT and {itl:.0%} of ITL; {told}"
