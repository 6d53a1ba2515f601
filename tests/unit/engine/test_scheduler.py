"""The one scheduling rule by hand-made cases: who runs next, and how many tokens."""

import logging
from dataclasses import replace

import pytest

from flyball.engine.config import RuntimeConfig
from flyball.engine.kv_manager import KVManager
from flyball.engine.request import FinishReason, Request, SamplingParams
from flyball.engine.scheduler import Scheduler, StepPlan

RUNTIME = RuntimeConfig(max_num_seqs=4, max_num_batched_tokens=8)


def scheduler(blocks: int = 100) -> Scheduler:
    """A scheduler over blocks of 4 tokens; token 0 ends a sequence."""
    return Scheduler(KVManager(blocks, 4), frozenset({0}))


def request(name: str, prompt: int, output: int = 4, arrival_s: float = 0.0, **params: object) -> Request:
    """A request whose prompt shares nothing with another name's."""
    ids = [ord(name) * 100 + i for i in range(prompt)]
    return Request(name, ids, SamplingParams(max_tokens=output, **params), arrival_s, seed=0)  # type: ignore[arg-type]


def counts(plan: StepPlan) -> dict[str, int]:
    """Tokens by request."""
    return {part.request.id: part.count for part in plan.parts}


def test_decodes_and_prefill_chunks_share_one_step() -> None:
    """A running sequence decodes while a long prompt fills the rest of the budget."""
    s = scheduler()
    s.add(request("a", 3))
    plan = s.schedule(RUNTIME, 0.0)
    s.update(plan, [5], RUNTIME)
    s.add(request("b", 20, arrival_s=1.0))
    assert counts(s.schedule(RUNTIME, 1.0)) == {"a": 1, "b": 7}


def test_a_long_prompt_is_capped_by_the_threshold() -> None:
    """long_prefill_token_threshold protects the others' ITL."""
    s = scheduler()
    s.add(request("a", 20))
    s.add(request("b", 20, arrival_s=1.0))
    assert counts(s.schedule(replace(RUNTIME, long_prefill_token_threshold=3), 0.0)) == {"a": 3, "b": 3}


def test_a_prefix_hit_leaves_at_least_the_last_token_to_compute() -> None:
    """Cached tokens = floor((n - 1) / block) * block, so that the last token's logits exist."""
    s = scheduler()
    runtime = replace(RUNTIME, max_num_batched_tokens=64)
    for name, expected in (("first", 0), ("second", 4)):
        r = Request(name, list(range(1, 9)), SamplingParams(max_tokens=1), 0.0, seed=0)
        s.add(r)
        s.update(s.schedule(runtime, 0.0), [7], runtime)
        assert r.num_cached_tokens == expected
    salted = Request("third", list(range(1, 9)), SamplingParams(max_tokens=1), 0.0, seed=0, salt=b"other tenant")
    s.add(salted)
    s.schedule(runtime, 0.0)
    assert salted.num_cached_tokens == 0


def test_the_latest_comer_is_preempted_and_resumes_with_its_tokens() -> None:
    """Preemption frees blocks, keeps output tokens, and the oldest request goes on."""
    s = scheduler(blocks=5)
    a, b = request("a", 6, output=8), request("b", 6, output=8, arrival_s=1.0)
    s.add(a)
    s.add(b)
    runtime = replace(RUNTIME, max_num_batched_tokens=32)
    for step in range(200):
        if not (s.running or s.waiting):
            break
        plan = s.schedule(runtime, float(step))
        s.update(plan, [5] * sum(p.samples for p in plan.parts), runtime)
    assert s.preemptions > 0
    assert a.num_preemptions == 0
    assert [a.finish_reason, b.finish_reason] == [FinishReason.LENGTH] * 2
    assert len(b.output_ids) == 8


