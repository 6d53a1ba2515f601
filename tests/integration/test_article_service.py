"""The service of the article that the engine is built from, without its faults 38 to 40 (placeholders, constants,
a cache flush that wipes what runs). Each test fails on what the article does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app
from flyball.server.auth import Keys

Serve = Callable[..., str]

WORDS = "the cat sat on the mat; the dog said: go on"


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> AsyncEngine:
    """An engine with room for prefixes of several blocks."""
    config = EngineConfig(
        model=tiny_checkpoint, dtype="float32", block_size=4, num_blocks=256, max_num_seqs=8, max_num_batched_tokens=64
    )
    return AsyncEngine(config, model_name="tiny", seed=1)


@pytest.fixture(scope="module")
def url(serve: Serve, engine: AsyncEngine) -> str:
    """Where it is served, with an admin key."""
    return serve(create_app(engine, keys=Keys(admin="boss")))


BOSS = {"authorization": "Bearer boss"}


def generate(url: str, **body: Any) -> dict[str, Any]:
    """Ask the native route."""
    settings = {"prompt": WORDS, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    response = httpx.post(f"{url}/v1/generate", json=settings | body, timeout=60)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def test_38_answers_are_the_models_own(url: str) -> None:
    """No placeholder: other prompts, other answers; as many tokens as were asked for; the same as OpenAI's route."""
    one, other = generate(url, prompt="the cat"), generate(url, prompt="go on")
    assert one["text"] != other["text"]
    assert one["tokens_generated"] == len(one["token_ids"]) == 12
    body = {"prompt": "the cat", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    assert httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]["text"] == one["text"]


def test_38_levels_act_and_say_what_they_did(url: str) -> None:
    """`none` runs alone and unshared, `basic` in a batch, `full` finds its prefix; the answer's text is the same."""
    httpx.delete(f"{url}/v1/cache", headers=BOSS)
    seen: dict[str, list[dict[str, Any]]] = {}
    for level in ("none", "basic", "full"):
        with ThreadPoolExecutor(4) as pool:
            asks = [pool.submit(generate, url, optimization=level, max_tokens=40) for _ in range(4)]
            seen[level] = [ask.result() for ask in asks]
        again = generate(url, optimization=level, max_tokens=40)
        cached = again["optimization_used"]["cached_tokens"]
        assert again["optimization"] == level
        assert (cached > 0) is (level == "full"), (level, cached)
    batches = {level: max(one["optimization_used"]["batch_size_seen"] for one in all_) for level, all_ in seen.items()}
    assert batches["none"] == 1
    assert min(batches["basic"], batches["full"]) > 1
    assert len({one["text"] for all_ in seen.values() for one in all_}) == 1


