"""The load generator: open loop, honest clocks, honest counts, every failure by its kind."""

from __future__ import annotations

import asyncio
import selectors
import signal
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyball.adapters.loadgen import Arrival, HttpLoad, client_bound, replay
from flyball.core.metrics import MetricsWindow, RequestTrace
from flyball.core.ports import Load
from flyball.core.slo import Slo
from flyball.core.workload import RequestSpec, Workload

NO_PROMISE = Slo()
TURN_S = 1e-5  # virtual time that one turn of the loop takes


def _workload(*arrivals_s: float, input_tokens: int = 20, output_tokens: int = 4) -> Workload:
    requests = tuple(
        RequestSpec(arrival_s=t, input_tokens=input_tokens, output_tokens=output_tokens) for t in arrivals_s
    )
    return Workload(requests=requests, source="made by hand")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time jumps to the next timer as soon as nothing else is to do."""

    def __init__(self) -> None:
        self.virtual_s = 0.0
        loop = self

        class Jump(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                assert timeout is not None, "every task waits for something that never comes"
                loop.virtual_s += max(timeout, TURN_S)
                return super().select(0)

        super().__init__(Jump())

    def time(self) -> float:
        """Virtual seconds."""
        return self.virtual_s

    now_s = wall_s = time  # a core.clock.Clock as well


class Scripted:
    """A sender in virtual time: one token after each of the delays, `stall` blocks the client itself."""

    def __init__(self, *delays_s: float, stall_s: float = 0.0, loop: VirtualLoop | None = None) -> None:
        self.delays_s = delays_s
        self.stall_s = stall_s
        self.loop = loop
        self.under_way = self.most_under_way = 0

    async def send(self, request: RequestSpec, index: int) -> AsyncGenerator[Arrival, None]:
        """Yield the tokens when they are due."""
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            for delay_s in self.delays_s:
                await asyncio.sleep(delay_s)
                yield Arrival(1)
            if self.loop and index == 0:
                self.loop.virtual_s += self.stall_s
        finally:
            self.under_way -= 1


def _measure(sender: Any, load: Workload, loop: VirtualLoop | None = None, **options: Any) -> MetricsWindow:
    loop = loop or VirtualLoop()
    settings = {"slo": Slo(), "generation": "g", "clock": loop, "timeout_s": 1e6} | options
    try:
        return loop.run_until_complete(replay(sender, load, **settings))
    finally:
        loop.close()


def test_a_slow_server_delays_no_send() -> None:
    """Every request leaves at its time though none has been answered: the loop is open."""
    sender = Scripted(1000.0)
    window = _measure(sender, _workload(*(i * 0.25 for i in range(40))))
    assert sender.most_under_way == 40
    assert max(trace.lag_s for trace in window.traces) < 20 * TURN_S
    assert [trace.ttft_s for trace in window.traces] == pytest.approx([1000.0] * 40, abs=0.01)
    assert window.duration_s == pytest.approx(1000 + 39 * 0.25, abs=0.01)


@given(gaps=st.lists(st.floats(0, 3), min_size=1, max_size=20), delay_s=st.floats(0, 5))
def test_sends_keep_to_the_schedule(gaps: list[float], delay_s: float) -> None:
    """Whatever the arrivals and the server's delay, nothing leaves early and nothing leaves late."""
    arrivals = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    window = _measure(Scripted(delay_s), _workload(*arrivals))
    assert all(-1e-9 <= trace.lag_s < 2e-3 for trace in window.traces)


def test_latency_counts_from_the_scheduled_time() -> None:
    """A client that was busy for half a second cannot make the next request look fast; it is called to account."""
    loop = VirtualLoop()
    window = _measure(Scripted(0.1, stall_s=0.5, loop=loop), _workload(0.0, 0.2), loop)
    late = window.traces[1]
    assert late.lag_s == pytest.approx(0.4, abs=0.01)
    assert late.ttft_s == pytest.approx(0.5, abs=0.01)
    assert "send lag" in (client_bound(window) or "")


def test_a_request_is_given_up_after_its_timeout() -> None:
    """A request that takes too long fails as a timeout, with the tokens that came, and its stream is closed."""
    sender = Scripted(1.0, 1.0, 1e5)
    window = _measure(sender, _workload(0.0, 1.0), timeout_s=10.0)
    assert window.errors == {"timeout": 2}
    assert [trace.output_tokens for trace in window.traces] == [2, 2]
    assert sender.under_way == 0


def test_an_error_of_ours_is_not_counted_but_raised() -> None:
    """Only failures of requests are data; a defect of the sender ends the replay and leaves nothing under way."""

    class Broken(Scripted):
        async def send(self, request: RequestSpec, index: int) -> AsyncGenerator[Arrival, None]:
            if index == 1:
                raise ZeroDivisionError
            async for arrival in super().send(request, index):
                yield arrival

    sender = Broken(1000.0)
    with pytest.raises(ExceptionGroup):
        _measure(sender, _workload(0.0, 1.0, 2.0))
    assert sender.under_way == 0


