"""Queue model v3: one replica that batches continuously and prefills in chunks.

An engine step takes alpha + beta * tokens computed + gamma * tokens of KV cache read. A request of n tokens in and m
out passes c prefill steps and d decode steps, and adds delta seconds of work to each. From the time that a whole life
takes in a batch of B follows a service rate for every B; with Poisson arrivals, a birth-death chain.
The equations are those of llm-inferno's queue-analysis (design notes: docs/theory/queueing.md).

symbol   shape   meaning                                                      unit
n, m     [C]     mean tokens in and out of a request
d        [C]     decode steps: m, or m - 1 where the last prefill step emits the first token
N, Q     [C]     most requests in service; most that wait
M        [C]     most tokens computed in a step
c(B)             chunks that a prompt is cut into when B are in service: the smallest c with
                 (c + d) (M - n / c) / (n + d) >= B
w_pre(c)         own prefill work, (beta + gamma (c + 1) / 2) n                s
w_dec    [C]     own decode work, beta d + gamma d (n + (d + 1) / 2)           s
delta(c)         mean own work a step, (w_pre + w_dec) / (c + d)              s
tau(B)           life in a batch of B, (c + d) (alpha + B delta)              s
mu(B)            rate of service with B, B / tau(B)                           1/s
X, W             mean number in service; mean wait                            -, s
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flyball.numerics.markov import Floats, Ints, ServiceRates, occupancy
from flyball.performance.queueing import Metrics, Queues, Replicas

_RATE_MARGIN = 1e-3  # sizing stays this far inside the range of rates, as queue-analysis does
_NEXT_TO_NOTHING = 1e-15  # stands for 0 where 0 / 0 has a limit: tokens, and load relative to the smallest rate


def _batch_allowed(c: Floats | float, n: Floats, d: Floats, limit: Floats) -> Floats:
    """(c + d) (M - n / c) / (n + d): the largest batch whose prompts take c chunks."""
    return (c + d) * (limit - n / c) / np.maximum(n + d, _NEXT_TO_NOTHING)


@dataclass(frozen=True, slots=True, eq=False)
class _Life:
    """The work of one request; all [C, 1], so that batches or rates can run along the second axis."""

    alpha: Floats
    beta: Floats
    gamma: Floats
    n: Floats
    d: Floats
    step_tokens: Floats

    def chunks(self, batch: Floats) -> Floats:
        """c(B): the positive root of M c² + (M d - n - B (n + d)) c - n d = 0, rounded up, then made exact."""
        cut = batch > _batch_allowed(1.0, self.n, self.d, self.step_tokens)
        chunks = np.ones(cut.shape)
        if cut.any():
            n, d, limit, b = (np.broadcast_to(v, cut.shape)[cut] for v in (self.n, self.d, self.step_tokens, batch))
            half = (limit * d - n - b * (n + d)) / 2
            c = np.maximum(np.ceil((np.sqrt(half * half + limit * n * d) - half) / limit), 2.0)
            c = np.where(_batch_allowed(c - 1, n, d, limit) >= b, c - 1, c)
            chunks[cut] = np.where(_batch_allowed(c, n, d, limit) < b, c + 1, c)
        return chunks

    def prefill_work(self, c: Floats) -> Floats:
        return (self.beta + self.gamma * (c + 1) / 2) * self.n

    def added(self, c: Floats) -> Floats:
        """delta(c)."""
        decode = self.d * (self.beta + self.gamma * (self.n + (self.d + 1) / 2))
        return (self.prefill_work(c) + decode) / (c + self.d)

    def rates(self, batch: Floats) -> Floats:
        """mu(B)."""
        c = self.chunks(batch)
        return batch / ((c + self.d) * (self.alpha + batch * self.added(c)))

    def background(self, c: Floats, batch: Floats) -> Floats:
        """Time of a step as its other requests make it."""
        return np.maximum(self.alpha + (batch - 1) * self.added(c), 0.0)

    def take(self, rows: Ints) -> _Life:
        return _Life(*(getattr(self, name)[rows] for name in _Life.__slots__))


@dataclass(frozen=True, slots=True, eq=False)
class _V3Queues:
    """Prepared replicas; see `flyball.performance.queueing.Queues`."""

    compat: bool
    first_token_decoded: bool
    life: _Life
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
        life, most = self.life, self.service.servers[:, None].astype(np.float64)
        seen = occupancy(self.service, lam)
        x = seen.in_service
        throughput = lam * seen.accepted
        service, wait = x / throughput, seen.waiting / throughput
        c = life.chunks(np.clip(np.floor(x + 0.5), 1, most))
        own, step = life.prefill_work(c), service / (c + life.d)
        background = life.background(c, x) if self.first_token_decoded else step - life.added(c)
        decodes = life.d > 0
        prefill = np.where(decodes, c * background + own, service)
        itl = np.where(decodes, (service - prefill) / np.where(decodes, life.d, 1.0), 0.0)
        if self.first_token_decoded:
            ttft = wait + prefill + itl
        else:  # whoever finds the engine busy first sits out the step in progress
            wait = wait + (1 - seen.idle) * (step + throughput * own * own / c) / 2
            ttft = wait + prefill
        response = wait + service
        return (np.minimum(throughput, offered), ttft, itl, wait, prefill, response, x, x / most, 1 - seen.accepted)

    def batch_within(self, *, itl_s: Floats, prefill_s: Floats) -> tuple[Ints, Ints]:
        """Largest batch within an ITL, and within a prefill time, by the closed forms (no waiting)."""
        life, servers = self.life, self.service.servers
        batch = np.arange(1.0, servers.max() + 1)[None, :]
        c = life.chunks(batch)
        background = life.background(c, batch)
        itl = background + life.beta + life.gamma * (life.n + (life.d + 1) / 2)
        prefill = c * background + life.prefill_work(c)
        exists = batch <= servers[:, None]

        def largest(fits: NDArray[np.bool_]) -> Ints:
            most: Floats = ((fits & exists) * batch).max(axis=1)
            return np.maximum(most, 1).astype(np.int64)

        return largest(itl <= itl_s[:, None]), largest(prefill <= prefill_s[:, None])

    def take(self, rows: Ints) -> _V3Queues:
        """Some of the replicas."""
        return _V3Queues(
            self.compat, self.first_token_decoded, self.life.take(rows), self.service.take(rows), self.valid[rows],
            self.min_rate_rps[rows], self.max_rate_rps[rows], self.capacity_rps[rows], self.best_batch[rows],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _V3:
    """The law, in one of its readings."""

    compat: bool = False  # with the original's defects: a replica without room for two is invalid; capacity is mu(N)
    first_token_decoded: bool = True  # False: the last prefill step emits it, as vLLM, SGLang and our engine do

    def prepare(self, replicas: Replicas) -> Queues:
        """Service rates for every batch of every replica."""
        r = replicas
        d = r.output_tokens if self.first_token_decoded else np.maximum(r.output_tokens - 1, 0.0)
        life = _Life(*(v[:, None] for v in (r.alpha_s, r.beta_s, r.gamma_s, r.input_tokens, d, r.max_step_tokens)))
        batch = np.arange(1.0, r.max_batch.max() + 1)[None, :]
        mu = life.rates(batch)
        rows = np.arange(len(r))
        within = np.where(batch <= r.max_batch[:, None], mu, 0.0)
        best = r.max_batch if self.compat else 1 + np.argmax(within, axis=1)
        capacity = mu[rows, best - 1]
        return _V3Queues(
            compat=self.compat,
            first_token_decoded=self.first_token_decoded,
            life=life,
            service=ServiceRates.of(mu, r.max_batch, r.max_queue),
            valid=(r.max_batch + r.max_queue > 1) | (not self.compat),
            min_rate_rps=mu[:, 0] * _RATE_MARGIN,
            max_rate_rps=capacity * (1 - _RATE_MARGIN),
            capacity_rps=capacity,
            best_batch=best,
        )


V3 = _V3()
V3_COMPAT = _V3(compat=True)
V3_ENGINE = _V3(first_token_decoded=False)
