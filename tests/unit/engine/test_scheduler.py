"""The one scheduling rule by hand-made cases: who runs next, and how many tokens."""

from dataclasses import replace

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
