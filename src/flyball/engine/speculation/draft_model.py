"""A small model drafts: its own keys and values, under the block tables that the large model's requests hold.

A token's place in the draft's cache is its place in the model's. Prefix blocks that a request found in the cache are
good for the draft only if the draft filled them: `_content` says for each block which full content, by hash, it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flyball.core.errors import InvalidInput
from flyball.engine.config import EngineConfig
from flyball.engine.model_runner import ModelRunner
from flyball.engine.request import Request
from flyball.engine.sampler import DRAFT, draw, first_maxima, processed_probabilities, uniform
from flyball.engine.scheduler import Scheduled
from flyball.engine.speculation.proposer import Draft


class DraftModelProposer:
    """Drafts token by token, all requests at once."""

    longest = 16

    def __init__(self, config: EngineConfig, target: ModelRunner) -> None:
        """`config` is the engine's; its sizes, device and threads hold for the draft as well.

        Raises InvalidInput for a draft with another vocabulary or too few positions.
        """
        assert config.draft_model is not None
        self.runner = ModelRunner(
            replace(config, model=config.draft_model, num_blocks=target.num_blocks, quantization=None,
                    quantize_head=False, draft_model=None, medusa_heads=None, spec_method="off")
        )  # fmt: skip
        ours, theirs = self.runner.shape, target.shape
        if ours.vocab_size != theirs.vocab_size:
            raise InvalidInput(
                f"the draft model in {config.draft_model} has {ours.vocab_size} tokens, the model {theirs.vocab_size}; "
                "give a draft with the same tokenizer"
            )
        wanted = min(config.max_model_len or theirs.max_positions, theirs.max_positions)
        if ours.max_positions < wanted:
            raise InvalidInput(
                f"the draft model in {config.draft_model} has {ours.max_positions} positions, requests may take "
                f"{wanted}; lower max_model_len or give a draft with more"
            )
        self.budget = config.max_num_batched_tokens
        self._size = config.block_size
        self._content: list[bytes | None] = [None] * target.num_blocks

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[Draft]:
        """Guess with the draft's own distribution at each request's temperature; who lags far behind gets none yet."""
        known = [r.num_known for r in requests]
        ready = self._catch_up(requests, counts)
        ids: dict[int, list[int]] = {i: [] for i in range(len(requests))}
        probs: dict[int, list[Tensor]] = {i: [] for i in range(len(requests))}
        active = [i for i in ready if counts[i] > 0]
        logits = self._forward([self._part(requests[i], known[i]) for i in active]) if active else torch.empty(0)
        while active:
            chosen, q = self._choose(logits, [requests[i] for i in active])
            for row, i in enumerate(active):
                ids[i].append(chosen[row])
                requests[i].spec_ids.append(chosen[row])
                if not requests[i].params.greedy:
                    probs[i].append(q[row])
                requests[i].draft_computed = known[i] + len(ids[i]) - 1
            active = [i for i in active if len(ids[i]) < counts[i] and chosen_is_token(ids[i])]
            if active:
                logits = self._forward([self._part(requests[i], known[i] + len(ids[i])) for i in active])
        for i, request in enumerate(requests):
            request.spec_ids = []
            if ids[i] and ids[i][-1] < 0:
                ids[i].pop()
                del probs[i][len(ids[i]) :]
        return [Draft(ids[i], torch.stack(probs[i]) if probs[i] else None) for i in range(len(requests))]

    def observe(self, requests: Sequence[Request], hidden: Tensor | None) -> None:  # noqa: ARG002  # no states needed
        """Forget what was computed for tokens that were not kept; name the blocks that are full."""
        for request in requests:
            request.draft_computed = min(request.draft_computed, request.num_known - 1)
            for i in range(min(request.draft_computed // self._size, request.num_hashed_blocks)):
                self._content[request.block_table[i]] = request.block_hashes[i]

    def _part(self, request: Request, end: int) -> Scheduled:
        return Scheduled(request, request.draft_computed, end - request.draft_computed, samples=True)

    def _catch_up(self, requests: Sequence[Request], counts: Sequence[int]) -> list[int]:
        """Bring the draft's cache near the end of each request's tokens; returns who is there."""
        ready, behind, budget = [], [], self.budget
        for i, request in enumerate(requests):
            if counts[i] < 1:
                continue
            if request.draft_computed == 0:
                request.draft_computed = self._found(request)
            missing = request.num_known - request.draft_computed
            if missing > budget:
                if budget > 0:
                    behind.append(Scheduled(request, request.draft_computed, budget, samples=False))
                    budget = 0
                continue
            budget -= missing
            ready.append(i)
        if behind:
            self._forward(behind)
            for part in behind:
                part.request.draft_computed += part.count
        return ready

    def _found(self, request: Request) -> int:
        """Leading tokens whose blocks hold the draft's keys and values already."""
        full = 0
        blocks = zip(request.block_table, request.block_hashes[: request.num_hashed_blocks], strict=False)
        for block, digest in blocks:
            if self._content[block] != digest:
                break
            full += 1
        return min(full * self._size, request.num_known - 1)

    def _forward(self, parts: Sequence[Scheduled]) -> Tensor:
        for part in parts:
            for block in part.request.block_table[
                part.start // self._size : -(-(part.start + part.count) // self._size)
            ]:
                self._content[block] = None  # it is being written: whole only once it is named again
        return self.runner.forward(parts)

    @staticmethod
    def _choose(logits: Tensor, requests: Sequence[Request]) -> tuple[list[int], Tensor]:
        """A token a row, -1 where the draft's logits are no numbers, and the distributions they were drawn from."""
        if all(r.params.greedy for r in requests):
            return first_maxima(logits), logits
        q = processed_probabilities(logits, [r.params for r in requests])
        draws = [uniform(r.seed, r.num_known + len(r.spec_ids), DRAFT) for r in requests]
        broken = q[:, 0].isnan()
        chosen = draw(q.masked_fill(broken[:, None], 1.0), torch.tensor(draws, dtype=torch.float64))
        return chosen.masked_fill(broken, -1).tolist(), q


def chosen_is_token(ids: Sequence[int]) -> bool:
    """Whether the last draw gave a token."""
    return ids[-1] >= 0
