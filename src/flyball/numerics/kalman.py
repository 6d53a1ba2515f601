"""Kalman filters: what is believed of a state, moved on in time and corrected by what is measured.

Update in Joseph's form, which keeps covariances symmetric and positive whatever the rounding (Bar-Shalom, Li and
Kirubarajan, *Estimation with Applications to Tracking and Navigation*, 5.2 and 10.3).

symbol   shape    meaning
x, P     [n]      state and its covariance [n, n]
f, F              motion of the state, and its matrix or Jacobian [n, n]
Q        [n, n]   covariance that motion adds
z, h     [m]      measurement, and what a state would show; H its matrix or Jacobian [m, n]
R        [m, m]   covariance of the measurement
y, S     [m]      innovation z - h(x) and its covariance [m, m]
NIS               y' S⁻¹ y: chi-squared with m degrees of freedom where the beliefs hold
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flyball.numerics.markov import Floats

JACOBIAN_STEP = 0.01  # relative; absolute where the state is 0


@dataclass(frozen=True, slots=True, eq=False)
class Belief:
    """A state and how sure it is."""

    mean: Floats
    covariance: Floats

    def moved(self, transition: Floats, noise: Floats) -> Belief:
        """A step of time later: F x, F P F' + Q. For a motion that is not linear, F is its Jacobian at x.

        >>> Belief(np.array([0.0, 1.0]), np.eye(2)).moved(np.array([[1, 1], [0, 1]]), np.zeros((2, 2))).mean.tolist()
        [1.0, 1.0]
        """
        return Belief(transition @ self.mean, transition @ self.covariance @ transition.T + noise)


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """A belief corrected by a measurement, and how that went."""

    belief: Belief
    innovation: Floats  # y
    innovation_covariance: Floats  # S
    gain: Floats  # K
    nis: float


def update(prior: Belief, innovation: Floats, observation: Floats, noise: Floats) -> Update:
    """Correct a belief: x + K y, with K = P H' S⁻¹ and S = H P H' + R."""
    p, h = prior.covariance, observation
    s = h @ p @ h.T + noise
    gain = np.asarray(np.linalg.solve(s, h @ p).T, dtype=np.float64)
    kept = np.eye(len(prior.mean)) - gain @ h
    covariance = kept @ p @ kept.T + gain @ noise @ gain.T
    nis = float(innovation @ np.linalg.solve(s, innovation))
    return Update(Belief(prior.mean + gain @ innovation, covariance), innovation, s, gain, nis)


def extended_update(prior: Belief, measured: Floats, shows: Callable[[Floats], Floats], noise: Floats) -> Update:
    """Correct a belief by a measurement that is no linear function of the state, taken as linear around it."""
    return update(prior, measured - shows(prior.mean), jacobian(shows, prior.mean), noise)


def jacobian(function: Callable[[Floats], Floats], at: Floats, step: float = JACOBIAN_STEP) -> Floats:
    """[m, n] By central differences.

    >>> jacobian(lambda x: np.array([x[0] ** 2, 3 * x[1]]), np.array([2.0, 0.0])).round(9).tolist()
    [[4.0, 0.0], [0.0, 3.0]]
    """
    width = np.where(at == 0, step, np.abs(at) * step)
    columns = [
        (function(at + move) - function(at - move)) / (2 * w) for move, w in zip(np.diag(width), width, strict=True)
    ]
    return np.stack(columns, axis=1)
