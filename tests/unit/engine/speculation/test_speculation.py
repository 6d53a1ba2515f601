"""Speculation in the engine changes how fast, never what: oracles O2, O5, O6, O7, and the article's items 31 to 37."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flyball.core.errors import InvalidInput, InvalidKnob
from flyball.engine.config import EngineConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import FinishReason, Grammar, Request, SamplingParams
from flyball.engine.sampler import processed_probabilities
from flyball.engine.scheduler import Scheduled
from flyball.engine.speculation.draft_model import DraftModelProposer
from flyball.engine.speculation.heads import MedusaHeads
from flyball.engine.speculation.ngram import Lookup

pytestmark = pytest.mark.slow  # together too long for the inner loop

Make = Callable[..., EngineCore]
PROMPTS = [[5, 9, 40, 77, 3], [1, 2, 3, 1, 2, 3, 1, 2], list(range(20, 60)), [7] * 19]
METHODS = ["ngram", "draft", "medusa"]


def save(folder: Path, seed: int, **shape: Any) -> Path:
    """A random checkpoint of a small vocabulary."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "bos_token_id": None,
             "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.5,
             "tie_word_embeddings": False}  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**sizes | shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target and another model as its draft, 7 tokens."""
    folder = tmp_path_factory.mktemp("small")
    return save(folder / "target", 1), save(folder / "draft", 2)


@pytest.fixture(scope="module")
def draft(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared checkpoint with its weights shaken: a draft that is right now and then."""
    folder = tmp_path_factory.mktemp("draft")
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def random_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads that know nothing."""
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(6)
    heads = MedusaHeads(heads=3, hidden=32, inner=8)
    for layer in heads.down:
        torch.nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    heads.save(folder)
    return folder


@pytest.fixture
def speculating(engine: Make, draft: Path, random_heads: Path) -> Make:
    """Make an engine with every proposer."""
    return lambda **more: engine(**{"draft_model": draft, "medusa_heads": random_heads, "spec_method": "draft"} | more)


def fresh_logits(path: Path, ids: list[int]) -> torch.Tensor:
    """The logits after some tokens, with no cache at all."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tight", [False, True])
def test_greedy_answers_are_the_same_with_and_without(speculating: Make, method: str, tight: bool) -> None:
    """O2, items 31 and 36: token for token, alone and in company, chunked prefill, a pool that makes them give way."""
    params = SamplingParams(max_tokens=21, temperature=0.0, ignore_eos=True)
    core = speculating(num_blocks=20 if tight else None, spec_method="off")
    wanted = core.generate(PROMPTS, params)
    for most, batch in ((1, 1), (4, 0)):
        core.update_runtime({"spec_method": method, "num_speculative_tokens": most, "spec_max_batch": batch,
                             "max_num_batched_tokens": 64 if most == 4 else 17})  # fmt: skip
        assert core.generate(PROMPTS, params) == wanted
    assert core.stats.preemptions > 0 or not tight
    assert core.stats.spec_drafts > 0 or method == "ngram"
    core.scheduler.kv.pool.check_integrity([])


@pytest.mark.parametrize("method", ["ngram", "medusa"])
def test_a_certain_draft_changes_no_token_of_a_seeded_answer(speculating: Make, method: str) -> None:
    """At any temperature, with filters, penalties and bias: each token is drawn with the number of its position."""
    core = speculating(spec_method="off")
    for more in ({}, {"top_p": 0.8, "logit_bias": ((5, 3.0),)}, {"repetition_penalty": 1.3, "min_tokens": 9}):
        params = SamplingParams(max_tokens=16, temperature=0.7, seed=11, logprobs=1, **more)
        core.update_runtime({"spec_method": "off"})
        wanted = core.generate(PROMPTS, params)
        core.update_runtime({"spec_method": method})
        assert core.generate(PROMPTS, params) == wanted


