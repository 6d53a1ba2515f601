"""A warm start from an earlier study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flyball.core.errors import InvalidInput
from flyball.core.slo import SloBound
from flyball.tuner import warm
from flyball.tuner.objective import Objective, Score
from flyball.tuner.proposers import Observation, Strategy, propose
from flyball.tuner.study import Problem, earlier, history, opened, run, storage_url
from flyball.tuner.trials import Trial, best
from helpers.simulated_engine import SimulatedEngine
from helpers.studies import problem, rig, study

pytestmark = pytest.mark.slow  # together too long for the inner loop


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a finished study `s` of eight trials, one of them failed."""
    path = tmp_path_factory.mktemp("warm") / "study.db"
    engine = SimulatedEngine(crash=lambda v: int(v["max_num_seqs"]) < 4)
    study(path, engine, trials=8, strategy=Strategy(sampler="random", seed=3))
    return path


def warmed(path: Path, name: str, asked: Problem, trials: int, resume: bool = False) -> tuple[str | None, list[Trial]]:
    """A study that begins with what `s` found."""
    url = storage_url(str(path))
    with opened(url, name, asked, resume=resume) as begun:
        if not resume:
            known = earlier(url, "s")
            warm.begin(begun, known, warm.fitting(known, asked.describe(), asked.lattice), asked.lattice)
        run(begun, asked, rig(SimulatedEngine()), Strategy(), trials=trials)
        return warm.provenance(begun), history(begun)


@pytest.mark.slow
def test_the_best_of_the_earlier_study_comes_after_the_default_and_no_design_after_it(path: Path) -> None:
    """Its own windows decide; where it came from is in the study, which resumes without the option."""
    asked = problem(SimulatedEngine())
    known = best(earlier(storage_url(str(path)), "s").trials, asked.objective)
    assert known is not None
    whence, trials = warmed(path, "warm", asked, 4)
    assert whence == "8 trials of s"
    assert [t.kind for t in trials] == ["default", "start", "search", "search"]
    assert trials[1].score.value >= 0.99 * known.score.value
    resumed = warmed(path, "warm", asked, 6, resume=True)
    assert resumed[0] == "8 trials of s"
    assert resumed[1] == warmed(path, "whole", asked, 6)[1]


def test_a_narrower_space_takes_what_still_fits(path: Path) -> None:
    """A knob that is fixed now keeps the trials which had that value; others are nothing to it."""
    known = earlier(storage_url(str(path)), "s")
    value = int(known.trials[0].values["max_num_batched_tokens"])
    narrow = problem(SimulatedEngine(), {"prefix_caching": "true", "max_num_batched_tokens": str(value)})
    chosen = warm.fitting(known, narrow.describe(), narrow.lattice)
    assert 1 <= len(chosen) < 8
    assert {t.values["max_num_batched_tokens"] for t in chosen} == {value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"objective": Objective.parse("throughput")},
            "was made with objective maximise goodput, not maximise through",
        ),
        ({"bounds": (SloBound.parse("p95_ttft<2s"),)}, "was made with slo"),
        ({"workload": "another"}, "was made with workload poisson .*, not another, and such values are not comparable"),
        ({"service": "another"}, "was made with service"),
    ],
)
def test_a_study_for_something_else_is_refused(path: Path, change: dict[str, object], said: str) -> None:
    """One sentence says what differs."""
    asked = replace(problem(SimulatedEngine()), **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=said):
        warm.fitting(earlier(storage_url(str(path)), "s"), asked.describe(), asked.lattice)


def test_a_space_that_does_not_fit_is_refused(path: Path) -> None:
    """A knob it never set, and a fixed value it never had."""
    known = earlier(storage_url(str(path)), "s")
    wide = problem(SimulatedEngine())
    unset = replace(known, trials=[replace(t, values={"max_num_seqs": 8}) for t in known.trials])
    with pytest.raises(InvalidInput, match="it never set max_num_batched_tokens; search what it searched"):
        warm.fitting(unset, wide.describe(), wide.lattice)
    off = problem(SimulatedEngine(), {"prefix_caching": "false"})
    with pytest.raises(InvalidInput, match="in none of its 8 trials the knobs that are fixed here"):
        warm.fitting(known, off.describe(), off.lattice)


def test_a_study_that_does_not_exist_is_named_with_those_that_do(path: Path) -> None:
    """Nothing is guessed."""
    with pytest.raises(InvalidInput, match=r"holds no finished trial of a study 'x'; it knows s"):
        earlier(storage_url(str(path)), "x")


@pytest.mark.parametrize("sampler", ["flyball", "tpe", "random"])
def test_earlier_points_may_be_tried_again_and_own_ones_not(sampler: str) -> None:
    """Observations of an earlier study inform; they take no place away."""
    asked = problem(SimulatedEngine(), {"max_num_seqs": "8,64", "max_num_batched_tokens": "512,2048",
                                        "prefix_caching": "true"})  # fmt: skip
    every = [asked.lattice.values(point) for point in asked.lattice.points()]
    seen = [Observation(values=v, score=Score(value=float(i), margins={}), earlier=True) for i, v in enumerate(every)]
    tried = []
    for _ in every:
        values = propose(asked.lattice, asked.objective, seen, Strategy(sampler=sampler))
        assert values not in tried
        tried.append(values)
        seen.append(Observation(values=values, score=Score(value=1.0, margins={})))
    assert tried[:2] == [asked.lattice.default, every[2] if asked.lattice.default == every[3] else every[3]]