def test_an_idle_engine_gathers_until_full_or_due() -> None:
    """max_wait_ms releases when the batch is full or the oldest request's deadline passes, whichever is first."""
    s = scheduler()
    gather = replace(RUNTIME, max_wait_ms=50.0, max_num_seqs=2)
    s.add(request("a", 2, arrival_s=1.0))
    plan = s.schedule(gather, 1.01)
    assert (plan.parts, plan.wake_s) == ((), 1.05)
    assert counts(s.schedule(gather, 1.05)) == {"a": 2}
    full = scheduler()
    full.add(request("a", 2, arrival_s=1.0))
    full.add(request("b", 2, arrival_s=1.0))
    assert counts(full.schedule(gather, 1.0)) == {"a": 2, "b": 2}


def test_eos_and_stop_tokens_end_a_request_unless_told_otherwise() -> None:
    """EOS is compared by id; ignore_eos goes on to max_tokens."""
    for params, token, reason in (
        ({}, 0, FinishReason.STOP),
        ({"ignore_eos": True}, 0, None),
        ({"stop_token_ids": (9,)}, 9, FinishReason.STOP),
    ):
        s = scheduler()
        r = request("a", 2, **params)
        s.add(r)
        s.update(s.schedule(RUNTIME, 0.0), [token], RUNTIME)
        assert r.finish_reason is reason


def test_lowering_the_sequence_limit_drains_and_evicts_nobody() -> None:
    """Running requests are kept; no new one is admitted until the count is under the new limit."""
    s = scheduler()
    for i, name in enumerate("abc"):
        s.add(request(name, 2, arrival_s=float(i)))
    s.update(s.schedule(RUNTIME, 0.0), [5, 5, 5], RUNTIME)
    s.add(request("d", 2, arrival_s=9.0))
    low = replace(RUNTIME, max_num_seqs=1, max_num_batched_tokens=1)
    seen: set[str] = set()
    for _ in range(3):
        plan = s.schedule(low, 1.0)
        seen |= set(counts(plan))
        s.update(plan, [5], low)
    assert seen == {"a", "b", "c"}, "too small a budget must rotate, not starve"


def admitted(plan: StepPlan) -> list[str]:
    """Names in the order in which they were scheduled."""
    return [part.request.id for part in plan.parts]


def test_policies_order_the_queue() -> None:
    """fcfs by arrival; priority by urgency; shortest prefill first; longest prefix match by what the cache knows."""
    known = list(range(1, 13))
    for policy, expected in (
        ("fcfs", ["long", "urgent", "short", "known"]),
        ("priority", ["urgent", "long", "short", "known"]),
        ("shortest_prefill_first", ["short", "urgent", "known", "long"]),
        ("longest_prefix_match", ["known", "long", "urgent", "short"]),
    ):
        s = scheduler()
        runtime = replace(RUNTIME, max_num_batched_tokens=100, policy=policy)  # type: ignore[arg-type]
        s.add(Request("warm", known, SamplingParams(max_tokens=1), 0.0, seed=0))
        s.update(s.schedule(runtime, 0.0), [7], runtime)
        s.add(request("l", 20))
        s.add(request("u", 5, priority=-1))
        s.add(request("s", 2))
        s.add(Request("known", known, SamplingParams(), 0.0, seed=0))
        names = {"l": "long", "u": "urgent", "s": "short", "known": "known"}
        assert [names[n] for n in admitted(s.schedule(runtime, 0.0))] == expected


def test_nobody_overtakes_a_head_that_does_not_fit() -> None:
    """A large prompt waits for blocks; smaller ones behind it do not keep taking them."""
    s = scheduler(blocks=10)
    s.add(request("a", 20))
    s.schedule(replace(RUNTIME, max_num_batched_tokens=64), 0.0)
    s.add(request("b", 30))
    s.add(request("c", 2))
    assert counts(s.schedule(replace(RUNTIME, max_num_batched_tokens=64), 0.0)) == {"a": 20}


def test_an_admission_counts_what_running_prefills_were_promised() -> None:
    """Two prompts that do not fit together are never both begun, though the first holds little as yet."""
    s = scheduler(blocks=10)
    s.add(request("a", 24))
    s.add(request("b", 24))
    for _ in range(3):
        plan = s.schedule(RUNTIME, 0.0)
        assert counts(plan) == {"a": 8}
        s.update(plan, [5] * sum(p.samples for p in plan.parts), RUNTIME)
    assert s.preemptions == 0


