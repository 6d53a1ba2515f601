"""Fit a replica's latency law (alpha, beta, gamma) to what was measured at several operating points.

Least squares over the relative errors of TTFT and ITL, in log parameters, so that all stay positive and a millisecond
of TTFT does not outweigh a millisecond of ITL. A soft loss keeps one odd window from bending the rest. Whether the data
pin all three down is told by the condition number of the residuals' Jacobian in log parameters: the ratio of the best
to the worst determined combination.

symbol   shape     meaning
P                  operating points
x        [3]       log of alpha, beta, gamma (seconds)
r        [2 P]     relative errors, predicted / measured - 1: all TTFTs, then all ITLs
J        [2 P, 3]  dr / dx, by central differences
kappa              largest over smallest singular value of J
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, nnls

from flyball.core.errors import InvalidInput
from flyball.core.fleet import IDENTIFIED_BELOW
from flyball.numerics.markov import Floats
from flyball.performance.queueing import DEFAULT_STEP_TOKENS, Metrics, QueueModel, Replicas

HOPELESS = 1e18  # stands for an infinite condition number, which JSON cannot hold
_STEP = 1e-3  # of a log parameter, for J
_SOFT = 0.1  # relative error from which a residual counts less than its square
_LEAST_NOISE = 0.005
_OPEN = 2.5  # standard deviation of the log of a parameter of which nothing is known
_REACH = np.log(1e6)  # how far a parameter may go from its start
OPEN_QUEUE = 1000  # places in the queue of an engine that turns nobody away; more would change no mean worth fitting
FAILURES_ALLOWED = 0.05  # of a window's requests
LAG_ALLOWED = 0.2  # of a window's TTFT, by which its load generator may have been late on average


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """A load on one replica, and what it did to latencies on average."""

    arrival_rps: float
    input_tokens: float
    output_tokens: float
    max_batch: int
    max_queue: int
    max_step_tokens: float = DEFAULT_STEP_TOKENS
    ttft_s: float
    itl_s: float

    def __post_init__(self) -> None:
        for name in ("arrival_rps", "input_tokens", "output_tokens", "ttft_s", "itl_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise InvalidInput(f"an operating point's {name} is {value}; measure a window in which it exceeds 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The law fitted, and how well."""

    alpha_s: float
    beta_s: float
    gamma_s: float
    condition_number: float
    log_covariance: tuple[float, ...]  # 3 x 3, of the logs of alpha, beta, gamma
    ttft_errors: tuple[float, ...]  # predicted / measured - 1, a point each
    itl_errors: tuple[float, ...]

    @property
    def identified(self) -> bool:
        """Whether the data determine all three parameters; predictions near the data hold either way."""
        return self.condition_number <= IDENTIFIED_BELOW

    @property
    def loss(self) -> float:
        """Mean over points of the squared relative errors of TTFT and ITL together."""
        return float(np.mean(np.square(self.ttft_errors) + np.square(self.itl_errors)))


def flaw(point: OperatingPoint, *, requests: int, failed: int, lag_s: float, concurrency: float) -> str | None:
    """Why a measured window says nothing about the law; None if it does.

    A saturated queue has no mean: what was measured depends on how long one looked. By Little's law it is saturated
    when as many requests are in the server (`concurrency`) as its batch holds.
    """
    if failed > FAILURES_ALLOWED * requests:
        return f"{failed} of {requests} requests failed"
    if lag_s > LAG_ALLOWED * point.ttft_s:
        return f"the load generator itself was {lag_s * 1e3:.0f} ms late on average"
    if concurrency >= point.max_batch:
        return f"saturated, {concurrency:.1f} requests in a server whose batch holds {point.max_batch}"
    return None


def predict(points: Sequence[OperatingPoint], model: QueueModel, parameters: Floats) -> Metrics:
    """What the law with alpha, beta, gamma (seconds) says of each point; arrays [P]."""
    alpha, beta, gamma = parameters
    replicas = Replicas.of(
        alpha_s=alpha,
        beta_s=beta,
        gamma_s=gamma,
        input_tokens=[p.input_tokens for p in points],
        output_tokens=[p.output_tokens for p in points],
        max_batch=[p.max_batch for p in points],
        max_queue=[p.max_queue for p in points],
        max_step_tokens=[p.max_step_tokens for p in points],
    )
    return model.prepare(replicas).analyze(np.array([p.arrival_rps for p in points]))


def relative_errors(points: Sequence[OperatingPoint], model: QueueModel, parameters: Floats) -> Floats:
    """[2, P]: predicted / measured - 1 of TTFT, then of ITL."""
    seen = predict(points, model, parameters)
    measured = np.array([[p.ttft_s for p in points], [p.itl_s for p in points]])
    errors: Floats = np.stack((seen.ttft_s, seen.itl_s)) / measured - 1
    return errors


