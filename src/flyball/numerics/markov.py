"""Finite queues with state-dependent service, solved in closed form where the chain is geometric.

A birth-death chain on 0..K: arrivals at rate lambda while fewer than K = N + Q are present, service at rate mu(k)
with k present and at mu(N) beyond. Its stationary law (Kleinrock, Queueing Systems I, 3.1) is

    p[k] ∝ prod_{j=1..k} lambda / mu(min(j, N))

so log p is linear in log(lambda) for k < N, and from k = N on the terms are geometric with ratio r = lambda / mu(N).
The head is one exponential a state, the tail (however long the queue) a closed form.

symbol      shape     meaning
C, R                  queues solved at once; arrival rates tried on each
N           [C]       states of the head: the most that are served at once
Q           [C]       places for those who wait
log_mu_sum  [C, Nmax] log_mu_sum[k] = sum of log(mu(j)) for j = 1..k, k = 0..N-1; +inf past the end of a shorter row
log_mu_last [C, 2]    that sum for k = N, and log(mu(N))
tail        [C]       exponent of r among the many who wait: 1 for exponential service, 2 / (1 + cv²) for another
                      variation (the workload's decay; that anybody waits hardly depends on it: Zhang, Dai and Zwart,
                      Diffusion limits of limited processor sharing queues, Annals of Applied Probability 21(2), 2011)
lam         [C, R]    arrival rates
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Where service is not exponential, fitted to simulations (docs/theory/queueing.md): the share of waits that regular
# service saves where N is large, and the mean of the delay that it adds at N = 1, with its growth in N.
_FEWER, _DELAY, _DELAY_GROWTH = 0.115, 0.44, 0.4
_MOST_DELAY = 0.6  # of the mean wait, where service varies more than exponentially; there a delay is taken away
_SERIES_BELOW = 1e-3  # |terms * log r| under which the closed form of sum(i r^i) cancels; its series is exact to 1e-9


@dataclass(frozen=True, slots=True, eq=False)
class Occupancy:
    """Stationary means of a finite queue; every array is [C, R]."""

    in_service: Floats
    waiting: Floats
    accepted: Floats  # share of arrivals that find a place
    idle: Floats  # probability that nobody is present
    full: Floats  # probability that nobody more can be served at once


@dataclass(frozen=True, slots=True, eq=False)
class ServiceRates:
    """The service side of C finite queues, ready to be met by any arrival rate."""

    log_mu_sum: Floats
    log_mu_last: Floats
    servers: Ints
    places: Ints
    tail: Floats

    @classmethod
    def of(cls, mu: Floats, servers: Ints, places: Ints, tail: Floats | None = None) -> ServiceRates:
        """Prepare rates mu [C, Nmax], mu[:, k-1] being the rate with k present (any value past a row's N).

        >>> one = ServiceRates.of(np.array([[1.0]]), np.array([1]), np.array([9]))  # M/M/1/10
        >>> seen = occupancy(one, np.array([[0.5]]))
        >>> print(f"{(seen.in_service + seen.waiting)[0, 0]:.7f}")
        0.9946263
        """
        rows = np.arange(len(mu))
        total = np.cumsum(np.log(mu), axis=1)
        head = np.concatenate((np.zeros((len(mu), 1)), total[:, :-1]), axis=1)
        head[np.arange(mu.shape[1]) >= servers[:, None]] = np.inf
        last = np.stack((total[rows, servers - 1], np.log(mu[rows, servers - 1])), axis=1)
        return cls(head, last, servers, places, np.ones(len(mu)) if tail is None else tail)

    def take(self, rows: Ints) -> ServiceRates:
        """Some of the queues."""
        return ServiceRates(
            self.log_mu_sum[rows], self.log_mu_last[rows], self.servers[rows], self.places[rows], self.tail[rows]
        )

    def distribution(self, lam: Floats) -> tuple[Floats, Floats]:
        """The stationary law at one rate each [C]: p[k] for k = 0..N-1 (0 past a row's end), and log r.

        What the head leaves is the chance that nobody more can be served; `backlog` tells how many wait then.
        """
        n, q = self.servers.astype(np.float64), self.places.astype(np.float64)
        log_lam, states = np.log(lam), np.arange(self.log_mu_sum.shape[1], dtype=np.float64)
        head = log_lam[:, None] * states - self.log_mu_sum
        log_r = log_lam - self.log_mu_last[:, 1]
        first = n * log_lam - self.log_mu_last[:, 0]  # of the tail
        sums, _ = geometric_sums(-np.abs(log_r), q + 1)
        whole = first + np.log(sums) + np.maximum(log_r, 0.0) * q
        scale = np.maximum(head.max(axis=1), whole)
        head = np.exp(head - scale[:, None])
        return head / (head.sum(axis=1) + np.exp(whole - scale))[:, None], log_r


class Backlog(NamedTuple):
    """How many wait while nobody more can be served: i with a probability proportional to a u^i - b v^i.

    That is a geometric number, and with probability p (negative: a correction the other way) a second one of mean x on
    top. By the distributional law of Little (Keilson and Servi, Operations Research Letters 7(5), 1988) waits are then
    exponential, some with a second exponential delay on top. Exponential service has p = 0.
    """

    log_u: Floats
    v: Floats
    a: Floats
    b: Floats
    above_a: Floats  # with an endless queue, i or more with a probability proportional to above_a u^i - above_b v^i
    above_b: Floats


def backlog(log_r: Floats, tail: Floats, servers: Floats) -> Backlog:
    """The law for r = lambda / mu(N); arrays of one shape."""
    log_u = log_r * tail
    y = np.expm1(np.maximum(-log_u, 0.0))  # one over the mean of the first
    p = (tail - 1) / 2
    x = _DELAY * servers**_DELAY_GROWTH * np.exp(np.minimum(log_r, 0.0) / 2) * 2 / tail
    x = np.where(p < 0, np.minimum(x, _MOST_DELAY / np.maximum(y, 1e-12)), x)
    x = np.where(np.abs(x * y - 1) < 0.01, x * 1.02, x)  # of two alike the difference would vanish
    x = np.where(p == 0, 0.0, x)
    above_a, above_b = 1 - (1 - p) * x * y, p * x * y
    return Backlog(log_u, x / (1 + x), above_a * (1 + x), p * x * (1 + y), above_a, above_b)


def fewer_waits(full: Floats, tail: Floats, servers: Floats) -> Floats:
    """By what factor the chance to wait differs from that under exponential service (M/G/1: not at all)."""
    return 1 - _FEWER * (1 - 1 / servers) * (tail - 1) * (1 - full)


def geometric_sums(log_r: Floats, terms: Floats) -> tuple[Floats, Floats]:
    """Sums of r^i and of i r^i over i = 0..terms-1, for 0 < r <= 1 given by its log.

    >>> geometric_sums(np.log([0.5, 1.0]), np.array([3.0, 4.0]))
    (array([1.75, 4.  ]), array([1., 6.]))
    """
    gap = np.maximum(-np.expm1(log_r), 1e-290)  # 1 - r; where it is too small to divide by, the series takes over
    plain = -np.expm1(terms * log_r) / gap
    weighted = (np.exp(log_r) * plain - terms * np.exp(terms * log_r)) / gap  # = (r sum(r^i) - n r^n) / (1 - r)
    near = terms * -log_r < _SERIES_BELOW
    if near.any():
        n, log_near = terms[near], log_r[near]
        first, second = n * (n - 1) / 2, (n - 1) * n * (2 * n - 1) / 6
        plain[near] = n + log_near * first + log_near**2 / 2 * second
        weighted[near] = first + log_near * second + log_near**2 / 2 * first**2
    return plain, weighted


def _tail_sums(log_r: Floats, q: Floats) -> tuple[Floats, Floats, Floats]:
    """Over i = 0..Q the sums of r^i, of those but the last, and of i r^i, relative to the largest term."""
    r = np.exp(-np.abs(log_r))
    before, before_weighted = geometric_sums(-np.abs(log_r), np.broadcast_to(q, r.shape))  # Q terms; the tail has Q + 1
    end = np.exp(-np.abs(log_r) * q)
    rising = log_r > 0
    tail_sum = np.where(rising, 1 + r * before, before + end)
    tail_open = np.where(rising, r * before, before)  # without state K, where arrivals are turned away
    all_sum, all_weighted = before + end, before_weighted + q * end
    return tail_sum, tail_open, np.where(rising, q * all_sum - all_weighted, all_weighted)


def occupancy(service: ServiceRates, lam: Floats) -> Occupancy:
    """Solve every queue at its arrival rates (> 0, however large): no overflow, no cancellation, no loop over states.

    Terms are scaled by the largest one. With r > 1 the tail is summed from its far end, which is then the largest.
    """
    n, q = service.servers[:, None].astype(np.float64), service.places[:, None].astype(np.float64)
    log_lam = np.log(lam)
    states = np.arange(service.log_mu_sum.shape[1], dtype=np.float64)
    head = log_lam[:, :, None] * states - service.log_mu_sum[:, None, :]
    log_r = log_lam - service.log_mu_last[:, 1:]
    tail = n * log_lam - service.log_mu_last[:, :1] + np.maximum(log_r, 0.0) * q
    scale = np.maximum(head.max(axis=2), tail)
    head -= scale[:, :, None]
    np.exp(head, out=head)
    head_sum, head_mean = head.sum(axis=2), np.einsum("crk,k->cr", head, states)  # no BLAS: its threads cost more
    tail = np.exp(tail - scale)

    tail_sum, tail_open, tail_waiting = _tail_sums(log_r, q)
    total = head_sum + tail * tail_sum
    full = tail * tail_sum / total
    bent = service.tail != 1
    if bent.any():  # as often nobody more can be served as with exponential service, but others wait
        own, most = service.tail[bent, None], n[bent]
        own_open, own_waiting = _bent(log_r[bent], own, most, q[bent])
        tail_open[bent] = tail_sum[bent] * own_open
        tail_waiting[bent] = tail_sum[bent] * own_waiting * fewer_waits(full[bent], own, most)
    return Occupancy(
        in_service=(head_mean + n * tail * tail_sum) / total,
        waiting=tail * tail_waiting / total,
        accepted=(head_sum + tail * tail_open) / total,
        idle=np.exp(-scale) / total,
        full=full,
    )


def _bent(log_r: Floats, tail: Floats, n: Floats, q: Floats) -> tuple[Floats, Floats]:
    """While nobody more can be served: the chance of a place to wait, and how many wait."""
    law = backlog(log_r, np.broadcast_to(tail, log_r.shape), np.broadcast_to(n, log_r.shape))
    first = _tail_sums(law.log_u, q)
    second = _tail_sums(np.log(np.maximum(law.v, 1e-300)), q)
    scale = law.b * np.exp(-np.maximum(law.log_u, 0.0) * q)  # the first's sums are relative to its largest term
    every, but_last, weighted = (law.a * f - scale * s for f, s in zip(first, second, strict=True))
    return but_last / every, weighted / every
