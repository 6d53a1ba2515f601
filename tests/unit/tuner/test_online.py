"""The online tuner: constraints first, forgetting, contexts that come back, and a choice that tells its reason."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Knob, Space
from flyball.tuner.drift import Shift
from flyball.tuner.drift import observe as observe_load
from flyball.tuner.objective import Score
from flyball.tuner.online.tuner import Failure, OnlineTuner

SQUARE = Space(tuple(Knob(name=n, kind="float", default=5.0, low=0.0, high=10.0) for n in "xy"))


def bowl(trial_values: object, centre: float) -> float:
    """A paraboloid."""
    return sum((float(v) - centre) ** 2 for v in trial_values.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["local", "tpe", "bayes", "nelder-mead"])
def test_an_optimum_that_jumps_is_found_again(name: str) -> None:
    """After a shift that makes every old point look better than any new one, regret falls again."""
    tuner = OnlineTuner(SQUARE, seed=1, proposer=name)
    regrets = []
    for step in range(600):
        centre, floor = (2.0, 0.0) if step < 300 else (8.0, 1.0)
        trial = tuner.ask()
        regrets.append(bowl(trial.values, centre))
        tuner.tell(trial.id, regrets[-1] + floor)
    assert sum(regrets[-100:]) / 100 < 2.0


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_direction_is_the_users(direction: str) -> None:
    """Larger is better exactly where that was said."""
    sign = 1.0 if direction == "minimize" else -1.0
    tuner = OnlineTuner(SQUARE, seed=2, direction=direction)  # type: ignore[arg-type]
    for _ in range(60):
        trial = tuner.ask()
        tuner.tell(trial.id, sign * bowl(trial.values, 3.0))
    best = tuner.best()
    assert best is not None
    assert bowl(best.values, 3.0) < 0.01
    assert best.score.value == pytest.approx(sign * bowl(best.values, 3.0), abs=1e-6)


def test_a_trial_that_breaks_a_promise_is_never_best() -> None:
    """However good its number is."""
    tuner = OnlineTuner(SQUARE, seed=3, constraints=("p99",))
    for _ in range(80):
        trial = tuner.ask()
        x = float(trial.values["x"])
        tuner.tell(trial.id, Score(value=-x, margins={"p99": x / 4.0 - 1.0}))
        best = tuner.best()
        assert best is None or best.score.feasible
    assert best is not None
    assert 3.6 < float(best.values["x"]) <= 4.0


def test_noisy_promises_are_kept_with_a_reserve() -> None:
    """Where margins are noisy, few of the late trials break them."""
    rng = random.Random(1)
    tuner = OnlineTuner(SQUARE, seed=3, constraints=("p99",))
    broken = []
    for _ in range(200):
        trial = tuner.ask()
        x = float(trial.values["x"])
        margin = x / 4.0 * math.exp(rng.gauss(0, 0.03)) - 1.0
        broken.append(margin > 0)
        tuner.tell(trial.id, Score(value=-x + rng.gauss(0, 0.02), margins={"p99": margin}))
    assert sum(broken[-100:]) <= 12


def test_pure_noise_does_not_churn() -> None:
    """Where nothing matters, the late trials stay where they are."""
    rng = random.Random(4)
    tuner = OnlineTuner(SQUARE, seed=4, start=SQUARE.defaults())
    visited = []
    for _ in range(300):
        trial = tuner.ask()
        visited.append(tuple(trial.values.values()))
        tuner.tell(trial.id, rng.gauss(10.0, 1.0))
    moves = sum(a != b for a, b in pairwise(visited[-100:]))
    assert moves < 40


def test_a_traffic_pattern_that_returns_is_answered_at_once() -> None:
    """Back under the first traffic, the first trial is what was best under it."""
    tuner = OnlineTuner(SQUARE, seed=5)
    for context, centre in (((2.0, 500.0), 2.0), ((20.0, 50.0), 8.0)):
        assert tuner.enter(context) is False
        for _ in range(60):
            trial = tuner.ask()
            tuner.tell(trial.id, bowl(trial.values, centre))
    assert tuner.enter((2.1, 480.0)) is True
    assert bowl(tuner.ask().values, 2.0) < 0.01


def test_a_result_from_before_the_traffic_changed_is_late() -> None:
    """It is kept in the history, and teaches nothing."""
    tuner = OnlineTuner(SQUARE, seed=5)
    tuner.enter((2.0,))
    trial = tuner.ask()
    tuner.enter((50.0,))
    assert tuner.tell(trial.id, 1.0) == "late"
    assert tuner.best() is None


def test_the_choice_tells_its_reason() -> None:
    """Which proposer, and why, as data; unknown names are refused."""
    switches = Space(tuple(Knob(name=f"s{i}", kind="bool", default=False) for i in range(6)))
    few = Space((Knob(name="n", kind="int", default=1, low=1, high=8),))
    assert OnlineTuner(SQUARE).choice.proposer == "local"
    assert OnlineTuner(switches).choice.proposer == "tpe"
    assert OnlineTuner(few).choice.proposer == "bandit"
    one = Space((Knob(name="n", kind="int", default=3, low=3, high=3),))
    assert OnlineTuner(one).ask().values == {"n": 3}
    told = OnlineTuner(SQUARE, catalogue=[{"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 2.0}]).choice.describe()
    assert told["proposer"] == "bandit"
    assert "2 approved variants" in told["reason"]
    with pytest.raises(InvalidInput, match="unknown proposer 'best'"):
        OnlineTuner(SQUARE, proposer="best")


def test_a_bandit_stays_in_its_catalogue() -> None:
    """Only approved variants are proposed, the best of them most, and it follows when they change."""
    catalogue = [{"x": float(i), "y": 5.0} for i in (1, 4, 9)]
    tuner = OnlineTuner(SQUARE, seed=1, catalogue=catalogue)
    rng = random.Random(0)
    chosen: list[float] = []
    for step in range(400):
        trial = tuner.ask()
        assert dict(trial.values) in catalogue
        chosen.append(float(trial.values["x"]))
        best = 4.0 if step < 200 else 9.0
        tuner.tell(trial.id, abs(chosen[-1] - best) + rng.gauss(0, 0.1))
    assert chosen[150:200].count(4.0) > 35
    assert chosen[350:].count(9.0) > 35


def test_relations_hold_in_every_proposal() -> None:
    """A known relation between knobs is never broken."""
    tuner = OnlineTuner(SQUARE, seed=1, relations=[lambda v: v["x"] <= v["y"]])
    for _ in range(100):
        trial = tuner.ask()
        assert trial.values["x"] <= trial.values["y"]
        tuner.tell(trial.id, -float(trial.values["x"]))


def test_configuration_refuses_unknown_keys() -> None:
    """A typing error is told, not ignored."""
    knobs = {"x": {"low": 0, "high": 1}}
    assert OnlineTuner.from_config({"knobs": knobs, "seed": 3}).ask().values["x"] <= 1
    for wrong in ({"knobs": knobs, "guardrails": {}}, {"knobs": {"x": {"low": 0, "high": 1, "step": 2}}}, {"seed": 1}):
        with pytest.raises(InvalidInput):
            OnlineTuner.from_config(wrong)
    with pytest.raises(InvalidInput, match="upwards"):
        OnlineTuner(SQUARE, direction="upwards")  # type: ignore[arg-type]


def test_failures_teach_where_not_to_go() -> None:
    """A region that crashes is proposed less and less."""
    tuner = OnlineTuner(SQUARE, seed=6)
    crashed = []
    for _ in range(160):
        trial = tuner.ask()
        x = float(trial.values["x"])
        crashed.append(x > 6)
        tuner.tell(trial.id, Failure("out of memory") if x > 6 else -x)
    assert sum(crashed[-50:]) <= 5
    best = tuner.best()
    assert best is not None
    assert 5.5 < float(best.values["x"]) <= 6


def test_a_shift_of_the_load_is_noticed_and_noise_is_not() -> None:
    """Poisson counts around one rate are no shift; half or twice the rate is, within three windows."""
    rng = random.Random(7)
    state, alarms = Shift(), 0
    for _ in range(300):
        state, shifted = observe_load(state, [rng.gauss(60, 60**0.5), 500 * math.exp(rng.gauss(0, 0.08))])
        alarms += shifted
    assert alarms <= 1
    for factor in (0.4, 2.2):
        after = state
        seen = []
        for _ in range(3):
            after, shifted = observe_load(after, [60 * factor, 500.0])
            seen.append(shifted)
        assert any(seen)
