"""One engine step: schedule, run, postprocess. Single-threaded and free of I/O; the worker gives it a thread."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import ContextLengthExceeded, InvalidInput
from flyball.core.knobs import Space
from flyball.engine.config import EngineConfig, RuntimeConfig, first_runtime, knob_space
from flyball.engine.kv_manager import KVManager
from flyball.engine.model_runner import ModelRunner, load_tokenizer
from flyball.engine.request import FinishReason, Request, RequestOutput, SamplingParams
from flyball.engine.sampler import sample
from flyball.engine.scheduler import Scheduler, StepPlan
from flyball.engine.stats import EngineStats


class EngineCore:
    """Serves requests step by step under one policy snapshot a step."""

    def __init__(self, config: EngineConfig, clock: Clock | None = None, seed: int | None = None) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.runner = ModelRunner(config)
        positions = self.runner.shape.max_positions
        if config.max_model_len is not None and config.max_model_len > positions:
            raise InvalidInput(
                f"max_model_len={config.max_model_len} exceeds the model's {positions} positions; lower it"
            )
        self.config = replace(
            config, num_blocks=self.runner.num_blocks, max_model_len=config.max_model_len or positions
        )
        self.tokenizer = load_tokenizer(config.model)
        self.clock = clock or SystemClock()
        self.space: Space = knob_space(self.config)
        self.runtime: RuntimeConfig = first_runtime(self.config)
        self.scheduler = Scheduler(
            KVManager(self.runner.num_blocks, config.block_size), self.runner.shape.eos_token_ids
        )
        self.requests: dict[str, Request] = {}
        self.stats = EngineStats(blocks_free=self.runner.num_blocks)
        self._seeds = random.Random(secrets.randbits(64) if seed is None else seed)

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        assert self.config.max_model_len is not None
        return self.config.max_model_len

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could never be served: raises InvalidInput or ContextLengthExceeded."""
        if not prompt_ids:
            raise InvalidInput("the prompt is empty; give at least one token")
        vocab = self.runner.shape.vocab_size
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab:
            raise InvalidInput(
                f"the prompt holds a token id outside 0..{vocab - 1}; give ids of this model's vocabulary"
            )
        wanted = len(prompt_ids) + params.max_tokens
        pool = self.runner.num_blocks * self.config.block_size
        limit = min(self.max_model_len, pool)
        if wanted > limit:
            what = "context length" if self.max_model_len <= pool else "KV cache"
            raise ContextLengthExceeded(
                f"{len(prompt_ids)} prompt tokens and max_tokens={params.max_tokens} make {wanted}, "
                f"but this model's {what} is {limit} tokens; shorten the prompt or lower max_tokens"
            )

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, salt: bytes = b"") -> Request:
        """Accept a request, or raise as `check` does; it runs from the next step on."""
        if request_id in self.requests:
            raise InvalidInput(f"request id {request_id!r} is in use; choose another")
        self.check(prompt_ids, params)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        request = Request(request_id, list(prompt_ids), params, self.clock.now_s(), seed, salt)
        self.requests[request_id] = request
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown and finished ids are ignored."""
        request = self.requests.pop(request_id, None)
        if request is not None:
            self.scheduler.abort(request)
            self._count(FinishReason.ABORT)
            self._observe()

    def update_runtime(
        self, changes: Mapping[str, object], *, if_version: int | None = None, dry_run: bool = False
    ) -> RuntimeConfig:
        """Check changes and, unless `dry_run`, put them in force from the next step on."""
        after = self.runtime.changed(changes, self.space, if_version)
        if not dry_run:
            self.runtime = after
        return after

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    def step(self) -> tuple[list[RequestOutput], float | None]:
        """Run one step; returns what it gave, and when to call again if an idle engine is gathering requests."""
        started = self.clock.now_s()
        runtime = self.runtime
        plan = self.scheduler.schedule(runtime, started)
        if not plan.parts:
            return [], plan.wake_s
        logits = self.runner.forward(plan.parts)
        news = self.scheduler.update(plan, self._sample(logits, plan), runtime)
        outputs = [self._output(request, token) for request, token in news]
        prompt = sum(max(0, min(p.start + p.count, len(p.request.prompt_ids)) - p.start) for p in plan.parts)
        self._observe(prompt, len(news), self.clock.now_s() - started)
        return outputs, None

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """Serve prompts offline, all at once; returns the output ids in order."""
        requests = [self.add(f"offline-{i}", prompt, params) for i, prompt in enumerate(prompts)]
        while self.busy:
            self.step()
        return [request.output_ids for request in requests]

    def _sample(self, logits: torch.Tensor, plan: StepPlan) -> list[int]:
        rows = [part.request for part in plan.parts if part.samples]
        if not rows:
            return []
        return sample(logits, [r.params for r in rows], [r.seed for r in rows], [r.num_known for r in rows])

    def _output(self, request: Request, token: int) -> RequestOutput:
        if request.finish_reason is not None:
            del self.requests[request.id]
            self._count(request.finish_reason)
        return RequestOutput(
            request_id=request.id,
            new_token_ids=(token,),
            finish_reason=request.finish_reason,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=request.num_cached_tokens,
        )

    def _count(self, reason: FinishReason) -> None:
        self.stats.finished[reason.value] = self.stats.finished.get(reason.value, 0) + 1

    def _observe(self, prompt_tokens: int = 0, new_tokens: int = 0, seconds: float = 0.0) -> None:
        scheduler, pool, old = self.scheduler, self.scheduler.kv.pool, self.stats
        self.stats = EngineStats(
            step=scheduler.step,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_free=pool.num_idle - pool.num_cached,
            prompt_tokens_computed=old.prompt_tokens_computed + prompt_tokens,
            prompt_tokens_cached=scheduler.cached_tokens,
            generation_tokens=old.generation_tokens + new_tokens,
            preemptions=scheduler.preemptions,
            preempted_tokens=scheduler.preempted_tokens,
            finished=old.finished,
            last_step_s=self.clock.now_s(),
            step_seconds=old.step_seconds + seconds,
        )
