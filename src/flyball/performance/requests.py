"""Requests sent one by one through the law of a queue model: the check on what its formulas say.

Arrivals are Poisson, at most N are served and Q wait, first come first served; more are turned away. A prefill advances
by 1 / (shared(b) + own(b) * relative prompt length) a second and a decode step by 1 / gap(b), b being the number in
service at that moment; relative lengths are gamma distributed. Nothing is averaged. Many equal replicas, each with its
own requests, run side by side in arrays: one pass of the loop is the next event of every replica.

symbol   shape    meaning
G                 replicas side by side
target   [G, N]   clock of decode steps at which a slot's request ends; inf: not decoding
left     [G, N]   share of a slot's prefill that is to come; inf: none
clock    [G]      decode steps that whoever decodes has advanced by so far
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flyball.numerics.markov import Floats, Ints
from flyball.performance.queueing import Anatomy

_SIDE_BY_SIDE = 1024
_WARM_UP = 0.2  # share of the time, left out of what is reported
_LOOK = 64  # events between two looks whether all that counts has ended


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What the requests that were served saw."""

    ttft_s: Floats  # [requests]
    e2e_s: Floats
    gap_s: Floats  # [N] a gap's length in a batch of 1..N
    gap_tokens: Floats  # [N] tokens that came after such a gap
    lost: float  # share of requests turned away

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
    """Send about so many requests, in all, to equal replicas of one kind, each at this arrival rate."""
    end = requests / _SIDE_BY_SIDE / rate_rps / (1 - _WARM_UP)
    world = _World(anatomy, row, rate_rps, rng, counted=(end * _WARM_UP, end))
    while world.going():
        for _ in range(_LOOK):
            world.step()
    ttft, e2e = (np.concatenate(parts) if parts else np.empty(0) for parts in (world.first, world.last))
    n = int(anatomy.service.servers[row])
    return Seen(ttft, e2e, anatomy.gap_s[row, :n], world.tokens[1:], world.lost / max(world.offered, 1))


