"""From a study's windows to a latency profile."""

from __future__ import annotations

import pytest

from flyball.performance.fit import OperatingPoint
from flyball.tuner.law import operating_point
from flyball.tuner.profile import export
from flyball.tuner.proposers import Strategy
from flyball.tuner.study import Problem, summary
from flyball.tuner.trials import Trial
from helpers.simulated_engine import SimulatedEngine
from helpers.studies import problem, rig, study

pytestmark = pytest.mark.slow  # together too long for the inner loop

LINEAR = {"base_s": 0.008, "token_s": 0.00005, "seq_s": 0.0}  # alpha, beta and no third: the law's own engine


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Problem, list[Trial]]:
    """Eight trials on an engine that keeps to the law."""
    engine = SimulatedEngine(**LINEAR)
    asked = problem(engine)
    strategy = Strategy(sampler="random")
    return asked, study(tmp_path_factory.mktemp("profile") / "s.db", engine, trials=8, strategy=strategy)[1]


@pytest.mark.slow
def test_the_profile_predicts_the_engine_it_was_fitted_to(searched: tuple[Problem, list[Trial]]) -> None:
    """Step cost and cost of a token come back, with the winner's own limits, and the sentence counts its windows."""
    asked, trials = searched
    winner = trials[-1].values
    found = export(asked, trials, None, winner, accelerator="here", model="m")
    assert found.profile is not None
    assert (found.profile.model, found.profile.accelerator) == ("m", "here")
    assert found.profile.max_batch == winner["max_num_seqs"]
    assert found.profile.max_step_tokens == winner["max_num_batched_tokens"]
    step_s = found.profile.alpha_s + 100 * found.profile.beta_s
    assert step_s == pytest.approx(0.008 + 100 * 0.00005, rel=0.4)
    assert f"condition number {found.profile.condition_number:.3g}" in found.sentence
    assert found.identified == ("NOT IDENTIFIED" not in found.sentence)


def test_windows_of_one_load_and_one_configuration_are_said_not_to_identify(
    searched: tuple[Problem, list[Trial]],
) -> None:
    """Twice the same operating point has two residuals for three parameters."""
    asked, trials = searched
    steady = next(
        t for t in trials if isinstance(operating_point({**asked.lattice.base, **t.values}, t.metrics), OperatingPoint)
    )
    found = export(asked, [steady, steady], None, steady.values, accelerator="here")
    assert found.profile is not None
    assert not found.identified
    assert "NOT IDENTIFIED" in found.sentence


def test_too_few_windows_are_named_with_what_is_wrong_with_them(searched: tuple[Problem, list[Trial]]) -> None:
    """A saturated window has no mean; trials of another configuration do not count."""
    asked, trials = searched
    engine = SimulatedEngine(**LINEAR)
    full = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "prefix_caching": True}
    metrics = summary(rig(engine).measure(full))
    saturated = Trial(number=0, kind="search", values=full, score=trials[0].score, metrics=metrics)
    found = export(asked, [saturated], None, full, accelerator="here")
    assert found.profile is None
    assert "0 of 1 can be used (saturated, " in found.sentence
    other = {**trials[0].values, "prefix_caching": False}
    assert "0 of 0 can be used" in export(asked, trials, None, other, accelerator="here").sentence


def test_an_engine_without_a_batch_limit_has_no_profile(searched: tuple[Problem, list[Trial]]) -> None:
    """One sentence names the knobs that would say it."""
    asked, trials = searched
    found = export(asked, trials, None, {"prefix_caching": True}, accelerator="here")
    assert found.profile is None
    assert "states none of max_num_seqs, max_running_requests, max_batch_size above 0" in found.sentence
