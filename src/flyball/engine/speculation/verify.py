"""Choose each request's next tokens from the rows of a verified draft.

A draft of k tokens has k + 1 rows of logits. Where the draft was certain, each row's token is drawn as without
speculation, with the same random number, and the draft is kept as far as it says the same: what is drawn is then not
only distributed as without speculation but the same. Where it was drawn from probabilities, `rejection` decides.
Requests whose logits are edited (penalties, masks, grammar) are walked row by row, since what was said before changes
what may be said next; a grammar never goes further than what is kept, so that nothing has to be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flyball.engine.edits import edit, ending_ids
from flyball.engine.request import Request
from flyball.engine.sampler import ACCEPT, RESIDUAL, processed_probabilities, sample, uniform
from flyball.engine.speculation.proposer import Draft
from flyball.engine.speculation.rejection import speculative_sample


@dataclass(slots=True)
class Verified:
    """One request's rows, and the tokens that come of them."""

    request: Request
    first: int  # row of its first logits
    draft: Draft
    tokens: list[int] = field(default_factory=list)
    known: int = field(init=False)  # tokens before those that are verified
    said: int = field(init=False)  # of them, output tokens

    def __post_init__(self) -> None:
        self.known, self.said = self.request.num_known, len(self.request.output_ids)

    @property
    def kept(self) -> int:
        """Drafted tokens that were kept."""
        return sum(a == b for a, b in zip(self.tokens, self.draft.ids, strict=False))

    def goes_on(self, eos_token_ids: Set[int]) -> bool:
        """Whether the row after the last token's counts: the draft said the same, and the answer has not ended."""
        r, ids, place = self.request, self.draft.ids, len(self.tokens) - 1
        if place >= len(ids) or self.tokens[place] != ids[place]:
            return False
        if ids[place] in ending_ids(r.params, eos_token_ids) or self.said + place + 1 >= r.params.max_tokens:
            return False
        return r.matcher is None or not r.matcher.is_terminated()


Tell = Callable[[Tensor, Sequence[Request], Sequence[int]], None]  # raw logits, requests, tokens: rows just decided


@torch.inference_mode()
def verify(logits: Tensor, groups: Sequence[Verified], eos_token_ids: Set[int], tell: Tell) -> None:
    """Fill in the groups' tokens from logits [rows, V].

    `tell` is called with rows whose requests want more than the token, in order, after each is decided. Should it or
    anything else fail, grammars and edits are as they were before.
    """
    at_once = [g for g in groups if g.draft.probs is None and g.request.plain]
    if at_once:
        _at_once(logits, at_once, eos_token_ids)
    walked = [g for g in groups if g.draft.probs is not None or not g.request.plain]
    try:
        _walk(logits, walked, eos_token_ids, tell)
    except BaseException:
        for g in walked:
            g.request.edits = None  # made anew from the answer
            if g.request.matcher is not None and g.tokens:
                g.request.matcher.rollback(len(g.tokens))
        raise
    finally:
        for g in walked:
            del g.request.output_ids[g.said :]  # the scheduler takes them down


def _walk(logits: Tensor, groups: Sequence[Verified], eos_token_ids: Set[int], tell: Tell) -> None:
    active = list(groups)
    while active:
        rows = torch.tensor([g.first + len(g.tokens) for g in active], device=logits.device)
        raw = logits[rows]
        tokens = _row(raw, active, eos_token_ids)
        for g, token in zip(active, tokens, strict=True):
            if g.request.matcher is not None and token >= 0:
                g.request.matcher.accept_token(token)
            g.tokens.append(token)
            g.request.output_ids.append(token)  # what follows is edited in the light of it
        tell(raw, [g.request for g in active], tokens)
        active = [g for g in active if g.goes_on(eos_token_ids)]


def _at_once(logits: Tensor, groups: Sequence[Verified], eos_token_ids: Set[int]) -> None:
    counts = [len(g.draft.ids) + 1 for g in groups]
    rows = [g.first + i for g, n in zip(groups, counts, strict=True) for i in range(n)]
    requests = [g.request for g, n in zip(groups, counts, strict=True) for _ in range(n)]
    places = [g.known + i for g, n in zip(groups, counts, strict=True) for i in range(n)]
    part = logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]
    chosen = iter(sample(part, [r.params for r in requests], [r.seed for r in requests], places))
    for g, n in zip(groups, counts, strict=True):
        tokens = [next(chosen) for _ in range(n)]
        for token in tokens:
            g.tokens.append(token)
            if not g.goes_on(eos_token_ids):
                break


def _row(raw: Tensor, groups: Sequence[Verified], eos_token_ids: Set[int]) -> list[int]:
    """One token for each group, from the row that its tokens so far lead to."""
    requests = [g.request for g in groups]
    logits, dead = raw, []
    if any(r.edited for r in requests):
        logits = raw.to(torch.float32, copy=True)
        dead = edit(logits, requests, eos_token_ids)
    places = [g.known + len(g.tokens) for g in groups]
    drawn = [i for i, g in enumerate(groups) if g.draft.probs is not None and len(g.tokens) < len(g.draft.ids)]
    tokens = [0] * len(groups)
    plain = [i for i in range(len(groups)) if i not in set(drawn)]
    for some, choose in ((plain, _sampled), (drawn, _weighed)):
        if some:
            part = logits if len(some) == len(groups) else logits[torch.tensor(some, device=logits.device)]
            for i, token in zip(some, choose(part, [groups[i] for i in some], [places[i] for i in some]), strict=True):
                tokens[i] = token
    for i in dead:
        tokens[i] = -1
    return tokens


def _sampled(logits: Tensor, groups: Sequence[Verified], places: Sequence[int]) -> list[int]:
    requests = [g.request for g in groups]
    return sample(logits, [r.params for r in requests], [r.seed for r in requests], places)


def _weighed(logits: Tensor, groups: Sequence[Verified], places: Sequence[int]) -> list[int]:
    """Keep the drafted token or draw from the residual: `speculative_sample` for drafts of one token."""
    p = processed_probabilities(logits, [g.request.params for g in groups])
    broken = p[:, 0].isnan()
    p = p.masked_fill(broken[:, None], 1.0)
    q = torch.stack([g.draft.probs[len(g.tokens)] for g in groups if g.draft.probs is not None])
    ids = torch.tensor([[g.draft.ids[len(g.tokens)]] for g in groups], device=p.device)
    accept, final = (
        torch.tensor(
            [uniform(g.request.seed, place, stream) for g, place in zip(groups, places, strict=True)],
            dtype=torch.float64, device=p.device,
        )
        for stream in (ACCEPT, RESIDUAL)
    )  # fmt: skip
    both = torch.stack([p, p], dim=1)  # the row after a kept token is weighed in its own turn
    kept, other = speculative_sample(both, q[:, None], ids, accept[:, None], final)
    return torch.where(kept == 1, ids[:, 0], other).masked_fill(broken, -1).tolist()
