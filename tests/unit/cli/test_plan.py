"""`flyball plan` and `flyball fit` as a shell sees them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from flyball.adapters.bench_files import BenchResult, write_bench
from flyball.cli import main
from flyball.core.metrics import Summary
from flyball.performance.fit import OperatingPoint, predict
from flyball.performance.queueing import queue_model

ROOT = Path(__file__).parents[3]
DATA = ROOT / "tests" / "data" / "inferno"
EXAMPLE = ROOT / "examples" / "fleet.yaml"
Shell = Callable[..., tuple[int, str, str]]
TRUTH = np.array([0.012, 1e-4, 2e-6])


@pytest.fixture
def flyball(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs a command line; gives its exit code, output and complaints."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flyball", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            main()
        out = capsys.readouterr()
        return int(exit_.value.code or 0), out.out, out.err

    return run


def window(rate: float, tokens_in: int, tokens_out: int, **changes: object) -> BenchResult:
    """A bench result that obeys the engine's law exactly."""
    point = OperatingPoint(
        arrival_rps=rate, input_tokens=tokens_in, output_tokens=tokens_out,
        max_batch=16, max_queue=1000, max_step_tokens=512, ttft_s=1, itl_s=1,
    )  # fmt: skip
    seen = predict([point], queue_model("v3-engine"), TRUTH)

    def summary(value: float) -> Summary:
        return Summary(100, value, value, value, value, value, value)

    result = BenchResult(
        generation="g1", configuration={"max_num_seqs": 16, "max_num_batched_tokens": 512}, model="tiny", url="",
        workload="test", seed=0, prompt_seed=0, duration_s=100 / rate, requests=100, completed=100, arrival_rps=rate,
        throughput_rps=rate, output_tps=0, mean_input_tokens=tokens_in, mean_output_tokens=tokens_out,
        mean_concurrency=float(seen.in_service[0]), ttft_s=summary(float(seen.ttft_s[0])),
        tpot_s=summary(float(seen.itl_s[0])), itl_s=summary(float(seen.itl_s[0])), e2e_s=summary(1), slo=(),
        attainment=1, goodput_rps=rate, errors={}, lag_s=summary(0), client_bound=False,
    )  # fmt: skip
    return replace(result, **changes)  # type: ignore[arg-type]


@pytest.fixture
def windows(tmp_path: Path) -> list[Path]:
    """Two loads of two token mixes, on disk."""
    loads = ((2.0, 128, 64), (8.0, 128, 64), (2.0, 400, 32), (4.0, 400, 32))
    paths = [tmp_path / f"w{index}.json" for index in range(len(loads))]
    for path, load in zip(paths, loads, strict=True):
        write_bench(path, window(*load))
    return paths


@pytest.mark.parametrize(
    ("name", "max_queue", "total"),
    [("small", 0, 21252), ("small", 128, 28911), ("large", 0, 20439), ("large", 128, 22416)],
)
def test_totals_of_the_sample_sets(flyball: Shell, name: str, max_queue: int, total: float) -> None:
    """JSON output is one AllocationSolution with the exact total in the spec's own unit."""
    code, out, _ = flyball("plan", DATA / name, "--unlimited", "--max-queue", max_queue, "--format", "json")
    solution = json.loads(out)
    assert (code, solution["totalCost"]) == (0, total)
    assert sum(a["cost"] for a in solution["allocations"].values()) == total


def test_the_spec_decides_whether_capacity_counts(flyball: Shell) -> None:
    """The small set is limited: the optimum within its capacity, unless the flag says otherwise."""
    file = DATA / "small" / "system-data.json"
    totals = [json.loads(flyball("plan", file, "--format", "json", *flag)[1])["totalCost"]
              for flag in ((), ("--limited",), ("--unlimited",))]  # fmt: skip
    assert totals == [22564, 22564, 21252]


def test_the_example_as_a_table(flyball: Shell) -> None:
    """Every server with accelerator, replicas and latencies, and the total."""
    code, out, _ = flyball("plan", EXAMPLE)
    assert code == 0
    assert "4 of 4 servers planned" in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["assistant"][0] == "A100"
    assert rows["night-jobs"][:2] == ["-", "0"]
    assert float(rows["total"][-1]) == sum(float(rows[n][3]) for n in ("assistant", "analyst", "summaries"))


def test_a_server_that_cannot_be_served_is_told_below_the_table(flyball: Shell, tmp_path: Path) -> None:
    """The rest is planned; the reason stands in the table's and in the JSON's answer."""
    spec = tmp_path / "fleet.yaml"
    spec.write_text(EXAMPLE.read_text().replace("mean_itl<60ms", "mean_itl<6ms"))
    code, out, _ = flyball("plan", spec)
    assert code == 0
    assert "analyst is not served: no accelerator keeps TTFT <= 1500 ms and ITL <= 6 ms for model 'chat-70b'" in out
    solution = json.loads(flyball("plan", spec, "--format", "json")[1])
    assert list(solution["unserved"]) == ["analyst"]
    assert set(solution["allocations"]) == {"assistant", "summaries", "night-jobs"}


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("plan", "no-such-file"), "cannot read no-such-file: No such file or directory; give a file that exists"),
        (("plan", EXAMPLE, "--queue-model", "v9"), "unknown queue model 'v9'; use one of v3, "),
        (("fit", "no-such-file"), "cannot read the bench file no-such-file"),
    ],
)
def test_mistakes_end_in_one_sentence_and_2(flyball: Shell, args: tuple[object, ...], complaint: str) -> None:
    """A wrong file or name: exit code 2, one line."""
    code, _, err = flyball(*args)
    assert code == 2
    assert complaint in err
    assert len(err.strip().splitlines()) == 1


