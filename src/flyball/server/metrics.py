"""What Prometheus scrapes: the engine's own counts, and the latencies that this server saw.

Names follow vLLM's where both count the same thing, with the prefix `engine_` and no colons, so that dashboards port.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from flyball.core.clock import Clock
from flyball.core.knobs import Knob, Value
from flyball.engine.request import RequestReport
from flyball.server.engine_client import EngineClient
from flyball.server.recent import Recent

_FAST = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_SLOW = (7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)

ENDINGS = ("stop", "length", "abort", "timeout", "error")


class Latency:
    """A histogram for Prometheus, a tenth of the library's own cost a value; used on the event loop only."""

    def __init__(self, name: str, doc: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._doc = doc
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def family(self) -> HistogramMetricFamily:
        """As scraped."""
        bounds = (*map(str, self._bounds), "+Inf")
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        return HistogramMetricFamily(self._name, self._doc, buckets=buckets, sum_value=self._sum)


class ServerMetrics:
    """A registry of one server's metrics; every app has its own."""

    def __init__(self, engine: EngineClient, clock: Clock) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.registry.register(_ServerCollector(self))
        self.recent = Recent(clock)
        self.clock = clock
        self.started_s = clock.now_s()
        self.ended: Counter[str] = Counter()
        self.ttft = Latency(
            "engine_time_to_first_token_seconds",
            "Seconds from the arrival of a request to its first token.",
            _FAST + _SLOW,
        )
        self.itl = Latency(
            "engine_inter_token_latency_seconds",
            "Seconds between two neighbouring outputs of one answer.",
            _FAST + _SLOW[:4],
        )
        self.e2e = Latency(
            "engine_e2e_request_latency_seconds",
            "Seconds from the arrival of a request to its last token, for answers that ended with stop or length.",
            _FAST + _SLOW,
        )
        self.queue, self.prefill, self.decode = (
            Latency(f"engine_request_{phase}_time_seconds", f"Seconds that an answer {doc}.", _FAST + _SLOW)
            for phase, doc in (
                ("queue", "waited for the engine, before it first ran"),
                ("prefill", "took from when it first ran to its first token"),
                ("decode", "took from its first token to its last"),
            )
        )

    def timer(self, arrival_s: float) -> AnswerTimer:
        """Times an answer to a request that arrived then."""
        return AnswerTimer(self, arrival_s)


class AnswerTimer:
    """Observes one answer as its outputs come."""

    __slots__ = ("_arrival_s", "_last_s", "_metrics", "ttft_s")

    def __init__(self, metrics: ServerMetrics, arrival_s: float) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._last_s: float | None = None
        self.ttft_s: float | None = None

    def output(self, new_tokens: int, prompt_tokens: int, cached_tokens: int) -> None:
        """One more output has come."""
        metrics, last_s = self._metrics, self._last_s
        now_s = self._last_s = metrics.clock.now_s()
        tally = metrics.recent.at(now_s)
        tally.generated_tokens += new_tokens
        if last_s is None:
            self.ttft_s = now_s - self._arrival_s
            metrics.ttft.observe(self.ttft_s)
            tally.ttft.add(self.ttft_s)
            tally.prompt_tokens += prompt_tokens
            tally.cached_tokens += cached_tokens
        else:
            metrics.itl.observe(now_s - last_s)
            tally.itl.add(now_s - last_s)

    def ended(self, reason: str, report: RequestReport | None = None) -> None:
        """The answer has ended."""
        metrics = self._metrics
        now_s = metrics.clock.now_s()
        tally = metrics.recent.at(now_s)
        metrics.ended[reason] += 1
        tally.ended[reason] += 1
        if reason in ("stop", "length"):
            metrics.e2e.observe(now_s - self._arrival_s)
            tally.e2e.add(now_s - self._arrival_s)
        if report is not None and report.first_scheduled_s is not None:
            queue_s = report.first_scheduled_s - report.arrival_s
            metrics.queue.observe(queue_s)
            tally.queue.add(queue_s)
            if report.first_token_s is not None:
                metrics.prefill.observe(report.first_token_s - report.first_scheduled_s)
                metrics.decode.observe(report.finished_s - report.first_token_s)


class _ServerCollector(Collector):
    """What this server counted itself."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """All families."""
        metrics = self._metrics
        for latency in (metrics.ttft, metrics.itl, metrics.e2e, metrics.queue, metrics.prefill, metrics.decode):
            yield latency.family()
        yield _labelled(
            CounterMetricFamily(
                "engine_request_success",
                "Answers by how they ended: stop, length, abort (the client left), timeout or error.",
                labels=["finished_reason"],
            ),
            {reason: metrics.ended[reason] for reason in ENDINGS},
        )


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
        yield GaugeMetricFamily(
            "engine_kv_blocks_limit", "KV blocks that may hold content now, by the live knob.", value=stats.blocks_limit
        )
        yield GaugeMetricFamily(
            "engine_kv_cache_tokens",
            "Tokens that all KV blocks together hold.",
            value=sum(blocks.values()) * self._engine.info().get("block_size", 0),
        )
        yield CounterMetricFamily(
            "engine_kv_blocks_evicted", "Cached KV blocks whose prefix was given up for room.", value=stats.evictions
        )
        yield CounterMetricFamily(
            "engine_out_of_memory_steps",
            "Steps given up for want of memory; the next are smaller.",
            value=stats.out_of_memory,
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
        for name, doc, value in (
            ("num_drafts", "Guesses of one or more tokens that were verified.", stats.spec_drafts),
            ("draft_tokens", "Tokens guessed.", stats.spec_draft_tokens),
            ("accepted_tokens", "Guessed tokens that were kept.", stats.spec_accepted_tokens),
        ):
            yield CounterMetricFamily(f"engine_spec_decode_{name}", doc, value=value)
        yield _labelled(
            CounterMetricFamily(
                "engine_spec_decode_accepted_per_pos",
                "Guessed tokens that were kept, by their place in the guess, from 0.",
                labels=["position"],
            ),
            {str(place): kept for place, kept in enumerate(stats.spec_accepted_at)},
        )
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
        yield _labelled(
            CounterMetricFamily(
                "engine_admission_rejections", "Requests that the engine did not take, by why.", labels=["reason"]
            ),
            {reason: stats.refused.get(reason, 0) for reason in ("queue_full", "too_long", "invalid")},
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