def test_38_a_stream_is_a_stream(url: str) -> None:
    """`stream` is not ignored: tokens come as they are made, one or a few an event, and join to the whole answer."""
    body = {"prompt": WORDS, "max_tokens": 9, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/generate", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *pieces, numbers, done = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert 3 <= len(pieces) <= 9
    assert "".join(json.loads(piece)["text"] for piece in pieces) == generate(url, max_tokens=9)["text"]
    assert (json.loads(numbers)["tokens_generated"], done) == (9, "[DONE]")


def test_39_metrics_follow_what_happens(url: str) -> None:
    """No constants: every count rises by what the script did, and the hit rate is hits over queries."""
    httpx.delete(f"{url}/v1/cache", headers=BOSS)
    before, cache = (httpx.get(f"{url}/v1/{path}").json() for path in ("stats", "cache/stats"))
    first, second = generate(url), generate(url)
    after, cache_after = (httpx.get(f"{url}/v1/{path}").json() for path in ("stats", "cache/stats"))
    assert after["requests_total"] - before["requests_total"] == 2
    assert after["tokens_generated_total"] - before["tokens_generated_total"] == 24
    assert cache_after["query_tokens"] - cache["query_tokens"] == 2 * first["prompt_tokens"]
    assert cache_after["hit_tokens"] - cache["hit_tokens"] == second["optimization_used"]["cached_tokens"] > 0
    assert cache_after["hit_rate"] == cache_after["hit_tokens"] / cache_after["query_tokens"]
    window = after["windows"]["1m"]
    assert 0 < window["latency_ms"]["p50"] <= window["latency_ms"]["p99"]


def test_39_the_model_told_is_the_model_loaded(url: str, engine: AsyncEngine, tiny_checkpoint: Path) -> None:
    """Shape, type and sizes of the checkpoint itself."""
    told = httpx.get(f"{url}/v1/model/info").json()
    assert (told["name"], told["architecture"], told["dtype"]) == ("tiny", "LlamaForCausalLM", "float32")
    assert (told["vocab_size"], told["max_model_len"]) == (engine.vocab_size, 512)
    assert (told["block_size"], told["num_blocks"], told["quantization"]) == (4, 256, None)
    assert told["parameters"] > 10_000


def test_40_a_flush_under_load_changes_no_answer(url: str, engine: AsyncEngine) -> None:
    """Requests run through several flushes unharmed; what was cached is told and then gone."""
    alone = generate(url, max_tokens=200)["text"]

    async def go() -> list[Any]:
        async with httpx.AsyncClient(timeout=60) as client:
            body = {"prompt": WORDS, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
            running = [asyncio.create_task(client.post(f"{url}/v1/generate", json=body)) for _ in range(4)]
            flushed = []
            while not all(task.done() for task in running):
                told = (await client.delete(f"{url}/v1/cache", headers=BOSS)).json()
                flushed.append((told["flushed_blocks"], told["requests_running"]))
                await asyncio.sleep(0.005)
            assert max(blocks for blocks, _ in flushed) > 0
            assert max(count for _, count in flushed) > 0
            return [task.result().json()["text"] for task in running]

    assert asyncio.run(go()) == [alone] * 4
    assert engine.stats().blocks_used == 0
    assert generate(url)["optimization_used"]["cached_tokens"] >= 0
    httpx.delete(f"{url}/v1/cache", headers=BOSS)
    assert generate(url)["optimization_used"]["cached_tokens"] == 0


def test_40_the_cache_is_not_anyones_to_wipe(url: str) -> None:
    """Without the admin key nothing is flushed."""
    generate(url)
    assert httpx.delete(f"{url}/v1/cache").status_code == 401
    assert generate(url)["optimization_used"]["cached_tokens"] > 0


@pytest.mark.parametrize(
    "body",
    [{"max_tokens": -5}, {"max_tokens": 0}, {"prompt": ""}, {"temperature": -1}, {"max_tokens": 10**6}, {"prompt": 5}],
)
def test_40_what_cannot_be_served_is_refused(url: str, body: dict[str, Any]) -> None:
    """Negative limits, empty prompts, more than the context: 400 in OpenAI's form, with an id to ask about."""
    response = httpx.post(f"{url}/v1/generate", json={"prompt": WORDS} | body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]


def test_40_a_request_can_have_a_deadline(url: str, engine: AsyncEngine) -> None:
    """408 for one's own, and its blocks are free."""
    body = {"prompt": WORDS, "max_tokens": 400, "ignore_eos": True, "timeout": 0.02}
    response = httpx.post(f"{url}/v1/generate", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "timeout")
    assert engine.stats().blocks_used == 0


def test_40_one_bad_prompt_does_not_fail_the_batch(url: str) -> None:
    """Each has its own result or its own error."""
    body = {"prompts": [WORDS, "", WORDS], "max_tokens": 4, "temperature": 0}
    first, bad, last = httpx.post(f"{url}/v1/generate/batch", json=body).json()["results"]
    assert first["text"] == last["text"]
    assert "empty" in bad["error"]["message"]
