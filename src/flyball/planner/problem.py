"""What a solver chooses from: for each server, every way to run it that keeps its promises, sized and priced.

The rules are those of llm-inferno's optimizer (docs/theory/queueing.md): how large the batch is, how many replicas the
load needs, what a change from the present placement is worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flyball.core.fleet import (
    LOWEST_PRIORITY,
    Accelerator,
    Allocation,
    FleetSpec,
    LatencyProfile,
    Placement,
    SaturationPolicy,
    ServerSpec,
    Targets,
)
from flyball.performance.memory import memory_batch
from flyball.performance.queueing import QueueModel, Replicas, queue_model
from flyball.performance.sizing import Goals, Measure, analyze_replicas, optimal_batch, size_replicas

BATCH_CEILING = 256  # of the search for a batch, where the profile states none (vLLM's usual max_num_seqs)
_ROUNDING = 1e-9  # relative
_BUDGET, _POWER = "cost/h of the budget", "W of power"  # names of limits, as complaints say them
MOVE_PENALTY = 0.1  # of both costs, for leaving an accelerator (llm-inferno's AccelPenaltyFactor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to run a server."""

    allocation: Allocation
    type: str = ""  # of accelerator, as capacity counts it
    cards: int = 0  # of that type, all replicas together
    extra: tuple[tuple[str, float], ...] = ()  # what it takes of further limits: quotas, the budget, power
    value: float = 0.0  # what solvers minimise: cost per hour, the price of moving, and the surcharge
    surcharge: float = 0.0  # an hour's share of starting new replicas, and energy
    sizing: Sizing | None = None  # what it was sized from; None: nothing runs
    also: tuple[Candidate, ...] = ()  # further replicas, on other accelerators

    @property
    def cards_each(self) -> int:
        """Cards of one replica."""
        return self.cards // max(self.allocation.replicas, 1)

    @property
    def uses(self) -> tuple[tuple[str, float], ...]:
        """What it takes of every limit, all replicas together."""
        return ((self.type, float(self.cards)), *self.extra) if self.cards else self.extra


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A server and its candidates, least value first; without any, the reason says why."""

    server: ServerSpec
    priority: int
    candidates: tuple[Candidate, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Choose at most one candidate for each server."""

    choices: tuple[Choice, ...]
    capacity: Mapping[str, float]  # cards of each type, and further limits by name; of what is missing there is none
    saturation_policy: SaturationPolicy = "None"
    delayed_best_effort: bool = False


def transition_value(current: Placement, new: Placement) -> float:
    """What a solver minimises: the cost added, and a tenth of both costs for moving to another accelerator.

    >>> transition_value(Placement(), Placement(accelerator="A100", replicas=2, cost_per_h=80.0))
    88.0
    """
    if current.accelerator == new.accelerator:
        return 0.0 if current.replicas == new.replicas else new.cost_per_h - current.cost_per_h
    return MOVE_PENALTY * (current.cost_per_h + new.cost_per_h) + new.cost_per_h - current.cost_per_h


def build(spec: FleetSpec, model: str | None = None) -> Problem:
    """Size every server on every accelerator that its model has a profile for.

    `model` names one queue model for all; without it each profile's own is used.
    """
    outcomes = _outcomes(spec)
    pairs = [pair for outcome in outcomes if not isinstance(outcome, str) for pair in outcome]
    sized = iter(_size(pairs, model, Terms.of(spec)))
    priorities = {c.name: c.priority for c in spec.service_classes}
    choices = []
    for server, outcome in zip(spec.servers, outcomes, strict=True):
        answers = () if isinstance(outcome, str) else [next(sized) for _ in outcome]
        candidates, reason = ((), outcome) if isinstance(outcome, str) else _settle(server, answers)
        priority = priorities.get(server.service_class, LOWEST_PRIORITY)
        choices.append(Choice(server=server, priority=priority, candidates=candidates, reason=reason))
    return Problem(
        choices=tuple(choices),
        capacity=_limits(spec),
        saturation_policy=spec.saturation_policy,
        delayed_best_effort=spec.delayed_best_effort,
    )


