"""Hidden constraints: which configurations will fail, learnt from those that did.

Only a trial tells that an engine does not start, runs out of memory or crashes under a configuration. Models of that,
by name:

gp      (default) a Gaussian process on +1 (served) and -1 (failed) with linear features beside the Matérn kernel, since
        failures mostly lie beyond a boundary: more sequences, more memory. The probability multiplies what a
        configuration is expected to gain, and configurations below a floor are left alone while others remain.
forest  SCOOT's rule (Cheng et al., 2025): a random forest, asked once there are as many trials as axes less one; a
        suggestion needs P(valid) ≥ δ, where δ begins at 0.5, grows by 0.05 (to 0.75 at most) with each failure, and
        falls by 0.05 (to 0.25 at least) after each five successes in a row.
none    no model: failures are trials without a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from flyball.numerics import gaussian_process as gp

Array = NDArray[np.float64]
FLOOR = 0.5  # probability below which a configuration is left alone while others remain
LABELS = gp.Priors(noise=(math.log(0.02), 1.0), weight=(math.log(0.3), 1.0))  # served and failed do not mix

Model = Callable[[Array], tuple[Array, float]]  # inputs -> log P(valid) of each, and the P that a suggestion needs


def everything(X: Array) -> tuple[Array, float]:
    """No trial failed yet: nothing is known against any configuration."""
    return np.zeros(len(X)), 0.0


def by_process(X: Array, valid: Sequence[bool], groups: NDArray[np.int64], seed: int) -> Model:  # noqa: ARG001
    """See the module, `gp`."""
    if all(valid):
        return everything
    labels = np.where(valid, 1.0, -1.0)
    linear = X - 0.5
    # in one class the labels have no spread; a lone opposite at no place keeps their scale
    model = gp.fit(X, labels, groups, linear, LABELS)

    def log_valid(candidates: Array) -> tuple[Array, float]:
        mean, sd = model.predict(candidates, candidates - 0.5)
        return log_ndtr(mean / np.hypot(sd, model.noise_sd)), FLOOR

    return log_valid


def by_forest(X: Array, valid: Sequence[bool], groups: NDArray[np.int64], seed: int) -> Model:
    """See the module, `forest`; `valid` in the order of the trials."""
    if all(valid) or len(valid) < int(groups.max(initial=0)):
        return everything
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(n_estimators=100, random_state=seed, n_jobs=1).fit(X, np.array(valid))
    threshold = scoot_threshold(valid)

    def log_valid(candidates: Array) -> tuple[Array, float]:
        classes = list(forest.classes_)
        chance = (
            forest.predict_proba(candidates)[:, classes.index(True)] if True in classes else np.zeros(len(candidates))
        )
        return np.where(chance >= threshold, 0.0, np.log(np.maximum(chance, 1e-6))), threshold

    return log_valid


def scoot_threshold(valid: Sequence[bool]) -> float:
    """SCOOT's δ after these trials.

    >>> round(scoot_threshold([True, False, False]), 2), round(scoot_threshold([True] * 10), 2)
    (0.6, 0.4)
    """
    threshold, streak = 0.5, 0
    for served in valid:
        streak = streak + 1 if served else 0
        if not served:
            threshold = min(threshold + 0.05, 0.75)
        elif streak == 5:
            threshold, streak = max(threshold - 0.05, 0.25), 0
    return threshold


def unlearnt(X: Array, valid: Sequence[bool], groups: NDArray[np.int64], seed: int) -> Model:  # noqa: ARG001
    """See the module, `none`."""
    return everything


MODELS: Mapping[str, Callable[[Array, Sequence[bool], NDArray[np.int64], int], Model]] = {
    "gp": by_process,
    "forest": by_forest,
    "none": unlearnt,
}
