"""Around the routes: bounds on bodies, one line a request, spans, draining."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from flyball.core.clock import SystemClock
from flyball.server.access_log import access_log
from flyball.server.account import Account, AnswerRecord
from flyball.server.app import Limits, create_app
from flyball.server.auth import Keys
from flyball.server.gate import Gate
from flyball.server.tracing import otlp_provider, provider, spans

WORDS = "the cat sat on the mat and said: stop here. "


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_a_413(parrot: Any, connect: Any, chunked: bool) -> None:
    """By its length, or when it has none by what comes; one at the limit is served."""

    async def go() -> None:
        body = json.dumps({"prompt": WORDS, "max_tokens": 1}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            yield body[:10]
            yield body[10:]

        async def send(limit: int) -> httpx.Response:
            async with connect(create_app(parrot, limits=Limits(max_body_bytes=limit))) as client:
                headers = {"content-type": "application/json"}
                content: Any = pieces() if chunked else body
                return await client.post("/v1/completions", content=content, headers=headers)

        assert (await send(len(body))).status_code == 200
        refused = await send(len(body) - 1)
        assert refused.status_code == 413
        assert refused.json()["error"]["code"] == "body_too_large"
        assert refused.headers["x-request-id"]

    asyncio.run(go())


def test_a_forged_request_id_is_replaced(parrot: Any, connect: Any) -> None:
    """What could break a line of a log, or fill it, is not echoed."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            for bad in ("a b", "x" * 129, ""):
                assert (await client.get("/health", headers={"x-request-id": bad})).headers["x-request-id"] != bad

    asyncio.run(go())


def test_each_request_is_one_line_with_its_numbers(parrot: Any, connect: Any, tokenizer: Any) -> None:
    """JSON with what it asked and got; refusals are lines, too; successful probes are not."""

    async def go() -> None:
        out = io.StringIO()
        async with connect(create_app(parrot, watchers=[access_log(out)])) as client:
            await client.get("/health/ready")
            headers = {"x-request-id": "me"}
            body = {"prompt": WORDS, "max_tokens": 5, "n": 2, "stream": True}
            await client.post("/v1/completions", json=body, headers=headers)
            await client.post("/v1/completions", json={"prompt": WORDS, "max_tokens": 500})
            await client.post("/v1/completions", json={"prompt": WORDS, "max_tokens": 50, "stop": "sat"})
        served, refused, stopped = map(json.loads, out.getvalue().splitlines())
        assert (served["event"], served["level"], served["request_id"], served["status"]) == (
            "request",
            "info",
            "me",
            200,
        )
        assert (served["method"], served["path"]) == ("POST", "/v1/completions")
        assert (served["prompt_tokens"], served["completion_tokens"]) == (len(tokenizer(WORDS)["input_ids"]), 10)
        assert (served["finish_reason"], served["queue_ms"], served["preemptions"]) == ("length", 1000, 0)
        assert served["duration_ms"] >= served["ttft_ms"] > 0
        assert refused["status"] == 400
        assert "prompt_tokens" not in refused
        assert (stopped["finish_reason"], stopped["queue_ms"]) == ("stop", None)

    asyncio.run(go())


def test_a_client_that_leaves_is_a_499_with_what_it_got(parrot: Any) -> None:
    """The log tells how far the answer came; the metrics count an abort."""

    async def go() -> None:
        seen: list[Account] = []
        app = create_app(parrot, watchers=[seen.append])
        body = json.dumps({"prompt": WORDS, "max_tokens": 100, "stream": True}).encode()
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body}])
        sent = 0

        async def receive() -> Any:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal sent
            sent += message["type"] == "http.response.body"
            if sent == 4:
                gone.set()
                await asyncio.sleep(0)

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": ("1.2.3.4", 5),
        }  # fmt: skip
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)
        line = seen[0].line()
        assert (line["status"], line["client"], line["finish_reason"]) == (499, "1.2.3.4", "abort")
        assert 4 <= int(str(line["completion_tokens"])) < 100
        assert parrot.running == set()

    asyncio.run(go())