def counts_of(core: EngineCore, params: dict[str, Any], samples: int) -> Counter[tuple[int, ...]]:
    """How often each answer of three tokens came, by as many seeds."""
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(samples // 64):
        answers = core.generate([[3, 1, 4]], SamplingParams(max_tokens=3, n=64, seed=seed << 20, **params))
        seen.update(map(tuple, answers))
    return seen


def law(path: Path, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """P(x1 x2 x3) by enumeration."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    found = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        with torch.no_grad():
            logits = model(torch.tensor([[3, 1, 4, *x] for x in found])).logits[:, -1]
        probs = processed_probabilities(logits, [params] * len(found)).tolist()
        for (x, mass), row in zip(found.items(), probs, strict=True):
            longer |= {(*x, token): mass * p for token, p in enumerate(row)}
        found = longer
    return found


def p_value(seen: Counter[tuple[int, ...]], wanted: dict[tuple[int, ...], float]) -> float:
    """Chi-square with rare answers taken together; an answer of probability 0 is an error at once."""
    total = sum(seen.values())
    assert all(wanted[x] > 0 for x in seen)
    common = [x for x, p in wanted.items() if p * total >= 5]
    observed = [seen[x] for x in common] + [total - sum(seen[x] for x in common)]
    expected = [wanted[x] * total for x in common]
    expected.append(total - sum(expected))
    if expected[-1] < 5:
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    return float(chisquare(observed, expected).pvalue)


def check_law(small: tuple[Path, Path], samples: int) -> None:
    """Samples with speculation on against the exact law; then, with the wrong law, the same test must fail."""
    params = {"temperature": 0.9, "top_p": 0.9}
    core = EngineCore(
        EngineConfig(
            model=small[0], draft_model=small[1], spec_method="draft", threads=1, block_size=4, max_num_seqs=64,
            max_model_len=16,
        ),
        seed=1,
    )  # fmt: skip
    core.update_runtime({"spec_max_batch": 0})
    seen = counts_of(core, params, samples)
    assert core.stats.spec_accepted_tokens > samples / 20
    assert p_value(seen, law(small[0], SamplingParams(**params))) > 1e-3
    assert p_value(seen, law(small[0], SamplingParams(temperature=1.2))) < 1e-6, "the test has no power"


@pytest.mark.slow
def test_article_33_answers_follow_the_law_of_the_model(small: tuple[Path, Path]) -> None:
    """O5: temperature and top-p hold for both p and q; 4096 answers of three tokens against all 343 exact ones."""
    check_law(small, 4096)


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_the_law_holds_in_fifty_thousand_samples(small: tuple[Path, Path]) -> None:
    """O5 in full."""
    check_law(small, 51_200)


def steps(core: EngineCore) -> Iterator[None]:
    """Run the engine until it is idle."""
    while core.busy:
        core.step()
        yield


def check_kv(core: EngineCore, checkpoint: Path, draft: Path) -> int:
    """Model's and draft's caches of whoever runs: the last computed token, computed again on them, is right."""
    proposer = core.speculator._proposers["draft"]
    assert isinstance(proposer, DraftModelProposer)
    seen = 0
    for request in core.scheduler.running:
        for runner, path, computed in (
            (core.runner, checkpoint, request.num_computed), (proposer.runner, draft, request.draft_computed),
        ):  # fmt: skip
            if computed:
                logits = runner.forward([Scheduled(request, computed - 1, 1, samples=True)])[0]
                assert torch.allclose(logits, fresh_logits(path, request.tokens(0, computed)), atol=2e-3)
                seen += 1
    return seen


def test_caches_are_right_after_every_step(speculating: Make, checkpoint: Path, draft: Path) -> None:
    """O6: rejected tokens leave nothing, and the draft lacks nothing, also when toggled and with shared prefixes."""
    core = speculating(num_blocks=26)
    params = SamplingParams(max_tokens=14, temperature=0.8, seed=3, ignore_eos=True)
    seen = 0
    for turn, method in enumerate(("draft", "off", "draft")):
        core.update_runtime({"spec_method": method})
        core.add(f"a{turn}", PROMPTS[2][:20], params)
        core.add(f"b{turn}", [*PROMPTS[2][:20], turn], params)
        for step, _ in enumerate(steps(core)):
            if turn == 2 and step % 4 == 1:
                core.update_runtime({"spec_method": "off" if step % 8 == 1 else "draft"})
            seen += check_kv(core, checkpoint, draft) if step % 2 == 0 else 0
    assert seen > 20
    assert core.stats.prompt_tokens_cached > 0


def test_the_cache_check_has_power(speculating: Make, checkpoint: Path, draft: Path) -> None:
    """Negative control of O6: a draft that takes found prefix blocks for its own is noticed."""
    core = speculating(spec_method="off")
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    core.generate([PROMPTS[2][:20]], params)  # the model's blocks are cached, the draft never ran
    core.update_runtime({"spec_method": "draft"})
    (request,) = core.add("again", PROMPTS[2][:20], params)
    core.step()
    request.draft_computed = 16  # as if the prefix were the draft's as well
    core.step()
    with pytest.raises(AssertionError):
        check_kv(core, checkpoint, draft)


def test_article_32_a_perfect_draft_gives_k_and_one_more(engine: Make, checkpoint: Path) -> None:
    """The model as its own draft: all k kept and the bonus, so k + 1 tokens a step; every place is counted."""
    core = engine(draft_model=checkpoint, spec_method="draft")
    core.update_runtime({"num_speculative_tokens": 4})
    core.generate([PROMPTS[0]], SamplingParams(max_tokens=21, temperature=0.0, ignore_eos=True))
    assert core.stats.step == 1 + 20 / 5
    assert core.stats.spec_accepted_at == (4, 4, 4, 4)
    assert core.stats.spec_accepted_tokens == core.stats.spec_draft_tokens == 16


def test_article_35_the_draft_computes_each_token_once(speculating: Make) -> None:
    """With a cache of its own it never runs the prompt again; another vocabulary and short positions are refused."""
    core = speculating()
    proposer = core.speculator._proposers["draft"]
    assert isinstance(proposer, DraftModelProposer)
    computed: list[int] = []
    forward = proposer.runner.forward

    def watch(parts: list[Scheduled]) -> torch.Tensor:
        computed.append(sum(part.count for part in parts))
        return forward(parts)

    proposer.runner.forward = watch  # type: ignore[method-assign,assignment]  # looked at, not replaced
    (answer,) = core.generate([PROMPTS[2]], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    assert len(answer) == 20
    assert computed[0] == len(PROMPTS[2]) + 1
    stats = core.stats
    assert sum(computed) <= len(PROMPTS[2]) + 20 + stats.spec_draft_tokens + stats.spec_drafts


def test_what_does_not_go_together_is_refused(engine: Make, small: tuple[Path, Path], random_heads: Path) -> None:
    """A draft of another tokenizer, heads of another model, a method without its parts: one sentence each."""
    with pytest.raises(InvalidInput, match="tokenizer"):
        engine(draft_model=small[1])
    with pytest.raises(InvalidInput, match="needs draft_model"):
        engine(spec_method="draft")
    with pytest.raises(InvalidInput, match="hidden size"):
        EngineCore(EngineConfig(model=small[0], medusa_heads=random_heads, kernels="torch"))
    with pytest.raises(InvalidKnob):
        engine().update_runtime({"spec_method": "draft"})


def finished(core: EngineCore, prompt: list[int], params: SamplingParams) -> Request:
    """An answer with its end."""
    (request,) = core.add("one", prompt, params)
    for _ in steps(core):
        pass
    return request


@pytest.mark.parametrize("method", ["ngram", "draft"])
def test_an_end_inside_a_draft_ends_the_answer(engine: Make, checkpoint: Path, method: str) -> None:
    """Items 35 and 37: nothing after a stop token or beyond max_tokens, however much of the draft would be kept."""
    core = engine(draft_model=checkpoint, spec_method="off")
    wanted = core.generate([PROMPTS[3]], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))[0]
    core.update_runtime({"spec_method": method})
    for length in (1, 2, 3, 7):
        request = finished(core, PROMPTS[3], SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True))
        assert (request.output_ids, request.finish_reason) == (wanted[:length], FinishReason.LENGTH)
    for place, stop in enumerate(wanted):
        if stop in wanted[:place]:
            continue
        params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
        request = finished(core, PROMPTS[3], params)
        assert (request.output_ids, request.finish_reason) == (wanted[: place + 1], FinishReason.STOP)


@pytest.mark.parametrize("method", METHODS)
def test_a_grammar_is_never_further_than_what_was_kept(speculating: Make, method: str) -> None:
    """Answers under a schema are valid with speculation on, greedy ones the same as without it."""
    pytest.importorskip("xgrammar")
    core = speculating(spec_method="off")
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4}, "ok": {"type": "boolean"}},
              "required": ["name", "ok"], "additionalProperties": False}  # fmt: skip
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    plain = core.generate([PROMPTS[0]], SamplingParams(max_tokens=90, temperature=0.0, grammar=grammar))
    core.update_runtime({"spec_method": method})
    assert core.generate([PROMPTS[0]], SamplingParams(max_tokens=90, temperature=0.0, grammar=grammar)) == plain
    for seed in range(4):
        request = finished(
            core, PROMPTS[0], SamplingParams(max_tokens=120, temperature=1.0, seed=seed, grammar=grammar)
        )
        if request.finish_reason is FinishReason.STOP:
            answer = json.loads(core.tokenizer.decode(request.output_ids, skip_special_tokens=True))
            assert set(answer) == {"name", "ok"}


def test_medusa_heads_that_know_are_kept_whole(cycle: tuple[Path, Path]) -> None:
    """O7, item 36: head h stands for the token h + 2 places on; one step verifies all, with the bonus."""
    core = EngineCore(EngineConfig(model=cycle[0], medusa_heads=cycle[1], spec_method="medusa", kernels="torch",
                                   threads=1, block_size=4), seed=1)  # fmt: skip
    (answer,) = core.generate([[1, 2]], SamplingParams(max_tokens=17, temperature=0.0))
    wanted = list(itertools.accumulate(range(17), lambda t, _: (5 * t + 3) % 32, initial=2))[1:18]
    assert answer == wanted
    assert core.stats.spec_accepted_at == (4, 4, 4)
    assert core.stats.step == 5


def test_medusa_heads_that_know_nothing_cost_no_token(speculating: Make) -> None:
    """O7: kept about as often as chance has it, and then they are mostly left alone; one forward a step (item 37)."""
    core = speculating(spec_method="medusa")
    core.generate(PROMPTS, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    assert core.stats.spec_accepted_tokens <= 0.1 * core.stats.spec_draft_tokens
    assert core.stats.spec_draft_tokens < 0.6 * 3 * core.stats.generation_tokens


def test_prompt_lookup_takes_the_longest_run() -> None:
    """What followed the last time; a longer run outweighs a later, shorter one."""
    lookup = Lookup()
    lookup.extend([1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3])
    assert lookup.follow(3) == [9, 8, 2]
    lookup.extend([7])
    assert lookup.follow(2) == [1, 2]
    assert Lookup().follow(3) == []
    assert len(lookup) == 12
