"""A fleet as data: what may be used, what is promised, what runs, and what is planned.

A *server* is one model served for one service class; it runs as equal *replicas* on one accelerator. Costs are per
hour in the spec's own currency or unit; everything else is in seconds, tokens and requests per second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from flyball.core.errors import InvalidInput
from flyball.core.slo import SloBound

LOWEST_PRIORITY = 100  # of 1..100, 1 being served first
IDENTIFIED_BELOW = 1000.0  # condition number of the residuals' Jacobian in log parameters


def _check(owner: str, *, low: float = 0.0, **values: float) -> None:
    """Refuse a value that is not a finite number of at least `low`."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= low):
            raise InvalidInput(f"{owner}: {name} is {value}; give a finite number of at least {low:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerCurve:
    """What an accelerator draws, in watts: straight from idle to a middle point, and from there to full load.

    >>> PowerCurve(idle_w=100, middle_w=300, full_w=400, middle_at=0.5).at(0.75)
    350.0
    """

    idle_w: float
    full_w: float
    middle_w: float | None = None  # None: straight from idle to full
    middle_at: float = 0.5  # utilisation of the middle point

    def __post_init__(self) -> None:
        _check("power", idle_w=self.idle_w, full_w=self.full_w, middle_w=self.middle_w or 0.0)
        if not 0 < self.middle_at < 1:
            raise InvalidInput(f"power: middle_at is {self.middle_at}; give a utilisation between 0 and 1")

    def at(self, utilization: float) -> float:
        """Watts at a utilisation of 0 to 1."""
        if self.middle_w is None:
            return self.idle_w + (self.full_w - self.idle_w) * utilization
        if utilization <= self.middle_at:
            return self.idle_w + (self.middle_w - self.idle_w) * utilization / self.middle_at
        return self.middle_w + (self.full_w - self.middle_w) * (utilization - self.middle_at) / (1 - self.middle_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """What a replica runs on: one or several cards of one type, rented together."""

    name: str
    type: str  # what capacity is counted in
    units: int = 1  # cards of the type in one accelerator
    cost_per_h: float = 0.0
    memory_gb: float = 0.0  # of the whole accelerator, as are the next two; 0: not known
    memory_gb_s: float = 0.0  # its bandwidth
    compute_tflops: float = 0.0  # dense, at the precision that is served
    startup_cost: float = 0.0  # of starting it, once
    power: PowerCurve | None = None

    def __post_init__(self) -> None:
        _check(f"accelerator {self.name}", units=self.units, low=1)
        _check(f"accelerator {self.name}", cost_per_h=self.cost_per_h, startup_cost=self.startup_cost)
        _check(f"accelerator {self.name}", memory_gb=self.memory_gb)
        _check(f"accelerator {self.name}", memory_gb_s=self.memory_gb_s, compute_tflops=self.compute_tflops)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyProfile:
    """How fast one model runs on one accelerator under one configuration of its engine.

    An engine step takes alpha + beta * tokens computed + gamma * tokens of KV cache read. What the parameters mean
    exactly is settled by the queue model they were fitted under, so the profile names it.
    """

    model: str
    accelerator: str
    alpha_s: float
    beta_s: float
    gamma_s: float
    max_batch: int = 0  # most sequences in a step; 0: not known
    at_tokens: int = 0  # output length that max_batch was stated for; 0: max_batch holds at any length
    max_step_tokens: int = 0  # most tokens computed in a step; 0: the queue model's default
    accelerators: int = 1  # that one replica takes
    generation: str = ""  # configuration it was measured under
    queue_model: str = "v3"
    condition_number: float | None = None  # of the fit; None: not fitted by us
    delta_s: float = 0.0  # fourth parameter of a queue model that has one (v1)
    kv_tokens: int = 0  # that a replica's KV cache holds; 0: not known, no limit
    log_covariance: tuple[float, ...] = ()  # 3 x 3, of the logs of alpha, beta, gamma; empty: not known

    def __post_init__(self) -> None:
        owner = f"profile of {self.model} on {self.accelerator}"
        _check(owner, alpha_s=self.alpha_s, beta_s=self.beta_s, gamma_s=self.gamma_s, delta_s=self.delta_s)
        _check(owner, max_batch=self.max_batch, at_tokens=self.at_tokens, max_step_tokens=self.max_step_tokens)
        _check(owner, kv_tokens=self.kv_tokens)
        _check(owner, accelerators=self.accelerators, low=1)
        if len(self.log_covariance) not in (0, 9) or not all(math.isfinite(v) for v in self.log_covariance):
            raise InvalidInput(
                f"{owner}: log_covariance has {len(self.log_covariance)} entries; give 9 numbers, or none"
            )

    @property
    def known(self) -> bool:
        """Whether it says anything: a calibrator that has not converged leaves all three at 0."""
        return self.alpha_s + self.beta_s + self.gamma_s > 0

    @property
    def identified(self) -> bool:
        """Whether the data it was fitted to pin each parameter down; predictions near the data hold either way."""
        return self.condition_number is None or self.condition_number <= IDENTIFIED_BELOW

    def batch_limit(self, output_tokens: float) -> int:
        """Most sequences in a step for answers of this length: longer answers hold memory longer; 0: not known."""
        if not (self.at_tokens and output_tokens):
            return self.max_batch
        return max(int(self.max_batch * self.at_tokens / output_tokens), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Latencies promised, and tokens per second to be held ready; None promises nothing."""

    ttft_s: float | None = None  # mean from arrival to first token, waiting included
    itl_s: float | None = None  # mean gap between tokens
    output_tps: float | None = None  # of the whole server
    bounds: tuple[SloBound, ...] = ()  # on percentiles, and on E2E
    max_loss: float | None = None  # share of requests that may be turned away because the queue is full

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s", "output_tps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InvalidInput(f"target {name} is {value}; give a number above 0, or leave it out")
        if self.max_loss is not None and not 0 < self.max_loss < 1:
            raise InvalidInput(f"target max_loss is {self.max_loss}; give a share between 0 and 1, or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceClass:
    """Whom a promise is made to: its priority, and its targets for each model."""

    name: str
    priority: int = LOWEST_PRIORITY
    targets: Mapping[str, Targets] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The load on a server: how often requests come, and their mean lengths."""

    arrival_rps: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0
    input_cv: float | None = None  # coefficient of variation of lengths; None: equal prompts, exponential service
    output_cv: float | None = None
    prefix_hit: float = 0.0  # share of a prompt that is found in the cache

    def __post_init__(self) -> None:
        _check("load", arrival_rps=self.arrival_rps, input_tokens=self.input_tokens, output_tokens=self.output_tokens)
        _check("load", input_cv=self.input_cv or 0.0, output_cv=self.output_cv or 0.0, prefix_hit=self.prefix_hit)
        if self.prefix_hit > 1:
            raise InvalidInput(f"load: prefix_hit is {self.prefix_hit}; give a share between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Replicas on an accelerator; no accelerator and no replicas is a placement as well."""

    accelerator: str = ""
    replicas: int = 0
    cost_per_h: float = 0.0

    def __post_init__(self) -> None:
        _check(f"placement on {self.accelerator or 'nothing'}", replicas=self.replicas, cost_per_h=self.cost_per_h)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """One model served for one class: its load, its limits, and where it runs now."""

    name: str
    service_class: str
    model: str
    demand: Demand = field(default_factory=Demand)
    min_replicas: int = 0
    max_replicas: int | None = None  # None: as many as the load needs
    quota: str = ""  # of the fleet's quotas, the one that its cards count against
    max_batch: int = 0  # 0: as the profile says
    max_queue: int = 0  # requests that may wait at one replica; more are turned away
    keep_accelerator: bool = False
    current: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        owner = f"server {self.name}"
        _check(owner, min_replicas=self.min_replicas, max_batch=self.max_batch, max_queue=self.max_queue)
        if self.max_replicas is not None and self.max_replicas < max(self.min_replicas, 1):
            raise InvalidInput(
                f"{owner}: max_replicas is {self.max_replicas} with min_replicas {self.min_replicas}; "
                "give at least 1, and no less than min_replicas"
            )


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _named(kind: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidInput(f"{kind} {name!r} is given twice; keep one of them")
        seen.add(name)


SaturationPolicy = Literal["None", "PriorityExhaustive", "PriorityRoundRobin", "RoundRobin"]
SATURATION_POLICIES: tuple[SaturationPolicy, ...] = get_args(SaturationPolicy)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """All that a plan is made from."""

    accelerators: tuple[Accelerator, ...]
    profiles: tuple[LatencyProfile, ...]
    service_classes: tuple[ServiceClass, ...]
    servers: tuple[ServerSpec, ...]
    capacity: Mapping[str, int] = field(default_factory=dict)  # cards of each accelerator type
    unlimited: bool = False  # plan as if every type were plentiful
    heterogeneous: bool = False  # a server's replicas may run on several accelerators
    saturation_policy: SaturationPolicy = "None"  # of the greedy solver, where capacity is short
    delayed_best_effort: bool = False  # its best effort waits until every priority has been served
    quotas: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # name -> cards by type; others are free
    budget_per_h: float | None = None  # most that all replicas together may cost
    power_limit_w: float | None = None  # most that all accelerators together may draw
    energy_price_per_kwh: float = 0.0  # counts in the choice, beside the cost
    horizon_h: float = 1.0  # hours that a plan is expected to hold, over which start-up costs are spread

    def __post_init__(self) -> None:
        _named("accelerator", (a.name for a in self.accelerators))
        _named("profile", (f"{p.model} on {p.accelerator}" for p in self.profiles))
        _named("service class", (c.name for c in self.service_classes))
        _named("server", (s.name for s in self.servers))
        _check("the fleet", budget_per_h=self.budget_per_h or 0.0, power_limit_w=self.power_limit_w or 0.0)
        _check("the fleet", energy_price_per_kwh=self.energy_price_per_kwh)
        _check("the fleet", low=1e-3, horizon_h=self.horizon_h)
        for server in self.servers:
            if server.quota and server.quota not in self.quotas:
                raise InvalidInput(
                    f"server {server.name} counts against the quota {server.quota!r}, and the fleet has "
                    f"{_list(self.quotas)}; define it or correct the name"
                )

    def with_profile(self, fitted: LatencyProfile) -> FleetSpec:
        """The same fleet with a measured profile in place of what was stated for its model and accelerator.

        The number of accelerators a replica takes stays as stated. A pair the spec has no profile for gains one.
        """
        owner = f"the profile of {fitted.model!r} on {fitted.accelerator!r}"
        names = {a.name for a in self.accelerators}
        if fitted.accelerator not in names:
            raise InvalidInput(
                f"{owner} does not fit the spec, whose accelerators are {_list(names)}; add or rename one"
            )
        models = {p.model for p in self.profiles} | {s.model for s in self.servers}
        if fitted.model not in models:
            raise InvalidInput(f"{owner} does not fit the spec, whose models are {_list(models)}; add or rename one")
        stated = {(p.model, p.accelerator): p for p in self.profiles}
        old = stated.get((fitted.model, fitted.accelerator))
        stated[fitted.model, fitted.accelerator] = replace(
            fitted,
            max_batch=fitted.max_batch or (old.max_batch if old else 0),
            at_tokens=fitted.at_tokens if fitted.max_batch or old is None else old.at_tokens,
            accelerators=old.accelerators if old else fitted.accelerators,
        )
        return replace(self, profiles=tuple(stated.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation(Placement):
    """Where a server shall run, and what its requests should then see on average."""

    max_batch: int
    ttft_s: float
    itl_s: float
    utilization: float = 0.0  # share of the batch in use
    loss: float = 0.0  # share of requests turned away because the queue is full
    capacity_rps: float = 0.0  # of all replicas together, within the targets
    power_w: float = 0.0  # of all replicas at their load, where the accelerator's power is known
    slo_met: bool = True  # False where capacity was short, and fewer replicas run than the targets need
    also: tuple[Allocation, ...] = ()  # further replicas of the server, on other accelerators


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """The whole wanted state, never a delta; what could not be served is named with its reason."""

    allocations: Mapping[str, Allocation]  # by server, in the spec's order
    unserved: Mapping[str, str]  # server -> reason
    solver: str
    value: float = 0.0  # what the solver minimised, for the servers planned
    bound: float | None = None  # no plan for the same servers has a smaller value; None: the solver proves nothing

    @property
    def cost_per_h(self) -> float:
        """Of all allocations."""
        return math.fsum(part.cost_per_h for a in self.allocations.values() for part in (a, *a.also))

    @property
    def gap(self) -> float | None:
        """How far the value may be above the least one, relative to it; None: not known."""
        if self.bound is None:
            return None
        return max(self.value - self.bound, 0.0) / max(abs(self.value), 1e-9)
