"""arqonhpo's API: their published programs run with another import, and do what their texts promise."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from flyball.compat.arqonhpo import ArqonMaximizer, ArqonProbe, ArqonSolver
from flyball.core.errors import InvalidInput

SLO_MS = 200.0
CONFIG: dict[str, Any] = {
    "seed": 42,
    "budget": 200,
    "bounds": {"batch_size": {"min": 1, "max": 64, "scale": "Log"}, "max_wait_ms": {"min": 10, "max": 500}},
}


class ServingEngine:
    """The engine of their dynamic batching example: latency grows with batch and wait, cost falls with both."""

    def set_batch_config(self, batch_size: int, max_wait_ms: float) -> None:
        """Take effect at once."""
        self.p99_latency_ms = 20 + 2.5 * batch_size + 0.6 * max_wait_ms
        self.cost_per_token = 10 / (1 + math.log(1 + batch_size)) + 3 * math.exp(-max_wait_ms / 60)


def dynamic_batching(solver: ArqonSolver) -> list[tuple[float, float]]:
    """Their example's loop as published: p99 and cost of each step."""
    engine, seen = ServingEngine(), []
    while True:
        candidate = solver.ask_one()
        if candidate is None:
            break
        engine.set_batch_config(batch_size=int(candidate["batch_size"]), max_wait_ms=candidate["max_wait_ms"])
        seen.append((engine.p99_latency_ms, engine.cost_per_token))
        reward = -1000 if engine.p99_latency_ms > SLO_MS else -engine.cost_per_token
        solver.seed(json.dumps([{"params": candidate, "value": reward, "cost": 60.0}]))
    return seen


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("how", ["key", "import"])
def test_dynamic_batching_keeps_the_slo_and_lowers_the_cost(seed: int, how: str) -> None:
    """With the direction stated, by a key or by the import, p99 holds at the end and the cost is near its least."""
    config = CONFIG | {"seed": seed}
    solver = (
        ArqonSolver(json.dumps(config | {"direction": "maximize"})) if how == "key"
        else ArqonMaximizer(json.dumps(config))
    )  # fmt: skip
    seen = dynamic_batching(solver)
    assert len(seen) == 200
    last = seen[-50:]
    assert sum(p99 > SLO_MS for p99, _ in last) <= 2
    assert sum(cost for _, cost in last) / 50 < 2.60  # the least possible is 2.409, a random point's 3.6


def test_constraints_take_the_place_of_penalties() -> None:
    """The same engine with a margin: fewer breaches on the way, and a lower cost."""
    config = CONFIG | {"constraints": ["p99"]}
    solver, engine = ArqonSolver(json.dumps(config)), ServingEngine()
    broken, costs = 0, []
    while (candidate := solver.ask_one()) is not None:
        engine.set_batch_config(int(candidate["batch_size"]), candidate["max_wait_ms"])
        broken += engine.p99_latency_ms > SLO_MS
        costs.append(engine.cost_per_token)
        margin = {"p99": engine.p99_latency_ms / SLO_MS - 1}
        solver.seed(json.dumps([
            {"params": candidate, "value": engine.cost_per_token, "cost": 60.0, "constraints": margin},
        ]))  # fmt: skip
    assert broken <= 30
    assert sum(costs[-50:]) / 50 < 2.43
    best = solver.best()
    assert best is not None
    assert best["value"] < 2.43


def test_batches_fill_the_budget_within_the_bounds() -> None:
    """`ask` and `tell` to the end: as many results as the budget, none out of bounds, the last batches better."""
    bounds = {"x": {"min": -5.0, "max": 10.0}, "y": {"min": 1e-5, "max": 1e-1, "scale": "Log"}}
    solver = ArqonSolver(json.dumps({"seed": 1, "budget": 60, "bounds": bounds, "probe_ratio": 0.2}))
    values: list[float] = []
    while (batch := solver.ask()) is not None:
        assert len({tuple(c.values()) for c in batch}) == len(batch)
        results = []
        for i, c in enumerate(batch):
            assert -5.0 <= c["x"] <= 10.0
            assert 1e-5 <= c["y"] <= 1e-1
            values.append((c["x"] - 2) ** 2 + (math.log10(c["y"]) + 3) ** 2)
            results.append({"eval_id": i, "params": c, "value": values[-1], "cost": 1.0})
        solver.tell(json.dumps(results))
    assert len(values) == solver.get_history_len() == 60
    assert min(values) < 0.05


