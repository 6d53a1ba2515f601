"""Prompts of a stated length, made from a seed, that share prefixes exactly where their requests say so.

Token ids are drawn evenly from the middle three quarters of the vocabulary, since special tokens (end of text, image
marks) sit at its ends. A prefix id always gives the same tokens; the rest of a prompt belongs to its request alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.core.workload import RequestSpec

_OWN, _SHARED = 0, 1  # streams of random numbers that never meet
# Short common words, for servers that take text only: about one token each in English vocabularies.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house service "
    "friend father power hour game line end member law car"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Makes the prompt of each request; equal seeds make equal prompts."""

    seed: tuple[int, ...]
    vocab_size: int

    def __post_init__(self) -> None:
        if self.vocab_size < 8:
            raise InvalidInput(f"a vocabulary of {self.vocab_size} tokens is too small to draw prompts from; need 8")

    def token_ids(self, request: RequestSpec, index: int) -> list[int]:
        """The prompt of the index-th request."""
        left = request.input_tokens
        parts = []
        for prefix_id in request.prefix_ids:
            if left <= 0:
                break
            parts.append(self._draw(_SHARED, prefix_id, request.prefix_tokens)[:left])
            left -= request.prefix_tokens
        if left > 0:
            parts.append(self._draw(_OWN, index, left))
        token_ids: list[int] = np.concatenate(parts).tolist()
        return token_ids

    def _draw(self, stream: int, key: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        rng = np.random.default_rng((*self.seed, stream, key))
        margin = self.vocab_size // 8
        return rng.integers(margin, self.vocab_size - margin, count)


def as_text(token_ids: list[int]) -> str:
    """The same prompt as words, one for each token id; equal prefixes stay equal."""
    return " ".join(_WORDS[token % len(_WORDS)] for token in token_ids)
