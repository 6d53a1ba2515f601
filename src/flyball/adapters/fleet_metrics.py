"""What engines call what they count: the same words for vLLM, SGLang and Flyball's own engine, as PromQL.

The queries are those by which llm-d's autoscaler and llm-inferno's collector read vLLM (rates of counters over a
window, the most of KV use and queue in it), written so that a colon in a name may have become an underscore on its way
(what
prometheus-client's OpenMetrics does to `vllm:num_requests_running`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flyball.core.errors import InvalidInput

IDENTITY = ("instance", "pod")  # labels that tell replicas apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Names of an engine's metrics; a name may list alternatives with `|`, and "" is one it does not have."""

    running: str
    waiting: str
    kv_used: str
    completed: str
    prompt_tokens: str
    generated_tokens: str
    ttft: str  # histograms: without _sum, _count, _bucket
    itl: str
    prefix_hits: str = ""
    prefix_queries: str = ""
    kv_tokens: str = ""  # a gauge of the cache's size
    kv_info: str = ""  # or an information metric with labels num_gpu_blocks and block_size
    hit_ratio_of_prompt: bool = False  # hits are over prompt tokens, not over queries


DIALECTS: Mapping[str, Dialect] = {
    "flyball": Dialect(
        running="engine_num_requests_running",
        waiting="engine_num_requests_waiting",
        kv_used="engine_kv_cache_usage_ratio",
        completed="engine_request_success_total",
        prompt_tokens="engine_prompt_tokens_total",
        generated_tokens="engine_generation_tokens_total",
        ttft="engine_time_to_first_token_seconds",
        itl="engine_inter_token_latency_seconds",
        prefix_hits="engine_prefix_cache_hits_tokens_total",
        prefix_queries="engine_prefix_cache_queries_tokens_total",
        kv_tokens="engine_kv_cache_tokens",
    ),
    "vllm": Dialect(
        running="vllm:num_requests_running",
        waiting="vllm:num_requests_waiting",
        kv_used="vllm:kv_cache_usage_perc|vllm:gpu_cache_usage_perc",
        completed="vllm:request_success_total",
        prompt_tokens="vllm:prompt_tokens_total",
        generated_tokens="vllm:generation_tokens_total",
        ttft="vllm:time_to_first_token_seconds",
        itl="vllm:inter_token_latency_seconds|vllm:request_time_per_output_token_seconds|vllm:time_per_output_token_seconds",
        prefix_hits="vllm:prefix_cache_hits_total|vllm:prefix_cache_hits",
        prefix_queries="vllm:prefix_cache_queries_total|vllm:prefix_cache_queries",
        kv_info="vllm:cache_config_info",
    ),
    "sglang": Dialect(
        running="sglang:num_running_reqs",
        waiting="sglang:num_queue_reqs",
        kv_used="sglang:token_usage",
        completed="sglang:num_requests_total",
        prompt_tokens="sglang:prompt_tokens_total",
        generated_tokens="sglang:generation_tokens_total",
        ttft="sglang:time_to_first_token_seconds",
        itl="sglang:inter_token_latency_seconds|sglang:time_per_output_token_seconds",
        prefix_hits="sglang:cached_tokens_total",
        kv_tokens="sglang:max_total_num_tokens",
        hit_ratio_of_prompt=True,
    ),
}


def dialect(name: str) -> Dialect:
    """The names of an engine."""
    if name not in DIALECTS:
        raise InvalidInput(f"unknown engine {name!r}; use one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def selector(names: str, matchers: Mapping[str, str], suffix: str = "") -> str:
    r"""A PromQL selector for a metric under any of its names.

    >>> selector("vllm:x|vllm:y", {"job": "chat"})
    '{__name__=~"vllm[:_]x|vllm[:_]y",job="chat"}'
    >>> selector("engine_x", {"model": 'say "hi"'}, "_sum")
    '{__name__="engine_x_sum",model="say \\"hi\\""}'
    """
    parts = [name + suffix for name in names.split("|")]
    if len(parts) == 1 and ":" not in parts[0]:
        named = f'__name__="{parts[0]}"'
    else:
        named = f'__name__=~"{"|".join(part.replace(":", "[:_]") for part in parts)}"'
    return "{" + ",".join([named, *(f'{label}="{_escaped(value)}"' for label, value in matchers.items())]) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def queries(names: Dialect, matchers: Mapping[str, str], window_s: float) -> dict[str, str]:
    """PromQL for each number of a replica view, one value for each replica."""
    window = f"[{max(round(window_s * 1000), 1)}ms]"
    by = f"by ({', '.join(IDENTITY)})"

    def grown(metric: str, suffix: str = "") -> str:
        return f"sum {by} (increase({selector(metric, matchers, suffix)}{window}))"

    def ratio(metric: str) -> str:
        return f"{grown(metric, '_sum')} / {grown(metric, '_count')}"

    def p90(metric: str) -> str:
        buckets = selector(metric, matchers, "_bucket")
        inner = f"sum by (le, {', '.join(IDENTITY)}) (increase({buckets}{window}))"
        return f"histogram_quantile(0.9, {inner})"

    found = {
        "running": f"max {by} ({selector(names.running, matchers)})",
        "waiting": f"max {by} ({selector(names.waiting, matchers)})",
        "kv_used": f"max {by} (max_over_time({selector(names.kv_used, matchers)}{window}))",
        "completed": grown(names.completed),
        "prompt_tokens": grown(names.prompt_tokens),
        "generated_tokens": grown(names.generated_tokens),
        "ttft_s": ratio(names.ttft),
        "itl_s": ratio(names.itl),
        "ttft_p90_s": p90(names.ttft),
        "itl_p90_s": p90(names.itl),
    }
    if names.prefix_hits:
        total = names.prompt_tokens if names.hit_ratio_of_prompt else names.prefix_queries
        found["prefix_hits"] = f"{grown(names.prefix_hits)} / {grown(total)}"
    if names.kv_tokens:
        found["kv_tokens"] = f"max {by} ({selector(names.kv_tokens, matchers)})"
    if names.kv_info:
        labels = ", ".join((*IDENTITY, "num_gpu_blocks", "block_size"))
        found["kv_info"] = f"max by ({labels}) ({selector(names.kv_info, matchers)})"
    return found
