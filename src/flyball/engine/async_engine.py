"""The engine on a thread of its own, and its asynchronous face.

The two sides share no state: commands (add, abort, set the policy) travel through a queue that the engine thread
empties between two steps; answers travel back with one `call_soon_threadsafe` a step and event loop. torch releases
the GIL inside its kernels, so the event loop stays responsive while a step runs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.knobs import Space
from flyball.engine.config import EngineConfig, RuntimeConfig
from flyball.engine.core import EngineCore
from flyball.engine.explain import Setting
from flyball.engine.history import ConfigChange
from flyball.engine.request import FinishReason, Grammar, RequestOutput, SamplingParams
from flyball.engine.stats import EngineStats

log = logging.getLogger("flyball.engine")

STALL_S = 10.0  # without progress for so long although there is work, something is wrong
GRAMMAR_TIMEOUT_S = 10.0  # a grammar that takes longer to compile is refused

_T = TypeVar("_T")
_Stream = tuple[asyncio.AbstractEventLoop, "asyncio.Queue[RequestOutput]"]


class AsyncEngine:
    """Streams tokens of many requests; every method but `stop` may be called from any event loop."""

    def __init__(
        self,
        config: EngineConfig,
        model_name: str | None = None,
        seed: int | None = None,
        given: Mapping[str, str] | None = None,
    ) -> None:
        """`given` names what set a field of the configuration, for `explain`."""
        self._given = given or {}
        self._core = EngineCore(config, seed=seed)
        self.config = self._core.config
        self.model_name = model_name or config.model.resolve().name
        self.max_model_len = min(self._core.max_model_len, self._core.runner.num_blocks * config.block_size)
        self.vocab_size = self._core.runner.shape.vocab_size
        self.tokenizer: Any = self._core.tokenizer
        self.space: Space = self._core.space
        self.error: str | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # owned by the engine thread
        self._pending: set[Future[Any]] = set()
        self._ids = itertools.count()
        self._grammar_threads = ThreadPoolExecutor(2, thread_name_prefix="flyball-grammar")
        self._turned_s = self._core.clock.now_s()  # when the engine thread last began a turn of its loop
        self._stopping = False
        self._stall_told = False
        self._thread = threading.Thread(target=self._run, name="flyball-engine", daemon=True)

    @property
    def runtime(self) -> RuntimeConfig:
        """The policy in force now."""
        return self._core.runtime

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive() and self.error is None

    def start(self) -> None:
        """Start the engine thread; once."""
        self._thread.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """End the engine, after up to `drain_s` seconds for running requests to finish; then the rest is aborted."""
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                while self.alive and self._core.busy:
                    await asyncio.sleep(0.01)

        def end() -> None:
            self._stopping = True

        self._inbox.put(end)
        self._grammar_threads.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def stalled_s(self) -> float:
        """Seconds since anything advanced although there is work: 0 while idle. Readiness looks at it.

        The first look at a stall of `STALL_S` or more logs what the engine is at.
        """
        now_s = self._core.clock.now_s()
        work_s = now_s - self._core.stats.progress_s if self._core.busy else 0.0
        stalled_s = max(0.0, work_s, 0.0 if self._inbox.empty() else now_s - self._turned_s)
        if stalled_s < STALL_S:
            self._stall_told = False
        elif not self._stall_told:
            self._stall_told = True
            log.error("event=stalled seconds=%.1f stats=%r stack=%r", stalled_s, self._core.stats, self._stack())
        return stalled_s

    def _stack(self) -> str:
        """Where the engine's thread is."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "the thread has ended"

    def info(self) -> dict[str, Any]:
        """What was loaded, as it is: architecture, parameters, types, sizes."""
        core = self._core
        return {
            "model": self.model_name,
            **core.runner.describe(),
            "block_size": self.config.block_size,
            "num_blocks": self.config.num_blocks,
            "max_model_len": self.max_model_len,
        }

    async def explain(self) -> list[Setting]:
        """Every setting, where its value came from and why."""
        return await self._call(lambda: self._core.explain(self._given))

    def requests(self) -> list[dict[str, Any]]:
        """The answers in the making, oldest first, as of the last step."""
        now_s = self._core.clock.now_s()
        return [
            {
                "id": r.group,
                "index": r.index,
                "state": "running" if r.block_table else "waiting",
                "age_s": now_s - r.arrival_s,
                "prompt_tokens": len(r.prompt_ids),
                "output_tokens": len(r.output_ids),
                "computed_tokens": r.num_computed,
                "blocks": len(r.block_table),
                "preemptions": r.num_preemptions,
                "priority": r.params.priority,
            }
            for answers in list(self._core.requests.values())
            for r in list(answers)
        ]

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve one request, an output a step and answer, until all of its `params.n` answers have ended.

        Closing the iterator frees their blocks at the next step boundary. Raises InvalidInput, ContextLengthExceeded or
        QueueFull before the first output, EngineFailed whenever the engine is gone. An answer whose deadline passes
        ends with FinishReason.TIMEOUT.
        """
        async with aclosing(self.steps(prompt_ids, params, request_id=request_id, salt=salt)) as steps:
            async for outputs in steps:
                for output in outputs:
                    yield output

    async def steps(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> AsyncGenerator[list[RequestOutput], None]:
        """As `generate`, with all outputs that are there at once: those of a step, and of more where one lags."""
        if params.grammar is not None:
            await self.compile_grammar(params.grammar)
        rid = request_id or f"req-{next(self._ids)}"
        stream: asyncio.Queue[RequestOutput] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def add() -> None:
            self._core.add(rid, prompt_ids, params, salt)
            self._streams[rid] = (loop, stream)

        try:
            await self._call(add)
        except asyncio.CancelledError:
            self.abort(rid)  # the engine may have taken it already
            raise
        left = params.n
        try:
            while left:
                outputs = [await stream.get()]
                while not stream.empty():
                    outputs.append(stream.get_nowait())
                for i, output in enumerate(outputs):
                    if output.finish_reason is FinishReason.ERROR:
                        if i:
                            yield outputs[:i]
                        raise EngineFailed(output.error or "the engine failed")
                    left -= output.finish_reason is not None
                yield outputs
        finally:
            if left:
                self.abort(rid)

    def abort(self, request_id: str) -> None:
        """Drop a request; unknown and finished ids are ignored."""

        def drop() -> None:
            for request in list(self._core.requests.get(request_id, ())):
                self._drop(request_id, request.index)

        self._inbox.put(drop)

    def abort_answer(self, request_id: str, index: int) -> None:
        """Drop one of the answers to a request, which its caller has enough of; the others go on."""
        self._inbox.put(lambda: self._drop(request_id, index))

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Make a grammar ready off the engine's thread; raises InvalidInput for one that cannot be used."""
        work = self._grammar_threads.submit(self._core.grammars.compile, grammar)
        try:
            async with asyncio.timeout(GRAMMAR_TIMEOUT_S):
                await asyncio.wrap_future(work)
        except TimeoutError:
            raise InvalidInput(
                f"this {grammar.kind} takes longer than {GRAMMAR_TIMEOUT_S:g} s to compile; simplify it"
            ) from None

    async def update_runtime(
        self,
        changes: Mapping[str, object],
        *,
        if_version: int | None = None,
        dry_run: bool = False,
        revert_to: int | None = None,
        preempt: bool = False,
        by: str = "",
    ) -> RuntimeConfig:
        """Change live knobs, all or none, at a step boundary; returns the snapshot in force (or that would be).

        `revert_to` starts from the values of an earlier version; with `preempt`, what no longer fits gives way at once.
        Raises InvalidKnob or VersionConflict, and then nothing has changed.
        """
        return await self._call(
            lambda: self._core.update_runtime(
                changes, if_version=if_version, dry_run=dry_run, revert_to=revert_to, preempt=preempt, by=by
            )
        )

    async def history(self) -> list[ConfigChange]:
        """The last changes of the policy, oldest first, with what was measured before and after each."""
        return await self._call(self._core.history)

    async def flush_cache(self) -> int:
        """Forget every cached prefix, at once and also under load; returns how many blocks were known."""
        return await self._call(self._core.flush_cache)

    def stats(self) -> EngineStats:
        """Gauges and counters as of the last step."""
        return self._core.stats

    async def _call(self, command: Callable[[], _T]) -> _T:
        """Run a command on the engine thread between two steps and wait for its answer or its error."""
        if not self.alive:
            raise EngineFailed(self.error or "the engine is not running; start it first")
        answer: Future[_T] = Future()

        def run() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # the caller went away
            try:
                answer.set_result(command())
            except Exception as error:  # noqa: BLE001  # the caller's; the engine goes on for all others
                answer.set_exception(error)

        self._pending.add(answer)
        answer.add_done_callback(self._pending.discard)
        self._inbox.put(run)
        if self.error is not None:  # it ended between the check and the put
            with suppress(InvalidStateError):
                answer.set_exception(EngineFailed(self.error or "the engine stopped"))
        return await asyncio.wrap_future(answer)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turned_s = self._core.clock.now_s()
                self._drain_inbox(block=not self._core.busy)
                if self._stopping or not self._core.busy:
                    continue
                outputs, wake_s = self._core.step()
                self._publish(outputs)
                if wake_s is not None:
                    self._drain_inbox(block=True, timeout_s=max(0.0, wake_s - self._core.clock.now_s()))
            self._fail_all("the engine was stopped")
        except BaseException as error:
            # Whatever it was, nobody may wait for tokens that will never come.
            self._fail_all(f"the engine failed: {type(error).__name__}: {error}")
            raise

    def _drain_inbox(self, *, block: bool, timeout_s: float | None = None) -> None:
        with suppress(queue.Empty):
            command = self._inbox.get(block=block, timeout=timeout_s)
            while True:
                command()
                command = self._inbox.get(block=False)

    def _drop(self, request_id: str, index: int) -> None:
        """End one answer, on the engine's thread, and tell its stream."""
        if not any(r.index == index for r in self._core.requests.get(request_id, ())):
            return
        self._core.abort_answer(request_id, index)
        ended = RequestOutput(request_id=request_id, index=index, new_token_ids=(), finish_reason=FinishReason.ABORT)
        self._publish([ended])

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        news, ended = [], set()
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            news.append((stream, output))
            if output.request_id not in self._core.requests:
                ended.add(output.request_id)
        _deliver(news)
        for request_id in ended:
            del self._streams[request_id]

    def _fail_all(self, reason: str) -> None:
        self.error = reason
        failed = [
            (stream, RequestOutput(request_id=rid, new_token_ids=(), finish_reason=FinishReason.ERROR, error=reason))
            for rid, stream in self._streams.items()
        ]
        self._streams.clear()
        _deliver(failed)
        for answer in list(self._pending):
            with suppress(InvalidStateError):
                answer.set_exception(EngineFailed(reason))


def _deliver(news: Sequence[tuple[_Stream, RequestOutput]]) -> None:
    """Hand outputs over with one call a loop, however many requests got a token."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[RequestOutput], RequestOutput]]] = {}
    for (loop, stream), output in news:
        by_loop.setdefault(loop, []).append((stream, output))
    for loop, items in by_loop.items():

        def put(items: list[tuple[asyncio.Queue[RequestOutput], RequestOutput]] = items) -> None:
            for stream, output in items:
                stream.put_nowait(output)

        with suppress(RuntimeError):  # the loop is closed: its clients are gone
            loop.call_soon_threadsafe(put)