def test_a_load_longer_than_what_is_prepared_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests past the ones prepared ahead are prepared on the way, each once and in order."""
    monkeypatch.setattr("flyball.adapters.loadgen.PREPARED_AHEAD", 3)
    prepared = []

    class Noting(Scripted):
        def send(self, request: RequestSpec, index: int) -> AsyncGenerator[Arrival, None]:
            prepared.append(index)
            return super().send(request, index)

    window = _measure(Noting(0.01), _workload(*(i * 0.1 for i in range(10))))
    assert prepared == list(range(10))
    assert [trace.scheduled_s for trace in window.traces] == [i * 0.1 for i in range(10)]


def _http_load(server: Any, **settings: Any) -> HttpLoad:
    return HttpLoad(**({"url": server.url, "model": "fake", "vocab_size": 3000} | settings))


def _run(load: Load, requests: Workload, slo: Slo = NO_PROMISE) -> MetricsWindow:
    return load.run(requests, slo, "g")


def test_all_requests_are_in_the_server_at_once(fake_server: Callable[..., Any]) -> None:
    """A server that answers nobody before all thirty are there gets all thirty over real sockets."""
    window = _run(_http_load(fake_server(hold_until=30)), _workload(*(i * 0.001 for i in range(30))))
    assert len(window.completed) == 30
    assert [trace.output_tokens for trace in window.traces] == [4] * 30
    assert all(len(trace.token_times_s) == 4 for trace in window.traces)
    assert window.generation == "g"


FAULTS = {
    "http_429": "http_429",
    "http_500": "http_500",
    "connection": "connection",
    "stream_error": "stream_error",
    "malformed": "malformed",
    "truncated": "truncated",
    "reset": "truncated",
    "empty": "empty",
}


@pytest.mark.parametrize(("fault", "kind"), FAULTS.items())
def test_a_failure_is_counted_by_its_kind(fake_server: Callable[..., Any], fault: str, kind: str) -> None:
    """One request of three fails in its way; it is counted as such, and the other two are measured."""
    server = fake_server(script=lambda index: fault if index == 1 else "ok")
    load = _http_load(server)
    window = _run(load, _workload(0.0, 0.1, 0.2))
    assert window.errors == {kind: 1}
    assert len(window.completed) == 2
    assert window.attainment == pytest.approx(2 / 3)
    assert kind in load.failures or kind == "empty"


def test_a_hanging_server_is_given_up(fake_server: Callable[..., Any]) -> None:
    """Requests that are never answered end as timeouts, and the server sees their clients leave."""
    server = fake_server(script=lambda index: "timeout")
    window = _run(_http_load(server, timeout_s=0.05), _workload(0.0, 0.01))
    assert window.errors == {"timeout": 2}
    assert server.sees_clients_leave()


def test_no_server_at_all(fake_server: Callable[..., Any]) -> None:
    """Where nothing listens every request fails as a connection, and the window says so."""
    server = fake_server()
    server.close()
    window = _run(_http_load(server), _workload(0.0, 0.01))
    assert window.errors == {"connection": 2}
    assert window.throughput_rps == 0


def test_the_servers_words_are_kept(fake_server: Callable[..., Any]) -> None:
    """The first message of each kind of failure is at hand for the report."""
    load = _http_load(fake_server(script=lambda index: "http_503"))
    _run(load, _workload(0.0, 0.0))
    assert "told to: http_503" in load.failures["http_503"]


@pytest.mark.parametrize("token_ids", [True, False])
def test_chunks_of_several_tokens(fake_server: Callable[..., Any], token_ids: bool) -> None:
    """The server's count is the truth for TPOT, whether or not its chunks list their tokens."""
    server = fake_server(tokens_per_chunk=4, token_ids=token_ids)
    (trace,) = _run(_http_load(server), _workload(0.0, output_tokens=10)).traces
    assert trace.output_tokens == 10
    assert len(trace.token_times_s) == (10 if token_ids else 3)
    assert trace.tpot_s == pytest.approx((trace.token_times_s[-1] - trace.token_times_s[0]) / 9)


def test_without_a_count_the_chunks_are_counted(fake_server: Callable[..., Any]) -> None:
    """A server that reports no usage is measured by what arrived, with the lengths that were asked for."""
    (trace,) = _run(_http_load(fake_server(script=lambda index: "no_usage", token_ids=False)), _workload(0.0)).traces
    assert (trace.input_tokens, trace.output_tokens, trace.error) == (20, 4, None)


