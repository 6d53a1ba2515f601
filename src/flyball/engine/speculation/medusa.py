"""Medusa as a chain: each head's first choice follows the one before, and all are verified in one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flyball.engine.config import EngineConfig
from flyball.engine.model_runner import ModelRunner
from flyball.engine.request import Request
from flyball.engine.speculation.heads import MedusaHeads
from flyball.engine.speculation.proposer import Draft


class MedusaProposer:
    """Guesses with heads on the model's own last state; costs some small products, no second model."""

    def __init__(self, config: EngineConfig, target: ModelRunner) -> None:
        """Raises InvalidInput for heads of another model."""
        assert config.medusa_heads is not None
        self._target = target
        self.heads = MedusaHeads.load(
            config.medusa_heads, target.model.config.hidden_size, target.shape.dtype, config.device
        )
        self.longest = self.heads.heads
        target.keep_hidden()

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Draft]:
        """What the heads made of the state under each request's newest token."""
        return [
            Draft(r.medusa_ids[1][:count] if r.medusa_ids and r.medusa_ids[0] == r.num_known else [])
            for r, count in zip(requests, counts, strict=True)
        ]

    @torch.inference_mode()
    def observe(self, requests: Sequence[Request], hidden: Tensor | None) -> None:
        """Guess at once, while the states are there."""
        if hidden is None or not requests:
            return
        states = self.heads(hidden.to(self._target.shape.dtype))
        guesses = torch.stack([self._target.logits_of(s).argmax(-1) for s in states], dim=-1).tolist()
        for request, ids in zip(requests, guesses, strict=True):
            request.medusa_ids = (request.num_known, ids)