class _World:
    """The replicas between two events."""

    def __init__(
        self, anatomy: Anatomy, row: int, rate_rps: float, rng: np.random.Generator, counted: tuple[float, float]
    ) -> None:
        n, q, g = int(anatomy.service.servers[row]), int(anatomy.service.places[row]), _SIDE_BY_SIDE
        self.rng, self.rate_rps, self.n, self.q = rng, rate_rps, n, q
        self.shared, self.own, self.gap = (  # by the number in service; with nobody there nothing advances
            np.concatenate(([1.0], table[row, :n])) for table in (anatomy.shared_s, anatomy.own_s, anatomy.gap_s)
        )
        self.cv = float(anatomy.input_cv[row]), float(anatomy.output_cv[row])
        self.decodes = float(anatomy.decodes[row])
        self.first_decoded = anatomy.first_decoded and self.decodes > 0
        self.every, self.counted = np.arange(g), counted
        self.now, self.clock, self.batch = np.zeros(g), np.zeros(g), np.zeros(g, dtype=np.int64)
        self.coming = rng.exponential(1 / rate_rps, g)
        self.target, self.left = np.full((g, n), np.inf), np.full((g, n), np.inf)
        self.prompt, self.came = np.ones((g, n)), np.zeros((g, n))
        self.first_at = np.zeros((g, n))
        self.queue, self.head, self.waiting = np.zeros((g, max(q, 1))), np.zeros(g, np.int64), np.zeros(g, np.int64)
        self.first: list[Floats] = []
        self.last: list[Floats] = []
        self.tokens = np.zeros(n + 1)
        self.offered = self.lost = 0
        self._fill(anatomy, row)

    def _fill(self, anatomy: Anatomy, row: int) -> None:
        """Begin with as many as the chain has, in an answer or in the queue, so that little must settle."""
        head, log_r = anatomy.service.distribution(np.full(len(anatomy.decodes), self.rate_rps))
        found = self.rng.choice(np.arange(self.n + 1), self.batch.size, p=_with_rest(head[row, : self.n]))
        cv = self.cv[1]
        whole = 1.0 if cv == 0 else self.rng.gamma(cv**-2 + 1, cv**2, self.target.shape)  # long ones are met oftener
        rest = self.decodes * whole * self.rng.random(self.target.shape)
        self.target = np.where(np.arange(self.n) < found[:, None], rest, np.inf)
        self.batch = found.astype(np.int64)
        exponent = float(log_r[row]) * np.arange(self.q + 1.0)
        places = np.exp(exponent - exponent.max())
        waiting = self.rng.choice(np.arange(self.q + 1), self.batch.size, p=places / places.sum())
        self.waiting = np.where(found == self.n, waiting, 0).astype(np.int64)
        self.queue[:] = -1.0
        self.came[:] = -1.0

    def going(self) -> bool:
        """Whether somebody who counts is still there or still to come."""
        end = self.counted[1]
        inside = np.isfinite(np.minimum(self.target, self.left)) & (self.came < end)
        return bool((self.now < end).any() or inside.any() or ((self.waiting > 0).any() and self._oldest() < end))

    def _oldest(self) -> float:
        """When the first of those who wait came."""
        heads = self.queue[self.every, self.head]
        return float(heads[self.waiting > 0].min())

    def _counts(self, came: Floats) -> NDArray[np.bool_]:
        return (came >= self.counted[0]) & (came < self.counted[1])

    def step(self) -> None:
        """The next event of every replica."""
        gap = self.gap[self.batch]
        pace = self.shared[self.batch][:, None] + self.own[self.batch][:, None] * self.prompt
        prefill_ends = self.left * pace
        prefill, decode = prefill_ends.argmin(axis=1), self.target.argmin(axis=1)
        to_prefill = prefill_ends[self.every, prefill]
        to_decode = (self.target[self.every, decode] - self.clock) * gap
        passed = np.maximum(np.minimum(np.minimum(to_prefill, to_decode), self.coming - self.now), 0.0)
        kind = np.stack((self.coming - self.now, to_prefill, to_decode)).argmin(axis=0)
        self.left -= passed[:, None] / pace
        steps = passed / gap
        decoding = np.isfinite(self.target).sum(axis=1)
        counted = self._counts(self.now)
        np.add.at(self.tokens, self.batch[counted], (steps * decoding)[counted])
        self.clock += steps
        self.now = self.now + passed
        self._arrive(np.flatnonzero(kind == 0))
        self._prefilled(np.flatnonzero(kind == 1), prefill)
        self._decoded(np.flatnonzero(kind == 2), decode)

    def _arrive(self, at: Ints) -> None:
        now = self.now[at]
        self.coming[at] = now + self.rng.exponential(1 / self.rate_rps, len(at))
        counted = self._counts(now)
        free = self.batch[at] < self.n
        self._enter(at[free], now[free])
        full = ~free & (self.waiting[at] >= self.q)
        self.offered += int(counted.sum())
        self.lost += int((full & counted).sum())
        queued = at[~free & ~full]
        self.queue[queued, (self.head[queued] + self.waiting[queued]) % self.queue.shape[1]] = self.now[queued]
        self.waiting[queued] += 1

    def _enter(self, at: Ints, came: Floats) -> None:
        slot = np.isinf(np.minimum(self.target[at], self.left[at])).argmax(axis=1)
        self.left[at, slot], self.came[at, slot] = 1.0, came
        self.prompt[at, slot] = _lengths(self.cv[0], len(at), self.rng)
        self.batch[at] += 1

    def _prefilled(self, at: Ints, slots: Ints) -> None:
        slot = slots[at]
        self.left[at, slot] = np.inf
        self.target[at, slot] = self.clock[at] + self.decodes * _lengths(self.cv[1], len(at), self.rng)
        extra = self.gap[self.batch[at]] if self.first_decoded else 0.0
        self.first_at[at, slot] = self.now[at] + extra

    def _decoded(self, at: Ints, slots: Ints) -> None:
        slot = slots[at]
        self.target[at, slot] = np.inf
        self.batch[at] -= 1
        counted = self._counts(self.came[at, slot])
        came = self.came[at, slot][counted]
        self.first.append(self.first_at[at, slot][counted] - came)
        self.last.append(self.now[at][counted] - came)
        again = at[self.waiting[at] > 0]
        came = self.queue[again, self.head[again]]
        self.head[again] = (self.head[again] + 1) % self.queue.shape[1]
        self.waiting[again] -= 1
        self._enter(again, came)


def _with_rest(shares: Floats) -> Floats:
    """Probabilities, with what they leave of 1 at the end."""
    whole = np.append(shares, max(1 - shares.sum(), 0.0))
    return np.asarray(whole / whole.sum(), dtype=np.float64)


def _lengths(cv: float, count: int, rng: np.random.Generator) -> Floats:
    if cv == 0:
        return np.ones(count)
    return np.asarray(rng.gamma(cv**-2, cv**2, count))