def test_spans_follow_a_request_through_queue_prefill_and_decode(parrot: Any, connect: Any) -> None:
    """Phases meet end to end with the engine's own times, below one span that continues the client's trace."""

    async def go() -> None:
        kept = InMemorySpanExporter()
        traces = provider([SimpleSpanProcessor(kept)], "parrot")
        async with connect(create_app(parrot, watchers=[spans(traces, SystemClock())])) as client:
            await client.get("/v1/models")
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            body = {"prompt": WORDS, "max_tokens": 5}
            await client.post("/v1/completions", json=body, headers={"traceparent": parent})
            refused = await client.post("/v1/completions", json={**body, "max_tokens": 500})
            assert refused.status_code == 400
        traces.shutdown()
        queue, prefill, decode, root = kept.get_finished_spans()
        assert [span.name for span in (queue, prefill, decode, root)] == [
            "queue", "prefill", "decode", "POST /v1/completions",
        ]  # fmt: skip
        assert root.context is not None
        assert root.parent is not None
        assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == tuple(parent.split("-")[1:3])
        assert all(s.parent is not None and s.parent.span_id == root.context.span_id for s in (queue, prefill, decode))
        assert (queue.end_time, prefill.end_time) == (prefill.start_time, decode.start_time)
        lengths = [(s.end_time or 0) - (s.start_time or 0) for s in (queue, prefill, decode)]
        assert lengths == pytest.approx([1e9, 2e9, 4e9], rel=1e-6)
        assert root.attributes is not None
        assert root.attributes["gen_ai.usage.output_tokens"] == 5
        assert root.attributes["gen_ai.response.finish_reasons"] == ("length",)

    asyncio.run(go())


def test_spans_are_sent_over_otlp() -> None:
    """To the address given, as protobuf, at the latest when the server ends."""
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        traces = otlp_provider(f"http://127.0.0.1:{server.server_port}/v1/traces", "parrot")
        account = Account(
            request_id="me",
            method="POST",
            path="/v1/completions",
            client="",
            traceparent=None,
            arrival_s=0.0,
            status=200,
        )
        account.answers.append(AnswerRecord(completion_tokens=3, finish_reason="length", ttft_s=0.1, report=None))
        spans(traces, SystemClock())(account)
        traces.shutdown()
        server.shutdown()
        thread.join()
    ((path, body),) = got
    assert path == "/v1/traces"
    assert b"POST /v1/completions" in body


def test_a_draining_server_ends_what_it_has_and_takes_nothing_new(parrot: Any, connect: Any) -> None:
    """Ready turns 503 at once, new requests too; the one under way comes to its end; DELETE opens again."""

    async def go() -> None:
        gate = Gate()
        async with connect(create_app(parrot, gate=gate)) as client:
            parrot.go.clear()
            body = {"prompt": WORDS, "max_tokens": 5}
            running = asyncio.create_task(client.post("/v1/completions", json=body))
            while not parrot.running:
                await asyncio.sleep(0)
            drained = (await client.post("/v1/drain")).json()
            assert drained == {"draining": True, "requests_inside": 1}
            assert (await client.get("/health/ready")).status_code == 503
            for path, ask in (
                ("/v1/completions", body),
                ("/v1/generate", body),
                ("/v1/generate/batch", {"prompts": []}),
            ):
                refused = await client.post(path, json=ask)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 200
            assert not gate._empty.is_set()
            parrot.go.set()
            assert (await running).status_code == 200
            await asyncio.wait_for(gate.empty(), 1)
            assert (await client.delete("/v1/drain")).json() == {"draining": False, "requests_inside": 0}
            assert (await client.get("/health/ready")).status_code == 200

    asyncio.run(go())


def test_what_a_signal_shut_no_operator_opens(parrot: Any, connect: Any) -> None:
    """A server on its way out stays on it."""

    async def go() -> None:
        gate = Gate()
        async with connect(create_app(parrot, gate=gate)) as client:
            gate.shut("signal")
            assert (await client.delete("/v1/drain")).json()["draining"] is True

    asyncio.run(go())


def test_an_engine_that_hangs_is_not_ready(parrot: Any, connect: Any) -> None:
    """Work and no progress for longer than the limit; the engine itself knows what is idle."""

    async def go() -> None:
        async with connect(create_app(parrot, limits=Limits(stall_s=10.0))) as client:
            parrot.stalled = 9.0
            assert (await client.get("/health/ready")).status_code == 200
            parrot.stalled = 11.0
            stuck = await client.get("/health/ready")
            assert stuck.status_code == 503
            assert "11 s" in stuck.json()["error"]["message"]

    asyncio.run(go())


def test_the_cache_is_flushed_by_admins_only_and_says_what_went(parrot: Any, connect: Any) -> None:
    """A user's key is not enough; the answer is the engine's own count."""

    async def go() -> None:
        async with connect(create_app(parrot, keys=Keys(users=("u",), admin="a"))) as client:

            async def delete(key: str | None) -> httpx.Response:
                return await client.delete("/v1/cache", headers={"authorization": f"Bearer {key}"} if key else {})

            assert [(await delete(key)).status_code for key in (None, "u", "x")] == [401, 403, 401]
            assert parrot.flushes == 0
            assert (await delete("a")).json() == {"flushed_blocks": 3, "flushed_tokens": 48, "requests_running": 0}
            assert parrot.flushes == 1

    asyncio.run(go())
