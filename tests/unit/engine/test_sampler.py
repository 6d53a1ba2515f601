"""The sampler draws from exactly the distribution that was asked for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flyball.core.errors import InvalidInput
from flyball.engine.request import SamplingParams
from flyball.engine.sampler import first_maxima, processed_probabilities, sample, uniform


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 20),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
)
def test_filters_equal_the_warpers_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """One filter at a time keeps the same tokens with the same probabilities (oracle O13)."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(seed)) * 3
    cases = [
        (SamplingParams(temperature=temperature), TemperatureLogitsWarper(temperature)),
        (SamplingParams(top_p=top_p), TopPLogitsWarper(top_p)),
        (SamplingParams(min_p=min_p), MinPLogitsWarper(min_p)),
    ]
    if top_k:
        cases.append((SamplingParams(top_k=top_k), TopKLogitsWarper(top_k)))
    for params, warper in cases:
        wanted = warper(None, logits.clone()).softmax(-1)
        torch.testing.assert_close(processed_probabilities(logits, [params]), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=1e-8), SamplingParams(temperature=1e-300), SamplingParams(top_p=1e-300),
    SamplingParams(top_k=1, min_p=1.0, top_p=1e-40),
])  # fmt: skip
def test_the_edge_of_the_allowed_is_greedy(params: SamplingParams) -> None:
    """Values too small for float32 keep the likeliest token instead of leaving none."""
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert processed_probabilities(logits, [params]).tolist() == [[0.0, 1.0, 0.0]]


def test_filters_too_large_for_a_float_keep_every_token() -> None:
    """A top-k beyond any vocabulary, of any size, is no filter; a temperature beyond float32 leaves all alike."""
    params = [SamplingParams(top_k=10**400), SamplingParams(temperature=1e300)]
    assert processed_probabilities(torch.zeros(2, 4), params).tolist() == [[0.25] * 4] * 2


def test_rows_with_different_parameters_do_not_disturb_each_other() -> None:
    """A batch gives each row what it would get alone."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    rows = [
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=3),
        SamplingParams(top_p=0.5, temperature=2.0),
        SamplingParams(),
    ]
    together = processed_probabilities(logits, rows)
    for i, params in enumerate(rows):
        torch.testing.assert_close(together[i : i + 1], processed_probabilities(logits[i : i + 1], [params]))


def test_the_lowest_id_wins_a_greedy_tie() -> None:
    """Greedy is deterministic even where logits are equal."""
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert sample(logits, [SamplingParams(temperature=0.0)], [1], [1]) == [1]
    mixed = sample(logits.expand(2, -1), [SamplingParams(temperature=0.0), SamplingParams()], [1, 1], [1, 1])
    assert mixed[0] == 1


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20 000 draws at one row over consecutive positions stays under its 99.9 % quantile."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]))
    n = 20_000
    tokens = sample(logits.expand(n, -1), [SamplingParams()] * n, [7] * n, list(range(n)))
    observed = torch.bincount(torch.tensor(tokens), minlength=5).double()
    expected = logits.exp()[0].double() * n
    assert float(((observed - expected) ** 2 / expected).sum()) < 18.47


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    """Filters are hard, also for draws at the very ends of the unit interval."""
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]).expand(5000, -1)
    assert set(sample(logits, [SamplingParams(top_k=2)] * 5000, list(range(5000)), [0] * 5000)) == {1, 3}


def test_uniform_is_uniform_and_keyed() -> None:
    """Neighbouring seeds and positions are independent enough: mean and variance of U(0, 1)."""
    draws = torch.tensor([uniform(seed, position) for seed in range(100) for position in range(100)])
    assert abs(float(draws.mean()) - 0.5) < 0.01
    assert abs(float(draws.var()) - 1 / 12) < 0.003


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("min_p", 2.0), ("top_k", -1)]
)
def test_a_bad_parameter_is_refused_by_name(field: str, value: float) -> None:
    """The sentence names the field, what was given and what is needed."""
    with pytest.raises(InvalidInput, match=f"{field}={value}"):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def reference(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The filters by their definition: one row, one stable sort."""
    probs = (logits / params.temperature).double().softmax(-1)
    ordered, order = probs.sort(descending=True, stable=True)
    keep = torch.arange(len(probs)) < (params.top_k or len(probs))
    mass = (ordered * keep).sum()
    keep &= (ordered.cumsum(-1) - ordered < params.top_p * mass) | torch.tensor(params.top_p >= 1)
    keep &= ordered >= params.min_p * ordered[0]
    kept = torch.zeros_like(probs).scatter_(0, order, ordered * keep)
    return kept / kept.sum()


