"""`flyball demo`: the main job end to end on the bundled model: serve, measure, tune, measure again, fit, plan.

Every step is a command that a user could type; it is printed before it runs, and its result is read back and checked.
The load rises until the default configuration misses the SLO on this machine; the SLO itself is set from what an
unloaded server does here, so that the demo asks the same question of a fast and of a slow machine.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from flyball.adapters.bench_files import BenchResult
    from flyball.core.slo import SloBound

TRAFFIC = ("--trace", "azure-conv", "--scale-lengths", "0.45", "--max-input", "640", "--max-output", "64")
WINDOW_S = 6
TRIALS = 12
PAIRS = 4
RATES_RPS = (3.0, 6.0, 9.0, 12.0, 16.0, 24.0, 32.0, 48.0)
TTFT_FACTOR, ITL_FACTOR = 6.0, 12.0  # promise, in multiples of what an unloaded server does
# Two token mixes (in, out, requests per request of the demo's traffic, so that both stay below saturation) at two loads
# each, and a load that is not fitted; loads are shares of the rate that breaks the promise.
MIXES = ((96, 48, 1.0), (400, 16, 0.5))
LOADS = (0.25, 0.6)
HOLDOUT = 0.4
LEAST_RPS = 1.5  # a window needs some requests to have a mean
WRITTEN = (  # nothing else in the folder is touched
    "idle.json", "before.json", "after.json", "holdout.json", "study.db", "tune.html", "tune.json", "tune-profile.json",
    "profile.json", "fleet.yaml", "plan.json",
    *(f"fit-{mix}-{load:g}.json" for mix in range(len(MIXES)) for load in LOADS),
)  # fmt: skip


def run(
    out: Annotated[Path, typer.Option(help="Folder for reports and results; an earlier demo's are replaced.")] = Path(
        "flyball-demo"
    ),
) -> None:
    """Serve the bundled model, replay real traffic, tune under an SLO, fit the profile and plan a fleet: 5 minutes."""
    from flyball.cli import require

    require("engine", "torch", "transformers", "fastapi", "uvicorn")
    require("tune", "optuna", "aiohttp", "httpx")
    require("plan", "scipy")
    from rich.console import Console

    from flyball.cli.tune import ended_by_signals
    from flyball.cli.tune_target import own_server

    console = Console(highlight=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (out / name).unlink(missing_ok=True)
    with ended_by_signals():
        with own_server(None, console) as url:
            demo = _Demo(url, out, console)
            bounds = demo.promise()
            before = demo.load_that_breaks(bounds)
            study = demo.tune(before, bounds)
            after = demo.again(before, study)
            demo.fit(before.arrival_rps)
        demo.plan(bounds)
    _summary(console, out, bounds, before, after, study)


@dataclass(frozen=True, slots=True)
class _Demo:
    """The demo's steps against one server; each ends only when its result was read back."""

    url: str
    out: Path
    console: Console

    def promise(self) -> tuple[SloBound, SloBound]:
        """Measure the idle server and promise a multiple of that."""
        from flyball.core.slo import SloBound

        self._title("What does an idle server do?")
        idle = self._bench("idle", "--requests", "8", "--rate", "0.9", "--warmup", "3")
        ttft_ms = max(50, round(idle.ttft_s.p95 * TTFT_FACTOR * 1e3, -1))
        itl_ms = max(20, round(idle.tpot_s.mean * ITL_FACTOR * 1e3))  # a busy machine's own hiccups reach 10 ms
        bounds = SloBound.parse(f"p95_ttft<{ttft_ms:g}ms"), SloBound.parse(f"p99_itl<{itl_ms:g}ms")
        self.console.print(
            f"The promise: [bold]{bounds[0]}[/] and [bold]{bounds[1]}[/], "
            f"{TTFT_FACTOR:g} times the idle TTFT and {ITL_FACTOR:g} times the idle TPOT."
        )
        return bounds

    def load_that_breaks(self, bounds: tuple[SloBound, SloBound]) -> BenchResult:
        """Raise the load until the default configuration misses the promise."""
        self._title("Which load breaks the promise with default knobs?")
        for rate in RATES_RPS:
            seen = self._bench(
                "before", "--rate", f"{rate:g}", "--duration", str(WINDOW_S), *_slo(bounds), "--prompt-seed", "1"
            )
            if seen.attainment < 1 and (seen.ttft_s.p95 > bounds[0].limit_s or seen.itl_s.p99 > bounds[1].limit_s):
                self.console.print(f"At {rate:g} requests/s the default configuration misses it.")
                return seen
        return seen

    def tune(self, before: BenchResult, bounds: tuple[SloBound, SloBound]) -> dict[str, Any]:
        """Search the live knobs under that load."""
        self._title("Tune: 12 configurations, no restart between them")
        report = self.out / "tune.html"
        self._flyball(
            "tune", "--url", self.url, *_slo(bounds), "--maximize", "goodput", *TRAFFIC,
            "--rate", f"{before.arrival_rps:.3g}", "--duration", str(WINDOW_S), "--trials", str(TRIALS),
            "--repeats", str(PAIRS), "--knob", "max_num_batched_tokens=32..2048", "--knob", "max_num_seqs=8..64",
            "--knob", "long_prefill_token_threshold=0..1024", "--named-only",
            "--study", str(self.out / "study.db"), "--name", "demo", "--report", str(report), "--apply",
        )  # fmt: skip
        study: dict[str, Any] = json.loads(report.with_suffix(".json").read_text())
        self._check(len(study["trials"]) >= TRIALS, f"the study holds {len(study['trials'])} trials, not {TRIALS}")
        return study

    def again(self, before: BenchResult, study: dict[str, Any]) -> BenchResult:
        """Replay the same traffic under what the study left in force."""
        self._title("The same traffic again")
        seen = self._bench(
            "after", "--rate", f"{before.arrival_rps:.3g}", "--duration", str(WINDOW_S), "--prompt-seed", "2",
            *(part for text in before.slo for part in ("--slo", text)),
        )  # fmt: skip
        wanted = study["recommended"] or {}
        self._check(wanted.items() <= dict(seen.configuration).items(), "the recommended configuration is not in force")
        return seen

    def fit(self, rate_rps: float) -> None:
        """Measure two token mixes at two loads, fit the latency profile, and test it on a load it has not seen."""
        self._title("From measurements to a latency profile")
        windows = []
        for mix in range(len(MIXES)):
            for load in LOADS:
                name = f"fit-{mix}-{load:g}"
                self._window(name, mix, rate_rps * load)
                windows.append(str(self.out / f"{name}.json"))
        self._window("holdout", 0, rate_rps * HOLDOUT)
        self._flyball(
            "fit", *windows, "--holdout", str(self.out / "holdout.json"), "--model", "tiny", "--accelerator",
            "this-machine", "--out", str(self.out / "profile.json"),
        )  # fmt: skip
        self._check((self.out / "profile.json").stat().st_size > 0, "no profile was written")

    def plan(self, bounds: tuple[SloBound, SloBound]) -> None:
        """Size a small fleet of machines like this one for two service classes."""
        self._title("How many such machines for a fleet?")
        spec = self.out / "fleet.yaml"
        spec.write_text(_fleet(bounds))
        arguments = (str(spec), "--profile", str(self.out / "profile.json"))
        self._flyball("plan", *arguments)
        solution = json.loads(self._flyball("plan", *arguments, "--format", "json", show=False))
        (self.out / "plan.json").write_text(json.dumps(solution, indent=1) + "\n")
        replicas = [a["numReplicas"] for a in solution["allocations"].values()]
        self._check(len(replicas) == 2 and min(replicas) >= 1, f"the plan gives {replicas} replicas to two servers")

    def _window(self, name: str, mix: int, rate_rps: float) -> None:
        inputs, outputs, share = MIXES[mix]
        rate_rps = max(LEAST_RPS, rate_rps * share)
        self._bench(
            name, "--rate", f"{rate_rps:.3g}", "--requests", str(round(rate_rps * WINDOW_S)), "--input-tokens",
            str(inputs), "--output-tokens", str(outputs), traffic=("--trace", "azure-conv"),
        )  # fmt: skip

    def _bench(self, name: str, *arguments: str, traffic: tuple[str, ...] = TRAFFIC) -> BenchResult:
        from flyball.adapters.bench_files import read_bench

        path = self.out / f"{name}.json"
        self._flyball("bench", "--url", self.url, *traffic, *arguments, "--out", str(path))
        seen = read_bench(path)
        self._check(seen.completed > 0, f"no request of the bench {name} was answered")
        return seen

    def _flyball(self, *arguments: str, show: bool = True) -> str:
        """Run one of our own commands; show its output, or return it."""
        from flyball.adapters.engines.process import run_to_end
        from flyball.core.errors import FlyballError

        if show:
            self.console.print(f"[dim]$ flyball {shlex.join(arguments)}[/]", markup=True)
        code, output = run_to_end([sys.executable, "-m", "flyball", *arguments], capture=not show)
        if code != 0:
            raise FlyballError(f"the step `flyball {arguments[0]}` of the demo ended with code {code}")
        return output

    def _title(self, text: str) -> None:
        self.console.rule(f"[bold]{text}", align="left")

    @staticmethod
    def _check(good: bool, problem: str) -> None:
        from flyball.core.errors import FlyballError

        if not good:
            raise FlyballError(f"the demo's step did not do its job: {problem}")


