"""Fits: exact where the data are, near where they are noisy, flagged where they say too little."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flyball.core.errors import InvalidInput
from flyball.performance.fit import Fit, OperatingPoint, fit, predict, relative_errors
from flyball.performance.queueing import queue_model

TRUTH = np.array([0.012, 1e-4, 2e-6])
MIXES = ((2.0, 128, 64), (8.0, 128, 64), (2.0, 400, 32), (4.0, 400, 32))


def measured(law: str, loads: tuple[tuple[float, int, int], ...] = MIXES) -> list[OperatingPoint]:
    """Points that obey the law exactly."""
    blank = [
        OperatingPoint(
            arrival_rps=rate, input_tokens=n, output_tokens=m, max_batch=16, max_queue=1000, ttft_s=1.0, itl_s=1.0
        )
        for rate, n, m in loads
    ]
    seen = predict(blank, queue_model(law), TRUTH)
    return [replace(p, ttft_s=float(t), itl_s=float(i)) for p, t, i in zip(blank, seen.ttft_s, seen.itl_s, strict=True)]


def parameters(found: Fit) -> list[float]:
    """Alpha, beta, gamma."""
    return [found.alpha_s, found.beta_s, found.gamma_s]


@pytest.mark.parametrize("law", ["v3", "v3-engine"])
def test_exact_data_give_the_exact_law(law: str) -> None:
    """Two loads of two mixes determine all three parameters, to 1e-5."""
    found = fit(measured(law), queue_model(law))
    assert parameters(found) == pytest.approx(TRUTH.tolist(), rel=1e-5)
    assert found.identified
    assert found.loss < 1e-10


def test_noise_spares_the_prediction(rng: np.random.Generator) -> None:
    """With 5 % noise on every latency, a load and mix that were not fitted are predicted within 10 %."""
    noisy = [
        replace(p, ttft_s=p.ttft_s * rng.normal(1, 0.05), itl_s=p.itl_s * rng.normal(1, 0.05))
        for p in measured("v3-engine")
    ]
    law = queue_model("v3-engine")
    found = fit(noisy, law)
    unseen = measured("v3-engine", ((5.0, 200, 50), (1.0, 300, 100)))
    assert np.abs(relative_errors(unseen, law, np.array(parameters(found)))).max() < 0.1


def test_one_odd_window_bends_the_law_little() -> None:
    """A TTFT three times too long in one of eight windows moves no parameter by more than a tenth."""
    loads = (*MIXES, (5.0, 128, 64), (3.0, 400, 32), (1.0, 64, 128), (4.0, 64, 128))
    points = measured("v3-engine", loads)
    points[1] = replace(points[1], ttft_s=points[1].ttft_s * 3)
    found = fit(points, queue_model("v3-engine"))
    assert parameters(found)[:2] == pytest.approx(TRUTH[:2].tolist(), rel=0.1)


def test_equal_windows_are_flagged() -> None:
    """The same load twice says two numbers about three parameters: predicted well, flagged all the same."""
    points = measured("v3-engine", (MIXES[0], MIXES[0]))
    found = fit(points, queue_model("v3-engine"))
    assert not found.identified
    assert found.condition_number > 1000
    assert found.loss < 1e-6


def test_one_window_is_refused() -> None:
    """A single point fits any law."""
    with pytest.raises(InvalidInput, match="a fit needs at least 2 operating points, not 1; measure more loads"):
        fit(measured("v3")[:1], queue_model("v3"))


@pytest.mark.parametrize("field", ["arrival_rps", "ttft_s"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_point_that_measured_nothing_is_refused(field: str, value: float) -> None:
    """An empty window cannot become an operating point; the complaint names the quantity."""
    with pytest.raises(InvalidInput, match=f"an operating point's {field} is {value}; measure a window"):
        replace(measured("v3")[0], **{field: value})
