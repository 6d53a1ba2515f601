"""The engine on its thread: streams of several answers, deadlines, refusals, stalls, and an honest end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flyball.core.errors import EngineFailed, InvalidInput, QueueFull, VersionConflict
from flyball.engine import async_engine
from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.engine.request import FinishReason, Grammar, RequestOutput, SamplingParams

GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPT = [5, 9, 31, 7, 7, 12, 100, 44, 3]


@pytest.fixture
def running(checkpoint: Path) -> Callable[..., Any]:
    """An engine that runs while its block does."""

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[AsyncEngine]:
        sizes: dict[str, Any] = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64, "threads": 1}
        engine = AsyncEngine(
            EngineConfig(model=checkpoint, **sizes | settings),
            model_name="tiny",
            seed=1,
            given={"threads": "--threads"},
        )
        engine.start()
        try:
            yield engine
        finally:
            await engine.stop()

    return make


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A test's body."""
    asyncio.run(main())


async def collect(engine: AsyncEngine, params: SamplingParams, **more: Any) -> list[RequestOutput]:
    """All outputs of one request."""
    return [output async for output in engine.generate(PROMPT, params, **more)]


async def until(true: Callable[[], bool]) -> None:
    """Wait for what the engine's thread does."""
    while not true():
        await asyncio.sleep(0.001)


def test_a_stream_carries_all_answers_to_their_ends(running: Any) -> None:
    """n answers, told apart by their index, each with its reason and report; then the stream ends."""

    async def main() -> None:
        async with running() as engine:
            outputs = await collect(engine, replace(GREEDY, n=3, temperature=1.0, seed=2))
            for i in range(3):
                mine = [o for o in outputs if o.index == i]
                assert sum(len(o.new_token_ids) for o in mine) == 6
                assert [o.finish_reason for o in mine] == [None] * 5 + [FinishReason.LENGTH]
                report = mine[-1].report
                assert report is not None
                assert report.first_scheduled_s is not None
                assert report.first_token_s is not None
                assert report.arrival_s <= report.first_scheduled_s <= report.first_token_s <= report.finished_s
            await until(lambda: not engine._streams)

    run(main)


def test_one_answer_can_be_dropped_and_the_others_end(running: Any) -> None:
    """Its caller has enough of it; nothing of it comes any more."""

    async def main() -> None:
        async with running() as engine:
            made = []
            async with aclosing(engine.generate(PROMPT, replace(GREEDY, n=2, max_tokens=60), request_id="r")) as stream:
                async for output in stream:
                    made.append(output)
                    if len(made) == 1:
                        engine.abort_answer("r", 0)
                    if output.index == 1 and output.finish_reason:
                        break
            assert sum(len(o.new_token_ids) for o in made if o.index == 0) < 60
            await until(lambda: engine.stats().blocks_used == 0)

    run(main)


def test_the_last_of_the_answers_dropped_ends_the_stream(running: Any) -> None:
    """A caller that drops every answer one by one does not wait for ever."""

    async def main() -> None:
        async with running() as engine:
            outputs = engine.generate(PROMPT, replace(GREEDY, n=2, max_tokens=100), request_id="r")
            async with aclosing(outputs), asyncio.timeout(60):
                await anext(outputs)
                engine.abort_answer("r", 0)
                engine.abort_answer("r", 1)
                async for output in outputs:
                    last = output
            assert last.finish_reason is FinishReason.ABORT

    run(main)


def test_closing_a_stream_frees_all_its_answers(running: Any) -> None:
    """A client that leaves takes its n answers with it."""

    async def main() -> None:
        async with running() as engine:
            outputs = engine.generate(PROMPT, replace(GREEDY, n=3, max_tokens=100))
            await anext(outputs)
            assert {r["state"] for r in engine.requests()} == {"running"} or len(engine.requests()) == 3
            await outputs.aclose()
            await until(lambda: engine.stats().blocks_used == 0)
            assert engine.stats().finished == {"abort": 3}
            assert engine.requests() == []

    run(main)


def test_a_deadline_ends_the_stream_with_its_reason(running: Any) -> None:
    """The last output says timeout."""

    async def main() -> None:
        async with running() as engine:
            outputs = await collect(engine, replace(GREEDY, max_tokens=100, timeout_s=1e-9))
            assert [o.finish_reason for o in outputs] == [FinishReason.TIMEOUT]

    run(main)


