"""Speculation in the step: after the schedule it asks for guesses, after the step it learns what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from flyball.engine.config import EngineConfig, Method, RuntimeConfig
from flyball.engine.kv_manager import KVManager
from flyball.engine.model_runner import ModelRunner
from flyball.engine.request import Request
from flyball.engine.scheduler import Scheduled, StepPlan
from flyball.engine.speculation.adaptive import DraftLength
from flyball.engine.speculation.proposer import Draft, Proposer
from flyball.engine.speculation.verify import Verified


@dataclass(slots=True)
class SpeculationCounts:
    """What was guessed and kept since the start."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)  # by place in the draft

    def add(self, drafted: int, kept: int) -> None:
        """Take in one verified draft."""
        self.drafts += 1
        self.draft_tokens += drafted
        self.accepted_tokens += kept
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for place in range(kept):
            self.accepted_at[place] += 1


class Speculator:
    """Owns the proposers of an engine and how long their drafts are; one object an engine, used by its thread."""

    def __init__(self, config: EngineConfig, target: ModelRunner) -> None:
        from flyball.engine.speculation.draft_model import DraftModelProposer
        from flyball.engine.speculation.medusa import MedusaProposer
        from flyball.engine.speculation.ngram import NgramProposer

        self._proposers: dict[Method, Proposer] = {"ngram": NgramProposer()}
        if config.draft_model is not None:
            self._proposers["draft"] = DraftModelProposer(config, target)
        if config.medusa_heads is not None:
            self._proposers["medusa"] = MedusaProposer(config, target)
        self._lengths = {method: DraftLength() for method in self._proposers}
        self.counts = SpeculationCounts()

    def drafts(self, plan: StepPlan, runtime: RuntimeConfig, kv: KVManager, max_len: int) -> dict[int, Draft]:
        """Guesses for parts of a plan, by place in it; their blocks are theirs. Nobody is preempted for a guess."""
        proposer = self._proposers.get(runtime.spec_method)
        if proposer is None or not runtime.num_speculative_tokens:
            return {}
        decoding = [(i, p) for i, p in enumerate(plan.parts) if p.samples and p.count == 1]
        wanted = [(i, p.request) for i, p in decoding if p.request.caching]
        most = min(runtime.num_speculative_tokens, proposer.longest)
        length = self._lengths[runtime.spec_method].choose(most, len(decoding), runtime.spec_max_batch)
        if not wanted or not length:
            return {}
        budget = runtime.max_num_batched_tokens - plan.tokens
        places, requests, counts = [], [], []
        for i, request in wanted:
            left = request.params.max_tokens - len(request.output_ids) - 1  # the last token needs no guess
            count = min(length, left, max_len - request.num_known - 1, budget)
            if count < 1 or kv.pool.room <= len(plan.parts) or not kv.grow(request, count + 1, alone=False):
                continue
            budget -= count
            places.append(i)
            requests.append(request)
            counts.append(count)
        made = proposer.propose(requests, counts) if requests else []
        return {i: draft for i, draft in zip(places, made, strict=True) if draft.ids}

    def observe(self, verified: Sequence[Verified], runtime: RuntimeConfig) -> None:
        """Learn how much of each draft was kept."""
        for group in verified:
            drafted, kept = len(group.draft.ids), group.kept
            if drafted:
                group.request.spec_accepted += kept
                self.counts.add(drafted, kept)
                self._lengths[runtime.spec_method].observe(drafted, kept)

    def after(self, requests: Sequence[Request], hidden: Tensor | None, runtime: RuntimeConfig) -> None:
        """Let the proposer look at what the step gave: the state under each request's newest token."""
        proposer = self._proposers.get(runtime.spec_method)
        if proposer is not None and requests and runtime.num_speculative_tokens:
            proposer.observe(requests, hidden)


def rows_of(parts: Sequence[Scheduled], drafts: dict[int, Draft]) -> list[Scheduled]:
    """What the runner computes: a part with a draft becomes a row of its own for each of its tokens.

    Every row sees what the step wrote before its own position, so that these rows verify the draft in one pass.
    """
    rows = []
    for i, part in enumerate(parts):
        draft = drafts.get(i)
        if draft is None:
            rows.append(part)
        else:
            part.request.spec_ids = draft.ids
            rows += [Scheduled(part.request, part.start + j, 1, samples=True) for j in range(len(draft.ids) + 1)]
    return rows
