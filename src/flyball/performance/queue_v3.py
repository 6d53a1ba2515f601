"""Queue model v3: one replica that batches continuously and prefills in chunks.

An engine step takes alpha + beta * tokens computed + gamma * tokens of KV cache read. A request of n tokens in and m
out passes c prefill steps and d decode steps, and adds delta seconds of work to each. From the time that a whole life
takes in a batch of B follows a service rate for every B; with Poisson arrivals, a birth-death chain. How latencies are
read from the chain differs: here as llm-inferno's queue-analysis does, in `queue_engine` as engines behave (both, with
their sources and limits: docs/theory/queueing.md).

symbol   shape   meaning                                                      unit
n, m     [C]     mean tokens in and out of a request
h        [C]     share of a prompt that is found in the cache: (1 - h) n tokens are computed
d        [C]     decode steps: m, or m - 1 where the last prefill step emits the first token
N, Q     [C]     most requests in service; most that wait
M        [C]     most tokens computed in a step
c(B)             chunks that a prompt is cut into when B are in service: the smallest c with
                 (c + d) (M - n / c) / (n + d) >= B, with (1 - h) n for n
w_pre(c)         own prefill work, (beta + gamma (c + 1) / 2) (1 - h) n + gamma c h n                         s
w_dec    [C]     own decode work, beta d + gamma d (n + (d + 1 + d cv²) / 2); cv of m, 0 where not stated     s
delta(c)         mean own work a step, (w_pre + w_dec) / (c + d)              s
tau(B)           life in a batch of B, (c + d) (alpha + B delta)              s
mu(B)            rate of service with B, B / tau(B)                           1/s
X, W             mean number in service; mean wait                            -, s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flyball.numerics.markov import Floats, Ints, ServiceRates, occupancy
from flyball.performance.queueing import Anatomy, Metrics, Queues, Replicas, take_rows

_RATE_MARGIN = 1e-3  # sizing stays this far inside the range of rates (as the original does)
_NEXT_TO_NOTHING = 1e-15  # stands for 0 where 0 / 0 has a limit: tokens, and load relative to the smallest rate


def _batch_allowed(c: Floats | float, n: Floats, d: Floats, limit: Floats) -> Floats:
    """(c + d) (M - n / c) / (n + d): the largest batch whose prompts take c chunks."""
    return (c + d) * (limit - n / c) / np.maximum(n + d, _NEXT_TO_NOTHING)


@dataclass(frozen=True, slots=True, eq=False)
class Life:
    """The work of one request; all [C, 1], so that batches or rates can run along the second axis."""

    alpha: Floats
    beta: Floats
    gamma: Floats
    n: Floats
    d: Floats
    step_tokens: Floats
    prompt: Floats  # (1 - h) n
    older: Floats  # d cv²: longer answers weigh more, and hold more cache

    def chunks(self, batch: Floats) -> Floats:
        """c(B): the positive root of M c² + (M d - n - B (n + d)) c - n d = 0, rounded up, then made exact."""
        cut = batch > _batch_allowed(1.0, self.prompt, self.d, self.step_tokens)
        chunks = np.ones(cut.shape)
        if cut.any():
            given = (self.prompt, self.d, self.step_tokens, batch)
            n, d, limit, b = (np.broadcast_to(v, cut.shape)[cut] for v in given)
            half = (limit * d - n - b * (n + d)) / 2
            c = np.maximum(np.ceil((np.sqrt(half * half + limit * n * d) - half) / limit), 2.0)
            c = np.where(_batch_allowed(c - 1, n, d, limit) >= b, c - 1, c)
            chunks[cut] = np.where(_batch_allowed(c, n, d, limit) < b, c + 1, c)
        return chunks

    @property
    def token_work(self) -> Floats:
        """Own work of one decode step, w_dec / d."""
        return self.beta + self.gamma * (self.n + (self.d + 1 + self.older) / 2)

    def prefill_work(self, c: Floats) -> Floats:
        """w_pre(c)."""
        found = self.n - self.prompt
        return (self.beta + self.gamma * (c + 1) / 2) * self.prompt + self.gamma * c * found

    def added(self, c: Floats) -> Floats:
        """delta(c)."""
        return (self.prefill_work(c) + self.d * self.token_work) / (c + self.d)

    def rates(self, batch: Floats) -> Floats:
        """mu(B)."""
        c = self.chunks(batch)
        return batch / ((c + self.d) * (self.alpha + batch * self.added(c)))

    def background(self, c: Floats, batch: Floats) -> Floats:
        """Time of a step as its other requests make it."""
        return np.maximum(self.alpha + (batch - 1) * self.added(c), 0.0)


class Steady(NamedTuple):
    """What the chain says of replicas at their loads, each [C, R]."""

    throughput: Floats
    service: Floats  # S: time in the batch
    wait: Floats  # W: time for a place in it
    in_service: Floats  # X
    batch: Floats  # N
    chunks: Floats  # c at X
    running: Floats  # probability that anybody is in service
    room: Floats  # of those who are admitted while it runs, the share who find a place in the batch


class Latencies(NamedTuple):
    """Seconds that a request sees, each [C, R]."""

    ttft: Floats
    itl: Floats
    wait: Floats
    prefill: Floats
    response: Floats


Reading = Callable[[Life, Steady], Latencies]


def first_token_decoded(life: Life, seen: Steady) -> Latencies:
    """The original's reading: a decode step after the prefill emits the first token, others add (X - 1) delta."""
    prefill = seen.chunks * life.background(seen.chunks, seen.in_service) + life.prefill_work(seen.chunks)
    decodes = life.d > 0  # without decode steps the prefill is the whole service
    prefill = np.where(decodes, prefill, seen.service)
    itl = np.where(decodes, (seen.service - prefill) / np.where(decodes, life.d, 1.0), 0.0)
    return Latencies(seen.wait + prefill + itl, itl, seen.wait, prefill, seen.wait + seen.service)


