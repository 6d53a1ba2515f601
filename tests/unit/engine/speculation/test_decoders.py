"""The article's decoders with none of their bugs: design notes, section 1, items 31 to 37, a test each.

Each test fails on what the article's code does, which its sentence names.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from flyball.core.errors import ContextLengthExceeded, EngineFailed, InvalidInput
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import SamplingParams
from flyball.engine.speculation.decoders import (
    MedusaDecoder,
    SpeculativeConfig,
    SpeculativeDecoder,
    SpeculativeResult,
)
from flyball.engine.text import TextCodec

pytestmark = pytest.mark.slow  # together too long for the inner loop

PROMPT = "The cat sat on the naïve mat 😀 and"
GREEDY = SpeculativeConfig(temperature=0.0)


def decoder(model: Path, draft: Path, config: SpeculativeConfig = GREEDY) -> SpeculativeDecoder:
    """One thread, small blocks, a fixed seed."""
    return SpeculativeDecoder(model, draft, config, engine=EngineConfig(model=model, threads=1, block_size=4), seed=3)


def ask(
    made: SpeculativeDecoder | MedusaDecoder, prompts: Sequence[str | Sequence[int]], max_tokens: int, **more: Any
) -> list[SpeculativeResult]:
    """Answers to prompts asked for at once; the decoder ends with them."""

    async def run() -> list[SpeculativeResult]:
        async with made:
            return await asyncio.gather(*(made.generate(p, max_tokens, ignore_eos=True, **more) for p in prompts))

    return asyncio.run(run())


def test_article_31_a_text_is_taken_to_tokens_once(checkpoint: Path) -> None:
    """The article counted characters where it meant tokens, and tokenised prompt and draft anew each round."""
    (result,) = ask(decoder(checkpoint, checkpoint), [PROMPT], 13)
    core = EngineCore(EngineConfig(model=checkpoint, threads=1, block_size=4))
    prompt = TextCodec(core.tokenizer).encode(PROMPT)
    assert len(prompt) != len(PROMPT)
    (wanted,) = core.generate([prompt], SamplingParams(max_tokens=13, temperature=0.0, ignore_eos=True))
    assert list(result.token_ids) == wanted
    assert result.text
    (same,) = ask(decoder(checkpoint, checkpoint), [prompt], 13)
    assert same == result


def test_article_32_a_draft_kept_whole_gives_one_token_more(checkpoint: Path) -> None:
    """The article lost one of k + 1 tokens a round: the model as its own draft makes 4 + 1 a step."""
    (result,) = ask(decoder(checkpoint, checkpoint), [[5, 9, 40]], 21)
    assert (result.steps, result.accepted_tokens) == (1 + 4, 16)
    assert result.tokens_per_step == pytest.approx(21 / 5)


def test_article_33_temperature_and_top_p_hold_for_both_models(checkpoint: Path, tmp_path: Path) -> None:
    """The article tempered the draft alone and ignored top_p: a top_p next to 0 is greedy at any temperature."""
    other = tmp_path / "other"
    config = LlamaConfig.from_pretrained(checkpoint, initializer_range=0.4)
    LlamaForCausalLM(config).save_pretrained(other)
    greedy, narrow = (
        ask(decoder(checkpoint, other, config), [[5, 9, 40], [7] * 9], 14)
        for config in (GREEDY, SpeculativeConfig(temperature=3.0, top_p=1e-6))
    )
    assert [r.token_ids for r in narrow] == [r.token_ids for r in greedy]
    with pytest.raises(InvalidInput, match="top_p"):
        SpeculativeConfig(top_p=1.5)
    with pytest.raises(InvalidInput, match="guess at least 1"):
        SpeculativeConfig(num_speculative_tokens=0)


def test_article_34_a_seed_gives_the_same_answer(checkpoint: Path) -> None:
    """The article drew from Python's global generator, so that no request could be repeated."""
    config = SpeculativeConfig(temperature=1.0, seed=8)
    state = random.getstate()
    first, again = (ask(decoder(checkpoint, checkpoint, config), [[5, 9, 40]] * count, 12)[-1] for count in (1, 3))
    assert first.token_ids == again.token_ids
    assert random.getstate() == state
    (other,) = ask(decoder(checkpoint, checkpoint, SpeculativeConfig(seed=9)), [[5, 9, 40]], 12)
    assert other.token_ids != first.token_ids


