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

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Draft]:
        """What the heads make of the state under each request's newest token; none where that was not kept."""
        drafts = [Draft([]) for _ in requests]
        ready = [i for i, r in enumerate(requests) if r.medusa_state is not None and r.medusa_state[0] == r.num_known]
        if ready:
            rows = torch.stack([requests[i].medusa_state[1] for i in ready])  # type: ignore[index]  # not None, above
            states = self.heads(rows.to(self._target.shape.dtype))[: max(counts[i] for i in ready)]
            guesses = torch.stack([self._target.logits_of(s).argmax(-1) for s in states], dim=-1).tolist()
            for i, ids in zip(ready, guesses, strict=True):
                drafts[i] = Draft(ids[: counts[i]])
        return drafts

    def observe(self, requests: Sequence[Request], hidden: Tensor | None) -> None:
        """Keep the states; what they say is worked out only if it is asked for."""
        if hidden is not None:
            for request, state in zip(requests, hidden, strict=True):
                request.medusa_state = (request.num_known, state)
