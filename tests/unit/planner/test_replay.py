"""Real cycles of llm-inferno's control loop, planned again."""

from __future__ import annotations

from pathlib import Path

import pytest

from flyball.adapters.cycle_logs import read_cycles
from flyball.core.errors import InvalidInput
from flyball.planner.replay import compare

LOGS = sorted((Path(__file__).parents[2] / "data" / "inferno" / "cycles").glob("*.jsonl"))


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.stem)
def test_no_cycle_is_dropped_and_none_costs_more(log: Path) -> None:
    """Every recorded cycle is planned whole, at most at their cost and at their predicted attainment or better."""
    cycles = [compare(c.spec, c.theirs, c.batches) for c in read_cycles(log)]
    assert len(cycles) == len(log.read_text().splitlines())
    assert not any(c.unserved for c in cycles)
    assert all(c.our_cost_per_h <= c.their_cost_per_h + 1e-9 for c in cycles)
    assert all(c.our_attainment >= c.their_attainment for c in cycles)
    assert sum(c.our_cost_per_h for c in cycles) < sum(c.their_cost_per_h for c in cycles)


def test_a_broken_log_is_named_with_its_line(tmp_path: Path) -> None:
    """A record that cannot be read is a user's mistake, told with file and line."""
    log = tmp_path / "log.jsonl"
    log.write_text('{"servers": []}\n{"servers": [{"name": 3}]}\n')
    with pytest.raises(InvalidInput, match=r"log\.jsonl:2"):
        read_cycles(log)
