"""Sizing for percentiles, for losses, for memory, for lengths that vary and prompts that are cached."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import numpy as np
import pytest

from flyball.adapters.fleet_files import read_fleet
from flyball.core.errors import InvalidInput
from flyball.performance.memory import held_tokens, memory_batch
from flyball.performance.percentiles import percentiles
from flyball.performance.queueing import Replicas, queue_model
from flyball.performance.sizing import Goals, size
from flyball.planner.plan import plan

LAW = queue_model("v3")
ONE = {"alpha_s": 0.008, "beta_s": 2e-5, "gamma_s": 2e-7, "input_tokens": 512, "output_tokens": 128}


def test_a_percentile_costs_load_and_is_kept() -> None:
    """A P99 of TTFT within a limit allows less load than a mean within it; at that load P99 is the limit."""
    queues = LAW.prepare(Replicas.of(**ONE, max_batch=16, max_queue=64))
    mean = size(queues, Goals.of(1, ttft_s=0.2))
    tail = size(queues, Goals.of(1, bounds={("ttft", 99.0): 0.2}))
    assert tail.rate_rps[0] < 0.97 * mean.rate_rps[0]
    assert percentiles(queues, tail.rate_rps, (99.0,)).ttft_s[0, 0] == pytest.approx(0.2, rel=0.02)
    both = size(queues, Goals.of(1, ttft_s=0.2, bounds={("ttft", 99.0): 0.2, ("e2e", 50.0): 1e9}))
    assert both.rate_rps[0] == pytest.approx(tail.rate_rps[0], rel=1e-3)
    assert not size(queues, Goals.of(1, bounds={("e2e", 50.0): 0.1})).feasible[0]


def test_a_loss_is_kept_within_its_share() -> None:
    """Without places to wait, a tenth of a percent lost means far less load than a tenth."""
    queues = LAW.prepare(Replicas.of(**ONE, max_batch=16, max_queue=0))
    rates = [size(queues, Goals.of(1, loss=share)).rate_rps for share in (0.1, 0.001)]
    for rate, share in zip(rates, (0.1, 0.001), strict=True):
        assert queues.analyze(rate).loss[0] == pytest.approx(share, rel=0.01)
    assert rates[1] < 0.7 * rates[0]


def test_memory_limits_the_batch() -> None:
    """Equal answers are half given on average; varied ones hold more, for long ones stay longer."""
    assert held_tokens(100, 300)[0] == 250
    assert held_tokens(100, 300, output_cv=1.0)[0] == 400
    batches = memory_batch(32768, 100, 300, output_cv=np.array([0.0, 0.5, 1.0, 2.0]))
    assert (np.diff(batches) < 0).all()
    assert memory_batch(32768, 100, 300) == pytest.approx(32768 / 250, rel=0.1)
    assert memory_batch(300, 100, 300) == 0
    assert memory_batch(400, 100, 300) == 1


def test_cached_prompts_take_less_work_but_still_are_read() -> None:
    """A prompt found in the cache is not computed: TTFT falls towards a step's time, decode steps stay as long."""
    many = Replicas.of(**ONE, max_batch=16, max_queue=64, prefix_hit=[0.0, 0.5, 1.0])
    seen = LAW.prepare(many).analyze(np.full(3, 1.0))
    assert (np.diff(seen.ttft_s) < 0).all()
    assert seen.ttft_s[2] > 0.008
    gaps = LAW.prepare(many).anatomy().gap_s[:, 0]  # type: ignore[attr-defined]
    assert gaps == pytest.approx(gaps[0])


def test_what_varies_more_waits_longer() -> None:
    """Stated variation spreads the wait of those who wait; the chance to wait at all stays about what it was."""
    base = Replicas.of(**ONE, max_batch=4, max_queue=500)
    waits = []
    for cv in (0.0, 1.0, 2.0):
        queues = LAW.prepare(dataclasses.replace(base, input_cv=np.array([0.0]), output_cv=np.array([cv])))
        waits.append(percentiles(queues, 0.8 * queues.capacity_rps, (99.0,)).ttft_s[0, 0])
    assert waits[0] < waits[1] < waits[2]


FLEET = """
    accelerators: [{name: A, cost_per_h: 4}, {name: B, cost_per_h: 1}]
    unlimited: true
    profiles:
      - {model: m, accelerator: A, alpha_ms: 8, beta_ms: 0.02, gamma_ms: 0.0002, max_batch: 64, kv_tokens: 40000}
      - {model: m, accelerator: B, alpha_ms: 20, beta_ms: 0.08, gamma_ms: 0.001, max_batch: 64, kv_tokens: 20000}
    service_classes:
      - {name: mean, targets: {m: {slo: [mean_ttft<500ms, mean_itl<40ms]}}}
      - {name: tail, targets: {m: {slo: [p99_ttft<500ms, p99_itl<40ms, p90_e2e<9s], max_loss: 0.001}}}
      - {name: never, targets: {m: {slo: [p99_ttft<5ms]}}}
    servers:
      - {name: s1, class: mean, model: m, arrival_rps: 30, input_tokens: 500, output_tokens: 200}
      - {name: s2, class: tail, model: m, arrival_rps: 30, input_tokens: 500, output_tokens: 200, output_cv: 1.2}
      - {name: s3, class: never, model: m, arrival_rps: 30, input_tokens: 500, output_tokens: 200}
      - {name: s4, class: mean, model: m, arrival_rps: 1, input_tokens: 50000, output_tokens: 200}
"""


def test_a_fleet_file_says_percentiles_losses_memory_and_variation(tmp_path: Path) -> None:
    """Percentiles cost more than means; what no accelerator keeps, or no cache holds, is named with its reason."""
    file = tmp_path / "fleet.yaml"
    file.write_text(textwrap.dedent(FLEET))
    made = plan(read_fleet(file))
    assert set(made.allocations) == {"s1", "s2"}
    assert made.allocations["s2"].cost_per_h > made.allocations["s1"].cost_per_h
    assert all(a.max_batch <= 160 for a in made.allocations.values())
    assert "no accelerator keeps p99_ttft<=5ms" in made.unserved["s3"]
    assert "no KV cache holds a request of 50200 tokens, the largest has room for 40000" in made.unserved["s4"]
    file.write_text(textwrap.dedent(FLEET).replace("p99_itl<40ms", "p99_tpot<40ms"))
    with pytest.raises(InvalidInput, match="percentiles of ttft, itl and e2e, use p99_itl"):
        read_fleet(file)


def test_a_plug_in_s_model_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution on the path that names an entry point in `flyball.queue_models` adds a queue model by name."""
    (tmp_path / "their_queue.py").write_text(
        "from flyball.performance.queue_legacy import LINEAR\nMODEL = LINEAR  # anything with `prepare`\n"
    )
    info = tmp_path / "their_queue-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-queue\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flyball.queue_models]\ntheirs = their_queue:MODEL\n")
    with pytest.raises(InvalidInput, match="unknown queue model 'theirs'"):
        queue_model("theirs")
    monkeypatch.syspath_prepend(tmp_path)
    one = Replicas.of(alpha_s=2.0, beta_s=0.25, gamma_s=0.0, input_tokens=1, output_tokens=1, max_batch=4, max_queue=2)
    assert queue_model("theirs").prepare(one).analyze(np.array([0.8])).throughput_rps[0] == pytest.approx(0.769475)