def test_silent_tokens_end_with_the_count(fake_server: Callable[..., Any]) -> None:
    """An answer whose tokens show no text and no ids is complete when the server's count says there were some."""
    (trace,) = _run(_http_load(fake_server(script=lambda index: "silent", token_ids=False)), _workload(0.0)).traces
    assert (trace.output_tokens, len(trace.token_times_s), trace.error) == (4, 1, None)


def test_what_is_sent(fake_server: Callable[..., Any]) -> None:
    """A request states the workload's lengths, streams, asks for the count, and carries the key."""
    server = fake_server()
    _run(_http_load(server, api_key="secret"), _workload(0.0, input_tokens=33, output_tokens=5))
    (body,) = server.bodies
    assert len(body.pop("prompt")) == 33
    assert body == {
        "model": "fake",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "max_tokens": 5,
    }
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_a_foreign_server_gets_no_extensions(fake_server: Callable[..., Any]) -> None:
    """Where extensions are refused, none is sent; where no vocabulary is known, prompts are words."""
    server = fake_server(token_ids=False)
    _run(_http_load(server, extensions=False, vocab_size=None), _workload(0.0, 0.0))
    assert not {"ignore_eos", "return_token_ids"} & server.bodies[0].keys()
    prompts = [body["prompt"] for body in server.bodies]
    assert [len(prompt.split()) for prompt in prompts] == [20, 20]
    assert prompts[0] != prompts[1]


def test_equal_seeds_send_equal_requests(fake_server: Callable[..., Any]) -> None:
    """Loads with one seed send the same; a second run of one load does not, or its prompts would be cached."""
    sent = []
    for load in (_http_load(server := fake_server(), prompt_seed=5), _http_load(server, prompt_seed=5)):
        for _ in range(2):
            server.bodies.clear()
            _run(load, _workload(0.0, 0.05, 0.1))
            sent.append([tuple(body["prompt"]) for body in server.bodies])
    assert sent[0] == sent[2]
    assert sent[1] == sent[3]
    assert not set(sent[0]) & set(sent[1])


def test_warm_up_is_not_counted(fake_server: Callable[..., Any]) -> None:
    """Warm-up requests reach the server first, with other prompts, and leave no trace even when they fail."""
    server = fake_server(script=lambda index: "http_500" if index < 3 else "ok")
    load = _http_load(server, warmup=3)
    requests = tuple(replace(spec, prefix_ids=(1,)) for spec in _workload(0.0, 0.01).requests)
    window = _run(load, Workload(requests=requests, source="one prefix"))
    assert len(server.bodies) == 5
    assert len(window.completed) == len(window.traces) == 2
    beginnings = [tuple(body["prompt"][:8]) for body in server.bodies]
    assert beginnings[3] == beginnings[4]  # the workload's own
    assert len(set(beginnings)) == 4  # the others spoil nothing for the server's prefix cache
    assert load.failures == {}


def test_progress_counts_to_the_end(fake_server: Callable[..., Any]) -> None:
    """Progress is told once for each request that ended, failed ones too."""
    seen: list[tuple[int, int]] = []
    load = _http_load(fake_server(script=lambda index: "http_500" if index % 2 else "ok"))
    load.run(_workload(*[0.0] * 6), Slo(), "g", lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 6) for i in range(6)]


def test_ctrl_c_gives_up_what_is_under_way(fake_server: Callable[..., Any]) -> None:
    """An interrupt ends the run at once, and the server sees its clients leave."""
    server = fake_server(hold_until=3, script=lambda index: "ok" if index == 0 else "timeout")

    def interrupt(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _http_load(server).run(_workload(0.0, 0.01, 0.02, 1000.0), Slo(), "g", interrupt)
    assert server.sees_clients_leave()
    assert server.answered == 1


def _trace(*, lag_s: float = 0.0, ttft_s: float = 1.0, error: str | None = None) -> RequestTrace:
    times = () if error else (ttft_s,)
    return RequestTrace(
        scheduled_s=0, sent_s=lag_s, input_tokens=1, output_tokens=len(times), token_times_s=times, error=error
    )


@pytest.mark.parametrize(
    ("traces", "reason"),
    [
        ([_trace(lag_s=0.001)] * 5, None),
        ([_trace(lag_s=0.06)] * 5, "50 ms"),
        ([_trace(lag_s=0.02, ttft_s=0.1)] * 5, "median"),
        ([_trace(ttft_s=0.1)] * 9 + [_trace(lag_s=0.04, ttft_s=0.1)], "p99"),
        ([_trace()] * 5 + [_trace(error="client_sockets")], "socket"),
        ([_trace(error="http_500")] * 5, None),
    ],
)
def test_a_late_client_is_named(traces: list[RequestTrace], reason: str | None) -> None:
    """A result is doubted when the client's own lag is a large part of what it shows, and only then."""
    found = client_bound(MetricsWindow(duration_s=1, generation="g", traces=tuple(traces)))
    assert found is None if reason is None else reason in (found or "")
