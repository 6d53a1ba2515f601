"""The engine core: what is asked of a request is what happens to it, and a change of policy is exact and remembered."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from flyball.core.clock import VirtualClock
from flyball.core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidInput,
    InvalidKnob,
    QueueFull,
    VersionConflict,
)
from flyball.engine.core import EngineCore
from flyball.engine.request import FinishReason, Grammar, RequestOutput, SamplingParams

Make = Callable[..., EngineCore]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
PROMPT = [5, 9, 31, 7, 7, 12, 100, 44, 3, 17]


def serve(core: EngineCore, bound: int = 2000) -> dict[tuple[str, int], list[RequestOutput]]:
    """Step until nothing is left; the outputs by request and answer."""
    told: dict[tuple[str, int], list[RequestOutput]] = {}
    for _ in range(bound):
        if not core.busy:
            return told
        for output in core.step()[0]:
            told.setdefault((output.request_id, output.index), []).append(output)
    raise AssertionError(f"still busy after {bound} steps: {core.scheduler}")


def tokens(outputs: list[RequestOutput]) -> list[int]:
    """All tokens of an answer."""
    return [token for output in outputs for token in output.new_token_ids]


@pytest.mark.parametrize("caching", [True, False])
def test_n_answers_share_the_prompt_and_equal_separate_requests(engine: Make, caching: bool) -> None:
    """Answer i is what seed + i gives alone; the prompt's full blocks are computed once, with the cache on or off."""
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=20, ignore_eos=True, n=3)
    core = engine(max_num_batched_tokens=8)
    core.update_runtime({"prefix_caching": caching})
    core.add("r", PROMPT, params)
    told = serve(core)
    alone = engine()
    for i in range(3):
        wanted = alone.generate([PROMPT], replace(params, n=1, seed=20 + i))[0]
        assert tokens(told["r", i]) == wanted
        assert told["r", i][-1].finish_reason is FinishReason.LENGTH
    assert core.stats.prompt_tokens_computed == len(PROMPT) + 2 * 2, "two siblings compute the last 2 of 10 tokens"
    assert told["r", 1][-1].num_cached_tokens == 8
    core.scheduler.kv.pool.check_integrity([])


def test_siblings_of_a_preempted_leader_still_end(engine: Make) -> None:
    """Many answers in a pool that holds hardly one of them all come, and equal the lone ones."""
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, n=6)
    core = engine(num_blocks=9, max_model_len=36)
    core.update_runtime({"prefix_caching": False})
    core.add("r", PROMPT, params)
    told = serve(core)
    assert core.stats.preemptions > 0
    alone = engine()
    for i in range(6):
        assert tokens(told["r", i]) == alone.generate([PROMPT], replace(params, n=1, seed=5 + i))[0]


def test_an_abort_takes_all_answers_and_one_can_go_alone(engine: Make) -> None:
    """A caller may have enough of one answer; giving up the request ends the rest and frees every block."""
    core = engine()
    core.add("r", PROMPT, replace(GREEDY, n=3, max_tokens=50))
    core.step()
    core.step()
    core.abort_answer("r", 1)
    assert {r.index for r in core.requests["r"]} == {0, 2}
    core.abort("r")
    core.abort("r")
    assert (core.busy, core.stats.blocks_used, core.stats.finished) == (False, 0, {"abort": 3})


def test_a_deadline_ends_a_request_waiting_or_running(engine: Make) -> None:
    """At the first step boundary after it, with what it has so far, and its blocks are free."""
    clock = VirtualClock()
    core = engine(clock, max_num_seqs=1)
    core.add("runs", PROMPT, replace(GREEDY, max_tokens=100, timeout_s=5.0))
    core.add("waits", PROMPT, replace(GREEDY, timeout_s=2.0))
    core.add("patient", PROMPT, GREEDY)
    core.step()
    clock.advance(2.0)
    outputs, _ = core.step()
    assert [(o.request_id, o.finish_reason) for o in outputs if o.finish_reason] == [("waits", FinishReason.TIMEOUT)]
    clock.advance(3.0)
    outputs, _ = core.step()
    assert outputs[0].request_id == "runs"
    assert outputs[0].finish_reason is FinishReason.TIMEOUT
    assert tokens(serve(core)["patient", 0])
    assert core.stats.finished == {"timeout": 2, "length": 1}


