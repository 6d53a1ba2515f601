"""What must hold of every proposal, whatever the space, the proposer and the order of tells."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Knob, Space
from flyball.tuner.objective import Score
from flyball.tuner.online.choice import PROPOSERS
from flyball.tuner.online.tuner import Failure, OnlineTuner

PAIR = Space((
    Knob(name="batch", kind="int", default=8, low=1, high=64, log=True),
    Knob(name="wait_ms", kind="float", default=100.0, low=10.0, high=500.0),
))  # fmt: skip
SEQUENCE = """
import json, sys
from flyball.core.knobs import Knob, Space
from flyball.tuner.online.tuner import OnlineTuner
space = Space((Knob(name="a", kind="float", default=0.0, low=-5.0, high=5.0),
               Knob(name="b", kind="int", default=8, low=1, high=64, log=True),
               Knob(name="c", kind="choice", default="x", choices=("x", "y", "z"))))
tuner = OnlineTuner(space, seed=7, proposer=sys.argv[1], start=space.defaults(),
                    catalogue=[{"a": a, "b": 8, "c": "y"} for a in (-1.0, 0.0, 1.0)] if sys.argv[1] == "bandit" else ())
out = []
for _ in range(60):
    trial = tuner.ask()
    out.append(dict(trial.values))
    tuner.tell(trial.id, (trial.values["a"] - 1) ** 2 + trial.values["b"] / 10)
