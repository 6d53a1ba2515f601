"""Prompt lookup: what followed the last time that these tokens stood together (Saxena 2023, prompt lookup decoding)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flyball.engine.request import Request
from flyball.engine.speculation.proposer import Draft

LONGEST, SHORTEST = 4, 2  # tokens that must agree; the most are tried first


class Lookup:
    """Where each run of tokens in one text ended last, before its present end."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in tokens at the end of the text."""
        for token in tokens:
            for length in range(SHORTEST, LONGEST + 1):  # runs that end before this token have a follower now
                if len(self._tokens) >= length:
                    self._ends[tuple(self._tokens[-length:])] = len(self._tokens)
            self._tokens.append(token)

    def __len__(self) -> int:
        return len(self._tokens)

    def follow(self, count: int) -> list[int]:
        """Up to so many tokens that followed the longest run of last tokens when it was seen before."""
        for length in range(LONGEST, SHORTEST - 1, -1):
            end = self._ends.get(tuple(self._tokens[-length:])) if len(self._tokens) >= length else None
            if end is not None:
                return self._tokens[end : end + count]
        return []


class NgramProposer:
    """Looks each request's own prompt and answer up; costs no model."""

    longest = 16

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Draft]:
        """What followed the same tokens earlier in the same request."""
        return [Draft(self._lookup(r).follow(count)) for r, count in zip(requests, counts, strict=True)]

    def observe(self, requests: Sequence[Request], hidden: Tensor | None) -> None:
        """Nothing to be learnt from states."""

    def _lookup(self, request: Request) -> Lookup:
        if request.lookup is None:
            request.lookup = Lookup()
        lookup: Lookup = request.lookup
        if len(lookup) < request.num_known:
            lookup.extend(request.tokens(len(lookup), request.num_known))
        return lookup