@dataclass(frozen=True, slots=True, eq=False)
class _V3Queues:
    """Prepared replicas; see `flyball.performance.queueing.Queues`."""

    compat: bool
    reading: Reading
    life: Life
    lengths: Floats  # [C, 2] variation of those in and out, nowhere NaN
    service: ServiceRates
    valid: NDArray[np.bool_]
    min_rate_rps: Floats
    max_rate_rps: Floats
    capacity_rps: Floats
    best_batch: Ints

    def analyze(self, rates_rps: Floats) -> Metrics:
        """Metrics at [C] or [C, R] arrival rates."""
        rates = np.asarray(rates_rps, dtype=np.float64)
        offered = rates if rates.ndim == 2 else rates[:, None]
        metrics = self._analyze(np.maximum(offered, self.min_rate_rps[:, None] * _NEXT_TO_NOTHING), offered)
        if not self.valid.all():
            for values in metrics:
                values[~self.valid] = np.nan
        return Metrics(*(v if rates.ndim == 2 else v[:, 0] for v in metrics))

    def _analyze(self, lam: Floats, offered: Floats) -> tuple[Floats, ...]:
        most = self.service.servers[:, None].astype(np.float64)
        chain = occupancy(self.service, lam)
        x, throughput = chain.in_service, lam * chain.accepted
        c = self.life.chunks(np.clip(np.floor(x + 0.5), 1, most))
        running = 1 - chain.idle
        room = np.clip(1 - chain.full / np.maximum(running, _NEXT_TO_NOTHING), 0.0, 1.0) / chain.accepted
        seen = Steady(throughput, x / throughput, chain.waiting / throughput, x, most, c, running, room)
        ttft, itl, wait, prefill, response = self.reading(self.life, seen)
        served = np.minimum(throughput, offered)
        return served, ttft, itl, wait, prefill, response, x, x / most, 1 - chain.accepted

    def batch_within(self, *, itl_s: Floats, prefill_s: Floats) -> tuple[Ints, Ints]:
        """Largest batch within an ITL, and within a prefill time, by the closed forms (no waiting)."""
        life, servers = self.life, self.service.servers
        batch = np.arange(1.0, servers.max() + 1)[None, :]
        c = life.chunks(batch)
        background = life.background(c, batch)
        prefill = c * background + life.prefill_work(c)
        exists = batch <= servers[:, None]

        def largest(fits: NDArray[np.bool_]) -> Ints:
            most: Floats = ((fits & exists) * batch).max(axis=1)
            return np.maximum(most, 1).astype(np.int64)

        return largest(background + life.token_work <= itl_s[:, None]), largest(prefill <= prefill_s[:, None])

    def take(self, rows: Ints) -> _V3Queues:
        """Some of the replicas."""
        return _V3Queues(
            self.compat, self.reading, take_rows(self.life, rows), self.lengths[rows], self.service.take(rows),
            self.valid[rows], self.min_rate_rps[rows], self.max_rate_rps[rows], self.capacity_rps[rows],
            self.best_batch[rows],
        )  # fmt: skip

    def anatomy(self) -> Anatomy:
        """Prefill and decode times for every batch."""
        batch = np.arange(1.0, self.service.servers.max() + 1)[None, :]
        shared, own, gap = _parts(self.life, batch)
        return Anatomy(
            shared_s=shared,
            own_s=own,
            gap_s=gap,
            decodes=self.life.d[:, 0],
            first_decoded=self.reading is first_token_decoded,
            input_cv=self.lengths[:, 0],
            output_cv=self.lengths[:, 1],
            service=self.service,
        )


