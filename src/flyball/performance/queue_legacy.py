"""Older and plainer queue models: llm-inferno's v1 and v2, M/M/1/K, and a general state-dependent chain.

All are one thing: for every batch b the time of a prefill and of a decode step, and with them the time a request takes.
From it follows a service rate for every batch, and with Poisson arrivals a birth-death chain (docs/theory/queueing.md).

symbol          shape    meaning                                                        unit
n, m            [C]      mean tokens in and out of a request
p(b), d(b)      [C, B]   time of a prefill, and of a decode step, in a batch of b       s
steps           [C, 1]   decode steps of a request
tau(b)          [C, B]   a request's time, p(b) + steps d(b); rate of service b / tau(b) s
S, W            [C, R]   mean time in service, mean wait                                s

v1              p = gamma + delta n b,  d = alpha + beta b,  steps = m - 1              (optimizer, 2025)
v2              w = beta (n + m) / (m + 1) + gamma (n + m / 2),  a step = alpha + b w,
                p = a step + (beta + gamma) n (0 without a prompt),  d = a step + beta + gamma (n + m / 2),  steps = m
mm1k            one request at a time, each in the time that v2 gives it without its second count of its own work
linear          no tokens at all: tau = alpha + beta b

Latencies are read in v1 at the effective batch, the b with tau(b) = S, and the prefill emits the first token. In v2 the
prefill is read at the mean number in service, the decode steps share the rest of S, and the first of them emits the
first token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flyball.numerics.markov import Floats, Ints, ServiceRates, occupancy
from flyball.performance.queueing import Metrics, Queues, Replicas

_RATE_MARGIN = 1e-3  # sizing stays this far inside the range of rates (as the original does)
_NEXT_TO_NOTHING = 1e-15  # stands for 0 where 0 / 0 has a limit, relative to the smallest rate


class Times(NamedTuple):
    """What a law says of C replicas."""

    prefill: Floats  # [C, B]
    decode: Floats  # [C, B]
    steps: Floats  # [C, 1]


Law = Callable[[Replicas, Floats], Times]  # batches [1, B], from 0 on


def v1(r: Replicas, batch: Floats) -> Times:
    """Prefill and decode apart, each linear in the batch; needs delta_s."""
    prefill = r.gamma_s[:, None] + (r.delta_s * r.input_tokens)[:, None] * batch
    decode = r.alpha_s[:, None] + r.beta_s[:, None] * batch
    return Times(prefill, decode, np.maximum(r.output_tokens - 1, 0.0)[:, None])


def v2(r: Replicas, batch: Floats) -> Times:
    """One step's law for prefill and decode, prompts in one chunk; a request's own work counts twice."""
    n, m = r.input_tokens, r.output_tokens
    cached = r.gamma_s * (n + m / 2)
    step = r.alpha_s[:, None] + batch * (r.beta_s * (n + m) / (m + 1) + cached)[:, None]
    prefill = np.where(n[:, None] > 0, step + ((r.beta_s + r.gamma_s) * n)[:, None], 0.0)
    return Times(prefill, step + (r.beta_s + cached)[:, None], m[:, None])


def alone(r: Replicas, batch: Floats) -> Times:
    """A request served alone, whatever the number present."""
    none = np.zeros_like(batch)
    prefill = r.alpha_s + (r.beta_s + r.gamma_s) * r.input_tokens
    decode = r.alpha_s + r.beta_s + r.gamma_s * (r.input_tokens + r.output_tokens / 2)
    return Times(prefill[:, None] + none, decode[:, None] + none, r.output_tokens[:, None])


def linear(r: Replicas, batch: Floats) -> Times:
    """A request's time is alpha + beta b: the first token comes with the last."""
    return Times(
        r.alpha_s[:, None] + r.beta_s[:, None] * batch, np.zeros((len(r), batch.shape[1])), np.zeros((len(r), 1))
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Chains:
    """Prepared replicas; see `flyball.performance.queueing.Queues`."""

    at_mean: bool
    times: Times
    service: ServiceRates
    min_rate_rps: Floats
    max_rate_rps: Floats
    capacity_rps: Floats
    best_batch: Ints

    @property
    def compat(self) -> bool:
        """These laws have no defect that sizing would have to repeat."""
        return False

    def analyze(self, rates_rps: Floats) -> Metrics:
        """Metrics at [C] or [C, R] arrival rates."""
        rates = np.asarray(rates_rps, dtype=np.float64)
        offered = rates if rates.ndim == 2 else rates[:, None]
        lam = np.maximum(offered, self.min_rate_rps[:, None] * _NEXT_TO_NOTHING)
        chain = occupancy(self.service, lam)
        throughput = lam * chain.accepted
        service, wait = chain.in_service / throughput, chain.waiting / throughput
        prefill, decode = self._at(chain.in_service if self.at_mean else self._effective_batch(service))
        decodes = self.times.steps > 0
        if self.at_mean:
            prefill = np.where(decodes, prefill, service)
            decode = (service - prefill) / np.where(decodes, self.times.steps, 1.0)
        itl = np.where(decodes, decode, 0.0)
        ttft = wait + prefill + (itl if self.at_mean else 0.0)
        metrics = (
            np.minimum(throughput, offered), ttft, itl, wait, prefill, wait + service, chain.in_service,
            chain.in_service / self.service.servers[:, None], 1 - chain.accepted,
        )  # fmt: skip
        return Metrics(*(v if rates.ndim == 2 else v[:, 0] for v in metrics))

    def _effective_batch(self, service: Floats) -> Floats:
        """[C, R] The batch whose requests take S, between whole batches on a line."""
        tau = np.maximum.accumulate(self.times.prefill + self.times.steps * self.times.decode, axis=1)
        most = self.service.servers.tolist()
        rows = [np.interp(s, t[: n + 1], np.arange(n + 1.0)) for s, t, n in zip(service, tau, most, strict=True)]
        return np.array(rows)

    def _at(self, batch: Floats) -> tuple[Floats, Floats]:
        """Prefill and decode times [C, R] at any batch, between whole ones on a line."""
        low = np.clip(batch.astype(np.int64), 0, self.service.servers[:, None] - 1)
        part = batch - low

        def between(times: Floats) -> Floats:
            return np.take_along_axis(times, low, 1) * (1 - part) + np.take_along_axis(times, low + 1, 1) * part

        return between(self.times.prefill), between(self.times.decode)

    def batch_within(self, *, itl_s: Floats, prefill_s: Floats) -> tuple[Ints, Ints]:
        """Largest batch within an ITL, and within a prefill time."""
        batch = np.arange(1, self.times.decode.shape[1])
        exists = batch <= self.service.servers[:, None]

        def largest(times: Floats, limit: Floats) -> Ints:
            fits = (times[:, 1:] <= limit[:, None]) & exists
            most: Ints = np.maximum((fits * batch).max(axis=1), 1)
            return most

        return largest(self.times.decode, itl_s), largest(self.times.prefill, prefill_s)

    def take(self, rows: Ints) -> _Chains:
        """Some of the replicas."""
        return _Chains(
            self.at_mean, Times(*(v[rows] for v in self.times)), self.service.take(rows),
            self.min_rate_rps[rows], self.max_rate_rps[rows], self.capacity_rps[rows], self.best_batch[rows],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StateDependent:
    """The general chain under any law of times; `one_at_a_time` turns the batch's places into places to wait.

    >>> one = Replicas.of(alpha_s=2.0, beta_s=0.25, gamma_s=0.0, input_tokens=1, output_tokens=1, max_batch=4,
    ...                   max_queue=2)
    >>> seen = StateDependent(linear).prepare(one).analyze(np.array([0.8]))
    >>> print(f"throughput {seen.throughput_rps[0]:.6f}, response {seen.response_s[0]:.6f}")
    throughput 0.769475, response 2.889637
    """

    law: Law
    at_mean: bool = False  # v2's reading of latencies, in place of v1's
    one_at_a_time: bool = False

    def prepare(self, replicas: Replicas) -> Queues:
        """Times and service rates for every batch of every replica."""
        servers, places = replicas.max_batch, replicas.max_queue
        if self.one_at_a_time:
            servers, places = np.ones_like(servers), servers + places - 1
        batch = np.arange(0.0, servers.max() + 1)[None, :]
        times = self.law(replicas, batch)
        mu = batch[:, 1:] / (times.prefill + times.steps * times.decode)[:, 1:]
        best = 1 + np.argmax(np.where(batch[:, 1:] <= servers[:, None], mu, 0.0), axis=1)
        capacity = mu[np.arange(len(replicas)), best - 1]
        return _Chains(
            at_mean=self.at_mean,
            times=times,
            service=ServiceRates.of(mu, servers, places),
            min_rate_rps=mu[:, 0] * _RATE_MARGIN,
            max_rate_rps=capacity * (1 - _RATE_MARGIN),
            capacity_rps=capacity,
            best_batch=best,
        )


V1 = StateDependent(v1)
V2 = StateDependent(v2, at_mean=True)
MM1K = StateDependent(alone, at_mean=True, one_at_a_time=True)
LINEAR = StateDependent(linear)
