"""What the server tells about itself: true numbers, never constants."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import pytest

from flyball.core.clock import VirtualClock
from flyball.server.app import create_app
from flyball.server.recent import Recent, Sketch

WORDS = "the cat sat on the mat and said: stop here. "


def test_the_numbers_are_what_happened(parrot: Any, connect: Any, tokenizer: Any) -> None:
    """Counts, rates and latencies of the script's own requests; null, not a made-up number, where nothing was."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            before = (await client.get("/v1/stats")).json()
            assert (before["requests_total"], before["tokens_generated_total"], before["cache_hit_rate"]) == (
                0,
                0,
                None,
            )
            assert before["windows"]["1m"]["latency_ms"]["p99"] is None
            for tokens in (3, 4, 5):
                await client.post("/v1/completions", json={"prompt": WORDS, "max_tokens": tokens})
            after = (await client.get("/v1/stats")).json()
            assert (after["requests_total"], after["tokens_generated_total"]) == (3, 12)
            assert after["prompt_tokens_total"] == 3 * len(tokenizer(WORDS)["input_ids"])
            assert after["requests_running"] == 0
            for window in after["windows"].values():
                assert (window["requests"], window["errors"]) == (3, 0)
                assert window["tokens_per_second"] == pytest.approx(12 / window["seconds"])
                assert window["latency_ms"]["count"] == window["ttft_ms"]["count"] == window["queue_ms"]["count"] == 3
                assert window["itl_ms"]["count"] == 9
                assert window["queue_ms"]["mean"] == pytest.approx(1000)
                assert window["queue_ms"]["p50"] == pytest.approx(1000, rel=0.011)

    asyncio.run(go())


def test_cache_and_model_tell_the_engines_own_state(parrot: Any, connect: Any) -> None:
    """Blocks, hits and what was loaded come from the engine."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            cache = (await client.get("/v1/cache/stats")).json()
            assert cache["blocks"]["total"] == 100
            assert (cache["query_tokens"], cache["hit_rate"], cache["usage"]) == (0, None, 0)
            parrot.stats().prompt_tokens_cached = 30
            parrot.stats().prompt_tokens_computed = 10
            assert (await client.get("/v1/cache/stats")).json()["hit_rate"] == 0.75
            model = (await client.get("/v1/model/info")).json()
            assert (model["name"], model["architecture"], model["max_model_len"]) == ("parrot", "Psittacus", 128)

    asyncio.run(go())


@dataclass
class Event:
    """Something to be counted."""

    at_s: float
    tokens: int


def test_a_window_holds_its_minutes_and_no_more() -> None:
    """Against the plain list of events: all of the last 60 s, at most a slice of 5 s more; memory stays bounded."""
    clock = VirtualClock(1000.0)
    recent = Recent(clock)
    events = []
    for i in range(2000):
        clock.advance(0.37 + (i % 7) * 0.11)
        recent.at(clock.now_s()).generated_tokens += i
        events.append(Event(clock.now_s(), i))
        if i % 50 == 0:
            for length_s in (60.0, 300.0):
                seen, seconds = recent.window(length_s)
                assert min(length_s, clock.now_s() - 1000) <= seconds <= length_s + 5
                assert seen.generated_tokens == sum(e.tokens for e in events if e.at_s >= clock.now_s() - seconds)
    assert len(recent._slices) <= 62
    clock.advance(1000)
    assert recent.window(60.0)[0].generated_tokens == 0


def test_a_quantile_is_within_one_percent() -> None:
    """Of any size from microseconds to minutes; of nothing there is none."""
    assert Sketch().quantile(0.5) is Sketch().mean is None
    for scale in (1e-5, 1e-2, 60.0):
        sketch = Sketch()
        values = [scale * (1 + i % 97) for i in range(970)]
        for value in values:
            sketch.add(value)
        ordered = sorted(values)
        for share in (0.5, 0.9, 0.99):
            assert sketch.quantile(share) == pytest.approx(ordered[math.ceil(share * 970) - 1], rel=0.011)
        assert sketch.mean == pytest.approx(sum(values) / 970)
