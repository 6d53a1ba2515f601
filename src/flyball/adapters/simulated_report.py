"""What a simulated fleet did: latencies, promises kept, replicas over time, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flyball.core.errors import InvalidInput
from flyball.core.slo import Latency, Slo
from flyball.performance.simulator import DONE, Records

_MOST_ROWS = 1024  # of a time-line; then neighbours are merged
_PER_E_FOLD = 100  # buckets of the latency sketch: within 1 %
_LEAST_S = 1e-4


class LatencySketch:
    """Percentiles of any number of latencies in constant memory, within 1 %."""

    def __init__(self) -> None:
        self._counts = np.zeros(1800, np.int64)  # up to 6,500 s
        self._sum_s = 0.0

    def add(self, seconds: NDArray[np.float64]) -> None:
        """Take in some latencies."""
        buckets = np.ceil(np.log(np.maximum(seconds, _LEAST_S) / _LEAST_S) * _PER_E_FOLD).astype(np.int64)
        self._counts += np.bincount(np.minimum(buckets, len(self._counts) - 1), minlength=len(self._counts))
        self._sum_s += float(seconds.sum())

    @property
    def mean_s(self) -> float:
        """NaN of nothing."""
        count = int(self._counts.sum())
        return self._sum_s / count if count else math.nan

    def percentile_s(self, q: float) -> float:
        """The q-th percentile; NaN of nothing."""
        below = np.cumsum(self._counts)
        if not below[-1]:
            return math.nan
        bucket = int(np.searchsorted(below, max(q / 100 * float(below[-1]), 1.0)))
        return _LEAST_S * math.exp((bucket - 0.5) / _PER_E_FOLD)


class Promises:
    """How the requests of one server fared."""

    def __init__(self, slo: Slo) -> None:
        if slo.itl_s is not None:
            raise InvalidInput(
                "a simulated fleet keeps no single gaps; promise the mean gap (mean_itl or tpot) instead"
            )
        self.slo = slo
        self.good = self.ended = self.lost = 0
        self.sketches: dict[Latency, LatencySketch] = {name: LatencySketch() for name in ("ttft", "tpot", "e2e")}

    def add(self, records: Records) -> None:
        """Requests that ended."""
        self.ended += len(records)
        done = records[records["outcome"] == DONE]
        self.lost += len(records) - len(done)
        gaps = done["output"] > 1
        seen: dict[Latency, NDArray[np.float64]] = {
            "ttft": done["first_s"] - done["arrival_s"],
            "tpot": (done["last_s"] - done["first_s"]) / np.maximum(done["output"] - 1, 1),
            "e2e": done["last_s"] - done["arrival_s"],
        }
        kept = np.ones(len(done), bool)
        for name, values in seen.items():
            limit = getattr(self.slo, f"{name}_s")
            if limit is not None:
                kept &= values <= limit
            self.sketches[name].add(values[gaps] if name == "tpot" else values)
        self.good += int(kept.sum())


class Timeline:
    """A bounded number of rows over time; a row is the mean of what was seen in its span."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self._rows: list[tuple[float, NDArray[np.float64]]] = []  # seconds that it lasted, values

    def add(self, lasted_s: float, values: Mapping[str, float]) -> None:
        """What held for a while."""
        self._rows.append((lasted_s, np.array([values[c] for c in self.columns])))
        if len(self._rows) == 2 * _MOST_ROWS:
            pairs = zip(self._rows[::2], self._rows[1::2], strict=True)
            self._rows = [(s + t, _mean(a, s, b, t)) for (s, a), (t, b) in pairs]

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """By column, and `time_s`: when each row's span began."""
        spans = np.array([s for s, _ in self._rows])
        values = np.array([v for _, v in self._rows]).reshape(len(self._rows), len(self.columns))
        return {"time_s": np.cumsum(spans) - spans, **{c: values[:, i] for i, c in enumerate(self.columns)}}


def _mean(a: NDArray[np.float64], s: float, b: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """Of two neighbours; a value that one lacks (NaN) is the other's."""
    whole = (a * s + b * t) / max(s + t, 1e-12)
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, whole))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReport:
    """One server at the end of a run."""

    name: str
    slo: Slo
    arrivals: int
    completed: int
    lost: int  # with a failed replica, too long for any, or not ended
    attainment: float  # share of all that arrived; NaN of none
    replica_hours: Mapping[str, float]  # by accelerator: starting, ready and draining
    gpu_hours: float  # the same in cards
    cost: float
    actions: int  # decisions that changed the replicas asked for
    latencies: Mapping[Latency, LatencySketch] = field(repr=False)
    timeline: Mapping[str, NDArray[np.float64]] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """A whole run."""

    duration_s: float
    servers: tuple[ServerReport, ...]

    @property
    def attainment(self) -> float:
        """Share of all requests of all servers that saw what was promised."""
        arrivals = sum(s.arrivals for s in self.servers)
        return sum(s.attainment * s.arrivals for s in self.servers if s.arrivals) / arrivals if arrivals else math.nan

    @property
    def gpu_hours(self) -> float:
        """Cards times hours."""
        return math.fsum(s.gpu_hours for s in self.servers)

    @property
    def cost(self) -> float:
        """In the currency of the accelerators' prices."""
        return math.fsum(s.cost for s in self.servers)

    @property
    def actions(self) -> int:
        """Changes of replicas asked for."""
        return sum(s.actions for s in self.servers)
