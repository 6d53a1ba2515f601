"""Finite queues in closed form against the plain sum over states, and against the Go code's answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flyball.numerics.markov import Floats, ServiceRates, geometric_sums, occupancy

VECTORS = Path(__file__).parents[2] / "data" / "inferno" / "queue_analysis.json"


def plain(mu: Floats, servers: int, places: int, lam: float) -> tuple[float, float, float, float]:
    """In service, waiting, accepted and idle, by summing over all states."""
    states = np.arange(servers + places + 1)
    steps = np.log(lam) - np.log(mu[np.minimum(states[1:], servers) - 1])
    logs = np.concatenate(([0.0], np.cumsum(steps)))
    p = np.exp(logs - logs.max())
    p /= p.sum()
    served = np.minimum(states, servers)
    return float(served @ p), float((states - served) @ p), float(1 - p[-1]), float(p[0])


@pytest.mark.parametrize("load", [1e-6, 0.3, 0.999, 1 - 1e-7, 1.0, 1 + 1e-6, 1 + 2e-5, 1.2, 10.0])
@pytest.mark.parametrize("places", [0, 1, 2, 128, 3000])
def test_closed_form_is_the_sum_over_states(load: float, places: int, rng: np.random.Generator) -> None:
    """Any service rates, any load, balance included: the same means to 1e-8."""
    servers = np.array([1, 7, 30])
    mu = rng.uniform(0.1, 3.0, (3, 30))
    lam = load * mu[np.arange(3), servers - 1]
    seen = occupancy(ServiceRates.of(mu, servers, np.full(3, places)), lam[:, None])
    for row in range(3):
        ours = [float(v[row, 0]) for v in (seen.in_service, seen.waiting, seen.accepted, seen.idle)]
        assert ours == pytest.approx(plain(mu[row], int(servers[row]), places, float(lam[row])), rel=1e-8, abs=1e-12)


def test_recorded_queues_are_met() -> None:
    """M/M/1/K and state-dependent queues up to 32 000 places agree with the Go code to its float32."""
    for raw in json.loads(VECTORS.read_text())["rawQueueModels"]:
        if raw["model"] == "MM1K":
            servers, mu, present = 1, np.array([[float(raw["mu"])]]), raw["N"]
        else:
            servers, present = raw["N"], raw["Nsys"]
            batch = np.arange(1.0, servers + 1)
            mu = (batch / (raw["a"] + raw["b"] * batch))[None, :]
        service = ServiceRates.of(mu, np.array([servers]), np.array([raw["K"] - servers]))
        seen = occupancy(service, np.array([[float(raw["lambda"])]]))
        assert (seen.in_service + seen.waiting)[0, 0] == pytest.approx(present, rel=1e-5)
        assert raw["lambda"] * seen.accepted[0, 0] == pytest.approx(raw["throughput"], rel=1e-5)


@pytest.mark.parametrize("r", [1e-300, 0.5, 1 - 1e-5, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("terms", [0, 1, 2, 100])
def test_geometric_sums(r: float, terms: int) -> None:
    """Both sums at every ratio from 0 to 1, the ends included."""
    i = np.arange(terms)
    sums = geometric_sums(np.log([r]), np.array([float(terms)]))
    assert [float(s[0]) for s in sums] == pytest.approx([np.sum(r**i), np.sum(i * r**i)], rel=1e-8, abs=1e-300)
