"""Fleets to plan: llm-inferno's sample sets, and one small enough to reason about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flyball.adapters.fleet_files import read_fleet
from flyball.core.fleet import (
    Accelerator,
    Demand,
    FleetSpec,
    LatencyProfile,
    ServerSpec,
    ServiceClass,
    Targets,
)

DATA = Path(__file__).parents[2] / "data" / "inferno"


@pytest.fixture(scope="session")
def sample() -> Callable[..., FleetSpec]:
    """A sample set by name, with a queue size and a share of its capacity."""

    def load(name: str, max_queue: int, *, capacity: float = 1.0, unlimited: bool = False) -> FleetSpec:
        spec = read_fleet(DATA / name)
        return replace(
            spec,
            servers=tuple(replace(s, max_queue=max_queue) for s in spec.servers),
            capacity={name: int(count * capacity) for name, count in spec.capacity.items()},
            unlimited=unlimited,
        )

    return load


@pytest.fixture
def fleet() -> Callable[..., FleetSpec]:
    """One model on a slow cheap and a fast dear accelerator; servers as given."""

    def make(
        *servers: ServerSpec, capacity: dict[str, int] | None = None, output_tps: float | None = None
    ) -> FleetSpec:
        profile = LatencyProfile(
            model="m", accelerator="slow", alpha_s=0.02, beta_s=1e-4, gamma_s=1e-7, max_batch=32, at_tokens=128
        )
        targets = {"m": Targets(ttft_s=0.5, itl_s=0.05, output_tps=output_tps)}
        return FleetSpec(
            accelerators=(
                Accelerator(name="slow", type="S", cost_per_h=1.0),
                Accelerator(name="fast", type="F", units=2, cost_per_h=5.0),
            ),
            profiles=(profile, replace(profile, accelerator="fast", alpha_s=0.005, beta_s=2.5e-5)),
            service_classes=(
                ServiceClass(name="gold", priority=1, targets=targets),
                ServiceClass(name="iron", priority=9, targets=targets),
                ServiceClass(name="strict", priority=1, targets={"m": Targets(itl_s=0.004)}),
            ),
            servers=servers,
            capacity=capacity or {},
            unlimited=capacity is None,
        )

    return make


@pytest.fixture
def server() -> Callable[..., ServerSpec]:
    """A server of model m for class gold, under a load that needs several slow replicas."""

    def make(name: str = "s", **changes: object) -> ServerSpec:
        demand = Demand(arrival_rps=20.0, input_tokens=256, output_tokens=128)
        return replace(ServerSpec(name=name, service_class="gold", model="m", demand=demand, max_queue=64), **changes)  # type: ignore[arg-type]

    return make