def test_the_knob_sets_a_timeout_for_those_who_set_none(engine: Make) -> None:
    """request_timeout_s acts at admission; a request's own word goes before it."""
    clock = VirtualClock()
    core = engine(clock, max_num_seqs=1)
    core.update_runtime({"request_timeout_s": 1.0})
    core.add("default", PROMPT, GREEDY)
    core.add("own", PROMPT, replace(GREEDY, timeout_s=60.0))
    clock.advance(1.5)
    told = serve(core)
    assert told["default", 0][-1].finish_reason is FinishReason.TIMEOUT
    assert told["own", 0][-1].finish_reason is FinishReason.LENGTH


def test_a_gathering_engine_wakes_for_a_deadline(engine: Make) -> None:
    """An idle engine that waits for company does not sleep past the end of the one it has."""
    clock = VirtualClock()
    core = engine(clock)
    core.update_runtime({"max_wait_ms": 1000.0})
    core.add("r", PROMPT, replace(GREEDY, timeout_s=0.2))
    assert core.step() == ([], 0.2)
    clock.advance(0.2)
    assert core.step()[0][0].finish_reason is FinishReason.TIMEOUT


def test_a_full_queue_refuses_with_a_hint_from_measured_throughput(engine: Make) -> None:
    """Those that will run with the next step do not count; the hint is queued tokens over tokens a second."""
    clock = VirtualClock()
    core = engine(clock, max_num_seqs=2)
    core.update_runtime({"max_queue_len": 2})
    for i in range(4):
        core.add(str(i), PROMPT, GREEDY)
    with pytest.raises(QueueFull, match="max_queue_len=2") as full:
        core.add("4", PROMPT, GREEDY)
    assert full.value.retry_after_s == 1.0, "nothing was measured yet"
    forward = core.runner.forward

    def slow(parts: object) -> torch.Tensor:
        clock.advance(4.0)
        return forward(parts)  # type: ignore[arg-type]

    core.runner.forward = slow  # type: ignore[method-assign]  # a machine that takes 4 s a step
    core.step()  # two prompts in 4 s
    core.add("5", PROMPT, GREEDY) if len(core.scheduler.waiting) < 2 else None
    with pytest.raises(QueueFull) as full:
        core.add("6", PROMPT, GREEDY)
    assert full.value.retry_after_s == pytest.approx(20 / (20 / 4.0))
    assert core.stats.refused == {"queue_full": 2}


def test_max_queue_tokens_bounds_the_prompts_that_wait(engine: Make) -> None:
    """Prompt tokens are counted, an empty queue takes anything, and 0 sets no limit."""
    core = engine()
    core.update_runtime({"max_queue_tokens": 15, "max_queue_len": 0})
    core.add("a", PROMPT * 3, GREEDY)
    with pytest.raises(QueueFull, match="max_queue_tokens=15"):
        core.add("b", PROMPT, GREEDY)
    core.update_runtime({"max_queue_tokens": 0})
    core.add("b", PROMPT, GREEDY)
    assert set(serve(core)) == {("a", 0), ("b", 0)}


def test_offline_serving_is_not_refused_by_a_short_queue(engine: Make) -> None:
    """`generate` hands prompts over as there is room."""
    core = engine(max_num_seqs=2)
    wanted = core.generate([PROMPT] * 9, GREEDY)
    core.update_runtime({"max_queue_len": 1, "max_queue_tokens": 11})
    assert core.generate([PROMPT] * 9, GREEDY) == wanted