def test_the_watermark_keeps_blocks_for_those_who_run() -> None:
    """An admission leaves the share idle, unless nobody runs."""
    s = scheduler(blocks=20)
    high = replace(RUNTIME, watermark=0.5, max_num_batched_tokens=100)
    s.add(request("a", 44))  # 11 of 20 blocks: alone it may
    s.add(request("b", 4))
    assert counts(s.schedule(high, 0.0)) == {"a": 44}
    low = replace(high, watermark=0.0)
    assert "b" in counts(s.schedule(low, 0.0))


def full(victim: str, policy: str = "fcfs") -> tuple[Scheduler, list[Request]]:
    """Three requests in 9 blocks, the first of which computed least; then a step in which they need more."""
    s = scheduler(blocks=9)
    runtime = replace(RUNTIME, max_num_batched_tokens=64, watermark=0.0, preemption_victim=victim, policy=policy)  # type: ignore[arg-type]
    urgent = {"a": 0, "b": 5, "c": 0}
    live = [
        request(n, p, output=20, arrival_s=i, priority=urgent[n])
        for i, (n, p) in enumerate([("a", 4), ("b", 8), ("c", 8)])
    ]
    for r in live:
        s.add(r)
    while not s.preemptions:
        plan = s.schedule(runtime, 0.0)
        s.update(plan, [5] * sum(p.samples for p in plan.parts), runtime)
    return s, live


def test_the_victim_is_the_latest_the_one_with_least_computed_or_the_least_urgent() -> None:
    """preemption_victim decides among equals in urgency; under the policy `priority` the least urgent goes first."""
    for victim, policy, name in (
        ("latest_arrival", "fcfs", "c"),
        ("least_computed", "fcfs", "a"),
        ("latest_arrival", "priority", "b"),
        ("least_computed", "priority", "b"),
    ):
        _, live = full(victim, policy)
        assert [r.id for r in live if r.num_preemptions] == [name], (victim, policy)


def test_a_preemption_is_logged_with_what_decided_it(caplog: pytest.LogCaptureFixture) -> None:
    """One event a decision, as key=value."""
    with caplog.at_level(logging.INFO, logger="flyball.engine"):
        s, _ = full("latest_arrival")
    assert len(caplog.messages) == s.preemptions == 1
    assert caplog.messages[0].startswith("event=preempted request=c reason='request b needs its blocks' victim_policy=")
    assert "computed_tokens=12 " in caplog.messages[0]


def test_prefill_interval_lets_others_decode_between_prompts() -> None:
    """While something decodes, steps with prompt tokens come only every so often; without, at once."""
    s = scheduler()
    runtime = replace(RUNTIME, prefill_interval=3)
    s.add(request("a", 4, output=50))
    plan = s.schedule(runtime, 0.0)
    s.update(plan, [5], runtime)
    s.add(request("b", 40))
    with_prompt = []
    for _ in range(12):
        plan = s.schedule(runtime, 0.0)
        with_prompt.append("b" in counts(plan))
        s.update(plan, [5] * sum(p.samples for p in plan.parts), runtime)
    assert with_prompt[:9] == [False, False, True] * 3


def test_max_batch_size_ends_the_gathering() -> None:
    """The window closes with the count reached, below max_num_seqs too."""
    s = scheduler()
    gather = replace(RUNTIME, max_wait_ms=50.0, max_batch_size=2)
    s.add(request("a", 2, arrival_s=1.0))
    assert s.schedule(gather, 1.0).wake_s == 1.05
    s.add(request("b", 2, arrival_s=1.0))
    assert counts(s.schedule(gather, 1.0)) == {"a": 2, "b": 2}


def test_deadlines_of_requests_that_ended_are_forgotten() -> None:
    """A year of requests with long timeouts does not fill the memory."""
    s = scheduler()
    for i in range(1000):
        r = request("a", 2)
        r.deadline_s = 1e9 + i
        s.add(r)
        s.abort(r)
    assert len(s._deadlines) < 200
