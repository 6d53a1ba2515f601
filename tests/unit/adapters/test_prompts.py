"""Prompts share what they should and nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.adapters.prompts import Prompts, as_text
from flyball.core.errors import InvalidInput
from flyball.core.workload import RequestSpec

PROMPTS = Prompts(seed=(1, 2), vocab_size=3000)


def _spec(input_tokens: int, prefix_ids: tuple[int, ...] = (), prefix_tokens: int = 16) -> RequestSpec:
    return RequestSpec(
        arrival_s=0, input_tokens=input_tokens, output_tokens=1, prefix_ids=prefix_ids, prefix_tokens=prefix_tokens
    )


def shared(a: list[int], b: list[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@given(
    lengths=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    ids=st.tuples(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6)),
)
def test_prefixes_are_shared_as_the_ids_say(lengths: tuple[int, int], ids: tuple[list[int], list[int]]) -> None:
    """Two prompts agree on the tokens of their common leading ids, to the token, and then part."""
    a, b = (PROMPTS.token_ids(_spec(lengths[i], tuple(ids[i])), i) for i in (0, 1))
    assert (len(a), len(b)) == lengths
    common = min(shared(ids[0], ids[1]) * 16, *lengths)
    assert common <= shared(a, b) <= common + 2  # one or two equal tokens by chance


def test_unrelated_prompts_share_no_prefix() -> None:
    """Among two hundred prompts without prefix ids no two begin alike, so no prefix cache can help."""
    beginnings = {tuple(PROMPTS.token_ids(_spec(64), index)[:4]) for index in range(200)}
    assert len(beginnings) == 200


@given(index=st.integers(0, 10**6), vocab_size=st.integers(8, 200_000))
def test_prompts_are_reproducible_and_avoid_special_tokens(index: int, vocab_size: int) -> None:
    """Equal seeds give equal prompts; no id comes from the ends of the vocabulary, where special tokens sit."""
    first, again = (Prompts(seed=(7,), vocab_size=vocab_size).token_ids(_spec(50), index) for _ in range(2))
    assert first == again
    assert min(first) >= vocab_size // 8
    assert max(first) < vocab_size - vocab_size // 8
    assert all(type(token) is int for token in first)


def test_another_seed_gives_other_prompts() -> None:
    """Own and shared parts both change with the seed."""
    other = Prompts(seed=(1, 3), vocab_size=3000)
    for ids in ((), (5,)):
        assert shared(PROMPTS.token_ids(_spec(16, ids), 0), other.token_ids(_spec(16, ids), 0)) < 4


def test_text_keeps_lengths_and_prefixes() -> None:
    """As words a prompt has as many of them as tokens, and equal beginnings stay equal."""
    a, b = (as_text(PROMPTS.token_ids(_spec(40, (1,)), index)).split() for index in (0, 1))
    assert len(a) == len(b) == 40
    assert a[:16] == b[:16]
    assert a != b


def test_a_tiny_vocabulary_is_refused() -> None:
    """Too few tokens to draw from is a mistake of the caller, said in a sentence."""
    with pytest.raises(InvalidInput, match="vocabulary of 3 tokens is too small"):
        Prompts(seed=(0,), vocab_size=3)