def test_levels_act_and_the_report_says_what_happened(engine: Make) -> None:
    """none: alone and without the prefix cache; basic: batched, without it; full: both. All give the same tokens."""
    core = engine()
    core.generate([PROMPT], GREEDY)  # the cache knows the prompt
    seen = {}
    for level in ("none", "basic", "full"):
        core.add(f"{level} 1", PROMPT, replace(GREEDY, optimization=level))
        core.add(f"{level} 2", [*PROMPT, 8], replace(GREEDY, optimization=level))
    told = serve(core)
    for level in ("none", "basic", "full"):
        report = told[f"{level} 1", 0][-1].report
        assert report is not None
        seen[level] = (report.batch_size_seen > 1, report.num_cached_tokens)
    assert seen == {"none": (False, 0), "basic": (True, 0), "full": (True, 8)}
    assert len({tuple(tokens(told[f"{level} 1", 0])) for level in ("none", "basic", "full")}) == 1


def test_a_request_of_level_none_neither_starves_nor_is_starved(engine: Make) -> None:
    """Own steps and shared steps take turns."""
    core = engine()
    long = replace(GREEDY, max_tokens=40)
    for i in range(3):
        core.add(f"shared {i}", PROMPT, long)
    core.add("own", PROMPT, replace(long, optimization="none"))
    for _ in range(40):
        core.step()
    made = {r.id: len(r.output_ids) for group in core.requests.values() for r in group}
    assert min(made.values()) >= 15
    serve(core)


def test_stream_interval_joins_tokens_but_for_the_first_and_the_last(engine: Make) -> None:
    """The first token comes at once, then several together, and the end is not held back; logprobs come along."""
    core = engine()
    core.update_runtime({"stream_interval": 3})
    core.add("r", PROMPT, replace(GREEDY, logprobs=0))
    told = serve(core)["r", 0]
    assert [len(o.new_token_ids) for o in told] == [1, 3, 3, 1]
    assert [len(o.logprobs or ()) for o in told] == [1, 3, 3, 1]


def test_a_change_is_all_or_nothing_and_a_dry_run_changes_nothing(engine: Make) -> None:
    """A bad value, a bad pair or an old version leave every knob as it was."""
    core = engine()
    before = core.runtime
    for changes in ({"max_num_seqs": 4, "policy": "best"}, {"max_num_seqs": 8, "max_num_batched_tokens": 7}):
        with pytest.raises(InvalidKnob):
            core.update_runtime(changes)
    with pytest.raises(VersionConflict):
        core.update_runtime({"max_num_seqs": 4}, if_version=7)
    assert core.update_runtime({"max_num_seqs": 4}, dry_run=True).max_num_seqs == 4
    assert core.runtime is before
    assert core.update_runtime({"max_num_seqs": 4, "policy": "priority"}, if_version=1).version == 2


def test_history_tells_who_changed_what_and_what_was_measured(engine: Make) -> None:
    """Rates before are those of the version before; after are those since. Going back makes a new version."""
    clock = VirtualClock()
    core = engine(clock)
    core.generate([PROMPT], GREEDY)
    clock.advance(4.0)
    core.update_runtime({"max_num_seqs": 3}, by="ada")
    core.generate([PROMPT, PROMPT[::-1]], GREEDY)
    clock.advance(2.0)
    start, change = core.history()
    assert (start.version, start.changes, start.before) == (1, {}, None)
    assert (change.version, change.changes, change.by) == (2, {"max_num_seqs": (8, 3)}, "ada")
    assert change.before is not None
    assert change.before.generation_tokens_per_s == pytest.approx(8 / 4)
    assert change.after.generation_tokens_per_s == pytest.approx(16 / 2)
    assert change.after.prefix_hit_ratio == pytest.approx(8 / 20)
    core.update_runtime({"policy": "priority"})
    back = core.update_runtime({}, revert_to=1, by="ada")
    assert (back.version, back.max_num_seqs, back.policy) == (4, 8, "fcfs")
    assert back.generation == core.history()[0].generation
    with pytest.raises(InvalidInput, match="no version 9"):
        core.update_runtime({}, revert_to=9)


