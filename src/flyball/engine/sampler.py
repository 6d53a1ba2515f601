"""From logits to tokens, all rows at once.

A row draws one uniform number, keyed by (the request's seed, the token's position), and inverts the cumulative
distribution with it. So a seeded request gets the same tokens whatever it is batched with, and after preemption.

Symbols: R rows, V vocabulary; logits [R, V] float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flyball.engine.request import SamplingParams

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (SplitMix64; Steele et al. 2014).

    >>> uniform(1, 0) == uniform(1, 0) != uniform(1, 1)
    True
    """
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def processed_probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution that is sampled from, [R, V]: temperature, then top-k, top-p and min-p, renormalised.

    Greedy rows become one-hot at the first maximum. Filters act on the same sorted order as in the
    field's warpers: top-p keeps the smallest set whose mass reaches p, min-p what is at least min_p times the maximum.
    """
    vocab = logits.shape[-1]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    probs = torch.softmax(logits / column([1.0 if p.greedy else p.temperature for p in params]), dim=-1)
    if any(p.top_k or p.top_p < 1 or p.min_p > 0 for p in params):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ordered = ordered * (
            torch.arange(vocab, device=logits.device) < column([min(p.top_k or vocab, vocab) for p in params])
        )
        ordered = ordered / ordered.sum(-1, keepdim=True)
        top_p = column([max(p.top_p, 1e-30) for p in params])  # above 0 in float32 too: the first token stays
        before = ordered.cumsum(-1) - ordered
        # A row without top-p keeps its tail even where rounding lets the cumulative sum reach 1 early.
        ordered = ordered * ((before < top_p) | (top_p >= 1))
        ordered = ordered * (ordered >= column([p.min_p for p in params]) * ordered[:, :1])
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered / ordered.sum(-1, keepdim=True))
    greedy = [i for i, p in enumerate(params) if p.greedy]
    if greedy:
        index = torch.tensor(greedy, device=logits.device)
        best = logits[index].argmax(-1)
        probs[index] = 0.0
        probs[index, best] = 1.0
    return probs


def sample(
    logits: Tensor, params: Sequence[SamplingParams], seeds: Sequence[int], positions: Sequence[int]
) -> list[int]:
    """Choose one token a row; `positions` are those of the tokens being chosen."""
    if all(p.greedy for p in params):
        tokens: list[int] = logits.argmax(-1).tolist()
        return tokens
    cumulative = processed_probabilities(logits.float(), params).double().cumsum(-1)
    draws = [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    wanted = torch.tensor(draws, dtype=torch.float64, device=logits.device)[:, None] * cumulative[:, -1:]
    # right=True: the first entry above the draw, so a token of probability 0 is never chosen.
    chosen: list[int] = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1).tolist()
    return chosen
