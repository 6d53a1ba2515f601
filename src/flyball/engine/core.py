"""One engine step: schedule, run, postprocess. Single-threaded and free of I/O; the worker gives it a thread."""

from __future__ import annotations

import logging
import random
import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import ContextLengthExceeded, EngineFailed, InvalidInput, QueueFull, RequestRefused
from flyball.core.knobs import Space
from flyball.engine.config import EngineConfig, RuntimeConfig, first_runtime, knob_space
from flyball.engine.edits import check_edits, edit
from flyball.engine.explain import ModelFacts, Setting, explain
from flyball.engine.history import ConfigChange, ConfigHistory
from flyball.engine.kv_manager import KVManager
from flyball.engine.model_runner import ModelRunner, load_tokenizer
from flyball.engine.request import FinishReason, Request, RequestOutput, RequestReport, SamplingParams
from flyball.engine.sampler import logprobs, sample
from flyball.engine.scheduler import Scheduler, StepPlan
from flyball.engine.speculation.proposer import Draft
from flyball.engine.speculation.speculator import Speculator, rows_of
from flyball.engine.speculation.verify import Verified, verify
from flyball.engine.stats import EngineStats
from flyball.engine.structured import GrammarCompiler

log = logging.getLogger("flyball.engine")

_MEMORY = 0.98  # weight of what was measured before, each step: throughput is that of the last 50 steps or so
_IDLE_STEPS = 1000  # plans in a row without work although requests wait: that never ends by itself


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
        self.asked = config  # as given, before sizes were derived
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
        self.speculator = Speculator(self.config, self.runner)
        self.grammars = GrammarCompiler(self.tokenizer, self.runner.shape.vocab_size, self.scheduler.eos_token_ids)
        self.requests: dict[str, list[Request]] = {}  # by group: the answers still to be given
        self.stats = EngineStats(blocks_free=self.runner.num_blocks, blocks_limit=self.runner.num_blocks)
        self._history = ConfigHistory()
        self._history.record(self.runtime, "start", self.clock.now_s(), self.clock.wall_s(), self.stats)
        self._seeds = random.Random(secrets.randbits(64) if seed is None else seed)
        self._lately = [0.0, 0.0]  # tokens and seconds of recent steps, the older the less
        self._empty_plans = 0

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output."""
        assert self.config.max_model_len is not None
        return self.config.max_model_len

    def explain(self, given: Mapping[str, str]) -> list[Setting]:
        """Every setting, where its value came from and why; `given` names what set a field of the configuration."""
        shape = self.runner.shape
        facts = ModelFacts(
            max_positions=shape.max_positions,
            block_bytes=shape.block_bytes(self.config.block_size),
            dtype=str(shape.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            kernels=self.runner.kernels,
        )
        return explain(self.asked, facts, given, self.runtime, self.history())

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Refuse what could never be served: raises InvalidInput or ContextLengthExceeded."""
        if not prompt_ids:
            raise InvalidInput("the prompt is empty; give at least one token")
        vocab = self.runner.shape.vocab_size
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab:
            raise InvalidInput(
                f"the prompt holds a token id outside 0..{vocab - 1}; give ids of this model's vocabulary"
            )
        check_edits(params, vocab, self.scheduler.eos_token_ids)
        wanted = len(prompt_ids) + params.max_tokens
        blocks = self.runtime.kv_cache_limit_blocks or self.runner.num_blocks
        pool = blocks * self.config.block_size
        limit = min(self.max_model_len, pool)
        if wanted > limit:
            what = "context length" if self.max_model_len <= pool else "KV cache"
            raise ContextLengthExceeded(
                f"{len(prompt_ids)} prompt tokens and max_tokens={params.max_tokens} make {wanted}, "
                f"but this model's {what} is {limit} tokens; shorten the prompt or lower max_tokens"
            )

    def add(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, salt: bytes = b""
    ) -> list[Request]:
        """Accept a request, which runs from the next step on; returns its `params.n` answers in the making.

        Raises as `check` does, and QueueFull where too much is waiting.
        """
        try:
            self.check(prompt_ids, params)
            self._check_queue(request_id, len(prompt_ids), params.n)
            matchers = [self.grammars.matcher(params.grammar) if params.grammar else None for _ in range(params.n)]
        except (RequestRefused, InvalidInput) as error:
            self._refused(error)
            raise
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        now_s = self.clock.now_s()
        timeout_s = params.timeout_s or self.runtime.request_timeout_s
        if not self.requests:
            self.stats.progress_s = now_s
        answers = []
        for i in range(params.n):
            request = Request(
                request_id if params.n == 1 else f"{request_id}#{i}", list(prompt_ids), params, now_s, seed + i, salt,
                group=request_id, index=i, deadline_s=now_s + timeout_s if timeout_s else None, matcher=matchers[i],
            )  # fmt: skip
            answers.append(request)
            self.scheduler.add(request)
        self.requests[request_id] = list(answers)
        return answers

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown and finished ids are ignored."""
        for request in list(self.requests.get(request_id, ())):
            self.abort_answer(request_id, request.index)

    def abort_answer(self, request_id: str, index: int) -> None:
        """Drop one of the answers to a request; unknown and finished ones are ignored."""
        for request in list(self.requests.get(request_id, ())):
            if request.index == index:
                self.scheduler.abort(request)
                self._forget(request)
                self._observe()

    def update_runtime(
        self,
        changes: Mapping[str, object],
        *,
        if_version: int | None = None,
        dry_run: bool = False,
        revert_to: int | None = None,
        preempt: bool = False,
        by: str = "",
    ) -> RuntimeConfig:
        """Check changes and, unless `dry_run`, put them in force from the next step on.

        `revert_to` starts from the values of an earlier version. With `preempt`, requests beyond a lowered limit of
        sequences or blocks give way at once; without, they run on and the limit holds for those who come.
        """
        earlier = self._history.values_of(revert_to) if revert_to is not None else {}
        after = self.runtime.changed({**earlier, **changes}, self.space, if_version)
        if not dry_run:
            self.runtime = after
            log.info("event=config_changed version=%d by=%r changes=%r", after.version, by, dict(changes))
            self._history.record(after, by, self.clock.now_s(), self.clock.wall_s(), self.stats)
            if preempt:
                self.scheduler.shed(after)
            self._observe()
        return after

    def history(self) -> list[ConfigChange]:
        """The last changes of the policy, oldest first, with what was measured before and after each."""
        return self._history.changes(self.clock.now_s(), self.stats)

    def flush_cache(self) -> int:
        """Forget every cached prefix, at once and also under load; returns how many blocks were known."""
        count = self.scheduler.kv.flush()
        self._observe()
        return count

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    def step(self) -> tuple[list[RequestOutput], float | None]:
        """Run one step; returns what it gave, and when to call again if an idle engine is gathering requests."""
        started = self.clock.now_s()
        runtime = self.runtime
        outputs = [self._output(request, started) for request in self.scheduler.expire(started)]
        plan = self.scheduler.schedule(runtime, started)
        if not plan.parts:
            self._watch_empty(plan)
            if outputs:
                self._observe()
            return outputs, plan.wake_s
        self._empty_plans = 0
        verified: list[Verified] = []
        tokens: Sequence[int | Sequence[int]]
        try:
            drafts = self.speculator.drafts(plan, runtime, self.scheduler.kv, self.max_model_len)
            if drafts:
                logits = self.runner.forward(rows_of(plan.parts, drafts))
                verified = self._verify(logits, plan, drafts)
                tokens = [group.tokens for group in verified]
            else:
                tokens = self._sample(self.runner.forward(plan.parts), plan)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not _out_of_memory(error):
                raise
            for part in plan.parts:
                part.request.spec_ids = []
            self._relieve(error)  # nothing of the plan was taken down, so the next one repeats it, in smaller steps
            return outputs, None
        news = self.scheduler.update(plan, tokens, runtime)
        self._learn(plan, verified, runtime)
        now_s = self.clock.now_s()
        interval = runtime.stream_interval
        for request in dict.fromkeys(request for request, _ in news):
            sent = request.num_sent
            if not sent or request.finish_reason is not None or len(request.output_ids) - sent >= interval:
                outputs.append(self._output(request, now_s))
        prompt, size = 0, len(plan.parts)
        for part in plan.parts:
            request = part.request
            request.batch_size_seen = max(request.batch_size_seen, size)
            prompt += max(0, min(part.start + part.count, len(request.prompt_ids)) - part.start)
        self._observe(plan.tokens, prompt, len(news), now_s - started)
        return outputs, None

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
        """Serve prompts offline; returns the output ids in order, the n answers of a prompt one after the other."""
        waiting = deque(enumerate(prompts))
        answers: list[list[Request]] = [[] for _ in prompts]
        while waiting or self.busy:
            while waiting and not self._queue_excess(len(waiting[0][1]), params.n):
                i, prompt = waiting.popleft()
                answers[i] = self.add(f"offline-{i}", prompt, params)
            self.step()
        return [request.output_ids for group in answers for request in group]

    def _queue_excess(self, prompt_tokens: int, n: int) -> str | None:
        """What of a queue limit a request would exceed; an empty queue takes any."""
        runtime, scheduler = self.runtime, self.scheduler
        waiting = len(scheduler.waiting)
        if not waiting:
            return None
        soon = max(0, runtime.max_num_seqs - len(scheduler.running))  # these will run with the next step
        if runtime.max_queue_len and waiting + n > runtime.max_queue_len + soon:
            return f"{waiting} requests wait already (max_queue_len={runtime.max_queue_len})"
        if runtime.max_queue_tokens:
            tokens = sum(r.deficit for r in scheduler.waiting)
            if tokens + n * prompt_tokens > runtime.max_queue_tokens:
                return f"{tokens} prompt tokens wait already (max_queue_tokens={runtime.max_queue_tokens})"
        return None

    def _check_queue(self, request_id: str, prompt_tokens: int, n: int) -> None:
        if request_id in self.requests:
            raise InvalidInput(f"request id {request_id!r} is in use; choose another")
        excess = self._queue_excess(prompt_tokens, n)
        if excess is not None:
            rate = self.stats.tokens_per_s
            retry_s = max(1.0, sum(r.deficit for r in self.scheduler.waiting) / rate) if rate else 1.0
            raise QueueFull(f"{excess}; send the request again in {retry_s:.0f} s", retry_s)

    def _refused(self, error: Exception) -> None:
        reason = {QueueFull: "queue_full", ContextLengthExceeded: "too_long"}.get(type(error), "invalid")
        self.stats.refused[reason] = self.stats.refused.get(reason, 0) + 1

    @torch.inference_mode()  # as the logits were made: they are edited in place
    def _sample(self, logits: torch.Tensor, plan: StepPlan) -> list[int]:
        rows = [part.request for part in plan.parts if part.samples]
        if not rows:
            return []
        raw = logits
        dead: list[int] = []
        if any(r.edited for r in rows):
            wanted = any(r.params.logprobs is not None for r in rows)
            logits = logits.to(torch.float32, copy=wanted)
            dead = edit(logits, rows, self.scheduler.eos_token_ids)
        tokens = sample(logits, [r.params for r in rows], [r.seed for r in rows], [r.num_known for r in rows])
        if min(tokens) < 0:
            self.runner.clear([block for r, t in zip(rows, tokens, strict=True) if t < 0 for block in r.block_table])
        for i in dead:
            tokens[i] = -1
        if not all(r.plain for r in rows):
            told = logprobs(raw, tokens, [r.params.logprobs for r in rows])
            for request, token, values in zip(rows, tokens, told, strict=True):
                if values is not None:
                    request.logprobs.append(values)
                if request.matcher is not None and token >= 0:
                    request.matcher.accept_token(token)
        return tokens

    def _verify(self, logits: torch.Tensor, plan: StepPlan, drafts: Mapping[int, Draft]) -> list[Verified]:
        """The tokens of each sampling part from the rows of its draft; a part without one has one row."""
        groups, row = [], 0
        for i, part in enumerate(plan.parts):
            if part.samples:
                part.request.spec_ids = []
                groups.append(Verified(part.request, row, drafts.get(i, Draft([]))))
                row += len(groups[-1].draft.ids) + 1

        def tell(raw: torch.Tensor, requests: Sequence[Request], tokens: Sequence[int]) -> None:
            told = logprobs(raw, tokens, [r.params.logprobs for r in requests])
            for request, values in zip(requests, told, strict=True):
                if values is not None:
                    request.logprobs.append(values)

        verify(logits, groups, self.scheduler.eos_token_ids, tell)
        broken = [g.request for g in groups if g.tokens[-1] < 0]
        if broken:
            self.runner.clear([block for request in broken for block in request.block_table])
        return groups

    def _learn(self, plan: StepPlan, verified: Sequence[Verified], runtime: RuntimeConfig) -> None:
        """Tell the speculator what a step kept, and show it the states under the newest tokens."""
        if runtime.spec_method == "off":
            return
        self.speculator.observe(verified, runtime)
        kept = {g.request: g.first + len(g.tokens) - 1 for g in verified}
        sampled = [part.request for part in plan.parts if part.samples]
        rows = [(r, kept.get(r, i)) for i, r in enumerate(sampled) if r.finish_reason is None]
        gated = 0 < runtime.spec_max_batch < len(rows)  # then nobody will ask
        hidden = self.runner.states() if runtime.spec_method == "medusa" and not gated else None
        states = hidden[[row for _, row in rows]] if hidden is not None else None
        self.speculator.after([r for r, _ in rows], states, runtime)

    def _output(self, request: Request, now_s: float) -> RequestOutput:
        new = tuple(request.output_ids[request.num_sent :])
        if not request.num_sent and new:
            request.first_token_s = now_s
        request.num_sent += len(new)
        values = None
        if request.params.logprobs is not None:
            values = tuple(request.logprobs)
            request.logprobs.clear()
        report = None
        if request.finish_reason is not None:
            self._forget(request)
            report = RequestReport(
                arrival_s=request.arrival_s,
                first_scheduled_s=request.first_scheduled_s,
                first_token_s=request.first_token_s,
                finished_s=now_s,
                num_preemptions=request.num_preemptions,
                batch_size_seen=request.batch_size_seen,
                num_cached_tokens=request.num_cached_tokens,
                spec_accepted_tokens=request.spec_accepted,
            )
        return RequestOutput(
            request_id=request.group,
            index=request.index,
            new_token_ids=new,
            logprobs=values,
            finish_reason=request.finish_reason,
            error=request.error,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=request.num_cached_tokens,
            report=report,
        )

    def _forget(self, request: Request) -> None:
        assert request.finish_reason is not None
        self._count(request.finish_reason)
        answers = self.requests[request.group]
        answers.remove(request)
        if not answers:
            del self.requests[request.group]

    def _count(self, reason: FinishReason) -> None:
        self.stats.finished[reason.value] = self.stats.finished.get(reason.value, 0) + 1

    def _watch_empty(self, plan: StepPlan) -> None:
        """Fail loudly where requests wait and nothing can ever run, rather than spin as if all were well."""
        stuck = plan.wake_s is None and bool(self.requests)
        self._empty_plans = self._empty_plans + 1 if stuck else 0
        if self._empty_plans > _IDLE_STEPS:
            raise EngineFailed(
                f"{len(self.scheduler.waiting)} requests wait and none can be scheduled; "
                "this is an error of the engine's: restart it and report what was sent"
            )

    def _relieve(self, error: Exception) -> None:
        """After a step ran out of memory: smaller steps from now on; raises when they cannot be smaller."""
        runtime = self.runtime
        budget = runtime.max_num_batched_tokens // 2
        log.warning(
            "event=out_of_memory max_num_batched_tokens=%d next=%d reason=%r",
            runtime.max_num_batched_tokens, budget, str(error).splitlines()[0] if str(error) else type(error).__name__,
        )  # fmt: skip
        self.stats.out_of_memory += 1
        if budget < runtime.max_num_seqs:
            raise EngineFailed(
                f"a step of {runtime.max_num_batched_tokens} tokens ran out of memory and cannot be made smaller; "
                "start again with a smaller max_num_seqs or KV cache"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.update_runtime({"max_num_batched_tokens": budget}, by="engine: out of memory")

    def _observe(self, tokens: int = 0, prompt_tokens: int = 0, new_tokens: int = 0, seconds: float = 0.0) -> None:
        scheduler, pool, old, counts = self.scheduler, self.scheduler.kv.pool, self.stats, self.speculator.counts
        if not self.requests:
            pool.check_idle()
        now_s = self.clock.now_s()
        if tokens:
            self._lately = [self._lately[0] * _MEMORY + tokens, self._lately[1] * _MEMORY + seconds]
        self.stats = EngineStats(
            step=scheduler.step,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_used=pool.num_used,
            blocks_cached=pool.num_cached,
            blocks_free=pool.num_idle - pool.num_cached,
            blocks_limit=self.runtime.kv_cache_limit_blocks or pool.num_blocks,
            evictions=pool.evictions,
            prompt_tokens_computed=old.prompt_tokens_computed + prompt_tokens,
            prompt_tokens_cached=scheduler.cached_tokens,
            generation_tokens=old.generation_tokens + new_tokens,
            preemptions=scheduler.preemptions,
            preempted_tokens=scheduler.preempted_tokens,
            out_of_memory=old.out_of_memory,
            finished=old.finished,
            refused=old.refused,
            spec_drafts=counts.drafts,
            spec_draft_tokens=counts.draft_tokens,
            spec_accepted_tokens=counts.accepted_tokens,
            spec_accepted_at=tuple(counts.accepted_at),
            tokens_per_s=self._lately[0] / self._lately[1] if self._lately[1] > 0 else 0.0,
            last_step_s=now_s if tokens else old.last_step_s,
            progress_s=now_s if tokens or not self.requests else old.progress_s,
            step_seconds=old.step_seconds + seconds,
        )


def _out_of_memory(error: Exception) -> bool:
    """Whether torch or numpy could not get memory; torch's CPU allocator has no error type of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
