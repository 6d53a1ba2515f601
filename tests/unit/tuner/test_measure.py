"""One measurement."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flyball.core.errors import InvalidKnob, VersionConflict
from flyball.core.metrics import MetricsWindow
from flyball.core.ports import LoadProgress
from flyball.core.slo import Slo
from flyball.core.workload import Workload
from flyball.tuner.measure import Rig
from helpers.simulated_engine import SimulatedEngine, poisson

WORKLOAD = poisson(count=20)
HEAD = replace(WORKLOAD, requests=WORKLOAD.requests[:3])


def rig(engine: SimulatedEngine, settle: Workload | None = None) -> Rig:
    """Engine and load in one."""
    return Rig(target=engine, load=engine, slo=Slo(ttft_s=1.0), workload=WORKLOAD, settle=settle)


def test_a_window_carries_the_generation_it_was_measured_under() -> None:
    """The configuration is set first, and the window names it."""
    engine = SimulatedEngine()
    window = rig(engine).measure({"max_num_seqs": 4})
    assert engine.windows == [{**engine.space().defaults(), "max_num_seqs": 4}]
    assert window.generation == engine.apply({})
    assert len(window.traces) == 20


def test_the_settling_traffic_is_not_counted() -> None:
    """It runs under the new configuration, before the window."""
    engine = SimulatedEngine()
    window = rig(engine, settle=HEAD).measure({"max_num_seqs": 4})
    assert [values["max_num_seqs"] for values in engine.windows] == [4, 4]
    assert len(window.traces) == 20


def test_a_refused_configuration_is_not_measured() -> None:
    """Nothing runs under the old configuration in its place."""
    engine = SimulatedEngine()
    with pytest.raises(InvalidKnob):
        rig(engine).measure({"max_num_seqs": 1000})
    assert engine.windows == []


def test_a_window_across_a_change_is_thrown_away() -> None:
    """Somebody else's change during the window is named, not averaged in."""

    class Meddled(SimulatedEngine):
        def run(
            self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None
        ) -> MetricsWindow:
            window = super().run(workload, slo, generation, progress)
            self.apply({"max_num_seqs": 7})
            return window

    with pytest.raises(VersionConflict, match=r"max_num_seqs 4 -> 7"):
        rig(Meddled()).measure({"max_num_seqs": 4})