def test_a_full_queue_is_told_before_the_first_output(running: Any) -> None:
    """QueueFull with a hint; those that wait are not disturbed."""

    async def main() -> None:
        async with running(max_num_seqs=1) as engine:
            await engine.update_runtime({"max_queue_len": 1})
            asked = [asyncio.create_task(collect(engine, replace(GREEDY, max_tokens=50))) for _ in range(20)]
            results = await asyncio.gather(*asked, return_exceptions=True)
            refused = [r for r in results if isinstance(r, QueueFull)]
            assert refused
            assert all(r.retry_after_s >= 1 for r in refused)
            assert all(isinstance(r, QueueFull) or len(r) == 50 for r in results)  # type: ignore[arg-type]

    run(main)


def test_policy_history_cache_and_facts_are_at_hand(running: Any) -> None:
    """What the server's admin routes need."""

    async def main() -> None:
        async with running() as engine:
            await collect(engine, GREEDY)
            after = await engine.update_runtime({"policy": "priority"}, if_version=1, by="ada")
            with pytest.raises(VersionConflict):
                await engine.update_runtime({"policy": "fcfs"}, if_version=1)
            assert after.version == 2
            history = await engine.history()
            assert [(c.version, c.by) for c in history] == [(1, "start"), (2, "ada")]
            assert (await engine.update_runtime({}, revert_to=1, dry_run=True)).policy == "fcfs"
            assert engine.runtime.policy == "priority"
            assert await engine.flush_cache() == 3  # 9 tokens of the prompt and 5 of the answer's 6 have KV
            assert engine.stats().blocks_cached == 0
            info = engine.info()
            assert info["architecture"] == "LlamaForCausalLM"
            assert info["parameters"] == sum(p.numel() for p in engine._core.runner.model.parameters())
            settings = {(s.name, s.live): s for s in await engine.explain()}
            assert settings["threads", False].source == "--threads"
            assert settings["policy", True].source == "version 2 by ada"

    run(main)


def test_a_grammar_is_compiled_off_the_engines_thread(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good one is kept to, a bad one is refused by name, one that takes too long is given up."""
    real = threading.Event()

    async def main() -> None:
        async with running() as engine:
            digits = Grammar(kind="regex", text="[0-9]{3}")
            outputs = await collect(engine, replace(GREEDY, temperature=1.0, grammar=digits, max_tokens=20))
            text = engine.tokenizer.decode([t for o in outputs for t in o.new_token_ids], skip_special_tokens=True)
            assert text.isdigit()
            assert len(text) == 3
            for bad in (Grammar(kind="regex", text="["), Grammar(kind="json_schema", text="{"),
                        Grammar(kind="choice", text="[]"), Grammar(kind="ebnf", text="root ::= nothing")):  # fmt: skip
                with pytest.raises(InvalidInput, match=f"this {bad.kind} cannot be used"):
                    await collect(engine, replace(GREEDY, grammar=bad))
            monkeypatch.setattr(async_engine, "GRAMMAR_TIMEOUT_S", 0.01)
            engine._core.grammars.compile = lambda _: real.wait()  # type: ignore[method-assign,assignment,return-value]
            with pytest.raises(InvalidInput, match="simplify it"):
                await engine.compile_grammar(digits)
            real.set()
            assert len(await collect(engine, GREEDY)) == 6, "nobody else noticed"

    run(main)


def test_a_stall_shows_says_where_and_ends(
    running: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Seconds without progress while there is work; 0 while idle and after. One event tells the state and the stack."""
    monkeypatch.setattr(async_engine, "STALL_S", 0.02)

    async def main() -> None:
        go = threading.Event()
        async with running() as engine:
            assert engine.stalled_s() == 0
            forward = engine._core.runner.forward

            def stuck(parts: Any) -> torch.Tensor:
                go.wait()
                return forward(parts)

            engine._core.runner.forward = stuck  # type: ignore[method-assign]
            request = asyncio.create_task(collect(engine, GREEDY))
            await until(lambda: engine.stalled_s() > 0.05)
            assert [m.split()[0] for m in caplog.messages] == ["event=stalled"]
            assert "in stuck" in caplog.text
            go.set()
            await request
            await until(lambda: engine.stalled_s() == 0)

    run(main)


def test_the_threads_death_fails_every_request_and_every_command(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, commands under way and those to come all get the reason; the engine is not alive."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def main() -> None:
        async with running() as engine:

            def broken(parts: Any) -> torch.Tensor:
                raise ArithmeticError("a cosmic ray")

            engine._core.runner.forward = broken  # type: ignore[assignment]
            results = await asyncio.gather(*(collect(engine, GREEDY) for _ in range(4)), return_exceptions=True)
            assert {type(r) for r in results} == {EngineFailed}
            assert not engine.alive
            for command in (engine.update_runtime({"policy": "fcfs"}), engine.flush_cache(), engine.history()):
                with pytest.raises(EngineFailed, match="cosmic ray"):
                    await command

    run(main)
