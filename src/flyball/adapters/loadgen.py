"""Open-loop load: each request leaves at its scheduled time whatever the server does, and its latency counts from then.

One scheduler (`replay`) drives any `Sender`. `HttpSender` is the one for OpenAI-compatible servers (`/v1/completions`,
streamed), `GenerateSender` the one for Triton's generate extension; an engine in process can be another. `HttpLoad`
wraps them as `core.ports.Load`.

Failed requests are counted by kind: timeout, connection (none, or lost before the reply), http_429, http_500, ...,
stream_error (the server reports one in the stream), malformed (a chunk is not JSON), truncated (the stream ends before
its [DONE]), empty (it ends as it should, without a token), client_sockets (this process may open no more).
"""

from __future__ import annotations

import asyncio
import errno
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Protocol

import aiohttp

from flyball.adapters.prompts import Prompts, as_text
from flyball.adapters.server_facts import Protocols
from flyball.core.clock import Clock, SystemClock
from flyball.core.metrics import MetricsWindow, RequestTrace, Summary
from flyball.core.ports import LoadProgress
from flyball.core.slo import Slo
from flyball.core.workload import RequestSpec, Workload

PREPARED_AHEAD = 2048  # requests whose bodies wait in memory, so that a burst does not wait for its own making
_TIMER_S = 1e-3  # event loops round timers up to a millisecond; the last one is waited out in turns of the loop
_CLIENT_SOCKETS = "client_sockets"


class RequestFailed(Exception):
    """How one request failed: its kind, and what the server said."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Arrival:
    """What came from the server at once: some new tokens, or at the end its own count of them."""

    tokens: int = 0
    input_tokens: int | None = None
    output_tokens: int | None = None


_ONE_TOKEN = Arrival(1)
_decode = json.JSONDecoder().decode  # json.loads would look for the encoding of every event again


class Sender(Protocol):
    """Sends one request and yields what comes back."""

    def send(self, request: RequestSpec, index: int) -> AsyncGenerator[Arrival, None]:
        """Prepare the index-th request now; it leaves when the first arrival is asked for.

        The generator raises RequestFailed, and gives the request up when it is closed.
        """
        ...


async def replay(
    sender: Sender,
    workload: Workload,
    *,
    slo: Slo,
    generation: str,
    clock: Clock,
    timeout_s: float,
    progress: LoadProgress | None = None,
) -> MetricsWindow:
    """Send every request at its time and measure what comes back; cancelling gives up all that is under way."""
    requests = workload.requests
    ahead = deque(sender.send(spec, i) for i, spec in enumerate(requests[:PREPARED_AHEAD]))
    tasks: list[asyncio.Task[RequestTrace]] = []
    done = 0

    def count(task: asyncio.Task[RequestTrace]) -> None:
        nonlocal done
        if progress is not None and not task.cancelled():
            done += 1
            progress(done, len(requests))

    async with asyncio.TaskGroup() as group:
        origin_s = clock.now_s()
        for index, spec in enumerate(requests):
            await _wait_until(origin_s + spec.arrival_s, clock)
            task = group.create_task(_observe(ahead.popleft(), spec, origin_s, clock, timeout_s))
            task.add_done_callback(count)
            tasks.append(task)
            if index + PREPARED_AHEAD < len(requests):
                await asyncio.sleep(0)  # the request just made leaves first
                ahead.append(sender.send(requests[index + PREPARED_AHEAD], index + PREPARED_AHEAD))
    return _window([task.result() for task in tasks], slo, generation)


async def _wait_until(due_s: float, clock: Clock) -> None:
    await asyncio.sleep(max(0.0, due_s - clock.now_s() - _TIMER_S))
    while clock.now_s() < due_s:
        await asyncio.sleep(0)


async def _observe(
    stream: AsyncGenerator[Arrival, None], spec: RequestSpec, origin_s: float, clock: Clock, timeout_s: float
) -> RequestTrace:
    """Follow one request to its end; its failure is data."""
    sent_s = clock.now_s() - origin_s
    times_s: list[float] = []
    counted = Arrival()
    error = None
    try:
        async with asyncio.timeout(timeout_s), aclosing(stream):
            async for arrival in stream:
                if arrival.tokens:
                    times_s.extend([clock.now_s() - origin_s] * arrival.tokens)
                if arrival.output_tokens is not None:
                    counted = arrival
    except TimeoutError:
        error = "timeout"
    except RequestFailed as failed:
        error = failed.kind
    if error is None and not times_s:
        error = "empty"
    return RequestTrace(
        scheduled_s=spec.arrival_s,
        sent_s=sent_s,
        input_tokens=counted.input_tokens or spec.input_tokens,
        output_tokens=counted.output_tokens or len(times_s),
        token_times_s=tuple(times_s),
        error=error,
    )


def _window(traces: Sequence[RequestTrace], slo: Slo, generation: str) -> MetricsWindow:
    first_s = traces[0].scheduled_s
    last_s = max(t.token_times_s[-1] if t.token_times_s else t.sent_s for t in traces)
    return MetricsWindow(duration_s=max(last_s - first_s, 1e-6), generation=generation, traces=tuple(traces), slo=slo)


def client_bound(window: MetricsWindow) -> str | None:
    """Why the figures tell more about this client than about the server, or None if they do not.

    The client was the bottleneck when its own lag exceeds 50 ms (p99), or a tenth of the TTFT at the median or the p99:
    the lag is part of every latency published.
    """
    if sockets := window.errors.get(_CLIENT_SOCKETS):
        return f"{sockets} requests found no free socket in this process"
    lag, ttft = Summary.of([t.lag_s for t in window.traces]), window.summary("ttft")
    if lag.p99 > 0.05:
        return f"the p99 of its own send lag is {lag.p99 * 1e3:.1f} ms, over 50 ms"
    for name, lag_s, ttft_s in (("median", lag.p50, ttft.p50), ("p99", lag.p99, ttft.p99)):
        if lag_s > 0.1 * ttft_s:
            return (
                f"the {name} of its own send lag is {lag_s * 1e3:.2f} ms, over a tenth of TTFT's {ttft_s * 1e3:.2f} ms"
            )
    return None


class HttpSender:
    """Sends completions to an OpenAI-compatible server and reads the stream.

    `extensions` asks for what OpenAI's own API lacks but vLLM and Flyball know: `ignore_eos`, so that an answer has the
    length that the workload states, and `return_token_ids`, so that chunks of several tokens count as such.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        url: str,
        model: str,
        prompt: Callable[[RequestSpec, int], list[int] | str],
        extensions: bool,
    ) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._prompt = prompt
        self._fixed: dict[str, object] = {
            "model": model,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
        } | ({"ignore_eos": True, "return_token_ids": True} if extensions else {})
        self.failures: dict[str, str] = {}  # what the server said at the first failure of each kind

    def send(self, request: RequestSpec, index: int) -> AsyncGenerator[Arrival, None]:
        """Encode the request; it leaves when the first arrival is asked for."""
        return self._stream(json.dumps(self._body(request, index)).encode())

    def _body(self, request: RequestSpec, index: int) -> dict[str, object]:
        return self._fixed | {"prompt": self._prompt(request, index), "max_tokens": request.output_tokens}

    def _events(self) -> _Events:
        return _Events()

    async def _stream(self, body: bytes) -> AsyncGenerator[Arrival, None]:
        began = False
        try:
            async with self._session.post(self._url, data=body) as response:
                await _check_status(response)
                began = True
                events = self._events()
                while data := await response.content.readany():
                    for arrival in events.feed(data):
                        yield arrival
                events.end()
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise self._note(RequestFailed(_kind(error, began=began), str(error))) from error
        except RequestFailed as failed:
            raise self._note(failed) from None

    def _note(self, failed: RequestFailed) -> RequestFailed:
        self.failures.setdefault(failed.kind, failed.detail)
        return failed


