"""Percentiles of TTFT, ITL and E2E: what a request goes through, sampled evenly from the chain's stationary law.

A request that comes finds k others with the chain's own probability (Poisson arrivals see time averages: Wolff, 1982).
With a place in the batch it starts at once, k + 1 in service; else it waits for k - N + 1 to leave: a gamma variable
with means that satisfy Little's law whatever the law of how many wait (`backlog`). Its shape is 1 for each that leaves
under exponential service; else 3 / (5 - 2 tail) for N = 1, as the rest of a gamma service has, and 1 / N of that
difference for more. Its prefill takes what the batch it joins makes it take. Over its decode steps the batch moves on
from there: the speed 1 / gap is an Ornstein-Uhlenbeck process with the mean and variance that requests in service see,
and the batch's own time of relaxation. The points are a fixed quasi-random set, some for those who start at once and
some for those who wait, each with its weight, so the same question always has the same answer. Checked against a
simulation of the requests (`flyball.performance.requests`) in benchmarks/percentiles.py; limits:
docs/theory/queueing.md.

symbol   shape   meaning
S                points; weight [S] of each
k        [S]     requests that one finds
W        [S]     wait, s
v        [S]     steps per second of one's own decode; vbar, var: mean and variance that a request in service sees
theta            relaxation of the batch, 1/s: arrivals over the variance of the batch (as in M/M/inf)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import gammaincinv, ndtri

from flyball.core.errors import InvalidInput
from flyball.numerics.markov import Backlog, Floats, backlog, fewer_waits
from flyball.numerics.quasirandom import kronecker
from flyball.performance.queueing import Anatomy, Dissectable, Queues

AT_ONCE, WAITING = 3072, 1024  # points
LEVELS = (50.0, 90.0, 99.0)
_ROUNDS = 6  # of the fixed point for the time that decode steps take
_EQUAL = 1e-3  # variation under which lengths are taken for equal
_IDLE_RPS = 1e-9  # stands for no load


@dataclass(frozen=True, slots=True, eq=False)
class Percentiles:
    """Of replicas at their loads: arrays [C, L] in the order of the levels asked for, and means [C]."""

    ttft_s: Floats
    itl_s: Floats  # of all gaps between tokens
    e2e_s: Floats
    mean_ttft_s: Floats
    mean_itl_s: Floats
    mean_e2e_s: Floats


def percentiles(queues: Queues, rates_rps: Floats, levels: Sequence[float] = LEVELS) -> Percentiles:
    """Percentiles of admitted requests at one arrival rate each, [C].

    >>> from flyball.performance.queueing import Replicas, queue_model
    >>> one = Replicas.of(alpha_s=.012, beta_s=5e-5, gamma_s=5e-7, input_tokens=128, output_tokens=512,
    ...                   max_batch=48, max_queue=128)
    >>> seen = percentiles(queue_model("v3").prepare(one), np.array([3.5]))
    >>> print(" ".join(f"{v:.2f}" for v in seen.ttft_s[0]))  # P50, P90, P99
    0.05 2.84 8.93
    """
    if not isinstance(queues, Dissectable):
        raise InvalidInput("this queue model tells means only; use v3 or v3-engine for percentiles")
    if not all(0 < level < 100 for level in levels):
        raise InvalidInput(f"percentiles {list(levels)} are asked for; give numbers between 0 and 100")
    anatomy = queues.anatomy()
    means = queues.analyze(rates_rps)
    head, log_r = anatomy.service.distribution(np.maximum(rates_rps, _IDLE_RPS))
    rows = [_Row.of(anatomy, c, head[c], float(log_r[c])) for c in range(len(head))]
    accepted = 1 - means.loss
    admitted = np.maximum(rates_rps * accepted, _IDLE_RPS).tolist()
    seen = [row.requests(rate) for row, rate in zip(rows, admitted, strict=True)]
    gaps = [row.gaps(levels) for row in rows]
    ttft, e2e, weights = (np.array([s[i] for s in seen]) for i in range(3))
    itl, mean_itl = np.array([g[0] for g in gaps]), np.array([g[1] for g in gaps])
    if not anatomy.first_decoded:  # what that reading adds (rest of a step, bursts) is added on average
        ttft += np.maximum(means.ttft_s - (weights * ttft).sum(axis=1), 0.0)[:, None]
        e2e += np.maximum(means.response_s - (weights * e2e).sum(axis=1), 0.0)[:, None]
        longer = np.maximum(means.itl_s / np.where(mean_itl > 0, mean_itl, np.inf), 1.0)
        itl, mean_itl = itl * longer[:, None], mean_itl * longer
    return Percentiles(
        ttft_s=_weighted(ttft, weights, levels),
        itl_s=itl,
        e2e_s=_weighted(e2e, weights, levels),
        mean_ttft_s=(weights * ttft).sum(axis=1),
        mean_itl_s=mean_itl,
        mean_e2e_s=(weights * e2e).sum(axis=1),
    )


def _weighted(values: Floats, weights: Floats, levels: Sequence[float]) -> Floats:
    """[C, L] Percentiles of [C, S] values."""
    order = np.argsort(values, axis=1)
    sorted_weights = np.take_along_axis(weights, order, axis=1)
    below = np.cumsum(sorted_weights, axis=1) - sorted_weights / 2
    rows = zip(np.array(levels) / 100 * np.ones((len(values), 1)), below, values, order, strict=True)
    return np.array([np.interp(at, share, row[o]) for at, share, row, o in rows])


@lru_cache(maxsize=1)
def _points() -> Floats:
    """[S, 5] In either part, every coordinate takes evenly spaced values."""

    def even(count: int) -> Floats:
        ranks = kronecker(count, 5).argsort(axis=0).argsort(axis=0)
        return np.asarray((ranks + 0.5) / count, dtype=np.float64)

    return np.concatenate((even(AT_ONCE), even(WAITING)))


@lru_cache(maxsize=64)
def _lengths(cv: float, column: int) -> Floats:
    """[S] Lengths relative to their mean, gamma distributed (cv 1: exponential; 0: all equal)."""
    u = _points()[:, column]
    if cv < _EQUAL:
        return np.ones(len(u))
    shape = cv**-2
    return np.asarray(gammaincinv(shape, u) / shape, dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """One replica at one load."""

    batch: Floats  # [N + 1] probability of 0..N in service
    shared: Floats  # [N] and so on: see Anatomy
    own: Floats
    gap: Floats
    decodes: float
    first_decoded: bool
    cv: tuple[float, float]
    places: int
    tail: float  # see ServiceRates
    log_r: float
    leaving_rps: float  # mu(N)

    @classmethod
    def of(cls, a: Anatomy, c: int, head: Floats, log_r: float) -> _Row:
        n = int(a.service.servers[c])
        waiting_or_full = max(1 - float(head[:n].sum()), 0.0)
        return cls(
            batch=np.append(head[:n], waiting_or_full),
            shared=a.shared_s[c, :n],
            own=a.own_s[c, :n],
            gap=a.gap_s[c, :n],
            decodes=float(a.decodes[c]),
            first_decoded=a.first_decoded,
            cv=(float(a.input_cv[c]), float(a.output_cv[c])),
            places=int(a.service.places[c]),
            tail=float(a.service.tail[c]),
            log_r=log_r,
            leaving_rps=float(np.exp(a.service.log_mu_last[c, 1])),
        )

    def requests(self, admitted_rps: float) -> tuple[Floats, Floats, Floats]:
        """[S] TTFT and [S] E2E of admitted requests, and [S] weights of them."""
        u = _points()
        found, waits = np.split(u[:, 0], [AT_ONCE])
        n = len(self.gap)
        head = np.cumsum(self.batch[:n])
        entered = np.searchsorted(head, found * head[-1], side="right")  # all 0 far beyond capacity: the full batch
        entered = np.minimum(np.append(entered, np.full(WAITING, n - 1)), n - 1)
        wait, late = self._wait(waits, u[AT_ONCE:, 1])
        prompt, answer = _lengths(self.cv[0], 2), _lengths(self.cv[1], 3)
        first = np.append(np.zeros(AT_ONCE), wait) + self.shared[entered] + self.own[entered] * prompt
        decode = self._decode(entered, self.decodes * answer, ndtri(u[:, 4]), admitted_rps)
        weights = np.repeat(((1 - late) / AT_ONCE, late / WAITING), (AT_ONCE, WAITING))
        ttft = first + self.gap[entered] if self.first_decoded and self.decodes else first
        return ttft, first + decode, weights

    def _wait(self, u: Floats, v: Floats) -> tuple[Floats, float]:
        """Waits of those who do, and the share of admitted requests that do."""
        full = np.asarray(self.batch[-1])
        if not self.places:
            return np.zeros(len(u)), 0.0
        log_r, tail, servers = (np.asarray(x, dtype=np.float64) for x in (self.log_r, self.tail, len(self.gap)))
        law = backlog(log_r, tail, servers)
        i, log_v = np.arange(self.places + 1.0), np.log(np.maximum(law.v, 1e-300))
        top = max(float(law.log_u), 0.0) * self.places
        chance = law.a * np.exp(law.log_u * i - top) - law.b * np.exp(log_v * i - top)
        room = float(chance[:-1].sum() / chance.sum())
        late = float(full * fewer_waits(full, tail, servers)) * room
        ahead = np.searchsorted(np.cumsum(chance[:-1]) / chance[:-1].sum(), u, side="right")
        ahead = np.minimum(ahead, self.places - 1)
        shape = (1 + (3 / (5 - 2 * self.tail) - 1) / len(self.gap)) * (i[:-1] + 1)
        wait = gammaincinv(shape[ahead], v) * (self._until_s(law, log_v) / shape)[ahead]
        return wait, late / (1 - float(full) * (1 - room))

    def _until_s(self, law: Backlog, log_v: Floats) -> Floats:
        """[Q] Mean wait with i ahead: each leaves after P(more than j wait) / P(j or more) / lambda, j = 0..i.

        So the mean over all is what Little's law says of an endless queue. Overloaded, each leaves after 1 / mu(N).
        """
        if self.log_r >= 0:
            return np.arange(1.0, self.places + 1) / self.leaving_rps
        i, top = np.arange(self.places + 1.0), max(float(law.log_u), float(log_v))
        above = law.above_a * np.exp((law.log_u - top) * i) - law.above_b * np.exp((log_v - top) * i)
        each = np.exp(top - self.log_r) / self.leaving_rps * above[1:] / above[:-1]
        return np.asarray(np.cumsum(each), dtype=np.float64)

    def _decode(self, entered: Floats, steps: Floats, z: Floats, admitted_rps: float) -> Floats:
        """[S] Time that so many decode steps take."""
        b = np.arange(1.0, len(self.gap) + 1)
        weight, speed = b * self.batch[1:], 1 / self.gap
        weight /= weight.sum()
        vbar = float(weight @ speed)
        var = float(weight @ np.square(speed - vbar))
        spread = float(self.batch[1:] @ np.square(b)) - float(self.batch[1:] @ b) ** 2
        theta = admitted_rps / max(spread, 1e-12)
        start, time = speed[entered] - vbar, steps / vbar
        for _ in range(_ROUNDS):
            x = np.maximum(theta * time, 1e-6)
            kept = -np.expm1(-x) / x  # of the first speed, in the mean over the time
            moved = np.maximum(2 * x - 3 + 4 * np.exp(-x) - np.exp(-2 * x), 0.0) / np.square(x)
            mean = vbar + start * kept + z * np.sqrt(var * moved)
            time = steps / np.clip(mean, speed.min(), speed.max())
        return time

    def gaps(self, levels: Sequence[float]) -> tuple[Floats, float]:
        """Percentiles over all gaps, and their mean: a batch of b yields b tokens a gap."""
        if not self.decodes:
            return np.zeros(len(levels)), 0.0
        b = np.arange(1.0, len(self.gap) + 1)
        tokens = self.batch[1:] * b / self.gap
        tokens /= tokens.sum()
        order = np.argsort(self.gap)
        below = np.cumsum(tokens[order])
        at = np.minimum(np.searchsorted(below, np.array(levels) / 100 * (1 - 1e-12)), len(b) - 1)
        return self.gap[order][at], float(tokens @ self.gap)