print(json.dumps(out))
"""


def random_space(rng: random.Random) -> Space:
    """One to five knobs of any kind, bounds and scale."""
    knobs: list[Knob] = []
    for i in range(rng.randint(1, 5)):
        kind = rng.choice(["int", "float", "float", "log", "logint", "bool", "choice"])
        low = rng.choice([-1e6, -3.0, 0.0, 0.25, 7.0, 1e5])
        high = low + rng.choice([0.0, 1e-6, 1.0, 3.0, 1e6])
        if kind in ("log", "logint"):
            low, high = rng.choice([(1e-9, 1e-3), (1.0, 64.0), (1.0, 1.0), (3.0, 1e9)])
        if kind in ("int", "logint"):
            low, high = float(max(int(low), 1 if kind == "logint" else int(low))), float(int(max(high, low, 1)))
            knobs.append(Knob(name=f"k{i}", kind="int", default=int(low), low=int(low), high=int(max(high, low)),
                              log=kind == "logint"))  # fmt: skip
        elif kind in ("float", "log"):
            knobs.append(Knob(name=f"k{i}", kind="float", default=low, low=low, high=high, log=kind == "log"))
        elif kind == "bool":
            knobs.append(Knob(name=f"k{i}", kind="bool", default=False))
        else:
            names = tuple("abcde"[: rng.randint(1, 5)])
            knobs.append(Knob(name=f"k{i}", kind="choice", default="a", choices=names))
    return Space(tuple(knobs))


def out_of_bounds(proposals: int, seed: int) -> int:
    """How many of so many proposals, by every proposer in random spaces, their space refuses."""
    rng = random.Random(seed)
    refused = seen = 0
    while seen < proposals:
        space = random_space(rng)
        name = rng.choice(["auto", *(p for p in PROPOSERS if p != "bandit")])
        tuner = OnlineTuner(space, seed=rng.randrange(1000), proposer=name, constraints=("c",))
        for _ in range(50):
            trial = tuner.ask()
            seen += 1
            try:
                assert space.check(dict(trial.values)) == trial.values
            except InvalidInput:
                refused += 1
            score = Score(value=rng.choice([rng.gauss(0, 1), 1e9 * rng.random()]), margins={"c": rng.gauss(0, 1)})
            tuner.tell(trial.id, Failure("crashed") if rng.random() < 0.1 else score)
    return refused


def test_no_proposal_is_out_of_bounds() -> None:
    """Any bounds, scale, type and proposer, with failures, broken promises and huge numbers told."""
    assert out_of_bounds(2_000, seed=1) == 0


@pytest.mark.sweep
@pytest.mark.timeout(900)
def test_none_of_a_hundred_thousand_is_out_of_bounds() -> None:
    """The same, 100 000 times."""
    assert out_of_bounds(100_000, seed=2) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "tpe", "bayes", "nelder-mead", "bandit"])
def test_the_sequence_is_the_same_in_every_process(name: str) -> None:
    """Equal seed and tells, another process and another hash seed: equal proposals."""
    seen = [
        subprocess.run(
            [sys.executable, "-c", SEQUENCE, name], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        ).stdout
        for hash_seed in ("0", "4711")
    ]  # fmt: skip
    assert seen[0] == seen[1]
    assert len(json.loads(seen[0])) == 60


@pytest.mark.parametrize("name", ["local", "tpe", "bayes", "nelder-mead"])
@pytest.mark.parametrize("coarse", [False, True])
def test_concurrent_asks_differ(name: str, coarse: bool) -> None:
    """Before, during and after the search, k trials open at once are k configurations, with coarse knobs too."""
    wait = Knob(name="wait_ms", kind="int", default=100, low=100, high=104)
    tuner = OnlineTuner(Space((PAIR["batch"], wait)) if coarse else PAIR, seed=3, proposer=name)
    for _ in range(12):
        trials = tuner.ask(6)
        assert len({tuple(t.values.values()) for t in trials}) == 6
        for trial in trials:
            tuner.tell(trial.id, (float(trial.values["wait_ms"]) - 200) ** 2 / 1e4 + float(trial.values["batch"]))


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_tells_come_in_any_order(data: st.DataObject) -> None:
    """Late, out of order, failed or twice: each is taken once, and what was told never changes."""
    tuner = OnlineTuner(PAIR, seed=1)
    trials = tuner.ask(8)
    told: dict[int, str] = {}
    for trial in data.draw(st.permutations([*trials, *trials[:4]])):
        result: Any = data.draw(st.sampled_from([1.0, 2.5, Failure("crashed"), float("nan"), float("inf")]))
        assert tuner.tell(trial.id, result) == ("duplicate" if trial.id in told else "used")
        told[trial.id] = "used"
    assert tuner.told == 8
    assert tuner.pending == []
    assert all((f.score.failure is None) == math.isfinite(f.score.value) for f in tuner.history())


def test_a_trial_never_asked_for_is_refused() -> None:
    """A result needs its trial."""
    tuner = OnlineTuner(PAIR)
    with pytest.raises(InvalidInput, match="no trial 7"):
        tuner.tell(7, 1.0)


@pytest.mark.parametrize("name", ["local", "tpe", "bayes", "nelder-mead"])
def test_a_saved_tuner_goes_on_the_same(name: str) -> None:
    """Saved as JSON at any time, open trials included, and loaded: the proposals that follow are equal."""
    tuner = OnlineTuner(PAIR, seed=5, proposer=name, constraints=("p99",))

    def step(one: OnlineTuner) -> dict[str, Any]:
        trial = one.ask()
        wait = float(trial.values["wait_ms"])
        one.tell(trial.id, Score(value=(wait - 200) ** 2, margins={"p99": wait / 300 - 1}))
        return dict(trial.values)

    for _ in range(23):
        step(tuner)
    open_trial = tuner.ask()
    copy = OnlineTuner.load(json.loads(json.dumps(tuner.save())))
    assert [t.values for t in copy.pending] == [open_trial.values]
    assert [step(tuner) for _ in range(30)] == [step(copy) for _ in range(30)]


def test_memory_is_bounded() -> None:
    """After thousands of trials no more is kept than after hundreds."""
    tuner = OnlineTuner(PAIR, seed=2, keep=100)

    def held(tells: int) -> int:
        for i in range(tells):
            trial = tuner.ask()
            tuner.tell(trial.id, (float(trial.values["wait_ms"]) - 200) ** 2 + i % 7)
        return len(json.dumps(tuner.save()))

    early = held(300)
    assert held(3000) < 1.5 * early
