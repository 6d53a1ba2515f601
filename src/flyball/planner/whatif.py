"""What if: a fleet with a change, planned beside the fleet as it is.

A change is written `WHAT=VALUE` or `WHAT:NAME=VALUE`:

load         factor on arrivals of all servers, or of the one named
slo          factor on latency targets of all classes, or of the one named
cost         factor on the cost of all accelerators, or of the one named
capacity     cards of the type named; without a name a factor on all
budget, power    most cost per hour, most watts
unlimited    every type as if plentiful (no value)

Several, joined by commas, make one variant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetPlan, FleetSpec, Targets

_FACTORS = ("load", "slo", "cost")


@dataclass(frozen=True, slots=True)
class Change:
    """One change to a fleet."""

    what: str
    name: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Change:
        """Read `load=2`, `capacity:A100=16` or `unlimited`.

        >>> Change.parse("capacity:A100=16")
        Change(what='capacity', name='A100', value=16.0)
        """
        key, equals, number = text.strip().partition("=")
        what, _, name = key.partition(":")
        if what == "unlimited" and not equals:
            return cls(what, "", 1.0)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        known = (*_FACTORS, "capacity", "budget", "power")
        if what not in known or not (math.isfinite(value) and value >= 0):
            raise InvalidInput(
                f"cannot read the change {text!r}; write {', '.join(known)} with a number of at least 0, such as "
                "load=2, load:SERVER=0.5 or capacity:A100=16, or write unlimited"
            )
        return cls(what, name, value)

    def applied(self, spec: FleetSpec) -> FleetSpec:
        """The fleet with this change."""
        self._check(spec)
        if self.what == "load":
            servers = tuple(
                replace(s, demand=replace(s.demand, arrival_rps=s.demand.arrival_rps * self.value))
                if self._meant(s.name)
                else s
                for s in spec.servers
            )
            return replace(spec, servers=servers)
        if self.what == "slo":
            classes = tuple(
                replace(c, targets={m: _scaled(t, self.value) for m, t in c.targets.items()})
                if self._meant(c.name)
                else c
                for c in spec.service_classes
            )
            return replace(spec, service_classes=classes)
        if self.what == "cost":
            accelerators = tuple(
                replace(a, cost_per_h=a.cost_per_h * self.value) if self._meant(a.name) else a
                for a in spec.accelerators
            )
            return replace(spec, accelerators=accelerators)
        if self.what == "capacity":
            return replace(spec, capacity=self._capacity(spec.capacity), unlimited=False)
        if self.what == "budget":
            return replace(spec, budget_per_h=self.value)
        if self.what == "power":
            return replace(spec, power_limit_w=self.value)
        return replace(spec, unlimited=True)

    def _capacity(self, capacity: Mapping[str, int]) -> dict[str, int]:
        if self.name:
            return {**capacity, self.name: int(self.value)}
        return {name: int(count * self.value) for name, count in capacity.items()}

    def _meant(self, name: str) -> bool:
        return self.name in ("", name)

    def _check(self, spec: FleetSpec) -> None:
        """Refuse a name that nothing has, and a factor that leaves no target."""
        names = {
            "load": [s.name for s in spec.servers],
            "slo": [c.name for c in spec.service_classes],
            "cost": [a.name for a in spec.accelerators],
            "capacity": [a.type for a in spec.accelerators],
        }.get(self.what, [])
        if self.name and self.name not in names:
            raise InvalidInput(f"the change of {self.what} names {self.name!r}; use one of {', '.join(sorted(names))}")
        if self.what == "slo" and not self.value:
            raise InvalidInput("a change of slo by 0 leaves no target that can be kept; give a factor above 0")


def _scaled(targets: Targets, factor: float) -> Targets:
    return replace(
        targets,
        ttft_s=targets.ttft_s * factor if targets.ttft_s else None,
        itl_s=targets.itl_s * factor if targets.itl_s else None,
    )


def variant(spec: FleetSpec, text: str) -> FleetSpec:
    """The fleet with all changes of a variant."""
    for part in text.split(","):
        spec = Change.parse(part).applied(spec)
    return spec


def moves(before: FleetPlan, after: FleetPlan) -> list[str]:
    """What of a plan is another in the second: one sentence a server."""
    told = []
    for name in {**before.allocations, **before.unserved, **after.allocations, **after.unserved}:
        old, new = (_placed(p, name) for p in (before, after))
        if old != new:
            told.append(f"{name}: {old} -> {new}")
    return told


def _placed(plan: FleetPlan, name: str) -> str:
    whole = plan.allocations.get(name)
    if whole is None:
        return "not served"
    parts = [f"{a.replicas} x {a.accelerator}" for a in (whole, *whole.also) if a.replicas]
    return " + ".join(parts) or "nothing"
