"""Requests sent one by one through the law of a queue model: the check on what its formulas say.

Arrivals are Poisson, at most N are served and Q wait, first come first served; more are turned away. A prefill advances
by 1 / (shared(b) + own(b) * relative prompt length) a second and a decode step by 1 / gap(b), b being the number in
service at that moment; relative lengths are gamma distributed. Nothing is averaged. Some independent runs, in C++ (a
few million requests a second), tell how certain their mean is.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyball.core.native import load_library
from flyball.numerics.markov import Floats
from flyball.performance.queueing import Anatomy

RUNS = 16
_WARM_UP = 20_000  # requests of every run that are left out; dozens of relaxation times of a load of 95 %
_FLAGS = ("-O3", "-ffp-contract=off")  # the same sums on every processor


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the requests that were served saw; those of one run lie together."""

    ttft_s: Floats  # [requests]
    e2e_s: Floats
    gap_s: Floats  # [N] a gap's length in a batch of 1..N
    gap_tokens: Floats  # [N] tokens that came after such a gap
    lost: float  # share of requests turned away
    mean_ttft_error: float  # standard error of the mean TTFT, relative to it

    def gap_percentiles(self, levels: tuple[float, ...]) -> Floats:
        """Over all gaps."""
        order = np.argsort(self.gap_s)
        below = np.cumsum(self.gap_tokens[order]) / self.gap_tokens.sum()
        return self.gap_s[order][np.minimum(np.searchsorted(below, np.array(levels) / 100), len(order) - 1)]

    @property
    def mean_gap_s(self) -> float:
        """Time in decode over tokens."""
        return float(self.gap_s @ self.gap_tokens / self.gap_tokens.sum())


def simulate(anatomy: Anatomy, row: int, rate_rps: float, requests: int, rng: np.random.Generator) -> Seen:
    """Send about so many requests, in all, at this arrival rate; raises NativeUnavailable without a C++ compiler."""
    n = int(anatomy.service.servers[row])
    each = -(-requests // RUNS)
    tokens = np.zeros(n + 1)
    runs = [_run(anatomy, row, rate_rps, each, rng, tokens) for _ in range(RUNS)]
    served = [~np.isnan(ttft) for ttft, _ in runs]
    ttft, e2e = (np.concatenate([r[i][s] for r, s in zip(runs, served, strict=True)]) for i in (0, 1))
    means = [float(np.nanmean(t)) for t, _ in runs]
    error = float(np.std(means, ddof=1)) / RUNS**0.5 / float(np.mean(means))
    return Seen(ttft, e2e, anatomy.gap_s[row, :n], tokens[1:], 1 - len(ttft) / (RUNS * each), error)


def _run(
    anatomy: Anatomy, row: int, rate_rps: float, requests: int, rng: np.random.Generator, tokens: Floats
) -> tuple[Floats, Floats]:
    """TTFT and E2E, NaN where turned away; adds to `tokens`."""
    n, places, count = int(anatomy.service.servers[row]), int(anatomy.service.places[row]), requests + _WARM_UP
    law = [
        np.concatenate(([1.0], table[row, :n])) for table in (anatomy.shared_s, anatomy.own_s, anatomy.gap_s)
    ]  # with nobody there nothing advances
    drawn = [
        np.cumsum(rng.exponential(1 / rate_rps, count)),
        _lengths(float(anatomy.input_cv[row]), count, rng),
        _lengths(float(anatomy.output_cv[row]), count, rng),
    ]
    seen = np.full((2, count), np.nan)
    decodes = float(anatomy.decodes[row])
    _library().law_requests(
        count, _WARM_UP, n, places, *map(_address, law), decodes, anatomy.first_decoded and decodes > 0,
        *map(_address, (*drawn, seen[0], seen[1], tokens)),
    )  # fmt: skip
    return seen[0, _WARM_UP:], seen[1, _WARM_UP:]


def _lengths(cv: float, count: int, rng: np.random.Generator) -> Floats:
    if cv == 0:
        return np.ones(count)
    return np.asarray(rng.gamma(cv**-2, cv**2, count))


@cache
def _library() -> ctypes.CDLL:
    library = load_library(Path(__file__).with_name("requests.cpp"), flags=_FLAGS)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.law_requests.restype = None
    library.law_requests.argtypes = [*[integer] * 4, *[pointer] * 3, ctypes.c_double, integer, *[pointer] * 6]
    return library


def _address(array: NDArray[Any]) -> int:
    return array.ctypes.data
