"""Load as data: when requests arrive and how long they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flyball.core.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec:
    """One request of a workload, before it is sent."""

    arrival_s: float  # from the start of the workload
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()  # equal leading ids mean a shared prompt prefix (Mooncake's hash_ids)
    prefix_tokens: int = 512  # prompt tokens that each prefix id stands for

    def __post_init__(self) -> None:
        if not (self.arrival_s >= 0 and self.input_tokens >= 1 and self.output_tokens >= 1 and self.prefix_tokens >= 1):
            raise InvalidInput(
                f"{self}: a request needs arrival_s >= 0, and at least one token in, one out and one a prefix id"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in order of arrival, and how they were made from their source."""

    requests: tuple[RequestSpec, ...]
    source: str  # what a person needs to make it again: trace, slice, scaling, seed

    def __post_init__(self) -> None:
        if not self.requests:
            raise InvalidInput(f"the workload {self.source!r} holds no request; widen the slice or add requests")
        if any(a.arrival_s > b.arrival_s for a, b in zip(self.requests, self.requests[1:], strict=False)):
            raise InvalidInput(f"the workload {self.source!r} is not in order of arrival; sort it by arrival_s")

    @property
    def duration_s(self) -> float:
        """Time from the workload's start to its last arrival."""
        return self.requests[-1].arrival_s

    @property
    def rate_rps(self) -> float:
        """Mean arrivals per second (n arrivals over the time to the last; for one request, infinity is not claimed)."""
        return len(self.requests) / max(self.duration_s, 1e-9) if len(self.requests) > 1 else 0.0


def mean_lengths(requests: Sequence[RequestSpec]) -> tuple[float, float]:
    """Mean input and output tokens of some requests."""
    count = len(requests)
    return sum(r.input_tokens for r in requests) / count, sum(r.output_tokens for r in requests) / count