def test_windows_become_a_profile_that_plan_accepts(flyball: Shell, windows: list[Path], tmp_path: Path) -> None:
    """The bridge: fit, predict a load that was not fitted, plan with the profile in place of the stated one."""
    held_out, out_file = tmp_path / "held.json", tmp_path / "profile.json"
    write_bench(held_out, window(5.0, 250, 48))
    code, out, _ = flyball(
        "fit", *windows, "--holdout", held_out, "--out", out_file, "--model", "chat-8b", "--accelerator", "L4"
    )
    assert code == 0
    assert "largest error held out: 0.0%, within the target of 20%" in out
    assert "alpha 12 ms a step, beta 0.1 ms a token computed, gamma 0.002 ms a cached token read" in out
    assert "the windows determine all three" in out
    stated, measured = (
        json.loads(flyball("plan", EXAMPLE, "--format", "json", *extra)[1]) for extra in ((), ("--profile", out_file))
    )
    assert stated["allocations"]["summaries"]["accelerator"] == "L4"
    assert stated["allocations"]["summaries"]["maxBatch"] > 16
    assert measured["allocations"]["summaries"]["maxBatch"] <= 16
    assert measured["allocations"]["analyst"] == stated["allocations"]["analyst"]


def test_a_fit_that_the_data_do_not_determine_is_flagged(flyball: Shell, windows: list[Path], tmp_path: Path) -> None:
    """The same window twice: three parameters from two numbers, said so and kept in the profile."""
    twin, out_file = tmp_path / "twin.json", tmp_path / "p.json"
    twin.write_bytes(windows[0].read_bytes())
    code, out, _ = flyball("fit", windows[0], twin, "--out", out_file)
    assert code == 0
    assert "NOT IDENTIFIED" in out
    assert json.loads(out_file.read_text())["profiles"][0]["condition_number"] > 1000


def test_a_saturated_window_is_left_out_and_named(flyball: Shell, windows: list[Path], tmp_path: Path) -> None:
    """A queue that only grows has no mean to fit; failures and a late client spoil a window as well."""
    spoilt = {
        "full.json": ({"mean_concurrency": 21.5}, "saturated, 21.5 requests in a server whose batch holds 16"),
        "failed.json": ({"completed": 80}, "20 of 100 requests failed"),
        "late.json": (
            {"lag_s": Summary(100, 0.05, 0, 0, 0, 0, 0)},
            "the load generator itself was 50 ms late on average",
        ),
    }
    for name, (changes, _) in spoilt.items():
        write_bench(tmp_path / name, window(8.0, 128, 64, **changes))
    code, out, _ = flyball("fit", *windows, *(tmp_path / name for name in spoilt))
    assert code == 0
    for name, (_, reason) in spoilt.items():
        assert f"left out: {tmp_path / name} ({reason})" in out
    full = tmp_path / "full.json"
    _, out, _ = flyball("fit", *windows, "--holdout", full)
    assert f"no test of the fit: {full} ({spoilt['full.json'][1]})" in out
    code, _, err = flyball("fit", windows[0], tmp_path / "full.json")
    assert code == 2
    assert "a fit needs 2 windows, and 1 of 2 can be used" in err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "other"}, "is of model 'tiny' and"),
        ({"configuration": {"max_num_seqs": 8}}, "max_num_batched_tokens=512 and"),
    ],
)
def test_windows_of_two_engines_are_refused(
    flyball: Shell, windows: list[Path], tmp_path: Path, changes: dict[str, object], complaint: str
) -> None:
    """One law cannot describe two models or two configurations."""
    write_bench(tmp_path / "other.json", window(2.0, 128, 64, **changes))
    code, _, err = flyball("fit", *windows, tmp_path / "other.json")
    assert code == 2
    assert complaint in err
    assert "by itself" in err