@given(
    seed=st.integers(0, 10_000),
    scale=st.floats(0.01, 8.0),
    top_k=st.sampled_from([0, 1, 5, 2047, 2048, 2049, 3000]),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.4]),
)
def test_filters_of_a_long_vocabulary_equal_their_definition(
    seed: int, scale: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Whether few candidates settle the border or all are looked at: the same support, the same law."""
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(seed)) * scale
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    got = processed_probabilities(logits, [params] * 2)
    for row, wanted in zip(got, (reference(logits[i], params) for i in range(2)), strict=True):
        differ = ((row > 0) != (wanted > 0)).sum()
        assert differ <= 1, "rounding may decide one token at the border of top-p"
        assert (row.double() - wanted).abs().max() < 1e-4 * (1 + 10 * differ)


def test_equal_probabilities_at_the_border_keep_the_lowest_ids() -> None:
    """A coarse number format makes ties: of them the first stay, in few candidates and in many."""
    few = processed_probabilities(torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]), [SamplingParams(top_k=2)])
    assert few.tolist() == [[0.0, 0.5, 0.5, 0.0, 0.0]]
    many = processed_probabilities(torch.zeros(1, 5000), [SamplingParams(top_k=2500)])
    assert many[0].nonzero()[:, 0].tolist() == list(range(2500))


@given(seed=st.integers(0, 10_000), vocab=st.sampled_from([1, 5, 255, 256, 257, 511, 512, 513, 1000, 2048]))
def test_the_first_maximum_is_argmax(seed: int, vocab: int) -> None:
    """The fast way finds the lowest id of the maximum, ties and all."""
    logits = torch.randint(0, 4, (6, vocab), generator=torch.Generator().manual_seed(seed)).float()
    wanted = [row.tolist().index(row.max()) for row in logits]
    assert first_maxima(logits) == first_maxima(logits.bfloat16()) == wanted


def test_draws_from_a_long_vocabulary_follow_the_distribution() -> None:
    """Chunked inversion: 20 000 draws over 1 000 tokens in 50 bins stay under the 99.9 % quantile of chi-square(49)."""
    n, vocab = 20_000, 1000
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(5))
    tokens = torch.tensor(sample(logits.expand(n, -1), [SamplingParams()] * n, [7] * n, list(range(n))))
    bins = torch.arange(vocab) % 50
    observed = torch.zeros(50, dtype=torch.double).index_add_(0, bins[tokens], torch.ones(n, dtype=torch.double))
    expected = torch.zeros(50, dtype=torch.double).index_add_(0, bins, logits.double().softmax(-1)[0]) * n
    assert float(((observed - expected) ** 2 / expected).sum()) < 85.4


def test_a_row_is_drawn_alike_alone_and_in_company() -> None:
    """Oracle O3 for the sampler: 300 rows of every kind, in any order and number, give each the token it gets alone."""
    generator = torch.Generator().manual_seed(1)
    kinds = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=0.3),
             SamplingParams(top_k=7), SamplingParams(top_p=0.8, temperature=2.5),
             SamplingParams(min_p=0.2)]  # fmt: skip
    n = 300
    logits = torch.randn(n, 3000, generator=generator) * 2
    params = [kinds[i % len(kinds)] for i in range(n)]
    seeds, positions = list(range(n)), [i % 13 for i in range(n)]
    together = sample(logits, params, seeds, positions)
    alone = [sample(logits[i : i + 1], params[i : i + 1], seeds[i : i + 1], positions[i : i + 1])[0] for i in range(n)]
    assert together == alone
    order = torch.randperm(n, generator=generator).tolist()
    mixed = sample(logits[order], [params[i] for i in order], [seeds[i] for i in order], [positions[i] for i in order])
    assert mixed == [together[i] for i in order]


def test_logits_that_are_no_numbers_give_no_token() -> None:
    """-1 says so, and the rows beside them are drawn as ever."""
    logits = torch.zeros(4, 600)
    logits[1, 3] = torch.nan
    logits[2, :] = torch.nan
    logits[3, 5] = 9.0
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(top_k=1, temperature=0.5)):
        assert sample(logits, [params] * 4, [0] * 4, [0] * 4) == [0, -1, -1, 5]
