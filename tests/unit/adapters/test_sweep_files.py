"""Sweeps of others become operating points, and the fit to them is at least as good as model-trainer's."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flyball.adapters.sweep_files import is_sweep, read_sweep
from flyball.core.errors import InvalidInput
from flyball.performance.fit import fit
from flyball.performance.queueing import queue_model

DATA = Path(__file__).parents[2] / "data" / "inferno" / "model-trainer"


@pytest.mark.parametrize("start", [(), (1e-3, 1e-5, 1e-7), (1.0, 1e-9, 1e-12), (1e-6, 1e-2, 1e-4), (1.0, 0.0, 0.0)])
def test_the_sample_is_fitted_from_any_start(start: tuple[float, ...]) -> None:
    """The loss on data.json is at most .0143 whatever the start; model-trainer's default one ends at .106."""
    found = fit(read_sweep(DATA / "data.json", max_batch=256), queue_model("v3-compat"), robust=False, start_s=start)
    assert found.loss <= 0.0143
    assert found.alpha_s == pytest.approx(6.674e-3, rel=0.01)


def test_a_start_below_zero_is_refused() -> None:
    """No latency grows by a negative number of seconds."""
    with pytest.raises(InvalidInput, match="a fit cannot start from"):
        fit(read_sweep(DATA / "data.json", max_batch=256), queue_model("v3-compat"), start_s=(1.0, -1e-5, 0.0))


def test_newer_reports_are_read(tmp_path: Path) -> None:
    """GuideLLM 0.5's CSV has three heading rows, its HTML the same sweep in a script; `throughput` is left out."""
    heads = (
        ("Run Info", "Benchmark", "Request Counts", "Time to First Token", "Time to First Token",
         "Inter Token Latency", "Server Throughput", "Token Metrics", "Token Metrics"),
        ("Run ID", "Strategy", "Successful", "Successful ms", "Successful ms", "Successful ms",
         "Successful Requests/Sec", "Successful Input Tokens", "Successful Output Tokens"),
        ("", "", "", "Mean", "Median", "Mean", "Mean", "Mean", "Mean"),
    )  # fmt: skip
    sweep = (("synchronous", 18.3175, 11.1911, 1.39667), ("throughput", 209.472, 63.1996, 121.603),
             ("constant", 34.776, 11.4766, 16.4033))  # fmt: skip
    with (tmp_path / "benchmarks.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerows(heads)
        writer.writerows(("2120", name, 839, 99.0, ttft, itl, rate, 83.05, 64.02) for name, ttft, itl, rate in sweep)
    means = (("prompts", 83.05), ("generations", 64.02))
    lengths = {of: {"tokenDistributions": {"statistics": {"mean": mean}}} for of, mean in means}
    shown = [{"ttft": {"mean": 99.0, "median": t}, "itl": {"mean": i}, "requestsPerSecond": r} for _, t, i, r in sweep]
    script = f"window.workloadDetails = {json.dumps(lengths)};\n window.benchmarks = {json.dumps(shown)};"
    page = tmp_path / "benchmarks.html"
    page.write_text(f"<!DOCTYPE html><script>{script}</script><body></body>")
    points = read_sweep(tmp_path / "benchmarks.csv", max_batch=512)
    assert [p.arrival_rps for p in points] == [1.39667, 16.4033]
    assert [p.ttft_s for p in points] == pytest.approx([0.0183175, 0.034776])
    assert is_sweep(page)
    assert read_sweep(page, max_batch=512) == points
    page.write_text("<script>window.benchmarks = [{</script>")
    with pytest.raises(InvalidInput, match=r"benchmarks\.html has no window\.workloadDetails"):
        read_sweep(page, max_batch=512)


def test_merged_sweeps_identify_all_three() -> None:
    """112 points of 16 token mixes: loss at most .0308 to its last digit, and model-trainer's own parameters."""
    points = read_sweep(DATA / "exp1-merged.json", max_batch=256)
    found = fit(points, queue_model("v3-compat"), robust=False)
    assert len(points) == 112
    assert found.loss <= 0.03082
    assert found.identified
    assert (found.alpha_s, found.beta_s, found.gamma_s) == pytest.approx((6.678e-3, 2.008e-5, 5.516e-8), rel=0.02)


def test_guidellm_is_read_in_all_forms(tmp_path: Path) -> None:
    """A list of rows and a CSV give the same points, those that model-trainer merged; its JSON report is read too."""
    rows = json.loads((DATA / "sweep-i1024-o1024.json").read_text())
    with (tmp_path / "sweep.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    listed = read_sweep(DATA / "sweep-i1024-o1024.json", max_batch=256)
    assert read_sweep(tmp_path / "sweep.csv", max_batch=256) == listed
    merged = read_sweep(DATA / "exp1-merged.json", max_batch=256)
    assert [(p.arrival_rps, p.ttft_s, p.itl_s) for p in listed[:7]] == [
        (p.arrival_rps, p.ttft_s, p.itl_s) for p in merged[:7]
    ]
    report = read_sweep(DATA / "guidellm.json", max_batch=256)
    assert len(report) == 9  # ten strategies, one of them throughput
    assert report[0].ttft_s == pytest.approx(0.011963129)


BAD = ["[{}]", '{"benchmarks": [{"metrics": 3}]}', '{"data": [{"requestRate": "x"}]}', '{"data": []}', "[1]", "3"]


@pytest.mark.parametrize("body", BAD)
def test_mistakes_are_named(tmp_path: Path, body: str) -> None:
    """Whatever is wrong with a file is told in a sentence with its name."""
    (tmp_path / "bad.json").write_text(body)
    with pytest.raises(InvalidInput, match=r"bad\.json"):
        read_sweep(tmp_path / "bad.json", max_batch=256)


def test_fit_takes_sweeps(tmp_path: Path) -> None:
    """`flyball fit` writes a profile from them and says how well they determine it."""
    out = tmp_path / "profile.json"
    assert is_sweep(DATA / "data.json")
    arguments = ["fit", str(DATA / "exp1-merged.json"), "--queue-model", "v3-compat", "--model", "llama"]
    ran = subprocess.run(
        [sys.executable, "-m", "flyball", *arguments, "--out", str(out)], capture_output=True, text=True, check=True
    )
    assert "112 points, loss 0.03" in ran.stdout
    assert json.loads(out.read_text())["profiles"][0]["model"] == "llama"