def fit(
    points: Sequence[OperatingPoint],
    model: QueueModel,
    *,
    robust: bool = True,
    start_s: Sequence[float] = (),
    tolerance: float = 1e-12,
) -> Fit:
    """The law that fits best, from two starts; at least two points are needed to say anything.

    `robust` lets large errors count less than their squares; without it `Fit.loss` itself is minimised. `start_s`
    (alpha, beta, gamma) is one more start; a 0 in it is filled in, for no step in logarithms leads away from it. The
    search ends when a step changes the parameters, or the cost, by a smaller share than `tolerance`.
    """
    if any(not (np.isfinite(value) and value >= 0) for value in start_s):
        raise InvalidInput(f"a fit cannot start from {tuple(start_s)}; give three numbers of at least 0, or none")
    if len(points) < 2:
        raise InvalidInput(f"a fit needs at least 2 operating points, not {len(points)}; measure more loads")

    def residuals(x: Floats) -> Floats:
        return relative_errors(points, model, np.exp(x)).ravel()

    runs = [
        least_squares(
            residuals,
            start,
            bounds=(start - _REACH, start + _REACH),
            loss="soft_l1" if robust else "linear",
            f_scale=_SOFT,
            xtol=tolerance,
            ftol=tolerance,
        )
        for start in [steady_start(points), _third(points), *([_filled(points, start_s)] if start_s else [])]
    ]
    best = min(runs, key=lambda run: float(run.cost)).x
    errors = relative_errors(points, model, np.exp(best))
    alpha, beta, gamma = np.exp(best).tolist()
    return Fit(
        alpha_s=alpha,
        beta_s=beta,
        gamma_s=gamma,
        condition_number=condition_number(points, model, np.exp(best)),
        log_covariance=_log_covariance(points, model, np.exp(best), errors),
        ttft_errors=tuple(errors[0].tolist()),
        itl_errors=tuple(errors[1].tolist()),
    )


def condition_number(points: Sequence[OperatingPoint], model: QueueModel, parameters: Floats) -> float:
    """kappa; HOPELESS with fewer residuals than parameters or a parameter without effect."""
    singular = np.linalg.svd(_jacobian(points, model, parameters), compute_uv=False)
    return float(min(singular[0] / singular[2], HOPELESS)) if len(singular) == 3 and singular[2] > 0 else HOPELESS


def _jacobian(points: Sequence[OperatingPoint], model: QueueModel, parameters: Floats) -> Floats:
    """J."""
    x = np.log(parameters)
    columns = []
    for step in _STEP * np.eye(3):
        above, below = (relative_errors(points, model, np.exp(x + s)).ravel() for s in (step, -step))
        columns.append((above - below) / (2 * _STEP))
    return np.stack(columns, axis=1)


def _log_covariance(
    points: Sequence[OperatingPoint], model: QueueModel, parameters: Floats, errors: Floats
) -> tuple[float, ...]:
    """How sure the points make the logs of the parameters; what they do not tell stays open by a factor of 12.

    The noise is the median error's (1.4826 of it is a normal law's deviation), and at least half a percent.
    """
    free = max(errors.size - 3, 1)
    noise = max(1.4826 * float(np.median(np.abs(errors))) * np.sqrt(errors.size / free), _LEAST_NOISE)
    j = _jacobian(points, model, parameters)
    covariance = np.linalg.inv(j.T @ j / noise**2 + np.eye(3) / _OPEN**2)
    return tuple(covariance.ravel().tolist())


def steady_start(points: Sequence[OperatingPoint]) -> Floats:
    """The law as if loads were steady, as logs: a place to start from.

    A step (of length ITL) computes rate (n + m) ITL tokens and reads the cache of rate (TTFT + m ITL) requests; a first
    token takes its chunks' steps, half a step of waiting, and its own work. Both are linear in the parameters.
    """
    rate, n, m, limit, ttft, itl = np.array([
        (p.arrival_rps, p.input_tokens, p.output_tokens, p.max_step_tokens, p.ttft_s, p.itl_s) for p in points
    ]).T  # fmt: skip
    chunks = np.ceil(n / limit)
    cached = rate * (ttft + m * itl) * (n + m / 2)
    steps = np.stack((np.ones_like(itl), rate * (n + m) * itl, cached), axis=1) / itl[:, None]
    firsts = np.stack((np.zeros_like(itl), n, n * (chunks + 1) / 2), axis=1) / ttft[:, None]
    own = np.maximum(ttft - (chunks + 0.5) * itl, 0.0) / ttft
    steady, _ = nnls(np.concatenate((steps, firsts)), np.concatenate((np.ones_like(itl), own)))
    logs: Floats = np.log(np.maximum(steady, np.exp(_third(points)) * 1e-3))
    return logs


def _filled(points: Sequence[OperatingPoint], start_s: Sequence[float]) -> Floats:
    """A start as logs, what is 0 in it taken from `_third`."""
    given = np.array(start_s, dtype=np.float64)
    return np.where(given > 0, np.log(np.where(given > 0, given, 1.0)), _third(points))


def _third(points: Sequence[OperatingPoint]) -> Floats:
    """Each parameter explains a third of the shortest ITL; as logs."""
    tokens = float(np.mean([p.input_tokens + p.output_tokens for p in points]))
    shortest = min(p.itl_s for p in points)
    return np.asarray(np.log(shortest / 3 / np.array([1.0, tokens, tokens**2])))