def _limits(spec: FleetSpec) -> dict[str, float]:
    """Amounts of everything that is limited, by the names that candidates use."""
    types = {a.type for a in spec.accelerators}
    limits = {name: math.inf if spec.unlimited else float(spec.capacity.get(name, 0)) for name in sorted(types)}
    for quota, cards in spec.quotas.items():
        limits |= {_of_quota(name, quota): float(count) for name, count in cards.items()}
    if spec.budget_per_h is not None:
        limits[_BUDGET] = spec.budget_per_h
    if spec.power_limit_w is not None:
        limits[_POWER] = spec.power_limit_w
    return limits


def _of_quota(type_name: str, quota: str) -> str:
    return f"{type_name} of quota {quota}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a candidate counts for beside its cost: limits of the whole fleet, start-up, energy."""

    quotas: Mapping[str, Mapping[str, int]]
    budget: bool
    power: bool
    energy_price_per_wh: float
    horizon_h: float

    @classmethod
    def of(cls, spec: FleetSpec) -> Terms:
        """The terms of a fleet."""
        return cls(
            quotas=spec.quotas,
            budget=spec.budget_per_h is not None,
            power=spec.power_limit_w is not None,
            energy_price_per_wh=spec.energy_price_per_kwh * 1e-3,
            horizon_h=spec.horizon_h,
        )

    def candidate(self, sizing: Sizing, allocation: Allocation) -> Candidate:
        """An allocation with all that it counts for."""
        pair = sizing.pair
        cards = pair.accelerator.units * pair.profile.accelerators * allocation.replicas
        started = pair.accelerator.startup_cost * pair.profile.accelerators * _new_replicas(pair.server, allocation)
        surcharge = started / self.horizon_h + allocation.power_w * self.energy_price_per_wh
        extra: list[tuple[str, float]] = []
        if pair.accelerator.type in self.quotas.get(pair.server.quota, ()):
            extra.append((_of_quota(pair.accelerator.type, pair.server.quota), float(cards)))
        if self.budget:
            extra.append((_BUDGET, allocation.cost_per_h))
        if self.power:
            extra.append((_POWER, allocation.power_w))
        return Candidate(
            allocation=allocation,
            type=pair.accelerator.type,
            cards=cards,
            extra=tuple(extra),
            value=transition_value(pair.server.current, allocation) + surcharge,
            surcharge=surcharge,
            sizing=sizing,
        )


def _new_replicas(server: ServerSpec, allocation: Allocation) -> int:
    stays = server.current.accelerator == allocation.accelerator
    return max(allocation.replicas - server.current.replicas * stays, 0)


def with_replicas(candidate: Candidate, replicas: int, *, rate_rps: float, value: float) -> Candidate:
    """The same way to run a server with another number of replicas, and what its requests see at a rate."""
    assert candidate.sizing is not None  # who runs replicas was sized
    sizing, a = candidate.sizing, candidate.allocation
    rates = np.array([rate_rps / replicas])
    seen = analyze_replicas(queue_model(sizing.model), _replicas([sizing.pair], [a.max_batch]), rates)
    share, used = replicas / a.replicas, float(seen.utilization[0])
    allocation = dataclasses.replace(
        a,
        replicas=replicas,
        cost_per_h=a.cost_per_h * share,
        capacity_rps=a.capacity_rps * share,
        ttft_s=float(seen.ttft_s[0]),
        itl_s=float(seen.itl_s[0]),
        utilization=used,
        loss=float(seen.loss[0]),
        power_w=sizing.pair.power_w(used) * replicas,
        slo_met=rate_rps <= a.capacity_rps * share * (1 + _ROUNDING),
    )
    return dataclasses.replace(sizing.terms.candidate(sizing, allocation), value=value)