def test_a_window_without_its_batch_limit_is_refused(flyball: Shell, tmp_path: Path) -> None:
    """The law needs to know how many requests run at once."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        write_bench(path, window(2.0, 128, 64, configuration={}))
    code, _, err = flyball("fit", *paths)
    assert code == 2
    assert f"{paths[0]}: the configuration's max_num_seqs is None; bench a server that states its max_num_seqs" in err


def test_fit_goes_on_from_where_it_stopped(flyball: Shell, windows: list[Path], tmp_path: Path) -> None:
    """Windows given in two runs teach the same law as in one; its doubt reaches the plan when asked for."""
    state, twin, out_file = tmp_path / "state.json", tmp_path / "twin.json", tmp_path / "profile.json"
    named = ("--model", "chat-8b", "--accelerator", "L4")
    code, out, _ = flyball("fit", *windows[:2], "--state", state, *named)
    assert code == 0
    assert "NOT IDENTIFIED" in out
    code, out, _ = flyball("fit", *windows[2:], "--state", state, *named, "--out", out_file)
    assert code == 0
    assert "NOT IDENTIFIED" not in out
    flyball("fit", *windows, "--state", twin, *named)
    assert json.loads(state.read_text()) == json.loads(twin.read_text())
    profile = json.loads(out_file.read_text())["profiles"][0]
    assert [profile["alpha_s"], profile["beta_s"]] == pytest.approx([0.012, 1e-4], rel=0.1)
    costs = [
        json.loads(flyball("plan", EXAMPLE, "--format", "json", "--profile", out_file, *extra)[1])["totalCost"]
        for extra in ((), ("--confidence", "0.999"))
    ]
    assert costs[0] <= costs[1]
    code, _, err = flyball("plan", EXAMPLE, "--confidence", "0.9")
    assert code == 2
    assert "no profile says how uncertain it is" in err


def test_a_new_accelerator_starts_from_a_known_one_s_profile(
    flyball: Shell, windows: list[Path], tmp_path: Path
) -> None:
    """`--prior` carries a profile over by the hardware that `--fleet` states, and says what it lacks."""
    known, fleet = tmp_path / "known.json", tmp_path / "fleet.yaml"
    flyball("fit", *windows, "--out", known, "--model", "chat-8b", "--accelerator", "L4")
    rest = ("--model", "chat-8b", "--accelerator", "A100", "--prior", known)
    code, _, err = flyball("fit", windows[0], "--state", tmp_path / "s.json", *rest)
    assert code == 2
    assert "--prior needs --fleet" in err
    fleet.write_text(
        "accelerators: [{name: L4, cost_per_h: 1, memory_gb_s: 300, compute_tflops: 121},"
        " {name: A100, cost_per_h: 4, memory_gb_s: 2039, compute_tflops: 312}]\nservers: []\n"
    )
    code, out, _ = flyball("fit", windows[0], "--state", tmp_path / "s.json", *rest, "--fleet", fleet)
    assert code == 0
    assert "chat-8b on A100: alpha" in out


def test_variants_trade_off_and_trace_are_shown(flyball: Shell, tmp_path: Path) -> None:
    """What-if, Pareto and a trace print a table, or JSON, and draw a picture that is well-formed."""
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{i / 4},900,220\n" for i in range(240))
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + rows)
    for options, key in (
        (("--what-if", "load=2", "--what-if", "capacity:A100=4"), "variants"),
        (("--pareto", "4"), "pareto"),
        (("--trace", trace, "--server", "assistant", "--window", "30"), "options"),
    ):
        picture = tmp_path / f"{key}.svg"
        code, table, _ = flyball("plan", EXAMPLE, *options, "--picture", picture)
        assert (code, bool(table)) == (0, True)
        assert ET.parse(picture).getroot().tag.endswith("svg")
        code, out, _ = flyball("plan", EXAMPLE, *options, "--format", "json")
        assert (code, len(json.loads(out)[key]) > 0) == (0, True)


def test_request_sizes_are_planned_from_melanges_file(flyball: Shell, tmp_path: Path) -> None:
    """Melange's own example: its cost with slices, a smaller one where loads are divided."""
    cases = json.loads((ROOT / "tests" / "data" / "fleet" / "melange.json").read_text())
    case = next(c for c in cases if c["name"] == "repo_example_sf4")
    path = tmp_path / "melange.json"
    path.write_text(json.dumps(case["input"]))
    costs = [
        json.loads(flyball("plan", path, "--format", "json", *divide)[1])["cost"] for divide in ((), ("--divide",))
    ]
    assert costs == pytest.approx([case["slices_cost"], case["divisible_cost"]])
    assert "A100-80GB" in flyball("plan", path)[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--what-if", "speed=2"), "cannot read the change 'speed=2'"),
        (("--trace", "azure_conv_slice.csv"), "give --server with one of assistant"),
        (("--picture", "x.svg"), "--picture needs one of them"),
        (("--pareto", "3", "--what-if", "load=2"), "give one of --what-if, --pareto and --trace"),
    ],
)
def test_what_does_not_go_together_is_told(flyball: Shell, options: tuple[str, ...], says: str) -> None:
    """A mistake ends in one sentence and exit code 2."""
    code, _, complaint = flyball("plan", EXAMPLE, *options)
    assert code == 2
    assert says in complaint
    assert complaint.count("\n") == 1


def test_the_schema_is_printed(flyball: Shell) -> None:
    """`flyball plan --schema` needs no spec; without both it says what to name."""
    code, out, _ = flyball("plan", "--schema")
    assert (code, json.loads(out)["title"]) == (0, "Flyball fleet spec")
    assert "no spec was given" in flyball("plan")[2]