def test_the_history_is_bounded(engine: Make) -> None:
    """Old changes are forgotten, new ones keep what they were changed from."""
    core = engine()
    for i in range(200):
        core.update_runtime({"stream_interval": 1 + i % 2})
    changes = core.history()
    assert len(changes) <= 65
    assert changes[-1].version == 201
    assert all(c.changes for c in changes)


def test_lowering_limits_with_preempt_makes_room_at_once(engine: Make) -> None:
    """Without it running requests stay; with it the latest give way, and all answers are the same."""
    core = engine()
    prompts = [[i, *PROMPT] for i in range(1, 7)]
    wanted = core.generate(prompts, GREEDY)
    requests = [core.add(str(i), prompt, GREEDY)[0] for i, prompt in enumerate(prompts)]
    core.step()
    core.update_runtime({"max_num_seqs": 5})
    assert core.stats.running == 6
    core.update_runtime({"max_num_seqs": 2}, preempt=True)
    assert [r.id for r in core.scheduler.running] == ["0", "1"]
    core.update_runtime({"kv_cache_limit_blocks": 1}, preempt=True)
    assert [r.id for r in core.scheduler.running] == ["0"]
    serve(core)
    assert [r.output_ids for r in requests] == wanted


def test_a_lowered_kv_limit_drops_cached_blocks_then_holds_admissions_and_touches_nobody(engine: Make) -> None:
    """Who runs keeps its blocks; accepted requests beyond the limit still run, alone; new ones are refused."""
    core = engine(num_blocks=40, max_model_len=80)
    wanted = core.generate([PROMPT, PROMPT[::-1] * 3], GREEDY)
    assert core.stats.blocks_cached > 0
    runs = core.add("runs", PROMPT, GREEDY)[0]
    core.step()
    waits = core.add("waits", PROMPT[::-1] * 3, GREEDY)[0]
    held = list(runs.block_table)
    core.update_runtime({"kv_cache_limit_blocks": 3})
    core.step()
    assert runs.block_table[: len(held)] == held
    assert core.stats.blocks_cached == 0
    assert waits in core.scheduler.waiting
    with pytest.raises(ContextLengthExceeded, match="KV cache is 12 tokens"):
        core.add("new", PROMPT, GREEDY)
    serve(core)
    assert [runs.output_ids, waits.output_ids] == wanted


def test_out_of_memory_halves_the_steps_and_loses_no_token(engine: Make) -> None:
    """A step that does not fit is repeated in smaller ones; where they cannot be smaller the engine says so."""
    core = engine(max_num_seqs=4)
    prompts = [PROMPT * 3, PROMPT[::-1] * 2, PROMPT]
    wanted = core.generate(prompts, GREEDY)
    core.flush_cache()
    forward = core.runner.forward

    def limited(most: int) -> Callable[[object], torch.Tensor]:
        def run(parts: list[object]) -> torch.Tensor:
            if sum(part.count for part in parts) > most:  # type: ignore[attr-defined]
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
            return forward(parts)  # type: ignore[arg-type]

        return run  # type: ignore[return-value]

    core.runner.forward = limited(20)  # type: ignore[assignment]  # a machine with little memory
    assert core.generate(prompts, GREEDY) == wanted
    assert core.runtime.max_num_batched_tokens == 16
    assert core.stats.out_of_memory == 2
    assert core.history()[-1].by == "engine: out of memory"
    core.runner.forward = limited(0)  # type: ignore[assignment]
    core.add("r", PROMPT, GREEDY)
    with pytest.raises(EngineFailed, match="ran out of memory"):
        serve(core)


def test_other_errors_of_a_step_are_not_taken_for_want_of_memory(engine: Make) -> None:
    """A failing model fails loudly."""
    core = engine()

    def broken(parts: object) -> torch.Tensor:
        raise RuntimeError("the weights are gone")

    core.runner.forward = broken  # type: ignore[assignment]
    core.add("r", PROMPT, GREEDY)
    with pytest.raises(RuntimeError, match="weights are gone"):
        core.step()