def test_article_35_the_loop_goes_on_and_the_bounds_hold(checkpoint: Path, cycle: tuple[Path, Path]) -> None:
    """The article computed in the event loop, ran past max_tokens, and took drafts of any vocabulary."""
    made = decoder(checkpoint, checkpoint)
    beats = 0

    async def run() -> list[SpeculativeResult]:
        nonlocal beats
        async with made:
            work = asyncio.gather(*(made.generate([5, 9, n], n, ignore_eos=True) for n in range(1, 10)))
            while not work.done():
                beats += 1
                await asyncio.sleep(1e-3)
            with pytest.raises(ContextLengthExceeded):
                await made.generate([5] * 250, 20)
            return await work

    results = asyncio.run(run())
    assert [len(r.token_ids) for r in results] == list(range(1, 10))
    assert all(r.finish_reason == "length" for r in results)
    assert beats > 2
    assert made.acceptance_rate == 1.0
    with pytest.raises(InvalidInput, match="tokenizer"):
        decoder(checkpoint, cycle[0])


def medusa(cycle: tuple[Path, Path], **more: Any) -> MedusaDecoder:
    """The model that counts, and heads that know it."""
    engine = EngineConfig(model=cycle[0], threads=1, block_size=4, kernels="torch")
    return MedusaDecoder(*cycle, engine=engine, seed=1, **more)


def counted(first: int, count: int) -> list[int]:
    """What the model says after a token."""
    said = [first]
    for _ in range(count):
        said.append((5 * said[-1] + 3) % 32)
    return said[1:]


def test_article_36_each_head_stands_for_its_own_position(cycle: tuple[Path, Path]) -> None:
    """The article verified every head's guess as the next token: heads that know are kept whole, at any temperature."""
    (result,) = ask(medusa(cycle, config=GREEDY), [[1, 2]], 17)
    assert list(result.token_ids) == counted(2, 17)
    assert result.accepted_tokens == 12
    assert result.text is None
    config = SpeculativeConfig(temperature=1.0, seed=5)
    (sampled,) = ask(medusa(cycle, config=config), [[1, 2]], 17)
    core = EngineCore(EngineConfig(model=cycle[0], threads=1, block_size=4, kernels="torch"))
    assert core.generate([[1, 2]], SamplingParams(max_tokens=17, seed=5)) == [list(sampled.token_ids)]


def test_article_37_all_heads_are_verified_in_one_step(cycle: tuple[Path, Path]) -> None:
    """The article ran the model once a guess, up to 20 times a round: 17 tokens are 1 + 4 steps, of one head 1 + 8."""
    assert ask(medusa(cycle, num_heads=1, config=GREEDY), [[1, 2]], 17)[0].steps == 1 + 8

    async def run() -> None:
        async with medusa(cycle, config=GREEDY) as made:
            for length, steps in ((1, 1), (2, 2), (4, 2), (5, 2), (6, 3), (17, 5)):
                result = await made.generate([1, 2], length, ignore_eos=True)
                assert (list(result.token_ids), result.steps) == (counted(2, length), steps)

    asyncio.run(run())


def test_a_decoder_without_a_tokenizer_wants_ids_and_one_that_ended_says_so(cycle: tuple[Path, Path]) -> None:
    """One sentence each."""

    async def run() -> None:
        made = medusa(cycle)
        async with made:
            with pytest.raises(InvalidInput, match="token ids"):
                await made.generate("text")
        with pytest.raises(EngineFailed):
            await made.generate([1, 2])

    asyncio.run(run())
