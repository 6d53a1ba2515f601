"""Melange's problem, against its own answers and the recorded optima."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyball.adapters.bucket_files import bucket_solution, buckets_from
from flyball.adapters.fields import Fields
from flyball.core.errors import Infeasible, InvalidInput
from flyball.planner.buckets import Buckets, plan_buckets

CASES = json.loads((Path(__file__).parents[2] / "data" / "fleet" / "melange.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_slices_meet_the_optimum_and_routing_betters_it(case: dict[str, Any]) -> None:
    """The cost equals the recorded optimum with slices, is no more when loads are divided; every load is carried."""
    sliced = buckets_from(Fields(case["input"], "case"))
    divided = replace(sliced, slices=None)
    for problem, cost in ((sliced, case["slices_cost"]), (divided, case["divisible_cost"])):
        found = plan_buckets(problem)
        assert found.cost_per_h == pytest.approx(cost, rel=1e-6)
        assert case["lp_bound"] - 1e-6 <= found.bound <= found.cost_per_h * (1 + 1e-9)
        assert found.gap <= 1e-6
        assert not found.unserved
        assert found.share.sum(axis=0)[problem.rate_rps > 0] == pytest.approx(1.0)
        load = np.where(found.share > 0, problem.rate_rps / np.maximum(problem.throughput_rps, 1e-12), 0.0)
        need = (found.share * load).sum(axis=(1, 2))
        counts = np.array(list(found.counts.values()))
        assert (need <= counts + 1e-6).all()
    whole = plan_buckets(sliced).share * sliced.slices
    assert whole == pytest.approx(np.rint(whole))
    assert sliced.slices is not None


def problem(**changes: Any) -> Buckets:
    """Two buckets, of which only the fast accelerator takes the second."""
    base = Buckets(
        accelerators=("slow", "fast"),
        cost_per_h=np.array([1.0, 3.0]),
        throughput_rps=np.array([[[2.0, 0.0]], [[8.0, 4.0]]]),
        rate_rps=np.array([[9.0, 2.0]]),
        slices=None,
    )
    return replace(base, **changes)


def test_a_bucket_that_nothing_serves_is_named_and_the_rest_planned() -> None:
    """An infeasible cell is told with its rate and the way out; the other is served all the same."""
    found = plan_buckets(problem(throughput_rps=np.array([[[2.0, 0.0]], [[8.0, 0.0]]])))
    assert set(found.unserved) == {(0, 1)}
    assert "2 requests/s come, and no accelerator (slow, fast) takes any" in found.unserved[0, 1]
    assert found.counts["slow"] + found.counts["fast"] > 0
    assert found.share[:, 0, 1].sum() == 0


def test_limited_accelerators_are_kept_or_said_to_be_too_few() -> None:
    """With fewer fast ones the slow ones take more; with too few of all the complaint says so."""
    free, limited = plan_buckets(problem(rate_rps=np.array([[9.0, 6.0]]))), plan_buckets(problem(most={"slow": 1}))
    assert free.counts["fast"] >= 2
    assert limited.counts["slow"] <= 1
    with pytest.raises(Infeasible, match="cannot take the load of all buckets; allow more"):
        plan_buckets(problem(most={"fast": 0, "slow": 9}, throughput_rps=np.array([[[2.0, 0.0]], [[8.0, 4.0]]])))


def test_no_load_rents_nothing() -> None:
    """Where no requests come nothing is rented, and nothing is unserved."""
    found = plan_buckets(problem(rate_rps=np.zeros((1, 2))))
    assert dict(found.counts) == {"slow": 0, "fast": 0}
    assert found.cost_per_h == 0
    assert not found.unserved


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu_info": {}}, "gpu_info names no accelerator"),
        ({"workload_distribution": [[1], [1, 2]]}, "workload_distribution is not a table"),
        ({"workload_distribution": [[1.0]]}, "give both the same"),
        ({"workload_distribution": [[0.5, -1], [0, 0]]}, "has -1; give numbers of at least 0"),
        ({"slice_factor": 0.5}, "slice_factor is 0.5; give a"),
        ({"total_request_rate": "many"}, "total_request_rate is 'many'; give a number"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], says: str) -> None:
    """Each complaint says the field, the value and the fix."""
    with pytest.raises(InvalidInput, match=says):
        buckets_from(Fields({**CASES[0]["input"], **change}, "case"))


def test_the_answer_says_where_each_bucket_goes() -> None:
    """As JSON a plan has its cost, its bound, and shares that add up to 1 for each bucket served."""
    base = problem()
    answer = json.loads(json.dumps(bucket_solution(base, plan_buckets(base))))
    assert answer["accelerators"] == {"slow": 0, "fast": 2}
    assert answer["cost"] == 6.0
    assert [sum(cell["share"].values()) for cell in answer["routing"]] == pytest.approx([1.0, 1.0])
    assert answer["gap"] <= 1e-6
