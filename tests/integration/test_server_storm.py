"""Many clients at once, who ask, wait, give up and leave, while the policy changes ten times a second."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from flyball.engine.async_engine import AsyncEngine
from flyball.engine.config import EngineConfig
from flyball.server.app import create_app

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Serve = Callable[..., str]

REQUESTS = 2000
CLIENTS = 48
PROMPTS = (
    "the cat",
    "the dog said: stop here",
    "go on and on and on and on",
    "mat",
    "naïve ☕ 家 the cat sat on the mat",
)
LONGEST = 60
LIMITS = {  # where a knob's whole range would make the test slow, not hard
    "max_wait_ms": (0.0, 10.0), "request_timeout_s": (0.0, 0.0), "prefill_interval": (0, 4), "stream_interval": (1, 5),
    "max_queue_len": (30, 90), "max_queue_tokens": (200, 900), "kv_cache_limit_blocks": (20, 96),
}  # fmt: skip


class Storm:
    """What was sent, and what became of it."""

    def __init__(self, url: str, session: aiohttp.ClientSession, rng: random.Random) -> None:
        self.url = url
        self.session = session
        self.rng = rng
        self.greedy: dict[str, list[int]] = {}  # what each prompt's answer begins with, alone
        self.ends: Counter[str] = Counter()
        self.patches: Counter[int] = Counter()

    async def learn(self) -> None:
        """Ask each prompt alone; asked again later, each answer must be the same."""
        for prompt in PROMPTS:
            body = self.body(prompt, LONGEST)
            async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
                (choice,) = (await response.json())["choices"]
            assert self.greedy.setdefault(prompt, choice["token_ids"]) == choice["token_ids"]

    def body(self, prompt: str, tokens: int) -> dict[str, Any]:
        """A greedy request whose answer is known."""
        return {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

    async def client(self, count: int) -> None:
        """One client after another request."""
        for _ in range(count):
            rng = self.rng
            body = self.body(rng.choice(PROMPTS), rng.randint(1, LONGEST))
            body["stream"] = rng.random() < 0.6
            kind = rng.choices(("plain", "sampled", "leave", "late", "long"), (5, 2, 3, 2, 1))[0]
            if kind == "sampled":
                body |= {"temperature": 1.0, "n": rng.randint(1, 3), "ignore_eos": False, "stop": ["e"], "logprobs": 2}
            elif kind == "late":
                body["timeout"] = rng.choice((0.001, 0.02, 0.1))
            elif kind == "long":
                body["max_tokens"] = 5000
            patience = rng.choice((0.001, 0.01, 0.05, 0.2)) if kind == "leave" else 120.0
            try:
                async with asyncio.timeout(patience):
                    how = await self.ask(body)
            except TimeoutError:
                assert kind == "leave", f"a request was never answered: {body}"
                how = "left"
            self.ends[how] += 1

    async def ask(self, body: dict[str, Any]) -> str:
        """Send one, check what comes, and say how it ended."""
        async with self.session.post(f"{self.url}/v1/completions", json=body) as response:
            text = await response.text()
        if response.status != 200:
            code = str(json.loads(text)["error"]["code"])
            known = {(400, "context_length_exceeded"), (408, "timeout"), (429, "queue_full")}
            assert (response.status, code) in known, text
            return code
        ids: dict[int, list[int]] = {}
        if body["stream"]:
            *chunks, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
            if last != "[DONE]":
                assert json.loads(last)["error"]["code"] == "timeout"
                return "timeout"
            choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
        else:
            choices = json.loads(text)["choices"]
        for choice in choices:
            ids.setdefault(choice["index"], []).extend(choice["token_ids"])
        assert sorted(ids) == list(range(body.get("n", 1)))
        if body["temperature"] == 0:
            assert ids[0] == self.greedy[body["prompt"]][: body["max_tokens"]]
        return "answered"

    async def patch(self) -> None:
        """Set a random knob to a random value every 100 ms; a relation between two may refuse it."""
        async with self.session.get(f"{self.url}/v1/config") as response:
            knobs = (await response.json())["knobs"]
        while True:
            await asyncio.sleep(0.1)
            name, knob = self.rng.choice(sorted(knobs.items()))
            low, high = LIMITS.get(name, (knob["low"], knob["high"]))
            draw: dict[str, Callable[[], Any]] = {
                "bool": lambda: self.rng.random() < 0.5,
                "choice": lambda knob=knob: self.rng.choice(knob["choices"]),
                "int": lambda low=low, high=high: self.rng.randint(int(low), int(high)),
                "float": lambda low=low, high=high: self.rng.uniform(low, high),
            }
            query = {"preempt": "true"} if self.rng.random() < 0.3 else {}
            change = {name: draw[knob["kind"]]()}
            async with self.session.patch(f"{self.url}/v1/config", json=change, params=query) as response:
                assert response.status in (200, 400), await response.text()
                self.patches[response.status] += 1


def test_a_storm_loses_nothing(serve: Serve, tiny_checkpoint: Path) -> None:
    """Every request ends in an answer or an error; greedy answers never change; no block leaks; the books balance."""
    config = EngineConfig(
        model=tiny_checkpoint, dtype="float32", block_size=4, num_blocks=96, max_num_seqs=12, max_num_batched_tokens=64
    )
    engine = AsyncEngine(config, model_name="tiny", seed=1)
    url = serve(create_app(engine))

    async def go() -> Storm:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=150)) as session:
            storm = Storm(url, session, random.Random(20))
            await storm.learn()
            patches = asyncio.create_task(storm.patch())
            await asyncio.gather(*(storm.client(REQUESTS // CLIENTS + 1) for _ in range(CLIENTS)))
            patches.cancel()
            await asyncio.gather(patches, return_exceptions=True)
            assert patches.cancelled(), patches.exception()
            while engine.stats().running + engine.stats().waiting:  # those whose clients left end within a step
                await asyncio.sleep(0.01)
            async with session.patch(f"{url}/v1/config", params={"revert_to": 1}, json={}) as response:
                if response.status == 400:  # so long ago that the history forgot it
                    defaults = {knob.name: knob.default for knob in engine.space}
                    async with session.patch(f"{url}/v1/config", json=defaults) as again:
                        assert again.status == 200
            await storm.learn()
            return storm

    storm = asyncio.run(go())
    stats = engine.stats()
    counted = httpx.get(f"{url}/v1/stats").json()
    assert counted["requests_by_finish_reason"]["timeout"] == stats.finished["timeout"]
    assert counted["requests_total"] >= sum(stats.finished.values())  # some left before the engine had their request
    for code, reason in (("context_length_exceeded", "too_long"), ("queue_full", "queue_full")):
        assert counted["requests_rejected"][reason] >= storm.ends[code]  # some left before they were told
    assert engine.error is None
    assert storm.ends.total() >= REQUESTS
    assert (
        min(storm.ends[how] for how in ("answered", "left", "timeout", "context_length_exceeded", "queue_full")) > 20
    ), storm.ends
    assert storm.patches[200] > 20
    assert stats.preemptions > 0, "the pool was large enough for all: no storm"
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_cached + stats.blocks_free == 96
