"""What the server is and how it fares, in JSON for people and scripts; Prometheus has `/metrics`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from flyball.server.engine_client import EngineClient
from flyball.server.metrics import ServerMetrics
from flyball.server.recent import Sketch

Json = dict[str, Any]

WINDOWS = {"1m": 60.0, "5m": 300.0}


def routes(engine: EngineClient, metrics: ServerMetrics) -> APIRouter:
    """The routes over one engine."""
    router = APIRouter(prefix="/v1")

    @router.get("/cache/stats")
    async def cache() -> Json:
        """The KV cache now, and its prefix hits since the start."""
        stats = engine.stats()
        blocks = {"used": stats.blocks_used, "cached": stats.blocks_cached, "free": stats.blocks_free}
        total = sum(blocks.values())
        queries = stats.prompt_tokens_computed + stats.prompt_tokens_cached
        return {
            "blocks": {**blocks, "total": total, "limit": stats.blocks_limit},
            "block_size": engine.info().get("block_size"),
            "usage": stats.blocks_used / total if total else 0.0,
            "query_tokens": queries,
            "hit_tokens": stats.prompt_tokens_cached,
            "hit_rate": _ratio(stats.prompt_tokens_cached, queries),
            "evictions": stats.evictions,
            "preemptions": stats.preemptions,
        }

    @router.get("/model/info")
    async def model() -> Json:
        """What was loaded, and how."""
        told = {"name": engine.model_name, "max_model_len": engine.max_model_len, "vocab_size": engine.vocab_size}
        return {**told, **engine.info()}

    @router.get("/stats")
    async def stats() -> Json:
        """Counts since the start, and what happened in the last 1 and 5 minutes; null where nothing did."""
        seen = engine.stats()
        queries = seen.prompt_tokens_computed + seen.prompt_tokens_cached
        return {
            "uptime_seconds": metrics.clock.now_s() - metrics.started_s,
            "requests_total": sum(metrics.ended.values()),
            "requests_by_finish_reason": dict(metrics.ended),
            "requests_rejected": dict(seen.refused),
            "requests_running": seen.running,
            "requests_waiting": seen.waiting,
            "prompt_tokens_total": queries,
            "tokens_generated_total": seen.generation_tokens,
            "cache_hit_rate": _ratio(seen.prompt_tokens_cached, queries),
            "kv_cache_usage": seen.blocks_used / max(1, seen.blocks_used + seen.blocks_cached + seen.blocks_free),
            "preemptions_total": seen.preemptions,
            "windows": {name: _window(metrics, seconds) for name, seconds in WINDOWS.items()},
        }

    return router


def _window(metrics: ServerMetrics, length_s: float) -> Json:
    """One window; answers that were aborted, timed out or failed have no latency, but are counted."""
    seen, seconds = metrics.recent.window(length_s)
    done = sum(seen.ended.values())
    return {
        "seconds": seconds,
        "requests": done,
        "errors": seen.ended["error"] + seen.ended["timeout"],
        "requests_per_second": _ratio(done, seconds),
        "tokens_per_second": _ratio(seen.generated_tokens, seconds),
        "prompt_tokens_per_second": _ratio(seen.prompt_tokens, seconds),
        "cache_hit_rate": _ratio(seen.cached_tokens, seen.prompt_tokens),
        "latency_ms": _summary(seen.e2e),
        "ttft_ms": _summary(seen.ttft),
        "itl_ms": _summary(seen.itl),
        "queue_ms": _summary(seen.queue),
    }


def _summary(sketch: Sketch) -> Json:
    """Mean and percentiles in milliseconds, the latter within 1 %."""
    values = {"mean": sketch.mean, **{f"p{p}": sketch.quantile(p / 100) for p in (50, 90, 95, 99)}}
    return {"count": sketch.count, **{name: None if v is None else v * 1e3 for name, v in values.items()}}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
