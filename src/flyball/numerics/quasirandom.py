"""Quasi-random points: they fill a cube evenly however few are drawn, and the n-th needs none of those before it.

The R sequence (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018):

d          dimensions
phi        the positive root of phi^(d+1) = phi + 1; the golden ratio for d = 1
x_n[j]     frac(shift[j] + (n + 1) phi^-j), j = 1..d, in [0, 1)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def r_sequence(start: int, count: int, shift: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Points start..start+count-1 of the R sequence in [0, 1)^d, one a row; d is the length of `shift`.

    >>> r_sequence(0, 3, [0.5]).round(3).ravel().tolist()
    [0.118, 0.736, 0.354]
    >>> bool((r_sequence(2, 1, [0.5, 0.5]) == r_sequence(0, 3, [0.5, 0.5])[2]).all())
    True
    """
    offset = np.atleast_1d(np.asarray(shift, dtype=np.float64))
    phi = 2.0
    for _ in range(64):  # a contraction: the fixed point is reached to the last bit
        phi = float((1 + phi) ** (1 / (len(offset) + 1)))
    steps = phi ** -np.arange(1.0, len(offset) + 1)
    points: npt.NDArray[np.float64] = (offset + np.outer(np.arange(start + 1, start + count + 1), steps)) % 1.0
    return points
