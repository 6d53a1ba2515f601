"""Workloads hold what can be sent, in order."""

from __future__ import annotations

from typing import Any

import pytest

from flyball.core.errors import InvalidInput
from flyball.core.workload import RequestSpec, Workload, mean_lengths


def _spec(arrival_s: float = 0.0, **fields: Any) -> RequestSpec:
    return RequestSpec(**({"arrival_s": arrival_s, "input_tokens": 10, "output_tokens": 2} | fields))


@pytest.mark.parametrize(
    "fields",
    [{"arrival_s": -1}, {"arrival_s": float("nan")}, {"input_tokens": 0}, {"output_tokens": 0}, {"prefix_tokens": 0}],
)
def test_a_request_can_be_sent(fields: dict[str, Any]) -> None:
    """A request before the start, or without a token, is refused."""
    with pytest.raises(InvalidInput, match="a request needs arrival_s >= 0"):
        _spec(**fields)


def test_a_workload_is_in_order_and_not_empty() -> None:
    """Requests out of order, or none at all, are refused, and the message names the source."""
    with pytest.raises(InvalidInput, match="'mine' is not in order"):
        Workload(requests=(_spec(1.0), _spec(0.5)), source="mine")
    with pytest.raises(InvalidInput, match="'mine' holds no request"):
        Workload(requests=(), source="mine")


def test_rates_and_lengths() -> None:
    """Rate is arrivals over the time to the last; one request alone has none."""
    load = Workload(requests=(_spec(0.0), _spec(1.0, input_tokens=30), _spec(4.0, output_tokens=8)), source="s")
    assert (load.duration_s, load.rate_rps) == (4.0, 0.75)
    assert Workload(requests=(_spec(3.0),), source="s").rate_rps == 0
    assert mean_lengths(load.requests) == (50 / 3, 4)
