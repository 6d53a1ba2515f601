"""What a measurement is expected to gain: logarithms, for far from the best the gains themselves vanish in rounding.

f           the unknown value at a point, normal with mean m and standard deviation s; larger is better
EI          E max(0, f - b), for the best value b so far: s h(z), z = (m - b) / s, h(z) = φ(z) + z Φ(z)
EHVI        the expected growth of the volume dominated by a Pareto front. In polar form the volume above a reference
            point is proportional to E_u max_y min_i (y_i / u_i)₊^k over directions u uniform on the positive sphere of
            k objectives (Zhang and Golovin, 2020); with samples of f in place of y that serves for any k.

log h is computed as in Ament, Daulton, Eriksson, Balandat and Bakshy (2023).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, log_ndtr

Array = NDArray[np.float64]
SAMPLES = 128  # of direction and function together


def log_expected_improvement(mean: Array, sd: Array, best: float) -> Array:
    """Logarithm of EI at each point.

    >>> float(np.exp(log_expected_improvement(np.array([0.0]), np.array([1.0]), 0.0))[0])
    0.3989...
    """
    z = (mean - best) / sd
    near = np.maximum(z, -1.0)
    usual = np.log(np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi) + near * np.exp(log_ndtr(near)))
    far = np.minimum(z, -1.0)
    rest = np.maximum(1 - math.sqrt(math.pi / 2) * -far * erfcx(-far / math.sqrt(2)), 1e-300)  # h(z) = φ(z) · rest
    tail = -0.5 * far**2 - 0.5 * math.log(2 * math.pi) + np.log(rest)
    logs: Array = np.log(sd) + np.where(z > -1, usual, np.where(z > -1e5, tail, -0.5 * far**2 - 2 * np.log(-far)))
    return logs


def log_volume_improvement(mean: Array, sd: Array, front: Array, reference: Array, rng: np.random.Generator) -> Array:
    """Logarithm of EHVI, up to a constant, at points [m, k]; `front` [n, k] is what was measured, larger is better."""
    k = mean.shape[1]
    directions = np.abs(rng.standard_normal((SAMPLES, k)))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    draws = rng.standard_normal((SAMPLES, k))
    gained = np.zeros(len(mean))
    for u, e in zip(directions, draws, strict=True):
        held = _reach(front, reference, u).max(initial=0.0)
        gained += np.maximum(_reach(mean + sd * e, reference, u) - held, 0.0)
    logs: Array = np.log(gained / SAMPLES + 1e-300)
    return logs


def _reach(y: Array, reference: Array, u: Array) -> Array:
    reach: Array = np.maximum(((y - reference) / u).min(axis=1), 0.0) ** len(u)
    return reach
