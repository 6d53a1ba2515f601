"""O4: what comes of speculative sampling is distributed as the model's own tokens; and the article's item 34."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from flyball.engine.request import SamplingParams
from flyball.engine.sampler import draw, processed_probabilities
from flyball.engine.speculation.rejection import residual, speculative_sample

pytestmark = pytest.mark.slow  # together too long for the inner loop

V, K, N = 12, 3, 100_000


def distributions(seed: int, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """p [K + 1, V] and q [K, V], processed."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * K + 1, V, generator=generator) * 1.2
    probs = processed_probabilities(logits, [SamplingParams(temperature=0.9, top_p=top_p)] * (2 * K + 1))
    return probs[: K + 1], probs[K + 1 :]


def rounds(p: Tensor, q: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts [N, K], how many were kept [N], and the token after them [N]."""
    generator = torch.Generator().manual_seed(seed)
    drafts = torch.stack([draw(q[i].expand(N, V), torch.rand(N, generator=generator)) for i in range(K)], dim=1)
    uniform = torch.rand(N, K + 1, generator=generator, dtype=torch.float64)
    kept, token = speculative_sample(p.expand(N, -1, -1), q.expand(N, -1, -1), drafts, uniform[:, :K], uniform[:, K])
    return drafts, kept, token


def fit(tokens: Tensor, p: Tensor) -> float:
    """Chi-square p-value of tokens against a distribution, over its support."""
    seen = np.bincount(tokens.numpy(), minlength=V)
    support = p.numpy() > 0
    assert seen[~support].sum() == 0, "a token of probability 0 came out"
    wanted = p.numpy()[support].astype(float)
    return float(chisquare(seen[support], wanted / wanted.sum() * seen.sum()).pvalue)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_distributed_as_the_models(top_p: float) -> None:
    """First tokens as p1, second ones, where there are some, as p2, the bonus as p4; as many kept as theory says."""
    p, q = distributions(1, top_p)
    drafts, kept, token = rounds(p, q, 2)
    first = torch.where(kept > 0, drafts[:, 0], token)
    assert fit(first, p[0]) > 1e-3
    assert fit(torch.where(kept > 1, drafts[:, 1], token)[kept > 0], p[1]) > 1e-3
    if bool((kept == K).any()):
        assert fit(token[kept == K], p[K]) > 1e-3
    theory = torch.minimum(p[:K], q).sum(-1).cumprod(0).sum()
    assert float(kept.float().mean()) == pytest.approx(float(theory), abs=4 * float(kept.float().std()) / N**0.5)


def test_the_test_has_power() -> None:
    """Negative control: drawing from p where the residual belongs is noticed with certainty."""
    p, q = distributions(1)
    drafts, kept, _ = rounds(p, q, 2)
    again = draw(p[0].expand(N, V), torch.rand(N, generator=torch.Generator().manual_seed(9)))
    assert fit(torch.where(kept > 0, drafts[:, 0], again), p[0]) < 1e-12


def test_a_certain_draft_is_kept_as_often_as_the_model_says() -> None:
    """One-hot q: kept with probability p(x); p itself comes out."""
    p, _ = distributions(3)
    q = torch.zeros(K, V)
    q[:, 4] = 1.0
    drafts, kept, token = rounds(p, q, 5)
    assert float((kept > 0).float().mean()) == pytest.approx(float(p[0, 4]), abs=0.006)
    assert fit(torch.where(kept > 0, drafts[:, 0], token), p[0]) > 1e-3


def test_article_34_nothing_of_probability_zero_is_ever_said() -> None:
    """A drafted token with p = 0 or q = 0 is refused even at u = 0; the residual never holds one."""
    p = torch.tensor([[[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]]])
    for q in (torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.4, 0.6]]])):
        kept, token = speculative_sample(p, q, torch.tensor([[0]]), torch.zeros(1, 1), torch.zeros(1))
        assert kept.tolist() == [0]
        assert token.item() in (1, 2)
    assert residual(p[0, :1], p[0, :1]).tolist() == p[0, :1].tolist()
