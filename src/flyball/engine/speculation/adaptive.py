"""How many tokens to guess: as many as were lately kept and one more, and none where the batch is too large.

A guess is worth its place in the step only if it is likely to be kept; what was kept lately says how likely. In a
large batch the step is bound by arithmetic, every guess costs what a token costs, and speculation only loses.
"""

from __future__ import annotations

_MEMORY = 0.9  # weight of what was seen before, a verified draft
_PROBE = 16  # after so many steps without a guess, one is tried again


class DraftLength:
    """The length of drafts from an average of how many were kept."""

    def __init__(self) -> None:
        self.kept: float | None = None  # tokens kept of a draft, lately; None: nothing seen
        self._idle = 0

    def choose(self, most: int, rows: int, max_batch: int) -> int:
        """Tokens to guess for each of `rows` decoding requests; 0 beyond `max_batch` of them (0: no bound)."""
        if most < 1 or (max_batch and rows > max_batch):
            return 0
        if self.kept is None:
            return most
        wanted = min(most, int(self.kept + 0.5) + 1)
        if self.kept >= 0.15:
            return wanted
        self._idle += 1  # next to nothing is kept: mostly leave it, and look again now and then
        if self._idle < _PROBE:
            return 0
        self._idle = 0
        return 1

    def observe(self, drafted: int, kept: int) -> None:
        """Take in one verified draft; one kept whole says that at least one more would have been worth a try."""
        seen = kept + 0.5 if kept == drafted else float(kept)
        self.kept = seen if self.kept is None else _MEMORY * self.kept + (1 - _MEMORY) * seen
