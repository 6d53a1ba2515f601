"""Speculative sampling: keep a draft's token with probability min(1, p / q), else draw from what p has more than q.

The tokens that result are distributed as p, whatever q is (Leviathan et al. 2023, arXiv:2211.17192, theorem 1).
A token of probability 0 is never kept: the test is strict, u < p / q with u in [0, 1).

Symbols: R rows, k drafted tokens a row, V vocabulary; p [R, k + 1, V] of the model, q [R, k, V] of the draft, both as
processed by temperature and filters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flyball.engine.sampler import draw


def speculative_sample(p: Tensor, q: Tensor, drafts: Tensor, accept: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens [R, k] each row keeps, and the token after them: [R] and [R].

    `accept` [R, k] and `final` [R] are uniform numbers in [0, 1). With all k kept the token after them is drawn from
    the last row of p: the bonus.
    """
    rows, k = drafts.shape
    chosen_p = p[:, :k].gather(-1, drafts[..., None])[..., 0]
    chosen_q = q.gather(-1, drafts[..., None])[..., 0]
    kept = accept * chosen_q < chosen_p  # as u < p / q, and false where both are 0
    count = kept.long().cumprod(-1).sum(-1)
    place = torch.arange(rows, device=p.device)
    at = p[place, count]
    below = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)[place, count]
    return count, draw(residual(at, below), final)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """What p [R, V] has more than q, not normalised; p itself where rounding leaves nothing."""
    more = (p - q).clamp_min(0)
    return torch.where(more.sum(-1, keepdim=True) > 0, more, p)
