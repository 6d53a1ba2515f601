"""An engine in virtual time that obeys the law of a step: the oracle that queueing formulas are held against.

Each step gives every running request its next token or the next chunk of its prompt, admits whom the batch and the
token budget have room for, first come first served, and takes alpha + beta · tokens + gamma · cached tokens read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Means over all requests of a run, in seconds, tokens and requests per second."""

    arrival_rps: float
    input_tokens: float
    output_tokens: float
    ttft_s: float
    itl_s: float
    concurrency: float
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The parameters of one engine."""

    alpha_s: float
    beta_s: float
    gamma_s: float
    max_batch: int
    max_step_tokens: int

    def run(self, rng: np.random.Generator, rate_rps: float, lengths: Lengths) -> Seen:
        """Serve Poisson arrivals of these lengths, to the last token of the last."""
        tokens_in, tokens_out = (values.tolist() for values in lengths)
        arrivals = np.cumsum(rng.exponential(1 / rate_rps, len(tokens_in))).tolist()
        computed, emitted = [0] * len(arrivals), [0] * len(arrivals)
        first, last = [0.0] * len(arrivals), [0.0] * len(arrivals)
        coming, running, now = deque(range(len(arrivals))), list[int](), 0.0
        while coming or running:
            if not running and arrivals[coming[0]] > now:
                now = arrivals[coming[0]]
            budget, cached = self.max_step_tokens, 0
            served = []
            while len(running) < self.max_batch and coming and arrivals[coming[0]] <= now:
                running.append(coming.popleft())
            for request in running:
                count = min(budget, max(tokens_in[request] - computed[request], 1))
                if count:
                    budget -= count
                    computed[request] += count
                    cached += computed[request]
                    served.append(request)
            now += self.alpha_s + self.beta_s * (self.max_step_tokens - budget) + self.gamma_s * cached
            for request in served:
                if computed[request] >= tokens_in[request]:
                    emitted[request] += 1
                    first[request] = first[request] or now
                    last[request] = now
            running = [request for request in running if emitted[request] < tokens_out[request]]
        begun, ended, came = np.array(first), np.array(last), np.array(arrivals)
        return Seen(
            arrival_rps=(len(came) - 1) / (came[-1] - came[0]),
            input_tokens=float(np.mean(tokens_in)),
            output_tokens=float(np.mean(tokens_out)),
            ttft_s=float((begun - came).mean()),
            itl_s=float((ended - begun).sum() / (np.sum(tokens_out) - len(came))),
            concurrency=float((ended - came).sum() / now),
            duration_s=now,
        )


def varied(rng: np.random.Generator, count: int, tokens_in: float, tokens_out: float, spread: float) -> Lengths:
    """Lognormal lengths around these means, up to four times as long, at least two tokens; spread 0: all equal."""
    shape = np.minimum(np.exp(rng.normal(-spread * spread / 2, spread, (2, count))), 4.0)
    tokens = np.maximum((np.array([[tokens_in], [tokens_out]]) * shape).astype(np.int64), 2)
    return tokens[0], tokens[1]
