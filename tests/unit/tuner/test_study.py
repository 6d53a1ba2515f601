"""The study's loop and its memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.knobs import Configuration
from flyball.core.slo import SloBound
from flyball.tuner.objective import Objective
from flyball.tuner.proposers import Strategy
from flyball.tuner.study import Progress, history, latest, opened, storage_url
from flyball.tuner.trials import best
from helpers.simulated_engine import SimulatedEngine
from helpers.studies import problem, study


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A study file that does not exist yet."""
    return tmp_path / "study.db"


@pytest.mark.slow
def test_a_study_finds_what_the_default_misses(path: Path) -> None:
    """Twelve trials on the simulated engine: the default breaks the SLO, the best keeps it at a higher goodput."""
    why, trials = study(path, SimulatedEngine(), trials=12)
    assert why == "every trial is done"
    assert [t.kind for t in trials] == ["default", *["start"] * 4, *["search"] * 7]
    assert trials[0].values == SimulatedEngine().values
    assert not trials[0].score.feasible
    top = best(trials, Objective.parse("goodput"))
    assert top is not None
    assert top.score.value > 1.5 * trials[0].score.value
    assert 4 <= int(top.values["max_num_seqs"]) <= 16


def test_what_was_tried_is_what_was_measured(path: Path) -> None:
    """Each trial's configuration ran, in order, once."""
    engine = SimulatedEngine()
    _, trials = study(path, engine, trials=6)
    assert engine.windows == [dict(t.values) for t in trials]


@pytest.mark.slow
def test_a_study_stopped_anywhere_goes_on_the_same(path: Path, tmp_path: Path) -> None:
    """Five trials, then five more after reopening, equal ten in one go."""
    _, whole = study(tmp_path / "whole.db", SimulatedEngine(), trials=10)
    study(path, SimulatedEngine(), trials=5)
    _, halves = study(path, SimulatedEngine(), trials=10, resume=True)
    assert [(t.number, t.values, t.score) for t in halves] == [(t.number, t.values, t.score) for t in whole]


def test_an_interrupted_trial_is_proposed_again(path: Path) -> None:
    """Ctrl-C loses the running trial and nothing else; its configuration is tried first after that."""
    running: list[Progress] = []

    def interrupt(progress: Progress) -> None:
        running.append(progress)
        if progress.number == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(path, SimulatedEngine(), trials=10, watch=interrupt)
    _, trials = study(path, SimulatedEngine(), trials=7, resume=True)
    assert [t.number for t in trials] == [0, 1, 2, 3, 4, 5, 7]
    assert trials[-1].values == running[-1].values


def test_a_configuration_that_crashes_is_a_finished_trial(path: Path) -> None:
    """It is infeasible with its cause, its constraint teaches the sampler, and the study goes on."""
    engine = SimulatedEngine(crash=lambda v: int(v["max_num_seqs"]) < 8)
    _, trials = study(path, engine, trials=6)
    crashed = [t for t in trials if t.score.failure is not None]
    assert crashed
    assert {t.score.failure for t in crashed} == {"out of memory"}
    stored = optuna.load_study(study_name="s", storage=storage_url(str(path))).trials
    assert all(stored[t.number].state is optuna.trial.TrialState.COMPLETE for t in crashed)
    assert all(stored[t.number].constraints["failed"] > 0 for t in crashed)
    assert len(trials) == 6


def test_an_engine_that_is_gone_ends_the_study(path: Path) -> None:
    """Its last trial is recorded with the cause, and no further one is tried."""

    class Mortal(SimulatedEngine):
        dead = False

        def apply(self, values: Configuration) -> str:
            if len(self.windows) == 3:
                self.dead = True
                raise EngineFailed("no server answers")
            return super().apply(values)

        def configuration(self) -> Configuration:
            if self.dead:
                raise EngineFailed("no server answers")
            return super().configuration()

    engine = Mortal()
    with pytest.raises(EngineFailed, match="no server answers"):
        study(path, engine, trials=10)
    with opened(storage_url(str(path)), "s", problem(engine), resume=True) as again:
        trials = history(again)
    assert [t.score.failure for t in trials] == [None, None, None, "no server answers"]


def test_a_small_space_ends_early_and_says_why(path: Path) -> None:
    """Four legal configurations make four trials."""
    engine = SimulatedEngine()
    small = problem(engine, {"max_num_seqs": "8,64", "max_num_batched_tokens": "512,2048", "prefix_caching": "true"})
    why, trials = study(path, engine, trials=50, problem_=small)
    assert (why, len(trials)) == ("every legal configuration was tried", 4)


def test_a_study_is_not_overwritten_by_accident(path: Path) -> None:
    """The same name again needs --resume."""
    study(path, SimulatedEngine(), trials=2)
    with pytest.raises(InvalidInput, match="exists already with 2 finished trials; add --resume"):
        study(path, SimulatedEngine(), trials=4)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"bounds": (SloBound.parse("p95_ttft<2s"),)}, "slo"),
        ({"objective": Objective.parse("throughput")}, "objective"),
        ({"workload": "another trace"}, "workload"),
    ],
)
def test_a_study_is_resumed_only_for_its_own_problem(path: Path, change: dict[str, object], key: str) -> None:
    """Trials for another promise, objective or load must not be mixed; the message names what differs."""
    engine = SimulatedEngine()
    study(path, engine, trials=1)
    with pytest.raises(InvalidInput, match=f"was made with {key} .*, not .*; give the same again, or another --name"):
        study(path, engine, trials=2, problem_=replace(problem(engine), **change), resume=True)  # type: ignore[arg-type]


def test_the_latest_study_of_a_file_is_known(path: Path) -> None:
    """Resume without a name takes it; an empty file says so."""
    with pytest.raises(InvalidInput, match="holds no study to resume"):
        latest(storage_url(str(path)))
    for name in ("b", "a"):
        with opened(storage_url(str(path)), name, problem(SimulatedEngine())):
            pass
    assert latest(storage_url(str(path))) == "a"


def test_optuna_alone_reads_the_study(path: Path) -> None:
    """Parameters, values and constraints are where Optuna and its dashboard look for them."""
    _, trials = study(path, SimulatedEngine(), trials=6, strategy=Strategy(seed=2))
    stored = optuna.load_study(study_name="s", storage=storage_url(str(path)))
    assert stored.direction is optuna.study.StudyDirection.MAXIMIZE
    for ours, theirs in zip(trials, stored.trials, strict=True):
        assert theirs.params.items() <= dict(ours.values).items()
        assert theirs.value == ours.score.value
        assert theirs.constraints == {**ours.score.margins, "failed": -1.0}
