"""`flyball control` from files: states in, plans with reasons out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from flyball.adapters.calibration_files import read_calibrations
from flyball.adapters.fleet_export import FleetMetrics
from flyball.cli import _register, app
from flyball.planner.cycle import turn
from flyball.planner.loop import FleetLoop
from helpers.toy_fleet import ToyFleet, fleet_spec

SPEC = """
accelerators: [{name: H100, cost_per_h: 4}]
capacity: {H100: 8}
profiles: [{model: m, accelerator: H100, alpha_ms: 9, beta_ms: 0.03, gamma_ms: 0.00006, max_batch: 256}]
service_classes: [{name: c, targets: {m: {slo: [mean_ttft<200ms, mean_itl<15ms]}}}]
servers: [{name: chat, class: c, model: m, arrival_rps: 1, input_tokens: 1180, output_tokens: 215}]
"""


def states(path: Path) -> Path:
    """Three looks at a server whose one replica is asked for too much."""
    replica = {"name": "r0", "accelerator": "H100", "running": 60, "kv_used": 0.2, "kv_capacity_tokens": 524288}
    server = {
        "arrivals": 180, "completed": 150, "input_tokens": 1180, "output_tokens": 215, "wanted": {"H100": 1},
        "replicas": [replica],
    }  # fmt: skip
    lines = [{"now_s": 15.0 * k, "window_s": 15.0, "servers": {"chat": server}} for k in (1, 2, 3)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def run(*arguments: object) -> tuple[int, str]:
    """The command's exit code and output."""
    _register()
    result = CliRunner().invoke(app, ["control", *map(str, arguments)])
    return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"


def test_states_in_plans_out(tmp_path: Path) -> None:
    """Each state yields one decision, with counts, cost, binding constraint, reasons and alternatives."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    code, text = run(tmp_path / "spec.yaml", "--states", states(tmp_path / "s.jsonl"), "--format", "json")
    assert code == 0, text
    decisions = [json.loads(line)["servers"]["chat"] for line in text.splitlines()]
    assert len(decisions) == 3
    assert decisions[0]["replicas"]["H100"] >= 3
    assert decisions[0]["cost_per_h"] == 4 * decisions[0]["replicas"]["H100"]
    assert decisions[0]["binding"] == "ITL"
    assert decisions[0]["alternatives"][0]["why_not"]
    code, text = run(tmp_path / "spec.yaml", "--states", tmp_path / "s.jsonl")
    assert code == 0
    assert "requests/s now" in text


def test_a_source_must_be_named(tmp_path: Path) -> None:
    """Without states or a Prometheus server there is nothing to decide from, and that is said."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    code, text = run(tmp_path / "spec.yaml")
    assert code != 0
    assert "--states FILE or --prometheus URL" in text


def test_decisions_are_exported_under_the_names_that_hpa_and_keda_objects_read() -> None:
    """`wva_desired_replicas` and its kin carry the last decision, by variant and namespace."""
    spec = fleet_spec()
    fleet = ToyFleet(spec=spec, rates={"chat": lambda _: 15.0})
    fleet.put("chat", "H100", 1)
    loop, metrics = FleetLoop(spec), FleetMetrics({"chat": "prod"})
    memory = loop.start()
    for _ in range(4):
        fleet.advance(15.0)
        told, memory = turn(fleet, loop, fleet, memory)
        metrics.record(told)
    families = {f.name: f for f in text_string_to_metric_families(metrics.exposition().decode())}
    desired = families["wva_desired_replicas"].samples[0]
    assert desired.labels == {"variant_name": "chat", "namespace": "prod", "accelerator_type": "H100"}
    assert desired.value == fleet.count("chat") >= 3
    names = ("current_replicas", "desired_ratio", "replica_scaling", "saturation_utilization", "spare_capacity")
    assert {f"wva_{name}" for name in names} <= set(families)


@pytest.mark.slow
def test_what_is_learnt_of_latencies_is_kept_in_a_file(tmp_path: Path) -> None:
    """With --calibrations the windows of one run are known to the next; --no-calibrate learns nothing."""
    (tmp_path / "spec.yaml").write_text(SPEC)
    replica = {"name": "r0", "accelerator": "H100", "running": 40, "arrivals": 240, "completed": 240}
    lines = []
    for k in range(1, 4):
        shown = replica | {"ttft_s": 0.05 + 0.001 * k, "itl_s": 0.011 + 0.0002 * k}
        server = {"arrivals": 240, "completed": 240, "input_tokens": 1000, "output_tokens": 200, "replicas": [shown]}
        lines.append(json.dumps({"now_s": 60 * k, "window_s": 60, "servers": {"chat": server}}))
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    given = (tmp_path / "spec.yaml", "--states", tmp_path / "s.jsonl", "--calibrations", tmp_path / "c.json")
    for cycles in (2, 4):
        code, text = run(*given)
        assert code == 0, text
        assert read_calibrations(tmp_path / "c.json")[0].cycle == cycles
    assert "latency profile on H100" in text
    code, text = run(*given, "--no-calibrate")
    assert code != 0
    assert "leave one of them out" in text
    code, text = run(*given[:3], "--no-calibrate")
    assert "latency profile" not in text
