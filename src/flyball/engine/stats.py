"""What the engine counts: a snapshot after each step, read by metrics, readiness and tests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Gauges of now and counters since the start; the engine thread replaces the whole object after a step."""

    step: int = 0
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0  # referenced by a request
    blocks_cached: int = 0  # free, but still holding a known prefix
    blocks_free: int = 0  # free and empty
    blocks_limit: int = 0  # most that may hold content now; the pool's size unless the knob says less
    evictions: int = 0  # cached blocks given up for room
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0  # prompt tokens answered from the prefix cache
    generation_tokens: int = 0
    preemptions: int = 0
    preempted_tokens: int = 0  # KV thrown away by preemption, to be computed again
    out_of_memory: int = 0  # steps given up for want of memory
    finished: dict[str, int] = field(default_factory=dict)  # answers by finish reason
    refused: dict[str, int] = field(default_factory=dict)  # requests by reason: queue_full, too_long, invalid
    spec_drafts: int = 0  # guesses of one or more tokens that were verified
    spec_draft_tokens: int = 0
    spec_accepted_tokens: int = 0
    spec_accepted_at: tuple[int, ...] = ()  # kept tokens by place in the guess
    tokens_per_s: float = 0.0  # computed lately, prompt and output, while steps ran; 0: nothing measured yet
    last_step_s: float = 0.0  # monotonic time of the last step's end
    progress_s: float = 0.0  # monotonic time when work last advanced, or arrived at an idle engine: the heartbeat
    step_seconds: float = 0.0  # time spent in steps