@dataclass(frozen=True, slots=True)
class Sizing:
    """What a candidate was sized from."""

    pair: Pair
    model: str  # queue model
    terms: Terms

    @property
    def rate_rps(self) -> float:
        """What the server's replicas together must take."""
        return self.pair.rate_rps


@dataclass(frozen=True, slots=True)
class Pair:
    """A server on an accelerator, before it is sized."""

    server: ServerSpec
    accelerator: Accelerator
    profile: LatencyProfile
    targets: Targets

    @property
    def batch(self) -> int:
        """Its fixed batch limit; 0: to be searched for."""
        if self.server.max_batch:
            return self.server.max_batch
        return self.profile.batch_limit(self.server.demand.output_tokens) if self.profile.at_tokens else 0

    @property
    def memory(self) -> int | None:
        """Most requests that the KV cache holds; None: no limit known."""
        demand = self.server.demand
        if not self.profile.kv_tokens or not demand.input_tokens + demand.output_tokens:
            return None
        cv = {"input_cv": demand.input_cv or 0.0, "output_cv": demand.output_cv or 0.0}
        return int(memory_batch(self.profile.kv_tokens, demand.input_tokens, demand.output_tokens, **cv))

    @property
    def ceiling(self) -> int:
        """Most requests in a step, as far as is known, memory included."""
        most = self.batch or self.profile.max_batch or BATCH_CEILING
        return most if self.memory is None else min(most, self.memory)

    @property
    def rate_rps(self) -> float:
        """What the replicas together must take: the load, or more where more tokens per second are promised."""
        demand = self.server.demand
        if self.targets.output_tps is None or not demand.output_tokens:
            return demand.arrival_rps
        return max(demand.arrival_rps, self.targets.output_tps / demand.output_tokens)

    def power_w(self, utilization: float) -> float:
        """Of one replica; 0 where it is not known."""
        curve = self.accelerator.power
        return curve.at(utilization) * self.profile.accelerators if curve else 0.0


@dataclass(frozen=True, slots=True)
class _TooSlow:
    """A pair that misses a target however little load it is given."""

    pair: Pair
    ttft_s: float  # when idle; NaN where the queue model has no answer
    itl_s: float

    @property
    def excess(self) -> float:
        """How many times over its targets it is."""
        targets = self.pair.targets
        return max(self.ttft_s / (targets.ttft_s or math.inf), self.itl_s / (targets.itl_s or math.inf))

    def __str__(self) -> str:
        name = self.pair.accelerator.name
        if math.isnan(self.ttft_s):
            return f"{name} cannot be solved with a batch of 1 and no queue under this queue model"
        return f"{name} needs TTFT {self.ttft_s * 1e3:.4g} ms and ITL {self.itl_s * 1e3:.4g} ms when idle"


@dataclass(frozen=True, slots=True)
class _TooMany:
    """A pair that needs more replicas than its server may have."""

    pair: Pair
    replicas: int


_Answer = Candidate | _TooSlow | _TooMany


