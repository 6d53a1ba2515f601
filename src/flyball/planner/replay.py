"""A recorded fleet planned again: what it would have cost, and whether the promises would have been kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from flyball.core.fleet import Allocation, FleetSpec, Placement
from flyball.performance.queueing import Replicas, queue_model
from flyball.planner.plan import plan

_ROUNDING = 1e-4  # relative: logs round their figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One cycle: theirs as recorded, ours as planned; attainment is the share of servers predicted to keep targets."""

    their_cost_per_h: float
    our_cost_per_h: float
    their_attainment: float
    our_attainment: float
    unserved: Mapping[str, str]


def compare(spec: FleetSpec, theirs: Mapping[str, Placement], batches: Mapping[str, int]) -> Compared:
    """Plan one cycle, moves free of charge, and predict both fleets by the same queue model."""
    ours = plan(spec)
    kept = sum(keeps(spec, s, theirs[s], batches[s]) for s in theirs)
    held = sum(keeps(spec, s, a, a.max_batch) for s, a in ours.allocations.items())
    count = max(len(spec.servers), 1)
    return Compared(
        their_cost_per_h=math.fsum(p.cost_per_h for p in theirs.values()),
        our_cost_per_h=ours.cost_per_h,
        their_attainment=kept / count,
        our_attainment=held / count,
        unserved=ours.unserved,
    )


def keeps(spec: FleetSpec, server: str, placement: Placement | Allocation, batch: int) -> bool:
    """Whether a server on these replicas is predicted to keep its mean targets."""
    one = next(s for s in spec.servers if s.name == server)
    targets = next(c for c in spec.service_classes if c.name == one.service_class).targets[one.model]
    demand = one.demand
    if not demand.arrival_rps:
        return True
    profile = next(
        (p for p in spec.profiles if (p.model, p.accelerator) == (one.model, placement.accelerator) and p.known), None
    )
    if profile is None or not placement.replicas:
        return False
    replica = Replicas.of(
        alpha_s=profile.alpha_s, beta_s=profile.beta_s, gamma_s=profile.gamma_s, input_tokens=demand.input_tokens,
        output_tokens=demand.output_tokens, max_batch=batch, max_queue=one.max_queue,
    )  # fmt: skip
    each = np.array([demand.arrival_rps / placement.replicas])
    seen = queue_model(profile.queue_model).prepare(replica).analyze(each)
    limits = ((targets.ttft_s, seen.ttft_s), (targets.itl_s, seen.itl_s))
    return all(limit is None or float(value[0]) <= limit * (1 + _ROUNDING) for limit, value in limits)
