"""Gaussian process regression for few and dear measurements: tens of points, some ten inputs, noise of unknown size.

n, p, d     points, columns of the inputs, length scales (a one-hot column group shares one: a choice is one input)
X [n, p]    inputs, ordered ones scaled to [0, 1]; two different choices are at distance 1 (one-hot columns / √2)
F [n, q]    features whose weight is learnt: prior knowledge of y, which counts as much as the data bear out
y [n]       outputs, of any scale (standardised inside)
l [d]       length scales; r²(x, x') = Σ_j |x_j - x'_j|² / l_j²
k(x, x')    s² M(r) + Σ_q w_q² f_q f'_q + 1, with M(r) = (1 + √5 r + 5/3 r²) exp(-√5 r), Matérn 5/2; the 1 is the
            unknown mean; the measured y has noise of variance v on top

The logarithms (log l, log s², log v, log w²) maximise the marginal likelihood times a normal prior on each
(Rasmussen and Williams, 2006, chapter 5), by L-BFGS with analytic gradients. The prior of log l grows with log √d, so
that functions of many inputs are not taken for noise (Hvarfner, Hellsten and Nardi, 2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist

Array = NDArray[np.float64]
ITERATIONS = 60  # of L-BFGS; more change no proposal
JITTER = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Priors:
    """Normal priors of the logarithms of l, s², v and w²: (mean, standard deviation)."""

    length: tuple[float, float] = (math.log(0.5), 0.8)  # of an input's length scale, times √d
    signal: tuple[float, float] = (0.0, 1.0)  # of s², in variances of y
    noise: tuple[float, float] = (math.log(1e-3), 1.5)  # of v, in variances of y
    weight: tuple[float, float] = (math.log(0.1), 1.5)  # of w², in variances of y


@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianProcess:
    """A fitted process; `fit` makes one."""

    groups: NDArray[np.int64]  # [p], which length scale each column uses
    X: Array
    F: Array
    lengths: Array  # [d]
    signal: float  # s², in variances of y
    noise: float  # v, in variances of y
    weights: Array  # [q], w²
    shift: float  # mean and scale of y
    scale: float
    _factor: Array = field(repr=False)  # lower Cholesky factor of the covariance of y
    _alpha: Array = field(repr=False)

    @property
    def noise_sd(self) -> float:
        """Standard deviation of one measurement, in the unit of y."""
        return math.sqrt(self.noise) * self.scale

    def predict(self, X: Array, F: Array | None = None) -> tuple[Array, Array]:
        """Mean and standard deviation of the noiseless function at [m, p] points, in the unit of y."""
        F = np.zeros((len(X), len(self.weights))) if F is None else F
        cross = _kernel(X, self.X, F, self.F, self.lengths[self.groups], self.signal, self.weights)
        mean = cross @ self._alpha
        half = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
        prior = self.signal + (F**2) @ self.weights + 1.0
        variance = np.maximum(prior - np.einsum("ij,ij->j", half, half), 1e-12)
        return self.shift + self.scale * mean, self.scale * np.sqrt(variance)

    def believing(self, X: Array, F: Array | None = None) -> GaussianProcess:
        """The same process, told its own mean at more points (Kriging believer; Ginsbourger et al., 2010)."""
        F = np.zeros((len(X), len(self.weights))) if F is None else F
        seen = self.shift + self.scale * (self._factor @ (self._factor.T @ self._alpha))
        mean, _ = self.predict(X, F)
        y = np.concatenate([seen, mean])
        return _condition(
            self.groups, np.vstack([self.X, X]), np.vstack([self.F, F]), y, self.lengths, self.signal, self.noise,
            self.weights, self.shift, self.scale,
        )  # fmt: skip


def fit(
    X: Array, y: Array, groups: NDArray[np.int64], F: Array | None = None, priors: Priors | None = None
) -> GaussianProcess:
    """The process with l, s², v and w² of highest posterior density; at least one point is needed."""
    priors = priors or Priors()
    F = np.zeros((len(X), 0)) if F is None else F
    shift, scale = float(y.mean()), float(y.std()) or 1.0
    z = (y - shift) / scale
    inputs = int(groups.max(initial=-1)) + 1
    apart = np.zeros((inputs, len(X), len(X)))
    for column, group in enumerate(groups):
        apart[group] += (X[:, None, column] - X[None, :, column]) ** 2
    outer = [np.outer(f, f) for f in F.T]
    middle = np.array(
        [priors.length[0] + 0.5 * math.log(max(inputs, 1))] * inputs
        + [priors.signal[0], priors.noise[0]]
        + [priors.weight[0]] * len(outer)
    )
    spread = np.array(
        [priors.length[1]] * inputs + [priors.signal[1], priors.noise[1]] + [priors.weight[1]] * len(outer)
    )

    def loss(theta: Array) -> tuple[float, Array]:
        return _negative_log_posterior(theta, z, apart, outer, middle, spread)

    bounds = [(m - 4 * s, m + 4 * s) for m, s in zip(middle, spread, strict=True)]
    found = minimize(loss, middle, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS})
    theta = np.exp(found.x)
    return _condition(
        groups, X, F, y, theta[:inputs], float(theta[inputs]), float(theta[inputs + 1]), theta[inputs + 2 :], shift,
        scale,
    )  # fmt: skip


def _negative_log_posterior(
    theta: Array, z: Array, apart: Array, outer: list[Array], middle: Array, spread: Array
) -> tuple[float, Array]:
    inputs = len(apart)
    lengths2 = np.exp(2 * theta[:inputs])
    signal, noise = math.exp(theta[inputs]), math.exp(theta[inputs + 1])
    weights = np.exp(theta[inputs + 2 :])
    r = np.sqrt(5 * np.tensordot(1 / lengths2, apart, axes=1))  # √5 r
    fall = signal * np.exp(-r)
    matern = fall * (1 + r + r * r / 3)
    K = matern + 1.0 + sum((w * o for w, o in zip(weights, outer, strict=True)), start=np.zeros_like(matern))
    K[np.diag_indices_from(K)] += noise + JITTER
    factor = cho_factor(K, lower=True, check_finite=False)
    alpha = cho_solve(factor, z, check_finite=False)
    inverse = cho_solve(factor, np.eye(len(z)), check_finite=False)
    away = (theta - middle) / spread
    value = 0.5 * z @ alpha + np.log(np.diag(factor[0])).sum() + 0.5 * away @ away
    slope = 0.5 * (inverse - np.outer(alpha, alpha))  # dvalue/dK
    gradient = np.empty_like(theta)
    steep = slope * fall * (1 + r) * (5 / 3)
    gradient[:inputs] = np.tensordot(apart, steep, axes=([1, 2], [0, 1])) / lengths2
    gradient[inputs] = (slope * matern).sum()
    gradient[inputs + 1] = noise * np.trace(slope)
    gradient[inputs + 2 :] = [w * (slope * o).sum() for w, o in zip(weights, outer, strict=True)]
    return float(value), gradient + away / spread


def _condition(
    groups: NDArray[np.int64], X: Array, F: Array, y: Array, lengths: Array, signal: float, noise: float,
    weights: Array, shift: float, scale: float,
) -> GaussianProcess:  # fmt: skip
    K = _kernel(X, X, F, F, lengths[groups], signal, weights)
    K[np.diag_indices_from(K)] += noise + JITTER
    factor, _ = cho_factor(K, lower=True, check_finite=False)
    factor = np.tril(factor)
    alpha = cho_solve((factor, True), (y - shift) / scale, check_finite=False)
    return GaussianProcess(
        groups=groups, X=X, F=F, lengths=lengths, signal=signal, noise=noise, weights=weights, shift=shift,
        scale=scale, _factor=factor, _alpha=alpha,
    )  # fmt: skip


def _kernel(A: Array, B: Array, FA: Array, FB: Array, lengths: Array, signal: float, weights: Array) -> Array:
    r = math.sqrt(5) * cdist(A / lengths, B / lengths) if A.shape[1] else np.zeros((len(A), len(B)))
    K: Array = signal * (1 + r + r * r / 3) * np.exp(-r) + 1.0 + (FA * weights) @ FB.T
    return K
