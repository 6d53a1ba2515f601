"""What the latency law expects of configurations that were not tried."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flyball.core.knobs import Configuration
from flyball.tuner.expectation import LEAST, Expectation, expectation
from flyball.tuner.objective import Objective, score
from flyball.tuner.proposers import Strategy
from flyball.tuner.space import Lattice
from flyball.tuner.study import summary
from helpers.simulated_engine import CONSTRAINTS, SimulatedEngine
from helpers.studies import BOUNDS, problem, rig, study

pytestmark = pytest.mark.slow  # together too long for the inner loop

LINEAR = {"base_s": 0.008, "token_s": 0.00005, "seq_s": 0.0}  # an engine that keeps to the law
TRIED = [(64, 2048), (24, 1024), (16, 512), (12, 256), (32, 256), (48, 512)]
OTHERS = [(3, 512), (6, 128), (8, 1536), (16, 1536), (32, 512), (64, 128)]


def configuration(batch: int, step: int) -> dict[str, int | bool]:
    """One of the simulated engine's."""
    return {"max_num_seqs": batch, "max_num_batched_tokens": step, "prefix_caching": True}


def expected(objective: str, tried: list[tuple[int, int]] = TRIED) -> tuple[Lattice, Expectation | None]:
    """After some trials."""
    engine = SimulatedEngine(**LINEAR)
    lattice = Lattice.of(engine.space(), {"prefix_caching": "true"}, CONSTRAINTS)
    wanted = Objective.parse(objective, maximise="_" not in objective)
    seen = [(c, summary(rig(engine).measure(c))) for c in (configuration(*pair) for pair in tried)]
    return lattice, expectation(lattice, wanted, BOUNDS, seen)


def test_untried_configurations_are_ranked_as_they_then_measure() -> None:
    """Goodput, and the margin of the promise on the first token, correlate over six configurations nobody tried."""
    _, told = expected("goodput")
    assert told is not None
    engine = SimulatedEngine(**LINEAR)
    windows = [rig(engine).measure(configuration(*pair)) for pair in OTHERS]
    goodput = Objective.parse("goodput")
    scores = [score(window, goodput, BOUNDS) for window in windows]
    predicted = [told.objective(configuration(*pair)) for pair in OTHERS]
    assert np.corrcoef(predicted, [s.value for s in scores])[0, 1] > 0.7
    margins = [told.margins[0](configuration(*pair)) for pair in OTHERS]
    seen = [s.margins[str(BOUNDS[0])] for s in scores]
    assert np.corrcoef(np.sign(margins) * np.log1p(np.abs(margins)), np.sign(seen) * np.log1p(np.abs(seen)))[0, 1] > 0.7


@pytest.mark.parametrize("objective", ["throughput", "output_tps", "attainment", "p95_ttft", "mean_e2e", "p99_tpot"])
def test_every_objective_has_a_finite_expectation_everywhere(objective: str) -> None:
    """Also for levels between those that were computed, and for those that saturate the engine."""
    lattice, told = expected(objective)
    assert told is not None
    values = [told.objective(lattice.values(point)) for point in lattice.points()]
    assert np.isfinite(values).all()
    assert np.ptp(values) > 0


def test_too_few_windows_expect_nothing() -> None:
    """The law has three parameters; saturated windows do not count."""
    assert expected("goodput", TRIED[: LEAST - 1])[1] is None
    assert expected("goodput", [*TRIED[: LEAST - 1], (1, 1)])[1] is None


def test_a_space_of_other_knobs_expects_nothing() -> None:
    """The law knows neither of its two limits there."""
    engine = SimulatedEngine()
    lattice = Lattice.of(engine.space(), {"max_num_seqs": "8", "max_num_batched_tokens": "512"})
    seen: list[tuple[Configuration, dict[str, float]]] = [
        (configuration(*pair), summary(rig(engine).measure(configuration(*pair)))) for pair in TRIED
    ]
    assert expectation(lattice, Objective.parse("goodput"), (), seen) is None


@pytest.mark.slow
def test_a_study_with_the_law_resumes_to_the_same_proposals(tmp_path: Path) -> None:
    """What it expects is a function of the finished trials, so a killed study goes on as if it never stopped."""
    engine, strategy = SimulatedEngine(**LINEAR), Strategy(law=True)
    asked = problem(engine)
    _, whole = study(tmp_path / "a.db", engine, trials=9, problem_=asked, strategy=strategy)
    study(tmp_path / "b.db", engine, trials=7, problem_=asked, strategy=strategy)
    _, halves = study(tmp_path / "b.db", engine, trials=9, problem_=asked, strategy=strategy, resume=True)
    assert halves == whole