def test_equal_seeds_give_equal_candidates() -> None:
    """And two asks without a tell give two."""
    a, b = ArqonSolver(json.dumps(CONFIG)), ArqonSolver(json.dumps(CONFIG))
    first = [a.ask_one() for _ in range(5)]
    assert first == [b.ask_one() for _ in range(5)]
    assert len({json.dumps(c) for c in first}) == 5


def test_past_results_are_a_start() -> None:
    """`seed` before the first ask: the search goes on from the best of them."""
    solver = ArqonSolver(json.dumps({"seed": 1, "budget": 40, "bounds": {"x": {"min": -5, "max": 5}}}))
    past = [{"params": {"x": x}, "value": (x - 1) ** 2, "cost": 1.0} for x in (-4.0, 0.0, 0.9, 3.0)]
    solver.seed(json.dumps(past))
    assert solver.get_history_len() == 4
    best = solver.best()
    assert best is not None
    assert best["params"]["x"] == pytest.approx(0.9)


def test_the_probe_is_stateless() -> None:
    """Any point by its number, the same in a range, spread over the bounds."""
    bounds = {"x": {"min": 0, "max": 1}, "y": {"min": 1, "max": 1000, "scale": "Log"}}
    config = json.dumps({"seed": 1, "budget": 10, "bounds": bounds})
    probe = ArqonProbe(config, seed=7)
    points = probe.sample_range(0, 64)
    assert points[10] == ArqonProbe(config, seed=7).sample_at(10)
    assert points != ArqonProbe(config, seed=8).sample_range(0, 64)
    for name, middle in (("x", 0.5), ("y", 1000**0.5)):
        assert 28 <= sum(p[name] < middle for p in points) <= 36


def test_an_endless_budget_never_ends() -> None:
    """`null` for the budget of a live service."""
    solver = ArqonSolver(json.dumps({"seed": 1, "budget": None, "bounds": {"x": {"min": 0, "max": 1}}}))
    for _ in range(300):
        candidate = solver.ask_one()
        assert candidate is not None
        solver.seed(json.dumps([{"params": candidate, "value": candidate["x"], "cost": 1.0}]))


def test_a_periodic_parameter_wraps() -> None:
    """An optimum at the seam of an angle is found from both sides."""
    bounds = {"angle": {"min": 0.0, "max": 360.0, "scale": "Periodic"}}
    solver = ArqonSolver(json.dumps({"seed": 3, "budget": 60, "bounds": bounds}))
    while (c := solver.ask_one()) is not None:
        solver.seed(json.dumps([{"params": c, "value": 1 - math.cos(math.radians(c["angle"] - 1)), "cost": 1.0}]))
    best = solver.best()
    assert best is not None
    assert best["value"] < 1e-3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"guardrails": {}}, "guardrails"),
        ({"seed": None}, "seed"),
        ({"budget": -1}, "budget"),
        ({"bounds": {}}, "bounds"),
        ({"bounds": {"x": {"min": 0, "max": 1, "scale": "Cubic"}}}, "Cubic"),
        ({"bounds": {"x": {"min": 0, "max": 1, "scale": "Log"}}}, "x"),
        ({"bounds": {"x": {"min": 0, "max": float("nan")}}}, "max of x"),
        ({"direction": "up"}, "up"),
        ({"strategy_params": {"gamma": 1}}, "strategy_params"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    """Nothing is ignored: what cannot be used is named."""
    with pytest.raises(InvalidInput, match=named):
        ArqonSolver(json.dumps(CONFIG | change))


def test_wrong_results_are_refused_by_name() -> None:
    """Unknown keys, missing values, values that are no numbers, parameters out of bounds."""
    solver = ArqonSolver(json.dumps(CONFIG))
    params = {"batch_size": 8.0, "max_wait_ms": 100.0}
    for wrong in (
        "nonsense", "{}", '[{"value": 1}]', json.dumps([{"params": params}]),
        json.dumps([{"params": params, "value": "low"}]), json.dumps([{"params": params, "value": 1, "weight": 2}]),
        json.dumps([{"params": {"batch_size": 99.0, "max_wait_ms": 100.0}, "value": 1}]),
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            solver.tell(wrong)
    solver.tell(json.dumps([{"params": params, "failed": "out of memory"}]))
    assert solver.get_history_len() == 1
    assert solver.best() is None