def _parts(life: Life, batch: Floats) -> tuple[Floats, Floats, Floats]:
    """Of a prefill what others and what oneself make it take, and a decode step, in a batch; they add up to tau."""
    c = life.chunks(batch)
    background = life.background(c, batch)
    return c * background, life.prefill_work(c), background + life.token_work


def _tail(life: Life, r: Replicas) -> Floats:
    """[C] 2 / (1 + cv²) of a life in a full batch; 1 (an exponential life) where no variation of answers is stated."""
    shared, own, gap = (v[:, 0] for v in _parts(life, r.max_batch[:, None].astype(np.float64)))
    decode = life.d[:, 0] * gap
    variance = np.square(decode * r.output_cv) + np.square(own * np.nan_to_num(r.input_cv))
    tail: Floats = 2 / (1 + variance / np.square(shared + own + decode))
    return np.where(np.isnan(tail), 1.0, tail)


@dataclass(frozen=True, slots=True)
class ChunkedPrefill:
    """The model, with a reading of its latencies."""

    reading: Reading
    decode_steps_saved: int = 0  # 1 where the last prefill step emits the first token
    compat: bool = False  # with the original's defects: a replica without room for two is invalid; capacity is mu(N)

    def prepare(self, replicas: Replicas) -> Queues:
        """Service rates for every batch of every replica."""
        r = replicas
        d = np.maximum(r.output_tokens - self.decode_steps_saved, 0.0)
        prompt, older = r.input_tokens * (1 - r.prefix_hit), d * np.nan_to_num(r.output_cv) ** 2
        fields = (r.alpha_s, r.beta_s, r.gamma_s, r.input_tokens, d, r.max_step_tokens, prompt, older)
        life = Life(*(v[:, None] for v in fields))
        batch = np.arange(1.0, r.max_batch.max() + 1)[None, :]
        mu = life.rates(batch)
        within = np.where(batch <= r.max_batch[:, None], mu, 0.0)
        best = r.max_batch if self.compat else 1 + np.argmax(within, axis=1)
        capacity = mu[np.arange(len(r)), best - 1]
        return _V3Queues(
            compat=self.compat,
            reading=self.reading,
            life=life,
            lengths=np.stack((np.nan_to_num(r.input_cv), np.where(np.isnan(r.output_cv), 1.0, r.output_cv)), axis=1),
            service=ServiceRates.of(mu, r.max_batch, r.max_queue, _tail(life, r)),
            valid=(r.max_batch + r.max_queue > 1) | (not self.compat),
            min_rate_rps=mu[:, 0] * _RATE_MARGIN,
            max_rate_rps=capacity * (1 - _RATE_MARGIN),
            capacity_rps=capacity,
            best_batch=best,
        )


V3 = ChunkedPrefill(first_token_decoded)
V3_COMPAT = ChunkedPrefill(first_token_decoded, compat=True)
