"""Model v3 read as engines behave: the prefill emits the first token, and prompts come in bursts.

The chain of `queue_v3` spreads a request's work evenly over its steps. An engine does not: a prompt is computed at
once, in one long step, and those who arrive during it are all computed in the next, and so on. With the step lengths T
as a linear process, where each arrival adds w to the next step and kappa to d more, the stationary law of T, and what a
request sees of it, is exact (derivation: docs/theory/queueing.md). Here its terms are added to the chain's means; they
count only as far as there is room in the batch for those who come in a burst.

symbol   meaning                                                                                     unit
T        length of a step without one's own work in it and what that work brings about               s
w        own prefill work, w_pre(c)                                                                  s
kappa    own work of a decode step, w_dec / d                                                        s
r        share of time that prefills take, throughput * w
theta    decode work that a burst brings about, relative to a step's: throughput * kappa * d / (1 - r)
lump     a prompt and the prompts that arrive because of it, w / (1 - r)                             s
tail     their decode work within one's own d steps, kappa d (e^theta - 1) / (theta (1 - r)^2)       s
"""

from __future__ import annotations

import numpy as np

from flyball.performance.queue_v3 import ChunkedPrefill, Latencies, Life, Steady

_MOST_BUSY = 0.99  # at which shares of time are cut off: the linear process has no bounds, an engine has


def first_token_prefilled(life: Life, seen: Steady) -> Latencies:
    """TTFT = W + rest of the step in progress + prefill, with the prompts that arrive together."""
    c, d, rate = seen.chunks, life.d, seen.throughput
    w, kappa, delta = life.prefill_work(c), life.token_work, life.added(c)
    step = seen.service / (c + d)  # of all that is seen, one's own work included
    busy = np.minimum(rate * (c + d) * delta, _MOST_BUSY)
    places = seen.batch - seen.in_service
    r = np.minimum(rate * w, _MOST_BUSY) * places / (1 + places)  # a burst ends where the batch is full
    others = np.maximum(step - delta / (1 - busy), life.alpha)  # T

    bursts = rate * w * w / (1 - r * r)  # variance of T over its mean, from prompts
    rest = seen.room * (seen.running * others + bursts / c) / 2
    joined = seen.room * (r * bursts + rate * w * w * (c - 1) / (2 * c))
    prefill = c * others + w + joined

    theta = np.maximum(np.minimum(rate * kappa * d / (1 - r), _MOST_BUSY), 1e-12)
    lump, tail = w / (1 - r), kappa * d / (1 - r) ** 2 * np.expm1(theta) / theta
    decodes = np.maximum(d, 1.0)
    spread = step + (c * delta - w) / decodes  # ITL if work came evenly
    full = life.alpha + seen.batch * delta + (c * delta - w) / decodes  # the longest mean ITL
    bunched = (
        others + (r * lump + tail + rate * (r * r * lump * w / (1 - r * r) + lump * tail + tail * tail / 2)) / decodes
    )
    free = 1 - (seen.in_service / seen.batch) ** 2  # how far a burst finds room; with none, work does come evenly
    itl = np.where(d > 0, spread + seen.room * free * (np.minimum(bunched, full) - spread), 0.0)
    wait = seen.wait + rest
    return Latencies(wait + prefill, itl, wait, prefill, wait + prefill + d * itl)


V3_ENGINE = ChunkedPrefill(first_token_prefilled, decode_steps_saved=1)
