"""O16: counters equal the script's own counts."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from flyball.server.app import create_app


def samples(text: str) -> dict[str, float]:
    """Every sample by its name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_metrics_equal_the_scripts_own_counts(parrot: Any, connect: Any, tokenizer: Any) -> None:
    """Requests by how they ended, tokens, latencies' counts: all as the script counted them."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            prompt = "the cat sat"
            length = len(tokenizer(prompt)["input_ids"])

            async def ask(**body: Any) -> httpx.Response:
                return await client.post("/v1/completions", json={"prompt": prompt, **body})

            for tokens in (1, 5, 10):
                await ask(max_tokens=tokens)
                await ask(max_tokens=tokens, stream=True)
            stopped = (await ask(max_tokens=50, stop=["sat"])).json()["usage"]["completion_tokens"]
            await ask(max_tokens=0)
            await ask(max_tokens=5000)
            seen = samples((await client.get("/metrics")).text)
            tokens = 2 * 16 + stopped
            assert seen["engine_request_success_total{finished_reason=length}"] == 6
            assert seen["engine_request_success_total{finished_reason=stop}"] == 1
            assert seen["engine_request_success_total{finished_reason=abort}"] == 0
            assert seen["engine_request_success_total{finished_reason=error}"] == 0
            assert seen["engine_prompt_tokens_total{source=computed}"] == 7 * length
            assert seen["engine_prefix_cache_queries_tokens_total"] == 7 * length
            assert seen["engine_prefix_cache_hits_tokens_total"] == 0
            assert seen["engine_generation_tokens_total"] == tokens
            assert seen["engine_time_to_first_token_seconds_count"] == 7
            assert seen["engine_inter_token_latency_seconds_count"] == tokens - 7
            assert seen["engine_e2e_request_latency_seconds_count"] == 7
            assert seen["engine_e2e_request_latency_seconds_sum"] >= seen["engine_time_to_first_token_seconds_sum"]
            assert seen["engine_num_requests_running"] == 0
            assert seen["engine_kv_blocks{state=free}"] == 100

    asyncio.run(go())


def test_the_policy_in_force_is_a_metric(parrot: Any, connect: Any) -> None:
    """Each knob's value and the version follow every change; names hold no colon; buckets begin at 1 ms."""

    async def go() -> None:
        async with connect(create_app(parrot)) as client:
            await client.patch("/v1/config", json={"max_num_seqs": 3, "prefix_caching": False})
            text = (await client.get("/metrics")).text
            seen = samples(text)
            assert seen["engine_runtime_config{knob=max_num_seqs}"] == 3
            assert seen["engine_runtime_config{knob=prefix_caching}"] == 0
            assert seen["engine_runtime_config_version"] == 2
            assert "engine_inter_token_latency_seconds_bucket{le=0.001}" in seen
            assert not any(":" in family.name for family in text_string_to_metric_families(text))
            assert all(name.startswith("engine_") for name in seen)

    asyncio.run(go())


def test_two_servers_count_apart(parrot: Any, connect: Any) -> None:
    """Each application owns its registry."""

    async def go() -> None:
        async with connect(create_app(parrot)) as one, connect(create_app(parrot)) as other:
            await one.post("/v1/completions", json={"prompt": "the"})
            for client, count in ((one, 1), (other, 0)):
                seen = samples((await client.get("/metrics")).text)
                assert seen["engine_request_success_total{finished_reason=length}"] == count

    asyncio.run(go())
