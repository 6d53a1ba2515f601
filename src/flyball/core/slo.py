"""What is promised: latency bounds of a request class, and how they are written.

A bound is written as people say it: `p95_ttft<500ms`, `p99_itl<60ms`, `mean_e2e<=8s`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from flyball.core.errors import InvalidInput

Latency = Literal["ttft", "tpot", "itl", "e2e"]

_BOUND = re.compile(
    r"^\s*(?P<stat>mean|p\d{1,2}(?:\.\d+)?)[_ ](?P<metric>[a-z0-9]+)\s*<=?\s*(?P<value>[0-9.]+)\s*(?P<unit>us|ms|s)\s*$"
)
_UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class SloBound:
    """One promise: a statistic of one latency stays at or under a limit.

    >>> SloBound.parse("p95_ttft<500ms")
    SloBound(metric='ttft', percentile=95.0, limit_s=0.5)
    >>> print(SloBound.parse("mean_e2e <= 8s"))
    mean_e2e<=8s
    """

    metric: Latency
    percentile: float | None  # None: the mean
    limit_s: float

    def __post_init__(self) -> None:
        if self.metric not in get_args(Latency):
            raise InvalidInput(f"unknown latency {self.metric!r}; use one of {', '.join(get_args(Latency))}")
        if not self.limit_s > 0:
            raise InvalidInput(f"the bound on {self.metric} is {self.limit_s} s; it must exceed 0 s")
        if self.percentile is not None and not 0 < self.percentile < 100:
            raise InvalidInput(f"percentile {self.percentile:g} of {self.metric} must lie between 0 and 100")

    @classmethod
    def parse(cls, text: str) -> SloBound:
        """Read a bound such as `p99_itl<60ms`; mean or pNN, then ttft, tpot, itl or e2e, then us, ms or s."""
        match = _BOUND.match(text.lower())
        if match is None:
            raise InvalidInput(
                f"cannot read the SLO {text!r}; write it like p95_ttft<500ms, p99_itl<60ms or mean_e2e<8s"
            )
        stat = match["stat"]
        try:
            limit_s = float(match["value"]) * _UNIT_S[match["unit"]]
        except ValueError:
            raise InvalidInput(f"{match['value']!r} in the SLO {text!r} is not a number; write it like 500ms") from None
        return cls(
            metric=match["metric"],  # type: ignore[arg-type]  # checked at birth
            percentile=None if stat == "mean" else float(stat[1:]),
            limit_s=limit_s,
        )

    @property
    def name(self) -> str:
        """The statistic bounded, as metrics are named: `p95_ttft`."""
        return f"{'mean' if self.percentile is None else f'p{self.percentile:g}'}_{self.metric}"

    def __str__(self) -> str:
        limit = f"{self.limit_s:g}s" if self.limit_s >= 1 else f"{self.limit_s * 1e3:g}ms"
        return f"{self.name}<={limit}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What one request must see to count as good; None promises nothing."""

    ttft_s: float | None = None  # from the scheduled send time to the first token
    tpot_s: float | None = None  # mean gap between the later tokens of one request (its mean ITL)
    itl_s: float | None = None  # gap between two neighbouring tokens, at `itl_percentile` of the request's own gaps
    itl_percentile: float = 100.0  # 100: the longest gap
    e2e_s: float | None = None  # from the scheduled send time to the last token

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InvalidInput(
                    f"{name} is {value}; a latency bound must exceed 0 s; leave it out to promise nothing"
                )

    @classmethod
    def from_bounds(cls, bounds: Iterable[SloBound]) -> Slo:
        """The per-request promise behind a set of bounds: the same limits.

        A percentile over requests (TTFT, TPOT, E2E) becomes the limit of each request; a percentile over gaps (ITL)
        becomes that percentile of the request's own gaps, and a mean ITL its mean gap (TPOT).
        """
        limits: dict[str, float] = {}
        for bound in bounds:
            key = "tpot_s" if bound.metric == "itl" and bound.percentile is None else f"{bound.metric}_s"
            if bound.limit_s < limits.get(key, float("inf")):
                limits[key] = bound.limit_s
                if key == "itl_s" and bound.percentile is not None:
                    limits["itl_percentile"] = bound.percentile
        return cls(**limits)
