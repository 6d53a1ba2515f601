"""Windows of a live Flyball server from its own counters: two scrapes of `/metrics`, and what happened between them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
from prometheus_client.parser import text_string_to_metric_families

from flyball.core.clock import Clock
from flyball.core.errors import EngineFailed
from flyball.tuner.hold_reading import Histogram, Reading

_LATENCIES = {
    "ttft": "engine_time_to_first_token_seconds",
    "itl": "engine_inter_token_latency_seconds",
    "e2e": "engine_e2e_request_latency_seconds",
}
_VERSION = "engine_runtime_config_version"


@dataclass
class Scrape:
    """All counters at one moment."""

    at_s: float
    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # sums over labels
    ended: dict[str, float] = field(default_factory=dict)  # answers by how they ended
    buckets: dict[str, dict[float, float]] = field(default_factory=lambda: defaultdict(dict))  # cumulative

    @property
    def generation(self) -> str:
        """The version of the configuration in force."""
        return f"{self.values[_VERSION]:.0f}"


def parse(text: str, at_s: float) -> Scrape:
    """Read Prometheus' text format."""
    seen = Scrape(at_s)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                seen.buckets[family.name][float(sample.labels["le"])] = sample.value
            elif sample.name == "engine_request_success_total":
                seen.ended[sample.labels["finished_reason"]] = sample.value
            else:
                seen.values[sample.name] += sample.value
    return seen


def between(before: Scrape, after: Scrape) -> Reading:
    """What happened between two scrapes of one server; a server that restarted meanwhile counts from 0."""

    def grown(a: float, b: float) -> float:
        return b - a if b >= a else b

    ended = {reason: grown(before.ended.get(reason, 0.0), n) for reason, n in after.ended.items()}
    finished = ended.get("stop", 0.0) + ended.get("length", 0.0)
    prompts = "engine_prompt_tokens_total"
    return Reading(
        start_s=before.at_s,
        end_s=after.at_s,
        generation=after.generation if after.generation == before.generation else "",
        finished=finished,
        failed=ended.get("timeout", 0.0) + ended.get("error", 0.0),
        input_tokens=grown(before.values[prompts], after.values[prompts]),
        output_tokens=grown(
            before.values["engine_generation_tokens_total"], after.values["engine_generation_tokens_total"]
        ),
        latencies={
            name: _histogram(before.buckets[family], after.buckets[family],
                             grown(before.values[f"{family}_sum"], after.values[f"{family}_sum"]))
            for name, family in _LATENCIES.items()
        },
    )  # fmt: skip


def _histogram(before: Mapping[float, float], after: Mapping[float, float], total: float) -> Histogram:
    bounds = tuple(sorted(after))
    restarted = any(after[b] < before.get(b, 0.0) for b in bounds)
    cumulative = [after[b] - (0.0 if restarted else before.get(b, 0.0)) for b in bounds]
    counts = tuple(b - a for a, b in zip([0.0, *cumulative], cumulative, strict=False))
    return Histogram(bounds or (math.inf,), counts or (0.0,), total)


class ServerWindows:
    """Scrapes one server; each look ends a window and begins the next."""

    def __init__(self, url: str, clock: Clock, *, api_key: str | None = None, timeout_s: float = 10.0) -> None:
        self._url, self._clock = url.rstrip("/").removesuffix("/v1"), clock
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=self._url, headers=headers, timeout=timeout_s, trust_env=False)
        self.last = self._scrape()

    def _scrape(self) -> Scrape:
        try:
            reply = self._client.get("/metrics")
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise EngineFailed(
                f"{self._url}/metrics cannot be read ({error or type(error).__name__}); start a server with "
                "`flyball serve`, or give the address of yours with --url"
            ) from None
        return parse(reply.text, self._clock.now_s())

    def generation(self) -> str:
        """What the server says is in force now."""
        return self._scrape().generation

    def read(self) -> Reading:
        """The window since the last look."""
        before, self.last = self.last, self._scrape()
        return between(before, self.last)

    def skip(self) -> None:
        """Begin the next window now: what happened since the last look belongs to none."""
        try:
            self.last = self._scrape()
        except EngineFailed:  # the next look says so
            return

    def close(self) -> None:
        """Hang up."""
        self._client.close()