def _outcomes(spec: FleetSpec) -> list[list[Pair] | str]:
    """For each server the pairs to size, or the reason why it cannot be run; no pair where nothing need run."""
    accelerators = {a.name: a for a in spec.accelerators}
    classes = {c.name: c for c in spec.service_classes}
    profiles: dict[str, list[LatencyProfile]] = {}
    for profile in spec.profiles:
        profiles.setdefault(profile.model, []).append(profile)

    def pairs(server: ServerSpec) -> list[Pair] | str:
        service = classes.get(server.service_class)
        if service is None:
            return f"its service class {server.service_class!r} is not defined; define it or correct the name"
        targets = service.targets.get(server.model)
        if targets is None:
            return f"class {service.name!r} has no targets for model {server.model!r}; add them"
        if not (server.demand.arrival_rps or targets.output_tps or server.min_replicas):
            return []
        if server.demand.arrival_rps and not server.demand.input_tokens + server.demand.output_tokens:
            return f"its load of {server.demand.arrival_rps:g} requests/s has no token counts; state them"
        known = [p for p in profiles.get(server.model, ()) if p.known and p.accelerator in accelerators]
        if server.keep_accelerator and server.current.accelerator:
            known = [p for p in known if p.accelerator == server.current.accelerator]
        if not known:
            kept = f" that it is to keep ({server.current.accelerator!r})" if server.keep_accelerator else ""
            return f"model {server.model!r} has no latency profile on any accelerator{kept}; measure one (flyball fit)"
        found = [Pair(server, accelerators[p.accelerator], p, targets) for p in known]
        if not (fitting := [pair for pair in found if pair.memory != 0]):
            tokens = server.demand.input_tokens + server.demand.output_tokens
            most = max(p.kv_tokens for p in known)
            return f"no KV cache holds a request of {tokens:g} tokens, the largest has room for {most}; add memory"
        return fitting

    return [pairs(server) for server in spec.servers]


def _order(candidate: Candidate) -> tuple[float, float, float, str]:
    """Least value first; of equals the cheaper, then that of smaller replicas, which follow a load more closely."""
    a = candidate.allocation
    return candidate.value, a.cost_per_h, a.cost_per_h / max(a.replicas, 1), a.accelerator


def _settle(server: ServerSpec, answers: Sequence[_Answer]) -> tuple[tuple[Candidate, ...], str]:
    """A server's candidates in order, or why it has none."""
    if not answers:
        nothing = Allocation(max_batch=0, ttft_s=0.0, itl_s=0.0)
        return (Candidate(allocation=nothing, value=transition_value(server.current, nothing)),), ""
    candidates = [a for a in answers if isinstance(a, Candidate)]
    if candidates:
        return tuple(sorted(candidates, key=_order)), ""
    if many := [a for a in answers if isinstance(a, _TooMany)]:
        fewest = min(many, key=lambda a: (a.replicas, a.pair.accelerator.name))
        return (), (
            f"it may have {server.max_replicas} replicas and needs {fewest.replicas} on {fewest.pair.accelerator.name} "
            f"for {fewest.pair.rate_rps:g} requests/s within its targets; allow more, or add a faster accelerator"
        )
    nearest = min((a for a in answers if isinstance(a, _TooSlow)), key=lambda a: (a.excess, a.pair.accelerator.name))
    targets = nearest.pair.targets
    means = (("TTFT", targets.ttft_s), ("ITL", targets.itl_s))
    wanted = " and ".join([
        *(f"{name} <= {limit * 1e3:g} ms" for name, limit in means if limit),
        *map(str, targets.bounds),
        *([f"a loss of at most {targets.max_loss:g}"] if targets.max_loss else []),
    ])  # fmt: skip
    return (), (
        f"no accelerator keeps {wanted} for model {server.model!r} at {server.demand.input_tokens:g} tokens in, "
        f"{server.demand.output_tokens:g} out: {nearest}; relax the targets or add a faster accelerator"
    )


