"""The online calibrator: what it learns, from how little, what it refuses to learn, what it says it does not know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flyball.adapters.calibration_files import read_calibrations, write_calibrations
from flyball.core.errors import InvalidInput
from flyball.core.fleet import Accelerator, LatencyProfile
from flyball.performance.fit import OperatingPoint, predict
from flyball.performance.queueing import queue_model
from flyball.planner.calibrate import KEPT, Calibration, CycleReport, begin, observe, prior_from

pytestmark = pytest.mark.slow  # together too long for the inner loop

TRUTH = np.array([8e-3, 1.6e-5, 5e-7])  # of the recorded tuner sequences; the default start is 10 times off in gamma


def window(
    truth: np.ndarray,
    *,
    rps: float,
    n: float = 1500,
    m: float = 700,
    batch: int = 128,
    wrong: tuple[float, float] = (1, 1),
) -> OperatingPoint:
    """What a replica that obeys the law shows; `wrong` multiplies TTFT and ITL."""
    blank = OperatingPoint(
        arrival_rps=rps, input_tokens=n, output_tokens=m, max_batch=batch, max_queue=128, ttft_s=1.0, itl_s=1.0
    )
    seen = predict([blank], queue_model("v3"), truth)
    return replace(blank, ttft_s=float(seen.ttft_s[0]) * wrong[0], itl_s=float(seen.itl_s[0]) * wrong[1])


def varied(k: int) -> dict[str, float]:
    """The k-th load of a service whose load and lengths vary, as in the recorded sequences."""
    return {"rps": (20 + 6 * (k % 6)) / 60, "n": 1500 + 200 * (k % 5), "m": 700 + 100 * (k % 4)}


def run(
    state: Calibration, truth: np.ndarray, cycles: range, noise: float = 0.0, seed: int = 1
) -> tuple[Calibration, list[CycleReport]]:
    """One window a cycle."""
    rng, reports = np.random.default_rng(seed), []
    for k in cycles:
        wrong = tuple(np.exp(rng.normal(0, noise, 2)).tolist())
        state, report = observe(state, [window(truth, wrong=wrong, **varied(k))])
        reports.append(report)
    return state, reports


def off(state: Calibration, truth: np.ndarray) -> float:
    """Largest relative error of a parameter."""
    return float(np.abs(np.exp(state.belief.mean) / truth - 1).max())


def start() -> Calibration:
    """The default start, under the law the windows obey."""
    return begin("granite", "H100", law="v3")


@pytest.mark.parametrize(("noise", "within"), [(0.0, 1e-3), (0.02, 0.1)])
def test_twenty_varied_windows_determine_the_law(noise: float, within: float) -> None:
    """From the default start alpha, beta, gamma come within 10 % in 20 observations, and are said to be determined."""
    state, reports = run(start(), TRUTH, range(20), noise)
    assert off(state, TRUTH) < within
    assert state.identified
    assert reports[-1].condition_number < 100
    assert reports[-1].advice == ""


def test_one_load_does_not_and_is_said_not_to() -> None:
    """Equal windows are flagged, with advice what to measure; loads like them are predicted within 5 % all the same."""
    state, report = start(), None
    rng = np.random.default_rng(3)
    for _ in range(12):
        wrong = tuple(np.exp(rng.normal(0, 0.02, 2)).tolist())
        state, report = observe(state, [window(TRUTH, rps=0.5, wrong=wrong)])
    assert report is not None
    assert not state.identified
    assert not state.profile().identified
    assert "measure also 3000 tokens in" in report.advice
    expected = window(TRUTH, rps=0.5)
    seen = predict([expected], queue_model("v3"), np.exp(state.belief.mean))
    assert seen.ttft_s[0] == pytest.approx(expected.ttft_s, rel=0.05)
    assert seen.itl_s[0] == pytest.approx(expected.itl_s, rel=0.05)
    assert np.sqrt(np.diag(state.belief.covariance)).max() > 0.5  # some parameter may be half as much or twice


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_step_is_tracked_in_five_cycles(noise: float) -> None:
    """All parameters grow by a quarter: five cycles on, each is within 3 %, and the change is reported once."""
    state, _ = run(start(), TRUTH, range(20), noise)
    state, reports = run(state, TRUTH * 1.25, range(20, 25), noise, seed=2)
    assert off(state, TRUTH * 1.25) < 0.03
    assert [r.changed for r in reports].count(True) == 1
    assert state.changes == 1


def test_three_replicas_tell_a_step_at_once() -> None:
    """Where every replica of a cycle disagrees with what is believed there is nothing to wait for."""
    state, _ = run(start(), TRUTH, range(20))
    state, report = observe(state, [window(TRUTH * 1.25, **varied(k)) for k in (1, 3, 5)])
    assert report.changed
    assert off(state, TRUTH * 1.25) < 0.03


def test_errors_of_measurement_change_nothing() -> None:
    """Single windows three times too long, one every fifth cycle, are told from a change and left out."""
    state, _ = run(start(), TRUTH, range(20), 0.02)
    before = state.belief.mean
    for k in range(20, 32):
        wrong = (3.0, 0.4) if k % 5 == 0 else (1.0, 1.0)
        state, _ = observe(state, [window(TRUTH, wrong=wrong, **varied(k))])
    assert state.changes == 0
    assert state.outliers >= 2
    assert np.abs(state.belief.mean - before).max() < 0.05


def test_a_saturated_window_counts_with_its_itl_only() -> None:
    """Of a replica that is full, the wait says how long one looked; the ITL is that of a full batch, and is used."""
    state, _ = run(start(), TRUTH, range(8))
    full = window(TRUTH, rps=50.0, batch=32)
    state, report = observe(state, [replace(full, ttft_s=full.ttft_s * 4)])
    assert (report.saturated, report.outliers, report.suspects) == (1, 0, 0)
    assert off(state, TRUTH) < 0.01


def test_memory_is_bounded_and_keeps_rare_loads() -> None:
    """After many windows of one load, the few of another are still kept."""
    state = start()
    state, _ = observe(state, [window(TRUTH, rps=0.2, n=200, m=100), window(TRUTH, rps=0.2, n=4000, m=100)])
    for _ in range(30):
        state, _ = observe(state, [window(TRUTH, rps=0.5), window(TRUTH, rps=0.52)])
    assert len(state.kept) == KEPT
    assert {s.point.input_tokens for s in state.kept} == {200, 1500, 4000}
    assert state.identified


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    """Kept on disk and read back, the calibration goes on as if it had not been interrupted."""
    file = tmp_path / "state.json"
    state, _ = run(start(), TRUTH, range(7), 0.02)
    assert read_calibrations(file) == ()
    write_calibrations(file, [begin("other", "L4"), state])
    write_calibrations(file, [state])
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    (back,) = read_calibrations(file)
    on, _ = run(state, TRUTH, range(7, 9), 0.02)
    again, _ = run(back, TRUTH, range(7, 9), 0.02)
    assert again.belief.mean.tolist() == on.belief.mean.tolist()
    assert again.kept == on.kept


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    """Half a file, or one that somebody edited, is refused with a sentence, never half understood."""
    file = tmp_path / "state.json"
    write_calibrations(file, [run(start(), TRUTH, range(3))[0]])
    whole = file.read_text()
    for text in (whole[:200], "{}", whole.replace('"log_mean"', '"mean"')):
        file.write_text(text)
        with pytest.raises(InvalidInput, match=r"state\.json"):
            read_calibrations(file)
    body = json.loads(whole)
    body["calibrations"][0]["prior"]["log_covariance"][0][0] = -1
    file.write_text(json.dumps(body))
    with pytest.raises(InvalidInput, match="no covariance"):
        read_calibrations(file)


def test_a_new_accelerator_starts_from_a_known_one() -> None:
    """Bandwidth and compute of both move the law; one window then does more than from the default start."""
    known = LatencyProfile(model="granite", accelerator="H100", alpha_s=8e-3, beta_s=1.6e-5, gamma_s=5e-7)
    h100 = Accelerator(name="H100", type="H100", memory_gb_s=3350, compute_tflops=989)
    a100 = Accelerator(name="A100", type="A100", memory_gb_s=2039, compute_tflops=312)
    prior = prior_from(known, h100, a100)
    slower = 3350 / 2039
    assert np.exp(prior.mean) == pytest.approx([8e-3 * slower, 1.6e-5 * 989 / 312, 5e-7 * slower])
    truth = np.array([15e-3, 4.5e-5, 9e-7])  # near what the hardware says, not at it
    unseen = window(truth, rps=0.3, n=300, m=2000)
    errors = []
    for prior_ in (prior, begin("granite", "A100").prior):
        state, _ = observe(begin("granite", "A100", law="v3", prior=prior_), [window(truth, rps=0.3)])
        seen = predict([unseen], queue_model("v3"), np.exp(state.belief.mean))
        errors.append(abs(float(seen.itl_s[0]) / unseen.itl_s - 1))
    assert errors[0] < 0.1 < errors[1]
    with pytest.raises(InvalidInput, match="state memory_gb_s or compute_tflops of both"):
        prior_from(known, h100, Accelerator(name="X", type="X"))


def test_nothing_observed_is_no_profile() -> None:
    """A calibration without a window has nothing to plan with, and cycles without traffic leave it as it is."""
    state, report = observe(start(), [])
    assert report.used == 0
    assert state.cycle == 1
    with pytest.raises(InvalidInput, match="nothing was observed of granite on H100 yet"):
        state.profile()


def test_the_order_of_replicas_does_not_matter() -> None:
    """Windows of one cycle are a set."""
    points = [window(TRUTH, **varied(k)) for k in range(4)]
    one, _ = observe(start(), points)
    other, _ = observe(start(), points[::-1])
    assert one.belief.mean.tolist() == other.belief.mean.tolist()
