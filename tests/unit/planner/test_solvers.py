"""Solvers are found by name, keep their time, and the optimal ones are, by brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.sparse import csr_array

from flyball.core.errors import InvalidInput
from flyball.core.fleet import Allocation, FleetSpec, ServerSpec
from flyball.planner.plan import plan
from flyball.planner.problem import Candidate, Choice, Problem, build
from flyball.planner.solvers import Solution, solver
from flyball.planner.solvers.program import Budget, IntegerProgram

LIMITS = ("A", "B", "budget")


def random_problem(rng: np.random.Generator, servers: int, *, tightness: float) -> Problem:
    """Servers of three priorities with up to three candidates; cards of two types and a budget are limited."""
    choices = []
    for s in range(servers):
        candidates = []
        for kind in rng.permutation(["A", "B", "A"])[: int(rng.integers(1, 4))].tolist():
            cards, cost = int(rng.integers(1, 9)), float(rng.integers(5, 60))
            allocation = Allocation(
                accelerator=kind, replicas=1, cost_per_h=cost, max_batch=1, ttft_s=0.1, itl_s=0.01, capacity_rps=1.0
            )
            candidates.append(
                Candidate(allocation=allocation, type=kind, cards=cards, extra=(("budget", cost),), value=cost * 1.1)
            )
        server = ServerSpec(name=f"s{s:03d}", service_class="c", model="m")
        ordered = tuple(sorted(candidates, key=lambda c: (c.value, c.cards, c.type)))
        choices.append(Choice(server=server, priority=int(rng.integers(1, 4)), candidates=ordered))
    room = {"A": 2.5 * servers * tightness, "B": 2.0 * servers * tightness, "budget": 30.0 * servers * tightness}
    return Problem(choices=tuple(choices), capacity={name: float(int(amount)) for name, amount in room.items()})


def merit(problem: Problem, chosen: tuple[Candidate | None, ...]) -> tuple[float, ...]:
    """Servers of priority 1, 2, 3 that are served, negative, and the value; of two plans the smaller is better."""
    served = [0.0] * 3
    for choice, candidate in zip(problem.choices, chosen, strict=True):
        served[choice.priority - 1] -= candidate is not None
    return (*served, round(math.fsum(c.value for c in chosen if c), 6))


def keeps_limits(problem: Problem, chosen: tuple[Candidate | None, ...]) -> bool:
    """Whether a plan keeps every limit."""
    used = dict.fromkeys(LIMITS, 0.0)
    for candidate in chosen:
        for name, amount in candidate.uses if candidate else ():
            used[name] += amount
    return all(used[name] <= problem.capacity[name] + 1e-9 for name in LIMITS)


@pytest.mark.parametrize("seed", range(24))
def test_priorities_are_lexicographic_by_brute_force(seed: int) -> None:
    """No plan of up to six servers serves more of a priority without losing one above it, or costs less at equals."""
    rng = np.random.default_rng(seed)
    problem = random_problem(rng, int(rng.integers(2, 7)), tightness=float(rng.choice([0.4, 0.7, 1.2])))
    plans = itertools.product(*((None, *choice.candidates) for choice in problem.choices))
    best = min(merit(problem, chosen) for chosen in plans if keeps_limits(problem, chosen))
    found = solver("exact")(problem, time_limit_s=10).chosen
    assert keeps_limits(problem, found)
    assert merit(problem, found) == best


@pytest.mark.parametrize("tightness", [0.5, 0.9, 2.0])
def test_prices_come_near_the_optimum_and_say_how_near(tightness: float) -> None:
    """The approximate plan keeps every limit and priority, its bound holds, and its gap on 300 servers is under 1 %."""
    problem = random_problem(np.random.default_rng(5), 300, tightness=tightness)
    found, best = (solver(name)(problem, time_limit_s=20) for name in ("approximate", "exact"))
    assert keeps_limits(problem, found.chosen)
    served, most = merit(problem, found.chosen), merit(problem, best.chosen)
    assert sum(served[:3]) <= 0.97 * sum(most[:3])  # counts are negative
    assert served[0] == most[0]
    value = math.fsum(c.value for c in found.chosen if c)
    assert found.bound is not None
    assert found.bound <= value * (1 + 1e-9)
    assert value - found.bound <= 0.01 * value
    if served[:3] == most[:3]:
        assert value <= served[3] * 1.01


def shuffled(problem: Problem, rng: np.random.Generator) -> Problem:
    """The same choices in another order."""
    order = rng.permutation(len(problem.choices)).tolist()
    return Problem(choices=tuple(problem.choices[i] for i in order), capacity=problem.capacity)


def by_name(problem: Problem, solution: Solution) -> dict[str, Candidate | None]:
    """What each server got."""
    return {choice.server.name: got for choice, got in zip(problem.choices, solution.chosen, strict=True)}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("exact", "approximate")]


@pytest.mark.parametrize("name", [*SLOW, "greedy", "unlimited"])
def test_a_hundred_shuffled_repetitions_are_identical(name: str) -> None:
    """Whatever the order of the servers, everyone gets the same."""
    rng = np.random.default_rng(11)
    problem = random_problem(rng, 5, tightness=0.6)
    wanted = by_name(problem, solver(name)(problem, time_limit_s=10))
    for _ in range(100):
        other = shuffled(problem, rng)
        assert by_name(other, solver(name)(other, time_limit_s=10)) == wanted


def test_sifting_changes_no_optimum() -> None:
    """A program solved over a core of its columns has the cost of the whole one, also where the core is too small."""
    rng = np.random.default_rng(3)
    servers, each = 600, 5
    cost, cards = rng.integers(10, 90, servers * each).astype(float), rng.integers(1, 9, servers * each).astype(float)
    kind = rng.integers(0, 2, servers * each)
    rows = np.concatenate((np.repeat(np.arange(servers), each), servers + kind))
    entries = np.concatenate((np.ones(servers * each), cards))
    columns = np.concatenate((np.arange(servers * each),) * 2)
    for room in (900.0, 600.0, 100.0):  # the last is too small for everybody
        whole = IntegerProgram(
            rows=csr_array((entries, (rows, columns)), shape=(servers + 2, servers * each)),
            low=np.concatenate((np.ones(servers), [-np.inf, -np.inf])),
            high=np.concatenate((np.ones(servers), [room, room])),
            least=np.zeros(servers * each),
            most=np.ones(servers * each),
            budget=Budget(20.0),
            gap=1e-6,
        )
        plain, sifted = whole.minimise(cost), IntegerProgram(**{**fields_of(whole), "sift": True}).minimise(cost)
        if room == 100.0:
            assert plain is None
            assert sifted is None
        else:
            assert plain is not None
            assert sifted is not None
            assert sifted.cost == pytest.approx(plain.cost, rel=2e-6)
            assert sifted.bound <= sifted.cost * (1 + 1e-9)
            assert cost @ sifted.amounts == pytest.approx(sifted.cost)


def fields_of(program: IntegerProgram) -> dict[str, object]:
    """Its fields."""
    return {name: getattr(program, name) for name in IntegerProgram.__slots__}


def test_a_wrong_name_says_which_there_are() -> None:
    """The registry names its solvers to who asks for another."""
    with pytest.raises(InvalidInput, match="unknown solver 'magic'; use one of unlimited, exact, greedy, het"):
        solver("magic")


@pytest.mark.parametrize("name", ["unlimited", "exact", "approximate"])
def test_bounds_are_kept(sample: Callable[..., FleetSpec], name: str) -> None:
    """No solution is better than its bound, and an optimum meets it."""
    found = plan(sample("small", 128), solver=name)
    assert found.bound is not None
    assert found.bound <= found.value * (1 + 1e-9)
    if name != "approximate":
        assert found.value == pytest.approx(found.bound, rel=1e-6)


def test_without_time_there_is_a_plan_and_its_gap(sample: Callable[..., FleetSpec]) -> None:
    """A limit that leaves no time for integer programming yields the plan of the prices, and how far it may be off."""
    problem = build(sample("large", 128))
    found = solver("exact")(problem, time_limit_s=0.0)
    assert found.bound is not None
    assert found.bound <= sum(c.value for c in found.chosen if c) * (1 + 1e-9)
    assert sum(c is not None for c in found.chosen) > 20
