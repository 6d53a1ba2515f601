"""Planning against what a measured law may be at worst, not only what it most likely is.

A fitted profile carries the covariance P of the logs of alpha, beta, gamma. With a the gradient of log latency in these
logs, the law that is slowest for a load among all within z standard deviations of the fitted one lies at
z P a / sqrt(a' P a) from it (the point of an ellipsoid that is farthest in a direction). The gradient is the share that
each parameter has of a step's time, half the batch being in use; z is the normal quantile of the confidence asked for.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetSpec, LatencyProfile
from flyball.numerics.markov import Floats

_USUAL_BATCH = 64  # where the profile states none
_USUAL_LENGTHS = (512.0, 256.0)  # of models that no server has a load for


def cautious(spec: FleetSpec, confidence: float) -> FleetSpec:
    """The same fleet with every uncertain profile as slow as it may be with this confidence; others unchanged."""
    if not 0.5 <= confidence < 1:
        raise InvalidInput(f"the confidence is {confidence:g}; give at least 0.5 and less than 1, such as 0.9")
    if not any(p.log_covariance for p in spec.profiles):
        raise InvalidInput(
            "no profile says how uncertain it is; give profiles of `flyball fit` (plan --profile), or no confidence"
        )
    z = NormalDist().inv_cdf(confidence)
    return replace(spec, profiles=tuple(_slowest(p, _lengths(spec, p.model), z) for p in spec.profiles))


def _lengths(spec: FleetSpec, model: str) -> tuple[float, float]:
    """Mean tokens in and out of all that is asked of a model."""
    loads = [s.demand for s in spec.servers if s.model == model and s.demand.arrival_rps]
    total = sum(d.arrival_rps for d in loads)
    if not total:
        return _USUAL_LENGTHS
    return (
        sum(d.arrival_rps * d.input_tokens for d in loads) / total,
        sum(d.arrival_rps * d.output_tokens for d in loads) / total,
    )


def shares(profile: LatencyProfile, input_tokens: float, output_tokens: float) -> Floats:
    """[3] What alpha, beta and gamma each make of a step's time, half the batch in use.

    >>> one = LatencyProfile(model="m", accelerator="a", alpha_s=0.01, beta_s=0.0, gamma_s=0.0)
    >>> shares(one, 512, 256).tolist()
    [1.0, 0.0, 0.0]
    """
    busy = (profile.batch_limit(output_tokens) or _USUAL_BATCH) / 2
    n, m = input_tokens, max(output_tokens, 1.0)
    parts = np.array([
        profile.alpha_s, profile.beta_s * busy * (n + m) / (m + 1), profile.gamma_s * busy * (n + m / 2)
    ])  # fmt: skip
    whole: Floats = parts / parts.sum()
    return whole


def _slowest(profile: LatencyProfile, lengths: tuple[float, float], z: float) -> LatencyProfile:
    if not (profile.log_covariance and profile.known):
        return profile
    covariance = np.reshape(profile.log_covariance, (3, 3))
    gradient = shares(profile, *lengths)
    away = covariance @ gradient
    spread = float(gradient @ away)
    if spread <= 0:
        return profile
    alpha, beta, gamma = np.exp(z * away / np.sqrt(spread)).tolist()
    return replace(
        profile, alpha_s=profile.alpha_s * alpha, beta_s=profile.beta_s * beta, gamma_s=profile.gamma_s * gamma
    )
