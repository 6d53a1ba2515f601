"""The proposer as a plain class, and as a sampler of any Optuna study."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import numpy as np
import optuna
import pytest

from flyball.core.errors import Infeasible, InvalidInput
from flyball.core.knobs import Configuration, Knob, Space
from flyball.tuner.bayes import Tried, even_tailed, suggest
from flyball.tuner.feasibility import scoot_threshold
from flyball.tuner.pool import Pool
from flyball.tuner.proposer import Proposer
from flyball.tuner.sampler import FlyballSampler
from flyball.tuner.space import Lattice

TABLE = [
    {"batch": batch, "share": share, "policy": policy, "cache": cache}
    for batch, share, policy, cache in product((1, 2, 4, 8, 16, 32), (0.5, 0.7, 0.9), ("fcfs", "lpm"), (False, True))
]
WIDE = Space((
    Knob(name="seqs", kind="int", default=64, low=1, high=4096, log=True),
    Knob(name="tokens", kind="int", default=4096, low=1, high=65536, log=True),
    Knob(name="share", kind="float", default=0.9, low=0.1, high=0.95),
    Knob(name="policy", kind="choice", default="fcfs", choices=("fcfs", "lpm", "priority")),
    Knob(name="chunked", kind="bool", default=True),
))  # fmt: skip
RULES = ("seqs <= tokens", "chunked or tokens >= 2048", "seqs * tokens <= 2000000")


def speed(row: Configuration) -> float:
    """Best at batch 8, share 0.9, lpm with the cache: 20."""
    near = 10 - 2 * abs(np.log2(float(row["batch"])) - 3)
    return near + 5 * float(row["share"]) + (row["policy"] == "lpm") * 2.5 + 3.0 * bool(row["cache"])


def worked(proposer: Proposer, count: int) -> list[Configuration]:
    """So many rows, asked and told."""
    rows = []
    for _ in range(count):
        rows.append(proposer.ask())
        proposer.tell(rows[-1], speed(rows[-1]))
    return rows


def test_the_best_row_of_a_table_is_found_early() -> None:
    """A sixth of the table is tried before its best row is; by chance it would be half."""
    needed = []
    for seed in range(3):
        rows = worked(Proposer(TABLE, seed=seed), 24)
        top = max(TABLE, key=speed)
        needed.append(rows.index(top) if top in rows else 72)
    assert sorted(needed)[1] <= 12


def test_a_table_is_tried_whole_and_then_ends() -> None:
    """Each row once; then one sentence says that nothing is left."""
    rows = [{"a": a, "b": b} for a in (1, 2, 3) for b in ("x", "y")]
    proposer = Proposer([*rows, rows[0]])
    seen = [proposer.ask() for _ in range(6)]
    assert sorted(map(str, seen)) == sorted(map(str, rows))
    with pytest.raises(Infeasible, match="each of the 6 legal configurations was tried"):
        proposer.ask()


def test_asks_before_a_tell_differ_and_tells_come_in_any_order() -> None:
    """Eight at once are eight; told backwards, they are all known."""
    proposer = Proposer(WIDE, constraints=RULES)
    asked = proposer.ask_many(8)
    assert asked[0] == WIDE.defaults()
    assert len({str(values) for values in asked}) == 8
    for i, values in enumerate(reversed(asked)):
        proposer.tell(values, float(i), failed=False)
    assert proposer.best() == (asked[0], (7.0,))
    assert not any(tried.runs for tried in proposer.history)


def test_wide_spaces_never_break_a_known_constraint() -> None:
    """Sixty suggestions in millions of points under three relations, with failures and promises on the way."""
    proposer = Proposer(WIDE, constraints=RULES, seed=3)
    lattice = Lattice.of(WIDE, constraints=RULES)
    seen = set()
    for i in range(24):
        values = proposer.ask()
        assert lattice.broken(values) is None
        seen.add(str(values))
        failed = float(values["share"]) > 0.8 and i > 0
        proposer.tell(values, float(values["seqs"]), margins=[float(values["tokens"]) / 16384 - 1], failed=failed)
    assert len(seen) == 24


SCRIPT = """
from flyball.tuner.proposer import Proposer
table = [{'a': a, 'b': b, 'c': c} for a in range(6) for b in 'xyz' for c in (0.5, 1.5)]
p = Proposer(table, seed=5)
for _ in range(9):
    v = p.ask()
    p.tell(v, v['a'] * v['c'], failed=v['b'] == 'z')
