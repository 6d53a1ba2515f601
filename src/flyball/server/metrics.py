"""What Prometheus scrapes: the engine's own counts, and the latencies that this server saw.

Names follow vLLM's where both count the same thing, with the prefix `engine_` and no colons, so that dashboards port.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from flyball.core.clock import Clock
from flyball.core.knobs import Knob, Value
from flyball.server.engine_client import EngineClient

_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_SLOW = (7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


class ServerMetrics:
    """A registry of one server's metrics; every app has its own."""

    def __init__(self, engine: EngineClient, clock: Clock) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self._clock = clock
        self.ttft = Histogram(
            "engine_time_to_first_token_seconds",
            "Seconds from the arrival of a request to its first token.",
            buckets=_FAST + _SLOW,
            registry=self.registry,
        )
        self.itl = Histogram(
            "engine_inter_token_latency_seconds",
            "Seconds between two neighbouring outputs of one request.",
            buckets=_FAST + _SLOW[:4],
            registry=self.registry,
        )
        self.e2e = Histogram(
            "engine_e2e_request_latency_seconds",
            "Seconds from the arrival of a request to its last token, for requests that ended with stop or length.",
            buckets=_FAST + _SLOW,
            registry=self.registry,
        )
        self.finished = Counter(
            "engine_request_success",
            "Requests by how they ended: stop, length, abort (the client left) or error.",
            ["finished_reason"],
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self.finished.labels(reason)  # present from the start, at zero

    def timer(self, arrival_s: float) -> RequestTimer:
        """Times a request that arrived then."""
        return RequestTimer(self, self._clock, arrival_s)


class RequestTimer:
    """Observes the latencies of one request as its outputs come."""

    def __init__(self, metrics: ServerMetrics, clock: Clock, arrival_s: float) -> None:
        self._metrics = metrics
        self._clock = clock
        self._arrival_s = arrival_s
        self._last_s: float | None = None

    def output(self) -> None:
        """One more output has come."""
        now_s = self._clock.now_s()
        if self._last_s is None:
            self._metrics.ttft.observe(now_s - self._arrival_s)
        else:
            self._metrics.itl.observe(now_s - self._last_s)
        self._last_s = now_s

    def finished(self, reason: str) -> None:
        """The request has ended."""
        self._metrics.finished.labels(reason).inc()
        if reason in ("stop", "length"):
            self._metrics.e2e.observe(self._clock.now_s() - self._arrival_s)


class _EngineCollector(Collector):
    """Reads the engine's snapshot at each scrape: nothing is counted twice, nothing can disagree."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All families, from one snapshot."""
        stats = self._engine.stats()
        yield GaugeMetricFamily("engine_num_requests_running", "Requests in the batch now.", value=stats.running)
        yield GaugeMetricFamily("engine_num_requests_waiting", "Requests in the queue now.", value=stats.waiting)
        blocks = {"used": stats.blocks_used, "cached": stats.blocks_cached, "free": stats.blocks_free}
        yield GaugeMetricFamily(
            "engine_kv_cache_usage_ratio",
            "KV blocks referenced by a request, over all blocks.",
            value=stats.blocks_used / max(1, sum(blocks.values())),
        )
        yield _labelled(
            GaugeMetricFamily(
                "engine_kv_blocks",
                "KV blocks by state; cached ones are free but hold a known prefix.",
                labels=["state"],
            ),
            blocks,
        )
        sources = {"computed": stats.prompt_tokens_computed, "cached": stats.prompt_tokens_cached}
        yield _labelled(
            CounterMetricFamily(
                "engine_prompt_tokens", "Prompt tokens by where their KV came from.", labels=["source"]
            ),
            sources,
        )
        yield CounterMetricFamily(
            "engine_prefix_cache_queries_tokens", "Prompt tokens looked up: all of them.", value=sum(sources.values())
        )
        yield CounterMetricFamily(
            "engine_prefix_cache_hits_tokens",
            "Prompt tokens found in the prefix cache; the hit ratio is hits over queries.",
            value=stats.prompt_tokens_cached,
        )
        yield CounterMetricFamily("engine_generation_tokens", "Tokens generated.", value=stats.generation_tokens)
        yield CounterMetricFamily(
            "engine_num_preemptions", "Requests pushed out of the batch.", value=stats.preemptions
        )
        yield CounterMetricFamily(
            "engine_preempted_tokens_wasted", "Tokens whose KV was thrown away.", value=stats.preempted_tokens
        )
        yield SummaryMetricFamily(
            "engine_step_duration_seconds",
            "Seconds in engine steps.",
            count_value=stats.step,
            sum_value=stats.step_seconds,
        )
        runtime = self._engine.runtime
        values = runtime.values()
        yield _labelled(
            GaugeMetricFamily(
                "engine_runtime_config",
                "Live knobs in force; true is 1, a choice is its place in the list that GET /v1/config gives.",
                labels=["knob"],
            ),
            {knob.name: _number(knob, values[knob.name]) for knob in self._engine.space},
        )
        yield GaugeMetricFamily(
            "engine_runtime_config_version", "Rises by one with each change of a knob.", value=runtime.version
        )


def _number(knob: Knob, value: Value) -> float:
    return float(knob.choices.index(value)) if isinstance(value, str) else float(value)


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, values: dict[str, float] | dict[str, int]
) -> GaugeMetricFamily | CounterMetricFamily:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
