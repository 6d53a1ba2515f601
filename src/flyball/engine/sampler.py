"""From logits to tokens, all rows at once.

A row draws one uniform number, keyed by (the request's seed, the token's position), and inverts the cumulative
distribution with it. So a seeded request gets the same tokens whatever it is batched with, and after preemption; which
way a row is computed depends on nothing but the row either.

A vocabulary is long, and torch sorts it a hundred times slower than numpy with its vector instructions: so filters
only look for the probability below which nothing is kept, which takes sorted values without their places. Cumulative
sums are made of chunks.

Symbols: R rows, V vocabulary, C chunks of a row; logits [R, V].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flyball.engine.request import SamplingParams, TokenLogprobs

_MASK = (1 << 64) - 1
_CHUNK = 256  # tokens whose probabilities are summed at once
_HEAD = 2048  # likeliest tokens among which the filters' border is sought before it is among all
_LOGPROB_ROWS = 16  # normalised at once: bounds the memory that logprobs take


SAMPLE, DRAFT, ACCEPT, RESIDUAL = range(4)  # streams of random numbers: what a draw at a position is for


def uniform(seed: int, position: int, stream: int = SAMPLE) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (SplitMix64; Steele et al. 2014).

    >>> uniform(1, 0) == uniform(1, 0) != uniform(1, 1)
    True
    """
    z = (seed * 0x9E3779B97F4A7C15 + (position + 1) * 0xD1342543DE82EF95 + stream * 0x8CB92BA72F3D8DD7) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def processed_probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The distribution that is sampled from, [R, V]: temperature, then top-k, top-p and min-p, renormalised.

    Greedy rows become one-hot at the first maximum. Filters act on the same sorted order as in the
    field's warpers: top-p keeps the smallest set whose mass reaches p, min-p what is at least min_p times the maximum.
    """
    probs = _tempered(logits, params)
    if any(map(_filters, params)):
        probs = _filtered(probs, params)
        probs /= probs.sum(-1, keepdim=True)
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
    """Choose one token a row, -1 where the logits are no numbers; `positions` are those of the tokens being chosen."""
    ways: dict[bool | None, list[int]] = {}
    for i, p in enumerate(params):
        ways.setdefault(None if p.greedy else _filters(p), []).append(i)
    tokens = [0] * len(params)
    for way, rows in ways.items():
        part = logits if len(ways) == 1 else logits[torch.tensor(rows, device=logits.device)]
        if way is None:
            chosen = first_maxima(part)
        else:
            draws = [uniform(seeds[i], positions[i]) for i in rows]
            chosen = _drawn(part, [params[i] for i in rows], draws, filters=way)
        if len(ways) == 1:
            return chosen
        for i, token in zip(rows, chosen, strict=True):
            tokens[i] = token
    return tokens


def _drawn(logits: Tensor, params: Sequence[SamplingParams], draws: Sequence[float], *, filters: bool) -> list[int]:
    probs = _tempered(logits, params)
    broken = probs[:, 0].isnan()
    if bool(broken.any()):
        probs[broken] = 1.0
    wanted = torch.tensor(draws, dtype=torch.float64).to(probs.device)
    chosen: list[int] = (
        _inverse(_filtered(probs, params) if filters else probs, wanted).masked_fill(broken, -1).tolist()
    )
    return chosen


def first_maxima(logits: Tensor) -> list[int]:
    """The lowest id of each row's largest logit; -1 where a row holds what is no number."""
    if logits.device.type == "cpu":  # torch takes ten times as long
        values = logits.float().numpy()
        places = values.argmax(-1)  # the first that is no number, if there is one
        return np.where(np.isnan(values[np.arange(len(values)), places]), -1, places).tolist()  # type: ignore[no-any-return]
    chosen = logits.argmax(-1)
    tokens: list[int] = chosen.masked_fill(logits.gather(-1, chosen[:, None])[:, 0].isnan(), -1).tolist()
    return tokens