asked = str([t.values for t in p.history])
"""


@pytest.mark.slow
def test_equal_seeds_give_equal_proposals_in_other_processes() -> None:
    """Another process, with another hash seed."""
    here: dict[str, str] = {}
    exec(SCRIPT, here)  # the same words there and here
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT + "print(asked)"], capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "7"},
    ).stdout  # fmt: skip
    assert there.strip() == here["asked"]


def test_two_objectives_fill_the_front() -> None:
    """More of one costs the other: many rates in between are tried, not only the ends."""
    space = Space((Knob(name="x", kind="int", default=0, low=0, high=32),
                   Knob(name="y", kind="int", default=32, low=0, high=32)))  # fmt: skip
    proposer = Proposer(space, maximise=(True, False), seed=0)
    for _ in range(22):
        values = proposer.ask()
        x, y = float(values["x"]), float(values["y"])
        proposer.tell(values, [x - y, x * x / 32 + y])
    front = {t.values["x"] for t in proposer.history if t.values["y"] == 0}
    assert len(front) >= 5


def test_a_right_prior_helps_and_a_wrong_one_is_overcome() -> None:
    """Told the truth it is there at the second trial; told the opposite, it still finds the best."""
    row = worked(Proposer(TABLE, prior=speed), 2)[1]
    assert row == max(TABLE, key=speed)
    misled = worked(Proposer(TABLE, prior=lambda v: -speed(v)), 24)
    assert max(map(speed, misled)) >= 0.95 * max(map(speed, TABLE))


def test_wrong_tells_and_tables_are_one_sentence() -> None:
    """Each says what was given and what is needed."""
    with pytest.raises(InvalidInput, match="holds no configuration"):
        Proposer([])
    with pytest.raises(InvalidInput, match="row 1 of the table sets b; every row must set a"):
        Proposer([{"a": 1}, {"b": 1}])
    with pytest.raises(InvalidInput, match="unknown model of hidden constraints 'svm'; use one of gp, forest, none"):
        Proposer(TABLE, feasibility="svm")
    proposer = Proposer(TABLE)
    with pytest.raises(InvalidInput, match=r"told nan .*give 1 finite value\(s\), or failed=True"):
        proposer.tell(proposer.ask(), float("nan"))


def test_scoots_threshold_rises_with_failures_and_falls_with_runs_of_success() -> None:
    """Half at first, 0.05 a failure up to 0.75, 0.05 less for each five successes in a row down to 0.25."""
    assert scoot_threshold([]) == 0.5
    assert scoot_threshold([False] * 9) == 0.75
    assert scoot_threshold([True] * 100) == pytest.approx(0.25)
    assert scoot_threshold([True, True, False, True, True, True]) == pytest.approx(0.55)


def test_while_nothing_keeps_the_promises_the_search_is_for_one_that_does() -> None:
    """Margins fall towards large x, so that is where it goes, whatever the objective says."""
    pool = Pool(Lattice.of(Space((Knob(name="x", kind="int", default=0, low=0, high=30),))))
    tried = [Tried(values={"x": x}, gains=(-float(x),), margins=(2 - x / 12,)) for x in (0, 6, 12, 18)]
    point = suggest(pool, tried, np.random.default_rng(0))
    assert point is not None
    assert point[0] >= 22


def test_skewed_values_are_bent_and_keep_their_order() -> None:
    """Latencies that grow a thousandfold no longer hide the differences of the small ones."""
    y = np.exp(np.linspace(0, 7, 12))
    bent = even_tailed(y)
    assert (np.diff(bent) > 0).all()
    assert np.ptp(bent[:6]) / np.ptp(bent) > 4 * np.ptp(y[:6]) / np.ptp(y)  # 4.7 at the hardest bend, -1


@pytest.mark.slow
def test_any_optuna_study_can_use_it() -> None:
    """Mixed parameters, exceptions as failures, a known relation never broken, and it gets better."""

    def objective(trial: optuna.Trial) -> float:
        x, n = trial.suggest_float("x", 0, 10), trial.suggest_int("n", 1, 64, log=True)
        kind = trial.suggest_categorical("kind", ["a", "b", None])
        if n > 40:
            raise MemoryError
        return -((x - 3) ** 2) - (np.log2(n) - 4) ** 2 + (kind == "b")

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=FlyballSampler(seed=1, constraints=["x <= 9 or n <= 8"]))
    study.optimize(objective, n_trials=18, catch=(MemoryError,))
    assert study.best_value > 0.5
    assert all(t.params["x"] <= 9 or t.params["n"] <= 8 for t in study.trials[1:])
