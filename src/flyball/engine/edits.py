"""Logits changed before sampling: penalties, bias, and masks (allowed tokens, minimum length, grammar).

Only rows of requests that ask for it are touched, and of these only the tokens concerned: each request keeps the
tokens it has used, once each, with their counts, so that a step costs what is new and not what is known.

Symbols: R rows, V vocabulary, E entries (row, token), all of them different; logits [R, V] float32, changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flyball.core.errors import InvalidInput
from flyball.engine.request import Request, SamplingParams


class Edits:
    """What is changed in the logits of one request; lives as long as the request."""

    def __init__(self, request: Request, eos_token_ids: Set[int]) -> None:
        params = request.params
        self.request = request
        used = np.unique(np.asarray(request.prompt_ids)) if params.repetition_penalty != 1 else np.empty(0, np.int64)
        self._place: dict[int, int] = {int(token): i for i, token in enumerate(used)}
        self._ids = np.empty(max(64, 2 * len(used)), dtype=np.int64)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._ids[: len(used)] = used
        self._seen = 0  # output tokens counted so far
        biases: dict[int, float] = {}
        for token, bias in params.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        self.bias_ids = np.fromiter(biases, dtype=np.int64, count=len(biases))
        self.biases = np.fromiter(biases.values(), dtype=np.float32, count=len(biases))
        self.allowed = torch.tensor(params.allowed_token_ids, dtype=torch.long)
        self.ends = np.array(sorted(ending_ids(params, eos_token_ids)), dtype=np.int64)

    def used(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of prompt and answer, once each, and how often the answer holds them."""
        for token in self.request.output_ids[self._seen :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._counts[place] += 1
        self._seen = len(self.request.output_ids)
        return self._ids[: len(self._place)], self._counts[: len(self._place)]


def ending_ids(params: SamplingParams, eos_token_ids: Set[int]) -> set[int]:
    """Tokens that would end an answer."""
    return set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))


def check_edits(params: SamplingParams, vocab_size: int, eos_token_ids: Set[int]) -> None:
    """Refuse edits of tokens that do not exist, and masks that leave no token: raises InvalidInput."""
    for name, ids in (
        ("logit_bias", [i for i, _ in params.logit_bias]),
        ("allowed_token_ids", params.allowed_token_ids),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InvalidInput(
                f"{name} holds a token id outside 0..{vocab_size - 1}; give ids of this model's vocabulary"
            )
    if params.min_tokens:
        ends, allowed = ending_ids(params, eos_token_ids), set(params.allowed_token_ids)
        if not (allowed - ends if allowed else vocab_size > len(ends)):
            raise InvalidInput("until min_tokens no token is allowed that does not end the answer; allow one more")


def edit(logits: Tensor, requests: Sequence[Request], eos_token_ids: Set[int]) -> list[int]:
    """Change the rows of those requests that ask for it; returns the rows that are left without any token."""
    rows = [(i, _edits(r, eos_token_ids)) for i, r in enumerate(requests) if r.edited]
    _penalize(logits, [(i, e) for i, e in rows if e.request.params.penalized])
    biased = [(i, e) for i, e in rows if len(e.bias_ids)]
    if biased:
        places = _places([(i, e.bias_ids) for i, e in biased], logits)
        logits[places] += torch.from_numpy(np.concatenate([e.biases for _, e in biased])).to(logits.device)
    for i, e in rows:
        if len(e.allowed):
            allowed = e.allowed.to(logits.device)
            kept = logits[i, allowed]
            logits[i] = -torch.inf
            logits[i, allowed] = kept
    short = [(i, e.ends) for i, e in rows if len(e.request.output_ids) < e.request.params.min_tokens]
    if short:
        logits[_places(short, logits)] = -torch.inf
    guided = [(i, e.request.matcher) for i, e in rows if e.request.matcher is not None]
    return _mask(logits, guided) if guided else []


def _edits(request: Request, eos_token_ids: Set[int]) -> Edits:
    if request.edits is None:
        request.edits = Edits(request, eos_token_ids)
    edits: Edits = request.edits
    return edits


def _penalize(logits: Tensor, rows: Sequence[tuple[int, Edits]]) -> None:
    """Repetition as in CTRL (Keskar et al. 2019), over prompt and answer; frequency and presence, over the answer."""
    if not rows:
        return
    used = [edits.used() for _, edits in rows]
    places = _places([(i, ids) for (i, _), (ids, _) in zip(rows, used, strict=True)], logits)
    lengths = [len(ids) for ids, _ in used]

    def column(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(logits.device)

    params = [edits.request.params for _, edits in rows]
    counts = torch.from_numpy(np.concatenate([counts for _, counts in used])).to(logits.device)
    repetition = column([p.repetition_penalty for p in params])
    values = logits[places]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= column([p.frequency_penalty for p in params]) * counts
    values -= column([p.presence_penalty for p in params]) * (counts > 0)
    logits[places] = values


def _mask(logits: Tensor, guided: Sequence[tuple[int, Any]]) -> list[int]:
    """Leave the tokens that each grammar can go on with."""
    import xgrammar

    bitmask = xgrammar.allocate_token_bitmask(len(logits), logits.shape[-1])
    rows = [i for i, _ in guided]
    for i, matcher in guided:
        matcher.fill_next_token_bitmask(bitmask, i)
    xgrammar.apply_token_bitmask_inplace(logits, bitmask.to(logits.device), indices=rows)
    best = logits[torch.tensor(rows, device=logits.device)].amax(-1).tolist()
    return [i for i, value in zip(rows, best, strict=True) if value == -np.inf]


def _places(entries: Sequence[tuple[int, np.ndarray]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and tokens of all entries, as one index."""
    rows = np.repeat(np.array([i for i, _ in entries]), [len(ids) for _, ids in entries])
    ids = np.concatenate([ids for _, ids in entries])
    return torch.from_numpy(rows).to(logits.device), torch.from_numpy(ids).to(logits.device)
