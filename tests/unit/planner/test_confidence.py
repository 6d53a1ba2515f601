"""Plans against what a law may be at worst."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.core.fleet import Accelerator, Demand, FleetSpec, LatencyProfile, ServerSpec, ServiceClass, Targets
from flyball.planner.confidence import cautious
from flyball.planner.plan import plan

SURE, UNSURE = (np.eye(3) * 0.01**2, np.eye(3) * 0.3**2)


def fleet(covariance: np.ndarray | None) -> FleetSpec:
    """One server on one accelerator whose law is more or less sure."""
    known = tuple(covariance.ravel().tolist()) if covariance is not None else ()
    return FleetSpec(
        accelerators=(Accelerator(name="A", type="A", cost_per_h=1.0),),
        profiles=(
            LatencyProfile(
                model="m", accelerator="A", alpha_s=8e-3, beta_s=2e-5, gamma_s=2e-7, max_batch=64, log_covariance=known
            ),
        ),
        service_classes=(ServiceClass(name="c", targets={"m": Targets(ttft_s=0.5, itl_s=0.03)}),),
        servers=(
            ServerSpec(
                name="s", service_class="c", model="m", max_queue=64,
                demand=Demand(arrival_rps=100.0, input_tokens=512, output_tokens=256),
            ),
        ),
        unlimited=True,
    )  # fmt: skip


def replicas(spec: FleetSpec) -> int:
    """How many the plan runs."""
    return plan(spec).allocations["s"].replicas


def test_doubt_costs_replicas_and_certainty_none() -> None:
    """A law known within 1 % is planned as it is; one within 30 % needs more replicas at 90 %, and yet more at 99 %."""
    assert replicas(cautious(fleet(SURE), 0.9)) == replicas(fleet(SURE))
    some, more = (replicas(cautious(fleet(UNSURE), c)) for c in (0.9, 0.99))
    assert replicas(fleet(UNSURE)) < some < more


def test_half_is_the_law_itself() -> None:
    """With a confidence of one half nothing is added."""
    assert cautious(fleet(UNSURE), 0.5) == fleet(UNSURE)


def test_what_moves_together_is_dearer_than_what_is_told_apart() -> None:
    """A common doubt about all three adds up; opposite ones, as of loads that do not tell them apart, cancel."""
    together, apart = np.full((3, 3), 0.3**2) + np.eye(3) * 1e-6, np.diag([0.3**2] * 3)
    assert replicas(cautious(fleet(together), 0.9)) > replicas(cautious(fleet(apart), 0.9))


def test_it_says_what_it_needs() -> None:
    """Profiles without uncertainty, and confidences that are none, are named."""
    with pytest.raises(InvalidInput, match="no profile says how uncertain it is"):
        cautious(fleet(None), 0.9)
    with pytest.raises(InvalidInput, match=r"the confidence is 1; give at least 0\.5"):
        cautious(fleet(SURE), 1.0)
    spec = fleet(SURE)
    other = replace(spec.profiles[0], model="n", log_covariance=())
    assert cautious(replace(spec, profiles=(*spec.profiles, other)), 0.9).profiles[1] == other