def _size(pairs: Sequence[Pair], model: str | None, terms: Terms) -> list[_Answer]:
    """Size all pairs, together those that share a queue model and a rule for the batch."""
    groups: dict[tuple[str, bool], list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault((model or pair.profile.queue_model, pair.batch == 0), []).append(index)
    answers: dict[int, _Answer] = {}
    for (name, search), members in groups.items():
        answers.update(zip(members, _size_alike(name, [pairs[i] for i in members], search, terms), strict=True))
    return [answers[index] for index in range(len(pairs))]


def _replicas(pairs: Sequence[Pair], batches: Sequence[int]) -> Replicas:
    """One replica of each pair, with a batch limit, under its server's load."""
    demands = [p.server.demand for p in pairs]
    return Replicas.of(
        alpha_s=[p.profile.alpha_s for p in pairs],
        beta_s=[p.profile.beta_s for p in pairs],
        gamma_s=[p.profile.gamma_s for p in pairs],
        input_tokens=[d.input_tokens for d in demands],
        output_tokens=[d.output_tokens if d.input_tokens else max(d.output_tokens, 1.0) for d in demands],
        max_batch=batches,
        max_queue=[p.server.max_queue for p in pairs],
        max_step_tokens=[p.profile.max_step_tokens for p in pairs],
        delta_s=[p.profile.delta_s for p in pairs],
        prefix_hit=[d.prefix_hit for d in demands],
        input_cv=[math.nan if d.input_cv is None else d.input_cv for d in demands],
        output_cv=[math.nan if d.output_cv is None else d.output_cv for d in demands],
    )


def _bounds(targets: Sequence[Targets]) -> dict[Measure, list[float]]:
    """For every latency and percentile that anybody is promised, the limit of each; infinity where none is."""
    limits: dict[Measure, list[float]] = {}
    for index, one in enumerate(targets):
        for bound in one.bounds:
            row = limits.setdefault((bound.metric, bound.percentile), [math.inf] * len(targets))
            row[index] = min(row[index], bound.limit_s)
    return limits


def _size_alike(name: str, pairs: Sequence[Pair], search: bool, terms: Terms) -> list[_Answer]:
    """Size pairs under one queue model, with their own batch limits or with the best ones under their ceilings."""
    model: QueueModel = queue_model(name)
    replicas = _replicas(pairs, [p.ceiling for p in pairs])
    goals = Goals.of(
        len(pairs),
        ttft_s=[p.targets.ttft_s or math.inf for p in pairs],
        itl_s=[p.targets.itl_s or math.inf for p in pairs],
        stable=[p.targets.output_tps is not None for p in pairs],
        loss=[p.targets.max_loss or math.inf for p in pairs],
        bounds=_bounds([p.targets for p in pairs]),
    )
    if search:
        best = optimal_batch(model, replicas, goals)
        replicas, sized = dataclasses.replace(replicas, max_batch=best.batch), best.sized
    else:
        sized = size_replicas(model, replicas, goals)
    per_replica = sized.metrics.throughput_rps
    rates = np.array([p.rate_rps for p in pairs])
    least = np.array([p.server.min_replicas for p in pairs])
    counts = np.maximum(np.ceil(rates / np.where(sized.feasible, per_replica, np.inf)), least)
    seen = analyze_replicas(model, replicas, rates / np.maximum(counts, 1))
    numbers = zip(
        counts.astype(int).tolist(), replicas.max_batch.tolist(), seen.ttft_s.tolist(), seen.itl_s.tolist(),
        seen.utilization.tolist(), seen.loss.tolist(), (counts * per_replica).tolist(), strict=True,
    )  # fmt: skip
    idle = zip(sized.feasible.tolist(), sized.idle_ttft_s.tolist(), sized.idle_itl_s.tolist(), strict=True)
    return [
        _candidate(Sizing(pair, name, terms), *number) if feasible else _TooSlow(pair, ttft_s, itl_s)
        for pair, number, (feasible, ttft_s, itl_s) in zip(pairs, numbers, idle, strict=True)
    ]


def _candidate(
    sizing: Sizing, replicas: int, batch: int, ttft_s: float, itl_s: float, utilization: float, loss: float, rps: float
) -> Candidate | _TooMany:
    pair = sizing.pair
    if pair.server.max_replicas is not None and replicas > pair.server.max_replicas:
        return _TooMany(pair, replicas)
    allocation = Allocation(
        accelerator=pair.accelerator.name,
        replicas=replicas,
        cost_per_h=pair.accelerator.cost_per_h * pair.profile.accelerators * replicas,
        max_batch=batch,
        ttft_s=ttft_s,
        itl_s=itl_s,
        utilization=utilization,
        loss=loss,
        power_w=pair.power_w(utilization) * replicas,
        capacity_rps=rps,
    )
    return sizing.terms.candidate(sizing, allocation)
