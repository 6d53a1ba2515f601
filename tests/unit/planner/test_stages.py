"""A server in two stages is two servers: each with its part of the work and of the promise."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from flyball.adapters.fleet_files import read_fleet
from flyball.core.errors import InvalidInput
from flyball.planner.plan import plan

FLEET = """
    accelerators: [{name: fast, cost_per_h: 4}, {name: wide, cost_per_h: 1}]
    unlimited: true
    profiles:
      - {model: m, accelerator: fast, alpha_ms: 8, beta_ms: 0.02, gamma_ms: 0.0004, max_batch: 64}
      - {model: m, accelerator: wide, alpha_ms: 9, beta_ms: 0.2, gamma_ms: 0.0004, max_batch: 64}
    service_classes: [{name: c, targets: {m: {slo: [mean_ttft<300ms, p99_itl<30ms]}}}]
    servers:
      - {name: s, class: c, model: m, arrival_rps: 20, input_tokens: 2000, output_tokens: 200, disaggregated: true}
"""


def fleet(tmp_path: Path, old: str = "", new: str = "") -> Path:
    """The fleet on disk, something in it changed."""
    file = tmp_path / "fleet.yaml"
    file.write_text(textwrap.dedent(FLEET.replace(old, new) if old else FLEET))
    return file


def test_each_stage_finds_its_own_accelerator(tmp_path: Path) -> None:
    """Prompts go where computing is fast, answers where a step is cheap; together they cost less than in one stage."""
    apart = plan(read_fleet(fleet(tmp_path)))
    assert {name: a.accelerator for name, a in apart.allocations.items()} == {"s/prefill": "fast", "s/decode": "wide"}
    assert apart.allocations["s/prefill"].ttft_s <= 0.3
    assert apart.allocations["s/decode"].itl_s <= 0.03
    together = plan(read_fleet(fleet(tmp_path, ", disaggregated: true")))
    assert apart.cost_per_h < together.cost_per_h


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("output_tokens: 200", "output_tokens: 1", "it takes a prompt, and answers of more than one token"),
        ("p99_itl<30ms", "p99_e2e<9s", "bounds e2e, which no stage of a disaggregated server can promise"),
    ],
)
def test_what_cannot_be_split_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    """Answers that end with the prefill, and promises of both stages together, are refused with the reason."""
    with pytest.raises(InvalidInput, match=complaint):
        read_fleet(fleet(tmp_path, old, new))
