"""Analyzers: the rules by which a fleet can be scaled, ours and the field's, by name and combinable.

An analyzer is a pure step: what is seen of one server and its memory in, its advice and the next memory out. Several
can be asked together: any that says up is followed (the most wanted), down is followed only when all say so.

name              rule                                                                    source
slo               forecast demand over what a replica takes within its promise            ours
saturation-v1     one more when spare KV or queue runs short, one less when it would not  llm-d WVA
saturation-v2     KV tokens wanted against KV tokens that replicas hold                   llm-d WVA
throughput        tokens wanted per second against a line of gap over KV use              llm-d WVA
hpa               requests under way per replica, with stabilisation and step limits      Kubernetes
keda              requests per second and replica, likewise                               KEDA (and HPA)
kpa               stable and panic windows of requests under way                          Knative
skyserve          requests per second, after a number of equal wishes                     SkyServe
inferno           mean SLO by queue model at the throughput seen                          llm-inferno control-loop

A third party adds one through the entry point group `flyball.analyzers`: a name, and a function without arguments that
returns an `Analyzer`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol, cast

from flyball.core.errors import InvalidInput
from flyball.core.fleet import ServerSpec
from flyball.core.observation import ServerView
from flyball.planner.forecast import Forecast
from flyball.planner.options import Option

_GROUP = "flyball.analyzers"
_BUILT_IN = {
    "slo": "flyball.planner.analyzers.slo:SloModel",
    "saturation-v1": "flyball.planner.analyzers.saturation:SaturationV1",
    "saturation-v2": "flyball.planner.analyzers.saturation:SaturationV2",
    "throughput": "flyball.planner.analyzers.throughput:Throughput",
    "hpa": "flyball.planner.analyzers.tracking:hpa",
    "keda": "flyball.planner.analyzers.tracking:keda",
    "kpa": "flyball.planner.analyzers.serverless:Kpa",
    "skyserve": "flyball.planner.analyzers.serverless:SkyServe",
    "inferno": "flyball.planner.analyzers.inferno:Inferno",
}
NAMES = tuple(_BUILT_IN)

Wanted = Mapping[str, int]  # accelerator -> replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One server as an analyzer sees it; times are seconds of the loop, which never go back."""

    view: ServerView
    server: ServerSpec
    now_s: float
    window_s: float
    current: Wanted  # replicas asked for, which start or are ready
    options: tuple[Option, ...]  # cheapest per request first; at least one
    rate_rps: float  # arrivals over the window
    level_rps: float  # the same, chance smoothed away
    ahead: Forecast  # when a replica asked for now would be ready
    peak_rps: float  # the most expected until then
    start_up_s: float  # of a replica

    @property
    def replicas(self) -> int:
        """Asked for on all accelerators."""
        return sum(self.current.values())

    @property
    def home(self) -> Option:
        """The option that most replicas run on; of none, the cheapest."""
        running = [o for o in self.options if self.current.get(o.name)]
        return max(running, key=lambda o: self.current[o.name]) if running else self.options[0]

    def moved_to(self, total: int) -> dict[str, int]:
        """The current replicas brought to a total: more on the cheapest accelerator, fewer of the dearest first."""
        wanted = {name: count for name, count in self.current.items() if count}
        more = total - sum(wanted.values())
        if more > 0:
            name = self.home.name
            wanted[name] = wanted.get(name, 0) + more
        prices = {o.name: o.cost_per_h / o.capacity_rps for o in self.options}
        for name in sorted(wanted, key=lambda n: (-prices.get(n, math.inf), n)):
            taken = min(max(-more, 0), wanted[name])
            wanted[name] -= taken
            more += taken
        return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What one analyzer wants; None: it cannot say, and abstains."""

    wanted: Wanted | None
    reason: str
    binding: str = ""  # what the count follows from
    figures: Mapping[str, float] = field(default_factory=dict)


class Analyzer(Protocol):
    """A rule for one server; its memory is its own and opaque to others."""

    @property
    def period_s(self) -> float:
        """How often its authors run it."""
        ...

    def start(self) -> Any:  # noqa: ANN401  # each has a memory of its own
        """The memory before the first look."""
        ...

    def advise(self, seen: Seen, memory: Any) -> tuple[Advice, Any]:  # noqa: ANN401
        """Advice from what is seen, and the next memory."""
        ...


def analyzer(name: str) -> Analyzer:
    """The analyzer of this name with its usual settings, ours or a plug-in's."""
    target = _BUILT_IN.get(name)
    if target is not None:
        module, attribute = target.split(":")
        return cast("Analyzer", getattr(importlib.import_module(module), attribute)())
    found = {point.name: point for point in entry_points(group=_GROUP)}
    if name not in found:
        known = ", ".join((*_BUILT_IN, *found))
        raise InvalidInput(f"unknown analyzer {name!r}; use one of {known}, or install a package that provides it")
    return cast("Analyzer", found[name].load()())


def combine(advices: Mapping[str, Advice], current: Wanted) -> Advice:
    """One advice out of several: any up is followed, down only if all who speak say down; who abstains is not counted.

    >>> up, down = Advice(wanted={"A": 3}, reason="busy"), Advice(wanted={"A": 1}, reason="idle")
    >>> combine({"x": up, "y": down}, {"A": 2}).wanted, combine({"y": down}, {"A": 2}).wanted
    ({'A': 3}, {'A': 1})
    >>> combine({"y": down, "z": Advice(wanted={"A": 2}, reason="steady")}, {"A": 2}).wanted
    {'A': 2}
    """
    speaking = {name: advice for name, advice in advices.items() if advice.wanted is not None}
    silent = "; ".join(f"{name} abstains: {a.reason}" for name, a in advices.items() if a.wanted is None)
    if not speaking:
        return Advice(wanted=None, reason=silent or "no analyzer was asked")
    if len(speaking) == 1:
        name, only = next(iter(speaking.items()))
        return Advice(
            wanted=only.wanted, reason=_said({name: only}, silent), binding=only.binding, figures=only.figures
        )
    have = sum(current.values())
    totals = {name: sum(a.wanted.values()) for name, a in speaking.items() if a.wanted is not None}
    decisive = max(totals, key=lambda name: totals[name])  # up: the most; down: the least far
    chosen = speaking[decisive]
    wanted = chosen.wanted if totals[decisive] != have else dict(current)
    return Advice(wanted=wanted, reason=_said(speaking, silent), binding=chosen.binding, figures=chosen.figures)


def _said(advices: Mapping[str, Advice], silent: str) -> str:
    parts = [f"{name}: {a.reason}" for name, a in advices.items()]
    return "; ".join([*parts, silent] if silent else parts)


def linear_fit(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Slope and intercept of the least-squares line through (x, y); None where all x are equal.

    >>> linear_fit([(0.0, 1.0), (1.0, 3.0)])
    (2.0, 1.0)
    """
    count = len(points)
    if not count:
        return None
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread <= 0:
        return None
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return slope, mean_y - slope * mean_x
