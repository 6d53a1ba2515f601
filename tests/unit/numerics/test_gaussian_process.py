"""Gaussian process regression and what it makes of gains."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad
from scipy.stats import norm

from flyball.numerics import gaussian_process as gp
from flyball.numerics.expected_improvement import log_expected_improvement, log_volume_improvement


def wave(X: np.ndarray) -> np.ndarray:
    """Two of the inputs matter."""
    return np.sin(3 * X[:, 0]) + X[:, 1] ** 2


def test_a_smooth_function_is_learnt_from_few_points(rng: np.random.Generator) -> None:
    """Forty points of four inputs: errors are small, and no larger than the process says."""
    X = rng.random((40, 4))
    model = gp.fit(X, wave(X), np.arange(4))
    Z = rng.random((200, 4))
    mean, sd = model.predict(Z)
    errors = np.abs(mean - wave(Z))
    assert errors.mean() < 0.05
    assert (errors < 3 * sd + 1e-3).mean() > 0.95
    assert model.lengths[2:].min() > model.lengths[:2].max()  # what does not matter is known to be so


def test_noise_is_told_from_signal(rng: np.random.Generator) -> None:
    """The noise found is about the noise put in."""
    X = rng.random((80, 1))
    model = gp.fit(X, 10 * wave(np.hstack([X, X])) + rng.normal(0, 1.0, 80), np.arange(1))
    assert 0.7 < model.noise_sd < 1.4


def test_the_gradient_of_the_posterior_is_right(rng: np.random.Generator) -> None:
    """Against differences, with a learnt weight."""
    X = rng.random((12, 3))
    apart = np.stack([(X[:, None, j] - X[None, :, j]) ** 2 for j in range(3)])
    outer = [np.outer(X[:, 0], X[:, 0])]
    z, middle, spread = rng.normal(size=12), np.zeros(6), np.ones(6)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return gp._negative_log_posterior(theta, z, apart, outer, middle, spread)

    theta = rng.normal(0, 0.5, 6)
    assert check_grad(lambda t: loss(t)[0], lambda t: loss(t)[1], theta) < 1e-4


def test_a_believed_point_is_certain_and_changes_no_mean(rng: np.random.Generator) -> None:
    """That is what keeps a second suggestion away from the first."""
    X = rng.random((15, 2))
    model = gp.fit(X, wave(X), np.arange(2))
    Z = rng.random((3, 2))
    believing = model.believing(Z)
    assert believing.predict(Z)[0] == pytest.approx(model.predict(Z)[0])
    assert (believing.predict(Z)[1] < model.predict(Z)[1]).all()


def test_a_feature_that_foretells_everything_is_trusted(rng: np.random.Generator) -> None:
    """Where no input says anything, predictions far from the data follow the feature."""
    X, F = rng.random((20, 2)), rng.normal(size=(20, 1))
    model = gp.fit(X, 3 * F[:, 0], np.arange(2), F)
    mean, _ = model.predict(np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([[-1.0], [1.0]]))
    assert mean == pytest.approx([-3, 3], abs=0.3)


@pytest.mark.parametrize("z", [-1e6, -50.0, -5.0, -1.0001, -0.9999, 0.0, 3.0])
def test_log_gains_are_finite_and_right(z: float) -> None:
    """Against the plain formula where that can be computed, and finite where it cannot."""
    found = log_expected_improvement(np.array([z]), np.array([1.0]), 0.0)[0]
    assert np.isfinite(found)
    if z > -6:
        assert found == pytest.approx(np.log(norm.pdf(z) + z * norm.cdf(z)), rel=1e-6)


def test_a_point_that_extends_the_front_gains_volume() -> None:
    """Beyond the front more than behind it; a gap in the front more than a neighbour of it."""
    front = np.array([[0.0, 1.0], [1.0, 0.0]])
    mean = np.array([[0.9, 0.9], [0.05, 0.99], [-0.5, -0.5]])
    gains = log_volume_improvement(mean, np.full((3, 2), 1e-3), front, np.array([-1.0, -1.0]), np.random.default_rng(0))
    assert gains[0] > gains[1] > gains[2]
