"""Penalties, bias and masks change exactly the logits they name, and no other row's."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from flyball.engine.edits import edit
from flyball.engine.request import Request, SamplingParams

VOCAB = 50
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)


def request(prompt: list[int], output: list[int], **params: object) -> Request:
    """A request that has said something already."""
    made = Request("r", prompt, SamplingParams(max_tokens=100, **params), 0.0, seed=0)  # type: ignore[arg-type]
    made.output_ids += output
    return made


def logits(rows: int) -> torch.Tensor:
    """Random ones of both signs."""
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3


@given(prompt=ids, output=ids, penalty=st.sampled_from([0.5, 1.2, 3.0]))
def test_repetition_equals_transformers_over_prompt_and_answer(
    prompt: list[int], output: list[int], penalty: float
) -> None:
    """Oracle O13: the same numbers as the reference processor's."""
    before = logits(1)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), before.clone())
    edit(before, [request(prompt, output, repetition_penalty=penalty)], frozenset())
    torch.testing.assert_close(before, wanted)


@given(prompt=ids, output=ids, presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
def test_presence_and_frequency_follow_their_definition_over_the_answer(
    prompt: list[int], output: list[int], presence: float, frequency: float
) -> None:
    """logit - frequency * count - presence * (count > 0), tokens of the prompt not counted."""
    before = logits(1)
    counts = torch.bincount(torch.tensor(output), minlength=VOCAB)
    wanted = before - frequency * counts - presence * (counts > 0)
    made = request(prompt, output[:1], presence_penalty=presence, frequency_penalty=frequency)
    edit(logits(1), [made], frozenset())  # an earlier step, from whose counts this one goes on
    made.output_ids += output[1:]
    edit(before, [made], frozenset())
    torch.testing.assert_close(before, wanted)


def test_long_answers_of_many_different_tokens_are_counted() -> None:
    """The table of used tokens grows with them."""
    made = Request("r", [1], SamplingParams(max_tokens=5000, frequency_penalty=1.0), 0.0, seed=0)
    made.output_ids = list(range(3000)) * 2
    row = torch.zeros(1, 3001)
    edit(row, [made], frozenset())
    assert row[0].tolist() == [-2.0] * 3000 + [0.0]


def test_bias_is_added_once_for_each_mention() -> None:
    """Also to a token named twice, and to no other."""
    row = torch.zeros(1, VOCAB)
    edit(row, [request([1], [], logit_bias=((3, 2.0), (4, -100.0), (3, 0.5)))], frozenset())
    assert row[0, 3:5].tolist() == [2.5, -100.0]
    assert row.count_nonzero() == 2


def test_masks_leave_what_is_allowed() -> None:
    """Allowed ids only; before min_tokens nothing that would end the answer, unless it would be ignored anyway."""
    row = torch.zeros(1, VOCAB)
    edit(row, [request([1], [], allowed_token_ids=(3, 9))], frozenset())
    assert (row[0] == 0).nonzero()[:, 0].tolist() == [3, 9]
    for params, output, masked in (
        ({"min_tokens": 2, "stop_token_ids": (7,)}, [1], [0, 7]),
        ({"min_tokens": 2, "stop_token_ids": (7,), "ignore_eos": True}, [1], [7]),
        ({"min_tokens": 2, "stop_token_ids": (7,)}, [1, 2], []),
    ):
        row = torch.zeros(1, VOCAB)
        edit(row, [request([1], output, **params)], frozenset({0}))
        assert row[0].isneginf().nonzero()[:, 0].tolist() == masked


def test_each_row_is_edited_by_its_own_request_alone() -> None:
    """A mixed batch equals its rows one by one; plain rows are left untouched, bit for bit."""
    kinds = (
        {},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "logit_bias": ((2, 1.0),)},
        {"logprobs": 3},
        {"allowed_token_ids": (1, 2, 3), "frequency_penalty": 0.5},
        {"min_tokens": 9, "stop_token_ids": (4, 5)},
    )
    whole = logits(len(kinds))
    alone = []
    for i, params in enumerate(kinds):
        row = whole[i : i + 1].clone()
        edit(row, [request([1, 2, 2], [3, i, i], **params)], frozenset({0}))
        alone.append(row)
    before = whole.clone()
    edit(whole, [request([1, 2, 2], [3, i, i], **params) for i, params in enumerate(kinds)], frozenset({0}))
    assert torch.equal(whole, torch.cat(alone))
    assert torch.equal(whole[[0, 3]], before[[0, 3]])
