"""Points that fill the unit cube evenly, the same ones every time: integration without a random generator."""

from __future__ import annotations

import numpy as np

from flyball.numerics.markov import Floats


def kronecker(count: int, dimensions: int) -> Floats:
    """[count, dimensions] Multiples of powers of the generalised golden ratio, modulo 1 (Roberts, 2018).

    Coordinate j steps by 1 / phi^(j+1), where phi^(d+1) = phi + 1. Every point lies strictly inside the cube.

    >>> kronecker(4, 1).ravel().round(3).tolist()
    [0.118, 0.736, 0.354, 0.972]
    """
    phi = 2.0
    for _ in range(40):  # contracts by more than half each time
        phi = (1 + phi) ** (1 / (dimensions + 1))
    steps = phi ** -np.arange(1.0, dimensions + 1)
    points: Floats = (0.5 + np.arange(1, count + 1)[:, None] * steps) % 1
    return np.clip(points, 1e-12, 1 - 1e-12)