def logprobs(logits: Tensor, tokens: Sequence[int], wanted: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Raw logprobs of the chosen tokens and of as many of the likeliest as each row wants; None: the row wants none.

    The logits are the model's, before anything was changed in them. Rows are normalised a few at a time.
    """
    told: list[TokenLogprobs | None] = [None] * len(wanted)
    rows = [i for i, count in enumerate(wanted) if count is not None and tokens[i] >= 0]
    for start in range(0, len(rows), _LOGPROB_ROWS):
        some = rows[start : start + _LOGPROB_ROWS]
        values = torch.log_softmax(logits[torch.tensor(some, device=logits.device)].float(), dim=-1)
        chosen = values.gather(-1, torch.tensor([[tokens[i]] for i in some], device=logits.device))[:, 0].tolist()
        most = min(max(wanted[i] or 0 for i in some), logits.shape[-1])
        top = values.topk(most, dim=-1)
        best, ids = top.values.tolist(), top.indices.tolist()
        for place, i in enumerate(some):
            pairs = tuple(zip(ids[place], best[place], strict=True))[: wanted[i]]
            told[i] = TokenLogprobs(tokens[i], chosen[place], pairs)
    return told


def _filters(params: SamplingParams) -> bool:
    return bool(params.top_k) or params.top_p < 1 or params.min_p > 0


def _tempered(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [R, V] at each row's temperature."""
    logits = logits.float()
    temperatures = [1.0 if p.greedy else p.temperature for p in params]
    if any(t != 1 for t in temperatures):
        logits = logits / _column(temperatures, logits)
    return torch.softmax(logits, dim=-1)


def _filtered(probs: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Set to 0, in place, probabilities [R, V] that filters drop; of equal ones at the border the lowest ids stay."""
    ordered = _ascending(probs)
    mass = probs.sum(-1, keepdim=True)
    least, excess, settled = _border(ordered[:, -_HEAD:].flip(-1), mass, params)
    rest = (~settled).nonzero()[:, 0]
    if len(rest) and probs.shape[-1] > _HEAD:
        theirs = [params[i] for i in rest.tolist()]
        least[rest], excess[rest], _ = _border(ordered[rest].flip(-1), mass[rest], theirs)
    probs.masked_fill_(probs < least, 0.0)
    for row in excess.nonzero()[:, 0].tolist():
        places = (probs[row] == least[row]).nonzero()[:, 0]
        probs[row, places[-int(excess[row]) :]] = 0.0
    return probs


def _border(head: Tensor, mass: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor, Tensor]:
    """The least probability kept [R, 1], how many of those equal to it are dropped [R], and whether that is certain.

    `head` [R, H] holds the largest probabilities in descending order, `mass` [R, 1] the sum of all. It is certain where
    the last of the head is less likely than the border, and top-k, if any, cuts within the head.
    """
    size = head.shape[-1]
    within = _column([float(p.top_k < size) for p in params], head)[:, 0] > 0
    top_k = _column([p.top_k if 0 < p.top_k < size else size for p in params], head)
    kept = torch.arange(size, device=head.device) < top_k
    if any(p.top_p < 1 for p in params):
        top_p = _column([max(p.top_p, 1e-30) for p in params], head)  # above 0 in float32 too: the first token stays
        cumulative = head.cumsum(-1)
        left = torch.where(top_k < size, cumulative.gather(-1, top_k.long() - 1), mass)  # what top-k leaves
        # A row without top-p keeps its tail even where rounding lets the cumulative sum reach 1 early.
        kept &= (cumulative - head < top_p * left) | (top_p >= 1)
    kept &= head >= _column([p.min_p for p in params], head) * head[:, :1]
    count = kept.sum(-1, keepdim=True)  # the kept ones stand first
    least = head.gather(-1, count - 1)
    excess = (head >= least).sum(-1) - count[:, 0]
    return least, excess, within & (least[:, 0] > head[:, -1])


def _ascending(values: Tensor) -> Tensor:
    """Each row's values, the smallest first."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort(dim=-1).values


def draw(weights: Tensor, draws: Tensor) -> Tensor:
    """A token a row of weights [R, V], which need not sum to 1, by uniform numbers [R]; never one of weight 0."""
    return _inverse(weights, draws.double())


def _inverse(probs: Tensor, draws: Tensor) -> Tensor:
    """Where each row's cumulative distribution passes its draw, [R]: first the chunk, then the place in it."""
    rows, vocab = probs.shape
    chunks = vocab // _CHUNK
    sums = probs[:, : chunks * _CHUNK].reshape(rows, chunks, _CHUNK).sum(-1)
    if vocab % _CHUNK:
        sums = torch.cat([sums, probs[:, chunks * _CHUNK :].sum(-1, keepdim=True)], dim=-1)
    cumulative = sums.double().cumsum(-1)
    chunk = _above(cumulative, draws)[:, None]
    end = cumulative.gather(-1, chunk)
    inside = sums.gather(-1, chunk).double()
    rest = ((draws[:, None] * cumulative[:, -1:] - (end - inside)) / inside).clamp(0, 1)
    ids = chunk * _CHUNK + torch.arange(min(_CHUNK, vocab), device=probs.device)
    within = probs.gather(-1, ids.clamp_max(vocab - 1)) * (ids < vocab)
    return ids[torch.arange(rows, device=probs.device), _above(within.double().cumsum(-1), rest[:, 0])]


def _above(cumulative: Tensor, draws: Tensor) -> Tensor:
    """The first place of each row above its draw times the row's sum, [R]: never one of probability 0."""
    total = cumulative[:, -1:]
    wanted = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]
