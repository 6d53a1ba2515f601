"""From windows of `flyball bench` to a latency profile that `flyball plan` sizes with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flyball.adapters.bench_files import BenchResult
from flyball.core.errors import InvalidInput
from flyball.core.fleet import LatencyProfile
from flyball.numerics.markov import Floats
from flyball.performance.fit import OPEN_QUEUE, Fit, OperatingPoint, fit, flaw, relative_errors
from flyball.performance.queueing import DEFAULT_STEP_TOKENS, queue_model


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowFit:
    """A profile, and which windows it rests on."""

    profile: LatencyProfile
    fit: Fit  # its errors are in the order of `used`
    used: tuple[str, ...]
    excluded: Mapping[str, str]  # window -> why it says nothing about the law


def fit_windows(
    windows: Mapping[str, BenchResult], *, law: str, accelerator: str, model: str | None = None
) -> WindowFit:
    """Fit a law to windows of one engine under one configuration, saturated ones left out; keys name them in errors."""
    check_alike(windows)
    points = {name: operating_point(window, name) for name, window in windows.items()}
    excluded = {name: why for name, window in windows.items() if (why := unusable(window, points[name]))}
    used = tuple(name for name in windows if name not in excluded)
    if len(used) < 2:
        left_out = "; ".join(f"{name}: {why}" for name, why in excluded.items()) or "no other was given"
        raise InvalidInput(
            f"a fit needs 2 windows, and {len(used)} of {len(windows)} can be used ({left_out}); "
            "bench more loads that the server can hold"
        )
    found = fit([points[name] for name in used], queue_model(law))
    first = windows[used[0]]
    profile = LatencyProfile(
        model=model or first.model,
        accelerator=accelerator,
        alpha_s=found.alpha_s,
        beta_s=found.beta_s,
        gamma_s=found.gamma_s,
        max_batch=points[used[0]].max_batch,
        max_step_tokens=int(points[used[0]].max_step_tokens),
        generation=first.generation,
        queue_model=law,
        condition_number=found.condition_number,
        log_covariance=found.log_covariance,
    )
    return WindowFit(profile=profile, fit=found, used=used, excluded=excluded)


def prediction_errors(profile: LatencyProfile, windows: Mapping[str, BenchResult]) -> Floats:
    """[2, windows]: predicted / measured - 1 of mean TTFT and ITL, by a profile."""
    points = [operating_point(window, name) for name, window in windows.items()]
    parameters = np.array([profile.alpha_s, profile.beta_s, profile.gamma_s])
    return relative_errors(points, queue_model(profile.queue_model), parameters)


def operating_point(window: BenchResult, origin: str) -> OperatingPoint:
    """The window's load and mean latencies; `origin` names it in an error."""
    try:
        return OperatingPoint(
            arrival_rps=window.arrival_rps,
            input_tokens=window.mean_input_tokens,
            output_tokens=window.mean_output_tokens,
            max_batch=_knob(window, "max_num_seqs"),
            max_queue=OPEN_QUEUE,
            max_step_tokens=_knob(window, "max_num_batched_tokens", default=int(DEFAULT_STEP_TOKENS)),
            ttft_s=window.ttft_s.mean - window.lag_s.mean,  # from when it was sent: a late client is not the engine's
            itl_s=window.itl_s.mean,
        )
    except InvalidInput as error:
        raise InvalidInput(f"{origin}: {error}") from None


def unusable(window: BenchResult, point: OperatingPoint) -> str | None:
    """Why a window says nothing about the law; None if it does."""
    return flaw(
        point,
        requests=window.requests,
        failed=window.requests - window.completed,
        lag_s=window.lag_s.mean,
        concurrency=window.mean_concurrency,
    )


def check_alike(windows: Mapping[str, BenchResult]) -> None:
    """Refuse windows of different models or configurations: one law cannot describe two engines."""
    first_name, first = next(iter(windows.items()))
    for name, window in windows.items():
        if window.model != first.model:
            raise InvalidInput(
                f"{first_name} is of model {first.model!r} and {name} of {window.model!r}; fit each model by itself"
            )
        ours, theirs = dict(first.configuration), dict(window.configuration)
        different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        if different:
            knob = different[0]
            raise InvalidInput(
                f"{first_name} was measured with {knob}={ours.get(knob)} and {name} with {knob}={theirs.get(knob)}; "
                "fit each configuration by itself"
            )


def _knob(window: BenchResult, name: str, default: int | None = None) -> int:
    value = window.configuration.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 1:
        raise InvalidInput(f"the configuration's {name} is {value}; bench a server that states its {name}")
    return int(value)