class GenerateSender(HttpSender):
    """Sends requests to Triton's generate extension (`/v2/models/MODEL/generate_stream`), which takes text only.

    Input names are those of the TensorRT-LLM backend's models: `text_input`, `max_tokens`, `stream`.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        url: str,
        model: str,
        prompt: Callable[[RequestSpec, int], list[int] | str],
    ) -> None:
        super().__init__(session, url=url, model=model, prompt=prompt, extensions=False)
        self._url = f"{url}/v2/models/{model}/generate_stream"

    def _body(self, request: RequestSpec, index: int) -> dict[str, object]:
        return {"text_input": self._prompt(request, index), "max_tokens": request.output_tokens, "stream": True}

    def _events(self) -> _Events:
        return _GenerateEvents()


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise RequestFailed(f"http_{response.status}", (await response.text(errors="replace"))[:500])


def _kind(error: Exception, *, began: bool) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL):
        return _CLIENT_SOCKETS
    return "truncated" if began else "connection"


class _Events:
    """Reads server-sent events; all that one read from the socket brings has arrived at one time."""

    def __init__(self) -> None:
        self._tail = b""
        self._seen = 0  # tokens so far
        self._done = False

    def feed(self, data: bytes) -> Iterator[Arrival]:
        """What the new data tells."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self._done = True
            elif arrival := self._arrival(payload):
                self._seen += arrival.tokens
                yield arrival

    def end(self) -> None:
        """Raise unless the stream said that it was over."""
        if not self._done:
            raise RequestFailed("truncated", "the stream ended before its [DONE]")

    def _arrival(self, payload: bytes) -> Arrival | None:
        try:
            event = _decode(payload.decode())
            if event.get("error"):
                raise RequestFailed("stream_error", str(event["error"])[:500])
            choices, usage = event.get("choices"), event.get("usage")
            tokens = _new_tokens(choices[0]) if choices else 0
            if usage is None:
                return _ONE_TOKEN if tokens == 1 else Arrival(tokens) if tokens else None
            counted = int(usage["completion_tokens"])
            if counted and not self._seen:  # no event showed a token: they are here by now
                tokens = tokens or 1
            return Arrival(tokens, int(usage["prompt_tokens"]), counted)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise RequestFailed("malformed", f"{payload[:200]!r}: {error}") from None


