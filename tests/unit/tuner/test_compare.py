"""Default against best, measured again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration
from flyball.core.workload import Workload
from flyball.tuner.compare import Comparison, Pair, Window, compare, verdict
from flyball.tuner.intervals import t_interval
from flyball.tuner.objective import Objective, Score
from flyball.tuner.study import Problem
from flyball.tuner.trials import Kind, Trial
from helpers.simulated_engine import SimulatedEngine, poisson
from helpers.studies import problem, rig

GOODPUT = Objective.parse("goodput")
PROBLEM = problem(SimulatedEngine())
DEFAULT: Configuration = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "prefix_caching": True}


def trial(number: int, seqs: int, value: float, margin: float = -0.5, kind: Kind = "search") -> Trial:
    """A finished trial of the simulated engine."""
    values = {**DEFAULT, "max_num_seqs": seqs}
    return Trial(number=number, kind=kind, values=values, score=Score(value=value, margins={"slo": margin}))


def comparison(pairs: Sequence[tuple[float, float]], margins: tuple[float, float] = (-0.1, -0.1)) -> Comparison:
    """A comparison of given values."""
    sides = [
        Pair(
            default=Window(score=Score(value=a, margins={"slo": margins[0]}), metrics={}),
            challenger=Window(score=Score(value=b, margins={"slo": margins[1]}), metrics={}),
        )
        for a, b in pairs
    ]
    return Comparison(challenger=trial(3, 8, 9.0), default=DEFAULT, pairs=tuple(sides), objective=GOODPUT)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_interval_is_students(count: int, rng: np.random.Generator) -> None:
    """It agrees with scipy's own interval of a mean."""
    values = rng.normal(3, 2, count)
    seen = t_interval(list(values))
    low, high = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert (seen.mean, seen.low, seen.high) == pytest.approx((values.mean(), low, high))


def test_one_pair_proves_nothing() -> None:
    """Its interval has no limits, and a comparison asks for two."""
    assert t_interval([1.0]).low == -math.inf
    engine = SimulatedEngine()
    with pytest.raises(InvalidInput, match="at least 2 pairs"):
        compare(problem(engine), rig(engine), [trial(0, 8, 1.0)], [poisson()])


def test_a_null_landscape_rarely_shows_a_gain(rng: np.random.Generator) -> None:
    """With 5 % noise and no difference at most 5 % of 1000 comparisons claim a gain (2.5 % is nominal)."""
    noise = rng.lognormal(0, 0.05, (1000, 4, 2)) * 10
    claims = [verdict([], PROBLEM, comparison([(a, b) for a, b in row])).outcome == "gain" for row in noise]
    assert np.mean(claims) <= 0.05


def test_a_real_gain_is_found(rng: np.random.Generator) -> None:
    """With 5 % noise a 30 % gain is claimed in at least 95 % of 300 comparisons, and its interval holds the truth."""
    noise = rng.lognormal(0, 0.05, (300, 4, 2))
    seen = [comparison([(10 * a, 13 * b) for a, b in row]) for row in noise]
    assert np.mean([verdict([], PROBLEM, c).outcome == "gain" for c in seen]) >= 0.95
    held = [c.relative_gain is not None and c.relative_gain.low <= 0.3 <= c.relative_gain.high for c in seen]
    assert np.mean(held) >= 0.9


@pytest.mark.parametrize(
    ("seen", "outcome", "sentence"),
    [
        (
            comparison([(10, 13), (10, 13.2)]),
            "gain",
            "goodput gain +31.0 % [+18.3, +43.7] (95% interval, t on 2 pairs)",
        ),
        (comparison([(10, 9), (10, 12)]), "no gain", "no gain: goodput changes by +5.0 %"),
        (comparison([(10, 9), (10, 12)], (0.5, -0.1)), "keeps the SLO", "kept in 2 of 2 windows, by default in 0"),
        (
            comparison([(10, 13), (10, 13)], (0.5, 0.1)),
            "not confirmed",
            "no gain: the best configuration broke the SLO",
        ),
        (comparison([(0, 5), (0, 5.1)]), "gain", "goodput gain +5.05 requests/s within the SLO [4.41, 5.69]"),
    ],
    ids=["gain", "noise", "slo", "broken", "from zero"],
)
def test_the_verdict_is_plain(seen: Comparison, outcome: str, sentence: str) -> None:
    """One word, one sentence with interval and windows kept, and only a better configuration is recommended."""
    found = verdict([], PROBLEM, seen)
    assert found.outcome == outcome
    assert sentence in found.sentence
    assert (found.recommended is not None) == (outcome in ("gain", "keeps the SLO"))


def test_no_challenger_no_gain() -> None:
    """The default was best: said plainly, with nothing to apply."""
    found = verdict([trial(0, 64, 5.0, kind="default"), trial(1, 8, 4.0)], PROBLEM, None)
    assert (found.outcome, found.recommended) == ("no gain", None)
    assert "none of 2 configurations beat the default" in found.sentence


def test_a_search_without_comparison_claims_no_gain() -> None:
    """Its best is recommended with the warning that it was measured once."""
    found = verdict([trial(0, 64, 5.0, kind="default"), trial(1, 8, 9.0)], PROBLEM, None)
    assert found.outcome == "not compared"
    assert "goodput 9, default 5; not measured again" in found.sentence
    assert found.recommended is not None
    assert found.recommended["max_num_seqs"] == 8


def test_nothing_feasible_names_the_closest() -> None:
    """How far it is off, and what can be done."""
    found = verdict([trial(0, 64, 5.0, 3.0, "default"), trial(1, 8, 4.0, 0.25)], PROBLEM, None)
    assert found.outcome == "infeasible"
    assert "the closest is max_num_seqs=8" in found.sentence
    assert "breaks slo by 25%: lower the load, relax the promise or widen the knobs" in found.sentence
    failed = Trial(number=0, kind="default", values=DEFAULT, score=Score(value=0, margins={"slo": 10.0}, failure="x"))
    assert verdict([failed], PROBLEM, None).sentence == "infeasible: none of 1 configurations could be measured"


def run(problem_: Problem, engine: SimulatedEngine, trials: list[Trial], loads: list[Workload]) -> Comparison | None:
    """Compare on the simulated engine."""
    return compare(problem_, rig(engine), trials, loads)


def test_windows_alternate_and_share_their_traffic() -> None:
    """Finalists first, then A B, B A, A B; both of a pair meet the same requests."""
    engine = SimulatedEngine()
    trials = [trial(0, 64, 4.0, 3.0, "default"), trial(1, 8, 13.4), trial(2, 2, 13.0), trial(3, 12, 1.0)]
    seen = run(problem(engine), engine, trials, [poisson(seed=s) for s in (1, 2, 3)])
    assert seen is not None
    assert [values["max_num_seqs"] for values in engine.windows] == [8, 2, 64, 8, 8, 64, 64, 8]
    for pair in seen.pairs:
        assert pair.default.metrics["requests"] == pair.challenger.metrics["requests"]
    assert seen.challenger.number == 1  # 2 sequences broke the SLO when measured again
    assert seen.mean("challenger") > seen.mean("default")
    assert (seen.kept("default"), seen.kept("challenger")) == (0, 3)


def test_a_default_that_is_best_needs_no_comparison() -> None:
    """No window is spent."""
    engine = SimulatedEngine()
    trials = [trial(0, 64, 9.0, kind="default"), trial(1, 8, 5.0)]
    assert run(problem(engine), engine, trials, [poisson(), poisson()]) is None
    assert engine.windows == []