def _slo(bounds: tuple[SloBound, SloBound]) -> list[str]:
    return [part for bound in bounds for part in ("--slo", str(bound))]


def _fleet(bounds: tuple[SloBound, SloBound]) -> str:
    ttft_ms, itl_ms = (bound.limit_s * 1e3 for bound in bounds)
    return f"""\
# Two service classes of the bundled model, on machines like the one that was measured.
accelerators:
  - {{name: this-machine, cost_per_h: 0.10}}
capacity: {{this-machine: 40}}
service_classes:
  - {{name: interactive, priority: 1, targets: {{tiny: {{slo: [mean_ttft<{ttft_ms:g}ms, mean_itl<{itl_ms / 2:g}ms]}}}}}}
  - {{name: batch, priority: 10, targets: {{tiny: {{slo: [mean_ttft<{8 * ttft_ms:g}ms, mean_itl<{3 * itl_ms:g}ms]}}}}}}
servers:
  - {{name: chat, class: interactive, model: tiny, arrival_rps: 12, input_tokens: 300, output_tokens: 60}}
  - {{name: summaries, class: batch, model: tiny, arrival_rps: 6, input_tokens: 500, output_tokens: 30}}
"""


def _summary(
    console: Console,
    out: Path,
    bounds: tuple[SloBound, SloBound],
    before: BenchResult,
    after: BenchResult,
    study: dict[str, Any],
) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.rule("[bold]Before and after", align="left")
    table = Table()
    for column in ("same traffic, one window each", "default", "tuned"):
        table.add_column(column, justify="right" if column != "same traffic, one window each" else "left")
    ttft, itl = (f"{bound.name} (promised {bound.limit_s * 1e3:g} ms)" for bound in bounds)
    rows: tuple[tuple[str, Callable[[BenchResult], str]], ...] = (
        ("SLO attainment", lambda r: f"{r.attainment:.0%}"),
        ("goodput, requests/s", lambda r: f"{r.goodput_rps:.2f}"),
        (ttft, lambda r: f"{r.ttft_s.p95 * 1e3:.0f} ms"),
        (itl, lambda r: f"{r.itl_s.p99 * 1e3:.1f} ms"),
    )
    for name, render in rows:
        table.add_row(name, render(before), render(after))
    console.print(table)
    console.print(f"Measured alternately: [bold]{escape(study['verdict'])}[/]")
    console.print(f"Report {out / 'tune.html'}, profile {out / 'profile.json'}, plan {out / 'plan.json'}")