class _GenerateEvents(_Events):
    """Triton's stream: an event a token, without counts, over when the connection says so."""

    def end(self) -> None:
        """Any end after an event is one."""
        if not self._seen:
            raise RequestFailed("empty", "the stream ended before its first token")

    def _arrival(self, payload: bytes) -> Arrival | None:
        try:
            event = _decode(payload.decode())
            if event.get("error"):
                raise RequestFailed("stream_error", str(event["error"])[:500])
            return _ONE_TOKEN if event["text_output"] else None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RequestFailed("malformed", f"{payload[:200]!r}: {error}") from None


def _new_tokens(choice: dict[str, object]) -> int:
    """Tokens in one event; where their ids are not listed, some text counts as one."""
    token_ids = choice.get("token_ids")
    if isinstance(token_ids, list):
        return len(token_ids)
    return 1 if choice.get("text") else 0


@dataclass(kw_only=True)
class HttpLoad:
    """Loads an OpenAI-compatible server (a `core.ports.Load`).

    Without a vocabulary size, prompts are sent as text and their length in tokens is then only about right.
    The k-th run of one load draws other prompts than the runs before it, or the server's prefix cache would know them.
    """

    url: str  # without /v1
    model: str
    vocab_size: int | None
    prompt_seed: int = 0
    warmup: int = 0  # requests sent, all at once, before the workload; not counted
    timeout_s: float = 600.0  # for one request
    extensions: bool = True
    protocol: Protocols = "openai"
    api_key: str | None = None
    clock: Clock = field(default_factory=SystemClock)
    failures: dict[str, str] = field(default_factory=dict, init=False)  # of the last run: first message by kind
    _runs: int = field(default=0, init=False)

    def run(self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None) -> MetricsWindow:
        """Replay the workload once; failed requests are counted in the window, never raised."""
        return asyncio.run(self.run_async(workload, slo, generation, progress))

    async def run_async(
        self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None
    ) -> MetricsWindow:
        """The same within a running event loop."""
        prompt = self._prompts()
        self._runs += 1
        # uvicorn closes idle connections after 5 s; one that we might reuse while it closes would look like a failure
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        unlimited = aiohttp.ClientTimeout(total=None)  # replay has its own, for every sender
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=unlimited) as session:
            sender = self._sender(session, prompt)
            if self.warmup:
                await self._warm_up(sender, workload)
            self.failures = sender.failures = {}
            return await replay(
                sender,
                workload,
                slo=slo,
                generation=generation,
                clock=self.clock,
                timeout_s=self.timeout_s,
                progress=progress,
            )

    def _sender(
        self, session: aiohttp.ClientSession, prompt: Callable[[RequestSpec, int], list[int] | str]
    ) -> HttpSender:
        if self.protocol == "triton":
            return GenerateSender(session, url=self.url, model=self.model, prompt=prompt)
        return HttpSender(session, url=self.url, model=self.model, prompt=prompt, extensions=self.extensions)

    def _prompts(self) -> Callable[[RequestSpec, int], list[int] | str]:
        seed = (self.prompt_seed, self._runs)
        if self.vocab_size is not None and self.protocol == "openai":
            return Prompts(seed=seed, vocab_size=self.vocab_size).token_ids
        words = Prompts(seed=seed, vocab_size=2**16)
        return lambda request, index: as_text(words.token_ids(request, index))

    async def _warm_up(self, sender: Sender, workload: Workload) -> None:
        # Other indices than the workload's, and no shared prefix: its prompts stay new to the server.
        first = len(workload.requests)
        specs = (replace(spec, prefix_ids=()) for spec in islice(cycle(workload.requests), self.warmup))
        async with asyncio.TaskGroup() as group:
            for index, spec in enumerate(specs, start=first):
                stream = sender.send(spec, index)
                group.create_task(_observe(stream, spec, self.clock.now_s(), self.clock, self.timeout_s))
