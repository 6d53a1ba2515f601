"""The queueing law against an engine simulated step by step, and the bridge from its windows to predictions."""

from __future__ import annotations

import numpy as np
import pytest

from flyball.performance.fit import OperatingPoint, fit, relative_errors
from flyball.performance.queueing import queue_model
from helpers.continuous_batching import Engine, Seen, varied

CPU = Engine(alpha_s=0.012, beta_s=1e-4, gamma_s=2e-6, max_batch=16, max_step_tokens=512)
CHUNKED = Engine(alpha_s=0.012, beta_s=1e-4, gamma_s=2e-6, max_batch=16, max_step_tokens=128)
GPU = Engine(alpha_s=0.007, beta_s=2e-5, gamma_s=5e-8, max_batch=64, max_step_tokens=2048)
TINY = Engine(alpha_s=0.0007, beta_s=1.9e-4, gamma_s=2e-7, max_batch=16, max_step_tokens=512)
LAW = queue_model("v3-engine")


def point(engine: Engine, seen: Seen) -> OperatingPoint:
    """What was seen, as a fit takes it."""
    return OperatingPoint(
        arrival_rps=seen.arrival_rps,
        input_tokens=seen.input_tokens,
        output_tokens=seen.output_tokens,
        max_batch=engine.max_batch,
        max_queue=1000,
        max_step_tokens=engine.max_step_tokens,
        ttft_s=seen.ttft_s,
        itl_s=seen.itl_s,
    )


@pytest.mark.slow
@pytest.mark.parametrize("rate_share", [0.05, 0.3, 0.5])
@pytest.mark.parametrize(
    ("engine", "lengths", "capacity_rps"),
    [
        pytest.param(CPU, (128, 64, 0.0), 11.4, id="equal lengths"),
        pytest.param(CPU, (128, 64, 0.6), 11.4, id="varied lengths"),
        pytest.param(CPU, (400, 32, 0.0), 10.5, id="long prompts"),
        pytest.param(CHUNKED, (400, 32, 0.0), 8.0, id="prompts in chunks"),
        pytest.param(GPU, (512, 128, 0.0), 32.8, id="large batch"),
        pytest.param(TINY, (250, 48, 0.0), 16.4, id="steps short, prompts long"),
        pytest.param(TINY, (400, 32, 0.0), 9.6, id="prompts that arrive in bursts"),
    ],
)
def test_means_agree_with_the_simulated_engine(
    engine: Engine,
    lengths: tuple[float, float, float],
    capacity_rps: float,
    rate_share: float,
    rng: np.random.Generator,
) -> None:
    """Up to half the capacity TTFT and ITL are within 8 % of what the engine's steps add up to."""
    tokens_in, tokens_out, spread = lengths
    seen = engine.run(rng, rate_share * capacity_rps, varied(rng, 3000, tokens_in, tokens_out, spread))
    law = np.array([engine.alpha_s, engine.beta_s, engine.gamma_s])
    assert np.abs(relative_errors([point(engine, seen)], LAW, law)).max() < 0.08


@pytest.mark.slow
def test_windows_of_an_engine_predict_a_load_that_was_not_fitted(rng: np.random.Generator) -> None:
    """Four short windows, two loads of two mixes, determine the law; other loads and a third mix come within 20 %."""

    def window(rate_rps: float, tokens_in: float, tokens_out: float) -> OperatingPoint:
        return point(CPU, CPU.run(rng, rate_rps, varied(rng, 150, tokens_in, tokens_out, 0.7)))

    found = fit([window(2, 128, 64), window(6, 128, 64), window(1.5, 400, 32), window(5, 400, 32)], LAW)
    assert found.identified
    assert found.alpha_s == pytest.approx(CPU.alpha_s, rel=0.1)
    unseen = [window(4, 128, 64), window(3, 400, 32), window(3, 64, 128)]
    errors = relative_errors(unseen, LAW, np.array([found.alpha_s, found.beta_s, found.gamma_s]))
    assert np.abs(errors).max() < 0.2
