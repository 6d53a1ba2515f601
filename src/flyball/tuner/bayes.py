"""Our proposer: Bayesian optimisation of few, dear, partly failing trials, within half a second a suggestion.

1. The values that were measured are made even-tailed (Yeo and Johnson, 2000: throughputs saturate, latencies explode)
   and each objective and each promise's margin gets a Gaussian process over the knobs, a prediction (`prior`) as a
   feature of learnt weight. A second process, or SCOOT's forest, learns which configurations fail
   (`tuner.feasibility`).
2. A configuration is worth

       log EI + log P(it is served) + Σ log P(promise kept)        or, with several objectives, log EHVI in place of EI,

   against the best mean among those that kept every promise, so that one lucky window does not end the search; while
   nothing has kept them, the probabilities alone.
3. The most valuable free legal configuration is taken: of all, or in a large space of some thousand drawn ones and
   their neighbours, climbing. Trials that still run are believed to give what is expected of them, so that q
   suggestions at once go to q places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration
from flyball.numerics.expected_improvement import log_expected_improvement, log_volume_improvement
from flyball.numerics.gaussian_process import GaussianProcess, Priors, fit
from flyball.tuner.feasibility import MODELS, Model
from flyball.tuner.pool import Points, Pool
from flyball.tuner.space import Point

Array = NDArray[np.float64]
Prediction = Callable[[Configuration], float]  # of the first objective, in its unit

TRIFLE = 0.03  # of the spread of values: a gain that no trial is risked for
CLIMBERS = 8  # points from which the acquisition is climbed in a large space
ROUNDS = 6  # steps of each climb
SAMPLE = 256  # configurations from which the scale of a prior is known
SKEWED = 6  # measured values from which their skew is judged
POWERS = tuple(k / 4 for k in range(-4, 13))  # of the bend; 1 leaves the values as they are
UNLIKELY = np.log(1e-3)  # a promise kept with less chance is as good as broken


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """A configuration that was tried, or is being tried."""

    values: Configuration
    gains: tuple[float, ...] | None = None  # each objective, larger is better; None while it runs, and if it failed
    margins: tuple[float, ...] = ()  # each promise; above 0 it was broken
    failed: bool = False

    @property
    def runs(self) -> bool:
        """Whether its result is not known yet."""
        return self.gains is None and not self.failed


def suggest(
    pool: Pool,
    tried: Sequence[Tried],
    rng: np.random.Generator,
    *,
    feasibility: str = "gp",
    prior: Prediction | None = None,
) -> Point | None:
    """The most valuable configuration to try next, or None if none is left."""
    taken = {pool.lattice.point(t.values) for t in tried}
    candidates = pool.candidates(taken, rng)
    worth = _Worth(pool, tried, rng, feasibility, prior)
    if pool.listed is None:
        candidates = _climbed(pool, candidates, worth, taken)
    if not len(candidates):
        return None
    values = worth(candidates)
    return tuple(int(level) for level in candidates[int(np.argmax(values))])


class _Worth:
    """The logarithm of what trying a point is worth, in an unknown unit."""

    def __init__(
        self, pool: Pool, tried: Sequence[Tried], rng: np.random.Generator, feasibility: str, prior: Prediction | None
    ) -> None:
        if feasibility not in MODELS:
            raise InvalidInput(f"unknown model of hidden constraints {feasibility!r}; use one of {', '.join(MODELS)}")
        self._pool = pool
        self._prior = prior
        self._volume_seed = int(rng.integers(2**31))
        self._usual = (0.0, 1.0)  # mean and scale of what the prior predicts
        if prior is not None:
            sample = pool.candidates((), rng)[:SAMPLE].tolist()
            expected = [prior(pool.lattice.values(tuple(point))) for point in sample]
            self._usual = (float(np.mean(expected)), float(np.std(expected)) or 1.0)
        done = [t for t in tried if not t.runs]
        X = self._encode(done)
        valid = [not t.failed for t in done]
        self._valid: Model = MODELS[feasibility](X, valid, pool.groups, int(rng.integers(2**31))) if done else _blank
        served = [t for t in done if not t.failed]
        pending = [t for t in tried if t.runs]
        self._promises: list[GaussianProcess] = []
        self._objectives: list[GaussianProcess] = []
        if served:
            self._fit(served, pending)

    def _fit(self, served: Sequence[Tried], pending: Sequence[Tried]) -> None:
        pool = self._pool
        X, waiting = self._encode(served), self._encode(pending)
        margins = np.array([t.margins for t in served]).reshape(len(served), -1)
        gains = np.array([t.gains for t in served])
        F = self._features([t.values for t in served])
        FW = self._features([t.values for t in pending])
        bent = np.sign(margins) * np.log1p(np.abs(margins))
        for margin in bent.T:
            model = fit(X, margin, pool.groups)
            self._promises.append(model.believing(waiting) if pending else model)
        for k, gain in enumerate(gains.T):
            model = fit(X, even_tailed(gain), pool.groups, F if k == 0 else None, Priors())
            if pending:
                model = model.believing(waiting, FW if k == 0 else None)
            self._objectives.append(model)
        kept = (margins <= 0).all(axis=1)
        everywhere = np.vstack([X, waiting])
        means = np.stack([m.predict(everywhere, np.vstack([F, FW]) if k == 0 else None)[0]
                          for k, m in enumerate(self._objectives)], axis=1)  # fmt: skip
        believed = np.ones(len(waiting), dtype=bool)
        for model in self._promises:
            believed &= model.predict(waiting)[0] <= 0
        self._front = means[np.concatenate([kept, believed & kept.any()])]
        self._reference = means.min(axis=0)

    def _encode(self, tried: Sequence[Tried]) -> Array:
        rows = [self._pool.encode_values(t.values) for t in tried]
        return np.array(rows).reshape(len(rows), len(self._pool.groups))

    def _features(self, values: Sequence[Configuration]) -> Array:
        if self._prior is None:
            return np.zeros((len(values), 0))
        mean, scale = self._usual
        return np.array([(self._prior(v) - mean) / scale for v in values]).reshape(len(values), 1)

    def __call__(self, points: Points) -> Array:
        X = self._pool.encode(points)
        chance, floor = self._valid(X)
        worth: Array = np.where(chance >= np.log(max(floor, 1e-12)), chance, chance - 1e3)
        for model in self._promises:
            mean, sd = model.predict(X)
            worth = worth + np.maximum(log_ndtr(-mean / sd), UNLIKELY * 3)
        if not self._objectives or not len(self._front):
            return worth
        F = self._features([self._pool.lattice.values(tuple(p)) for p in points.tolist()]) if self._prior else None
        seen = [m.predict(X, F if k == 0 else None) for k, m in enumerate(self._objectives)]
        if len(seen) == 1:
            gain = log_expected_improvement(*seen[0], float(self._front.max()))
            return worth + np.logaddexp(gain, math.log(TRIFLE * self._objectives[0].scale))
        mean, sd = (np.stack([s[i] for s in seen], axis=1) for i in (0, 1))
        rng = np.random.default_rng(self._volume_seed)
        return worth + log_volume_improvement(mean, sd, self._front, self._reference, rng)


def _blank(X: Array) -> tuple[Array, float]:
    return np.zeros(len(X)), 0.0


def even_tailed(y: Array) -> Array:
    """Values bent monotonically until they look normal (Yeo and Johnson, 2000); few values as they are."""
    spread = float(y.std())
    if len(y) < SKEWED or not spread > 0:
        return y
    z = (y - y.mean()) / spread
    stretch = float((np.sign(z) * np.log1p(np.abs(z))).sum())
    bent = [_yeo_johnson(z, power) for power in POWERS]
    likelihood = [
        (power - 1) * stretch - len(z) / 2 * math.log(float(b.var())) for power, b in zip(POWERS, bent, strict=True)
    ]
    return bent[int(np.argmax(likelihood))]


def _yeo_johnson(z: Array, power: float) -> Array:
    up, down = np.log1p(np.maximum(z, 0)), np.log1p(np.maximum(-z, 0))
    high = np.expm1(power * up) / power if power else up
    low = np.expm1((2 - power) * down) / (2 - power) if power != 2 else down
    bent: Array = np.where(z >= 0, high, -low)
    return bent


def _climbed(pool: Pool, points: Points, worth: _Worth, taken: set[Point | None]) -> Points:
    """The best points after some rounds of moving to better neighbours."""
    if not len(points):
        start = [p for p in taken if p is not None] or [tuple(0 for _ in pool.lattice.axes)]
        points = pool.free(pool.around(np.array(start)), taken)
    best = points
    for _ in range(ROUNDS):
        if not len(best):
            return best
        order = np.argsort(-worth(best), kind="stable")[:CLIMBERS]
        climbers = best[order]
        near = pool.free(np.vstack([climbers, pool.around(climbers)]), taken)
        if len(near) == len(climbers):
            break
        best = near
    return best
