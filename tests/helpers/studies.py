"""Small problems on the simulated engine, for all who test studies."""

from __future__ import annotations

from pathlib import Path

from flyball.core.slo import Slo, SloBound
from flyball.tuner.measure import Rig
from flyball.tuner.objective import Objective
from flyball.tuner.proposers import Strategy
from flyball.tuner.space import Lattice
from flyball.tuner.study import Problem, StopReason, Watch, history, opened, run, storage_url
from flyball.tuner.trials import Trial
from helpers.simulated_engine import CONSTRAINTS, SimulatedEngine, poisson

BOUNDS = (SloBound.parse("p95_ttft<1500ms"), SloBound.parse("p99_itl<60ms"))
WORKLOAD = poisson()


def problem(
    engine: SimulatedEngine, narrow: dict[str, str] | None = None, bounds: tuple[SloBound, ...] = BOUNDS
) -> Problem:
    """Goodput of the simulated engine under two promises, which its default breaks."""
    return Problem(
        lattice=Lattice.of(engine.space(), narrow or {"prefix_caching": "true"}, CONSTRAINTS),
        objective=Objective.parse("goodput"),
        bounds=bounds,
        workload=WORKLOAD.source,
        service="simulated",
    )


def rig(engine: SimulatedEngine, bounds: tuple[SloBound, ...] = BOUNDS) -> Rig:
    """The simulated engine under its own load."""
    return Rig(target=engine, load=engine, slo=Slo.from_bounds(bounds), workload=WORKLOAD)


def study(
    path: Path,
    engine: SimulatedEngine,
    *,
    trials: int,
    problem_: Problem | None = None,
    strategy: Strategy | None = None,
    resume: bool = False,
    watch: Watch = lambda _: None,
) -> tuple[StopReason, list[Trial]]:
    """Run a study to so many trials and give back its history."""
    asked = problem_ or problem(engine)
    with opened(storage_url(str(path)), "s", asked, resume=resume) as opened_study:
        why = run(opened_study, asked, rig(engine, asked.bounds), strategy or Strategy(), trials=trials, watch=watch)
        return why, history(opened_study)
