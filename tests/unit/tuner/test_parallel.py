"""Several trials at once, several windows a trial, several processes on a study."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from flyball.core.errors import EngineFailed, InvalidInput
from flyball.core.knobs import Configuration
from flyball.tuner.objective import Objective, Score
from flyball.tuner.patience import Patience, pooled
from flyball.tuner.proposers import Strategy
from flyball.tuner.study import history, opened, run, storage_url
from helpers.simulated_engine import SimulatedEngine
from helpers.studies import problem, rig

pytestmark = pytest.mark.slow  # together too long for the inner loop

GOODPUT = Objective.parse("goodput")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A study file that does not exist yet."""
    return storage_url(str(tmp_path / "study.db"))


@pytest.mark.slow
def test_three_engines_measure_three_trials_at_once(url: str) -> None:
    """All three are busy before any ends, no configuration is tried twice, and exactly nine trials are made."""
    meet = threading.Barrier(3, timeout=60)

    class Meeting(SimulatedEngine):
        def apply(self, values: Configuration) -> str:
            if not self.windows:
                meet.wait()
            return super().apply(values)

    engines = [Meeting() for _ in range(3)]
    asked = problem(engines[0])
    with opened(url, "s", asked) as study:
        why = run(study, asked, [rig(e) for e in engines], Strategy(), trials=9)
        trials = history(study)
    assert why == "every trial is done"
    assert len(trials) == 9
    assert len({str(t.values) for t in trials}) == 9
    assert sum(len(e.windows) for e in engines) == 9
    assert trials[0].kind == "default"


def test_an_engine_that_dies_beside_others_loses_no_finished_trial(url: str) -> None:
    """The study ends with the cause; what others were measuring is marked as lost, nothing stays running."""

    class Dead(SimulatedEngine):
        def configuration(self) -> Configuration:
            raise EngineFailed("no server answers")

        def apply(self, values: Configuration) -> str:
            raise EngineFailed("no server answers")

    asked = problem(SimulatedEngine())
    with opened(url, "s", asked) as study:
        with pytest.raises(EngineFailed, match="no server answers"):
            run(study, asked, [rig(SimulatedEngine()), rig(Dead())], Strategy(), trials=8)
        states = {t.state.name for t in study.get_trials()}
    assert "RUNNING" not in states


def test_a_second_process_does_not_take_a_living_trial_for_lost(url: str) -> None:
    """Opened by somebody who is not alone, a trial of a live process stays, one of a dead process ends."""
    asked = problem(SimulatedEngine())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        with opened(url, "s", asked) as study:
            for process in (living, ended):
                owner = {"flyball:owner": [platform.node(), process.pid]}
                study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=owner))
        with opened(url, "s", asked, resume=True, alone=False) as study:
            states = [t.state.name for t in study.get_trials()]
        assert states == ["RUNNING", "FAIL"]
        living.communicate(b"\n")
    with opened(url, "s", asked, resume=True, alone=False) as study:
        assert [t.state.name for t in study.get_trials()] == ["FAIL", "FAIL"]


def told(*values: float, margin: float = -0.5) -> list[Score]:
    """Windows of these values."""
    return [Score(value=value, margins={"p95_ttft<=1s": margin}) for value in values]


def test_windows_go_on_until_the_mean_is_known_or_the_trial_has_lost() -> None:
    """Tight, hopeless, beaten, or out of windows: then it ends, and only then."""
    patient = Patience(windows=5, tolerance=0.05, hopeless=0.5)
    assert not patient.ends(told(10), GOODPUT, None)
    assert not patient.ends(told(10, 12), GOODPUT, None)
    assert patient.ends(told(10, 10.1, 10), GOODPUT, None)
    assert patient.ends(told(10, margin=0.8), GOODPUT, None)
    assert patient.ends(told(10, 11, 10.5), GOODPUT, best=20)
    assert not patient.ends(told(10, 12, 8), GOODPUT, best=11)
    assert patient.ends(told(1, 9, 1, 9, 1), GOODPUT, None)
    assert pooled(told(1, 3)).value == 2


def test_a_noisy_engine_gets_more_windows_than_a_quiet_one(tmp_path: Path) -> None:
    """One window each where nothing varies after the second, up to four where it does; the trial says how many."""
    counts = {}
    for noise in (0.0, 2.0):
        engine = SimulatedEngine(noise=noise)
        asked = problem(engine, bounds=())
        with opened(storage_url(str(tmp_path / f"{noise}.db")), "s", asked) as study:
            run(study, asked, rig(engine, ()), Strategy(), trials=1, patience=Patience(windows=4, tolerance=0.01))
            (trial,) = history(study)
        counts[noise] = len(engine.windows)
        assert trial.metrics["windows"] == counts[noise]
    assert counts[0.0] == 2
    assert counts[2.0] == 4


def test_two_objectives_make_an_optuna_study_of_two_directions(url: str) -> None:
    """Each trial has both values where Optuna and its dashboard look for them."""
    engine = SimulatedEngine()
    asked = replace(problem(engine), also=(Objective.parse("p95_ttft", maximise=False),))
    with opened(url, "s", asked) as study:
        run(study, asked, rig(engine), Strategy(), trials=7)
    stored = optuna.load_study(study_name="s", storage=url)
    assert [d.name for d in stored.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert all(len(t.values) == 2 for t in stored.trials)
    assert stored.trials[0].values[1] == pytest.approx(
        stored.trials[0].user_attrs["flyball:trial"]["metrics"]["p95_ttft"]
    )


def test_a_database_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    """A folder in place of a file, and a URL of no known kind."""
    asked = problem(SimulatedEngine())
    with pytest.raises(InvalidInput, match=r"cannot be read or written: .*; see to its disk or server"):
        opened(f"sqlite:///{tmp_path}", "s", asked).__enter__()
    with pytest.raises(InvalidInput, match="the study's address 'nosql://x' cannot be used"):
        opened("nosql://x", "s", asked).__enter__()


def test_a_full_disk_is_one_sentence_and_loses_the_running_trial_only(tmp_path: Path) -> None:
    """The study's file may grow no further after its first trials; with room again it goes on from them."""
    path = tmp_path / "study.db"
    url, engine = storage_url(str(path)), SimulatedEngine()
    asked = problem(engine)
    with opened(url, "s", asked) as study:
        run(study, asked, rig(engine), Strategy(), trials=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as if the disk were full
    try:
        with (
            pytest.raises(InvalidInput, match=r"cannot be read or written: .*; see to its disk or server"),
            opened(url, "s", asked, resume=True) as study,
        ):
            run(study, asked, rig(engine), Strategy(), trials=30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with opened(url, "s", asked, resume=True) as study:
        assert len(history(study)) == 2
        run(study, asked, rig(engine), Strategy(), trials=3)
        assert len(history(study)) == 3


@pytest.mark.parametrize("bad", [{"windows": 0}, {"tolerance": 0.0}, {"hopeless": float("nan")}])
def test_bad_patience_is_refused(bad: dict[str, float]) -> None:
    """One sentence."""
    with pytest.raises(InvalidInput, match="give at least one window and limits above 0"):
        Patience(**bad)  # type: ignore[arg-type]
