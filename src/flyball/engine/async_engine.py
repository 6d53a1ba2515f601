"""The engine on a thread of its own, and its asynchronous face.

The two sides share no state: commands (add, abort, set the policy) travel through a queue that the engine thread
empties between two steps; answers travel back with one `call_soon_threadsafe` a step and event loop. torch releases
the GIL inside its kernels, so the event loop stays responsive while a step runs.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, TypeVar

from flyball.core.errors import EngineFailed
from flyball.core.knobs import Space
from flyball.engine.config import EngineConfig, RuntimeConfig
from flyball.engine.core import EngineCore
from flyball.engine.request import FinishReason, RequestOutput, SamplingParams
from flyball.engine.stats import EngineStats

_T = TypeVar("_T")
_Stream = tuple[asyncio.AbstractEventLoop, "asyncio.Queue[RequestOutput]"]


class AsyncEngine:
    """Streams tokens of many requests; every method but `stop` may be called from any event loop."""

    def __init__(self, config: EngineConfig, model_name: str | None = None, seed: int | None = None) -> None:
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
        self._stopping = False
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
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        salt: bytes = b"",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Serve one request, one output a step; closing the iterator frees its blocks at the next step boundary.

        Raises InvalidInput or ContextLengthExceeded before the first output, EngineFailed whenever the engine is gone.
        """
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
        done = False
        try:
            while not done:
                output = await stream.get()
                done = output.finish_reason is not None
                if output.finish_reason is FinishReason.ERROR:
                    raise EngineFailed(output.error or "the engine failed")
                yield output
        finally:
            if not done:
                self.abort(rid)

    def abort(self, request_id: str) -> None:
        """Drop a request; unknown and finished ids are ignored."""

        def drop() -> None:
            self._core.abort(request_id)
            stream = self._streams.pop(request_id, None)
            if stream is not None:
                ended = RequestOutput(request_id=request_id, new_token_ids=(), finish_reason=FinishReason.ABORT)
                _deliver([(stream, ended)])

        self._inbox.put(drop)

    async def update_runtime(
        self, changes: Mapping[str, object], *, if_version: int | None = None, dry_run: bool = False
    ) -> RuntimeConfig:
        """Change live knobs, all or none, at a step boundary; returns the snapshot in force (or that would be).

        Raises InvalidKnob or VersionConflict, and then nothing has changed.
        """
        return await self._call(lambda: self._core.update_runtime(changes, if_version=if_version, dry_run=dry_run))

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

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        news = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            news.append((stream, output))
            if output.finish_reason is not None:
                del self._streams[output.request_id]
        _deliver(news)

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
