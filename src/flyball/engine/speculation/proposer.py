"""What every way to guess tokens shares: it is asked for drafts between scheduling and running a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flyball.engine.request import Request


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed next tokens of one request; none if there is no good guess."""

    ids: list[int]
    probs: Tensor | None = None  # [len(ids), V] they were drawn from; None: they were certain (q is one-hot)


class Proposer(Protocol):
    """One way to guess; keeps what it needs about requests itself or on them."""

    longest: int  # most tokens it can guess at once

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Draft]:
        """Up to so many next tokens for each request, all of which have known tokens but one computed.

        The requests' tables hold blocks for as many tokens. `request.spec_ids` is empty before and after.
        """

    def observe(self, requests: Sequence[Request], hidden: Tensor | None) -> None:
        """After a step: the model's last states [R, d] from which each request's newest token was sampled."""
