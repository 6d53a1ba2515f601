"""Prefill and decode on replicas of their own: two queues in a row.

A prefill replica computes the prompt and gives the first token; the prompt's keys and values move to a decode replica,
which gives the rest. Each stage is the queue model itself: prefill is a request without further answer, decode one
whose prompt is found in the cache (read, not computed) and whose answer is a token shorter. What leaves the first stage
is taken for Poisson again (exact for M/M/c: Burke, 1956; what joins from several prefill replicas is closer to it than
what leaves each). Between the stages lies the transfer, which costs time and no rate.

symbol       meaning                                             unit
first        TTFT of the prefill stage: the user's TTFT          s
second       its first token's gap: transfer, wait for a place, reading the prompt's cache, a step
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.numerics.markov import Floats, Ints
from flyball.performance.queueing import QueueModel, Replicas
from flyball.performance.sizing import Goals, analyze_replicas, size_replicas


@dataclass(frozen=True, slots=True, eq=False)
class Tandem:
    """What requests see of C pairs of stages; arrays [C]."""

    ttft_s: Floats
    second_token_s: Floats  # gap between the first two tokens: where the stages meet
    itl_s: Floats  # gap between later tokens
    e2e_s: Floats
    loss: Floats  # share turned away by either stage
    throughput_rps: Floats


@dataclass(frozen=True, slots=True, eq=False)
class TandemSize:
    """Fewest replicas of each stage for a load, [C]; 0 where no number keeps the targets."""

    prefill: Ints
    decode: Ints
    seen: Tandem  # with these numbers; NaN where there are none


def prefill_stage(replicas: Replicas) -> Replicas:
    """The same replicas, with nothing to answer but the first token."""
    nothing = np.zeros_like(replicas.output_tokens)
    return dataclasses.replace(replicas, output_tokens=nothing, output_cv=nothing)


def decode_stage(replicas: Replicas) -> Replicas:
    """The same replicas, their prompts computed elsewhere, and the first token given."""
    if (replicas.output_tokens <= 1).any():
        raise InvalidInput("answers of at most one token end with the prefill; plan them without a decode stage")
    return dataclasses.replace(
        replicas, output_tokens=replicas.output_tokens - 1, prefix_hit=np.ones_like(replicas.prefix_hit)
    )


def analyze(
    model: QueueModel,
    prefill: Replicas,
    decode: Replicas,
    rates_rps: Floats,
    *,
    prefill_count: Ints,
    decode_count: Ints,
    transfer_s: Floats | float = 0.0,
) -> Tandem:
    """What requests see when a load [C] is shared evenly by the replicas of each stage.

    `prefill` and `decode` are replicas under the whole request's lengths, as for one stage.
    """
    first = analyze_replicas(model, prefill_stage(prefill), rates_rps / prefill_count)
    through = first.throughput_rps * prefill_count
    second = analyze_replicas(model, decode_stage(decode), through / decode_count)
    gap = transfer_s + second.wait_s + second.prefill_s + second.itl_s
    return Tandem(
        ttft_s=first.response_s,
        second_token_s=gap,
        itl_s=second.itl_s,
        e2e_s=first.response_s + transfer_s + second.response_s,
        loss=1 - (1 - first.loss) * (1 - second.loss),
        throughput_rps=second.throughput_rps * decode_count,
    )


def fewest(
    model: QueueModel,
    prefill: Replicas,
    decode: Replicas,
    rates_rps: Floats,
    *,
    ttft_s: Floats | float = np.inf,
    itl_s: Floats | float = np.inf,
    loss: Floats | float = np.inf,
    transfer_s: Floats | float = 0.0,
) -> TandemSize:
    """Fewest prefill replicas whose TTFT, and decode replicas whose ITL, keep their targets under a load [C].

    The stages need nothing of each other: TTFT ends where the first does, ITL begins in the second.
    """
    c = len(rates_rps)
    whole = Goals.of(c, ttft_s=ttft_s, loss=loss, stable=True)
    later = Goals.of(c, itl_s=itl_s, loss=loss, stable=True)
    counts = []
    for stage, goals in ((prefill_stage(prefill), whole), (decode_stage(decode), later)):
        sized = size_replicas(model, stage, goals)
        each = np.where(sized.feasible, sized.rate_rps, np.inf)
        counts.append(np.where(sized.feasible, np.maximum(np.ceil(rates_rps / each), 1), 0).astype(np.int64))
    feasible = (counts[0] > 0) & (counts[1] > 0)
    seen = analyze(
        model, prefill, decode, rates_rps, prefill_count=np.maximum(counts[0], 1),
        decode_count=np.maximum(counts[1], 1), transfer_s=transfer_s,
    )  # fmt: skip
    hidden = {f.name: np.where(feasible, getattr(seen, f.name), np.nan) for f in dataclasses.fields(seen)}
    prefill_count, decode_count = (np.where(feasible, count, 0) for count in counts)
    return TandemSize(prefill_count, decode_count, Tandem(**hidden))