def test_a_flush_under_load_is_complete_and_changes_no_output(engine: Make) -> None:
    """After it nothing computed before is found, not even blocks that a running request fills later."""
    core = engine()
    wanted = core.generate([PROMPT], replace(GREEDY, max_tokens=20))[0]
    core.flush_cache()
    running = core.add("r", PROMPT, replace(GREEDY, max_tokens=20))[0]
    for _ in range(4):
        core.step()
    assert core.flush_cache() > 0
    serve(core)
    assert running.output_ids == wanted
    again = core.add("again", PROMPT + wanted, GREEDY)[0]
    core.step()
    assert again.num_cached_tokens == 0
    serve(core)


def test_hits_are_counted_exactly(engine: Make) -> None:
    """Oracle O11: floor((n - 1) / block) * block for an equal prompt; none for another tenant's, none after a flush."""
    for length in range(1, 14):
        core = engine()
        prompt = PROMPT * 2
        for salt, flush, expected in ((b"", False, 0), (b"", False, (length - 1) // 4 * 4), (b"x" * 70, False, 0),
                                      (b"x" * 69 + b"y", False, 0), (b"", True, 0)):  # fmt: skip
            if flush:
                core.flush_cache()
            request = core.add("r", prompt[:length], replace(GREEDY, max_tokens=1), salt)[0]
            serve(core)
            assert request.num_cached_tokens == expected
        assert core.stats.prompt_tokens_cached == (length - 1) // 4 * 4


def test_logprobs_are_the_models_own_whatever_is_done_to_the_logits(engine: Make) -> None:
    """Chosen and top logprobs equal those of the stock model; penalties, bias and temperature do not show in them."""
    from transformers import AutoModelForCausalLM

    core = engine()
    stock = AutoModelForCausalLM.from_pretrained(core.config.model, dtype=torch.float32)
    for params in (
        replace(GREEDY, logprobs=3),
        SamplingParams(max_tokens=6, temperature=0.7, seed=1, logprobs=2, ignore_eos=True, presence_penalty=1.5,
                       logit_bias=((9, 50.0),)),
    ):  # fmt: skip
        core.add("r", PROMPT, params)
        core.add("other", PROMPT[::-1], SamplingParams(max_tokens=9, seed=4))
        told = serve(core)["r", 0]
        made, values = tokens(told), [v for o in told for v in o.logprobs or ()]
        with torch.no_grad():
            logits = stock(torch.tensor([PROMPT + made])).logits[0, len(PROMPT) - 1 : -1]
        wanted = logits.log_softmax(-1)
        assert [v.token_id for v in values] == made
        for row, value in zip(wanted, values, strict=True):
            assert value.logprob == pytest.approx(float(row[value.token_id]), abs=1e-4)
            best = row.topk(params.logprobs or 0)
            assert [i for i, _ in value.top] == best.indices.tolist()
            assert [p for _, p in value.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_edited_requests_do_not_depend_on_their_batch_or_on_preemption(engine: Make) -> None:
    """Greedy and seeded answers with every kind of edit are the same alone and in a crowded, preempting engine."""
    rng = random.Random(4)
    edits = [
        replace(GREEDY, repetition_penalty=1.7, max_tokens=14),
        replace(GREEDY, frequency_penalty=1.1, presence_penalty=-0.4, max_tokens=14),
        SamplingParams(max_tokens=14, seed=8, logit_bias=((4, 3.0), (5, -100.0)), top_p=0.9),
        SamplingParams(max_tokens=14, seed=9, min_tokens=10, stop_token_ids=tuple(range(200))),
        SamplingParams(max_tokens=14, seed=10, allowed_token_ids=(1, 2, 3, 4), repetition_penalty=1.3),
        SamplingParams(max_tokens=14, seed=11),
        replace(GREEDY, max_tokens=14),
    ]
    prompts = [[rng.randrange(1, 200) for _ in range(rng.randint(1, 14))] for _ in edits]
    alone = engine()
    wanted = [alone.generate([prompt], params)[0] for prompt, params in zip(prompts, edits, strict=True)]
    crowded = engine(num_blocks=9, max_model_len=36, max_num_batched_tokens=16)
    requests = [crowded.add(str(i), p, e)[0] for i, (p, e) in enumerate(zip(prompts, edits, strict=True))]
    serve(crowded)
    assert [r.output_ids for r in requests] == wanted
    assert crowded.stats.preemptions > 0
    assert len(wanted[3]) >= 10
    assert set(wanted[4]) <= {1, 2, 3, 4}


def test_impossible_edits_are_refused_by_name(engine: Make) -> None:
    """Ids outside the vocabulary, and masks that would leave no token."""
    core = engine()
    for params, words in (
        (SamplingParams(logit_bias=((10**6, 1.0),)), "logit_bias"),
        (SamplingParams(allowed_token_ids=(-1,)), "allowed_token_ids"),
        (SamplingParams(allowed_token_ids=(0, 7), stop_token_ids=(7,), min_tokens=1), "min_tokens"),
    ):
        with pytest.raises(InvalidInput, match=words):
            core.add("r", PROMPT, params)
    assert core.stats.refused == {"invalid": 3}


def test_a_request_whose_logits_are_no_numbers_fails_alone(engine: Make) -> None:
    """NaN ends that request with an error; the others' answers are what they were."""
    core = engine()
    wanted = core.generate([PROMPT], GREEDY)[0]
    with torch.no_grad():
        core.runner.model.model.embed_tokens.weight[77] = torch.nan
    core.add("bad", [77, 5], GREEDY)
    core.add("bad too", [77, 6], SamplingParams(seed=1))
    core.add("good", PROMPT, GREEDY)
    told = serve(core)
    assert tokens(told["good", 0]) == wanted
    for name in ("bad", "bad too"):
        assert told[name, 0][-1].finish_reason is FinishReason.ERROR
        assert "not a number" in (told[name, 0][-1].error or "")


def test_an_answer_keeps_to_its_grammar_and_then_ends(engine: Make) -> None:
    """Random weights, temperature 1: every answer matches, and so do those beside them without a grammar."""
    import re

    core = engine(max_num_seqs=16, max_num_batched_tokens=256)
    plain = core.generate([PROMPT], SamplingParams(max_tokens=20, seed=3))[0]
    regex = Grammar(kind="regex", text="[ab]{2,6}(cat|mat)?!")
    for i in range(6):
        core.add(f"g{i}", PROMPT, SamplingParams(max_tokens=40, seed=i, grammar=regex, ignore_eos=i % 2 == 0))
    core.add("plain", PROMPT, SamplingParams(max_tokens=20, seed=3))
    told = serve(core)
    for i in range(6):
        ids = [t for t in tokens(told[f"g{i}", 0]) if t != 0]
        text = core.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert re.fullmatch("[ab]{2,6}(cat|mat)?!", text), text
        assert told[f"g{i}", 0][-1].finish_reason is FinishReason.STOP
    assert tokens(told["plain", 0]) == plain


def test_a_leaked_block_is_found_when_the_engine_falls_idle(engine: Make) -> None:
    """Fail loudly rather than serve on with less memory each day."""
    core = engine()
    core.scheduler.kv.pool.take(1)
    core.add("r", PROMPT, GREEDY)
    with pytest.raises(EngineFailed, match="still held though no request is left"):
        serve(core)


def test_an_engine_that_can_schedule_nothing_says_so(engine: Make) -> None:
    """Requests that wait for blocks nobody will return do not wait for ever."""
    core = engine(num_blocks=10, max_model_len=40)
    core.scheduler.kv.pool.take(10)
    core.add("r", PROMPT, GREEDY)
    with pytest.raises(EngineFailed, match="none can be scheduled"):
        serve(core)


def test_the_heartbeat_moves_with_work_and_rests_with_the_engine(engine: Make) -> None:
    """progress_s is when work last advanced or arrived, so its age is a stall only while there is work."""
    clock = VirtualClock()
    core = engine(clock)
    clock.advance(100.0)
    core.add("r", PROMPT, GREEDY)
    assert core.stats.progress_s == 100.0
    clock.advance(1.0)
    core.step()
    assert core.stats.progress_s == 101.0
