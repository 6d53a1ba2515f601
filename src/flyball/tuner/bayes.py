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
    earlier: bool = False  # by an earlier study: it may be tried again

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
    promised: Sequence[Prediction] = (),
) -> Point | None:
    """The most valuable configuration to try next, or None if none is left."""
    taken = {pool.lattice.point(t.values) for t in tried if not t.earlier}
    candidates = pool.candidates(taken, rng)
    worth = _Worth(pool, tried, rng, feasibility, prior, promised)
    if pool.listed is None:
        candidates = _climbed(pool, candidates, worth, taken)
    if not len(candidates):
        return None
    values = worth(candidates)
    return tuple(int(level) for level in candidates[int(np.argmax(values))])


class _Worth:
    """The logarithm of what trying a point is worth, in an unknown unit."""

    def __init__(
        self,
        pool: Pool,
        tried: Sequence[Tried],
        rng: np.random.Generator,
        feasibility: str,
        prior: Prediction | None,
        promised: Sequence[Prediction],
    ) -> None:
        if feasibility not in MODELS:
            raise InvalidInput(f"unknown model of hidden constraints {feasibility!r}; use one of {', '.join(MODELS)}")
        self._pool = pool
        self._volume_seed = int(rng.integers(2**31))
        self._features = _Feature(prior, pool, rng)  # of the first objective
        self._promised = [_Feature(_bent(its), pool, rng) for its in promised]
        self._informed = prior is not None or bool(self._promised)
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
        if len(self._promised) != bent.shape[1]:
            self._promised = [_Feature(None, pool) for _ in bent.T]
        for margin, feature in zip(bent.T, self._promised, strict=True):
            model = fit(X, margin, pool.groups, feature([t.values for t in served]))
            waiting_features = feature([t.values for t in pending])
            self._promises.append(model.believing(waiting, waiting_features) if pending else model)
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
        for model, feature in zip(self._promises, self._promised, strict=True):
            believed &= model.predict(waiting, feature([t.values for t in pending]))[0] <= 0
        self._front = means[np.concatenate([kept, believed & kept.any()])]
        self._reference = means.min(axis=0)

    def _encode(self, tried: Sequence[Tried]) -> Array:
        rows = [self._pool.encode_values(t.values) for t in tried]
        return np.array(rows).reshape(len(rows), len(self._pool.groups))

    def __call__(self, points: Points) -> Array:
        X = self._pool.encode(points)
        chance, floor = self._valid(X)
        worth: Array = np.where(chance >= np.log(max(floor, 1e-12)), chance, chance - 1e3)
        values = [self._pool.lattice.values(tuple(p)) for p in points.tolist()] if self._informed else []
        for model, feature in zip(self._promises, self._promised, strict=True):
            mean, sd = model.predict(X, feature(values) if feature.told else None)
            worth = worth + np.maximum(log_ndtr(-mean / sd), UNLIKELY * 3)
        if not self._objectives or not len(self._front):
            return worth
        F = self._features(values) if self._features.told else None
        seen = [m.predict(X, F if k == 0 else None) for k, m in enumerate(self._objectives)]
        if len(seen) == 1:
            gain = log_expected_improvement(*seen[0], float(self._front.max()))
            return worth + np.logaddexp(gain, math.log(TRIFLE * self._objectives[0].scale))
        mean, sd = (np.stack([s[i] for s in seen], axis=1) for i in (0, 1))
        rng = np.random.default_rng(self._volume_seed)
        return worth + log_volume_improvement(mean, sd, self._front, self._reference, rng)


class _Feature:
    """What is expected of configurations, on the scale of what is usual in the space; no column if nothing is."""

    def __init__(self, expected: Prediction | None, pool: Pool, rng: np.random.Generator | None = None) -> None:
        self._expected = expected
        self._usual = (0.0, 1.0)  # mean and scale
        if expected is not None and rng is not None:
            sample = [expected(pool.lattice.values(tuple(p))) for p in pool.candidates((), rng)[:SAMPLE].tolist()]
            self._usual = (float(np.mean(sample)), float(np.std(sample)) or 1.0)

    @property
    def told(self) -> bool:
        """Whether anything is expected."""
        return self._expected is not None

    def __call__(self, values: Sequence[Configuration]) -> Array:
        """[n, 1], or [n, 0]."""
        if self._expected is None:
            return np.zeros((len(values), 0))
        mean, scale = self._usual
        return np.array([(self._expected(v) - mean) / scale for v in values]).reshape(len(values), 1)


def _bent(margin: Prediction) -> Prediction:
    def bent(values: Configuration) -> float:
        seen = margin(values)
        return math.copysign(math.log1p(abs(seen)), seen)

    return bent


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
