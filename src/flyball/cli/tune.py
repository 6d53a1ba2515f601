"""`flyball tune`: find the engine configuration that keeps the promises best, and show that it does."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flyball.cli import load_options as opt

if TYPE_CHECKING:
    from types import FrameType

    from flyball.core.metrics import MetricsWindow
    from flyball.core.ports import EngineTarget, Load, LoadProgress
    from flyball.core.slo import Slo
    from flyball.core.workload import Workload
    from flyball.tuner.objective import Objective
    from flyball.tuner.space import Lattice

DEFAULT_DURATION_S = 8.0


def run(
    engine: Annotated[
        str, typer.Argument(help="Kind of engine: flyball, vllm, sglang, tensorrt_llm or triton.")
    ] = "flyball",
    url: Annotated[
        str | None, typer.Option(help="Address of a running server; default: one is started for the study.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --url, the model to ask for; else the folder of the model to serve.")
    ] = None,
    slo: opt.SloBounds = None,
    maximize: Annotated[
        str | None, typer.Option(help="goodput (the default), throughput, output_tps or attainment.")
    ] = None,
    minimize: Annotated[str | None, typer.Option(help="A latency statistic instead, such as p95_ttft.")] = None,
    trials: Annotated[
        int, typer.Option("--trials", "--budget", help="Configurations to measure, the default's included.", min=1)
    ] = 14,
    repeats: Annotated[
        int, typer.Option(help="Pairs of windows, default against best, at the end; 0 compares nothing.", min=0)
    ] = 4,
    knob: Annotated[
        list[str] | None, typer.Option(help="NAME=LOW..HIGH, NAME=A,B,C or NAME=VALUE; may be given several times.")
    ] = None,
    named_only: Annotated[
        bool, typer.Option("--named-only", help="Search the knobs named by --knob; all others stay as they are.")
    ] = False,
    constraint: Annotated[
        list[str] | None, typer.Option(help="A relation every configuration must satisfy, such as 'a <= 2 * b'.")
    ] = None,
    study: Annotated[str, typer.Option(help="SQLite file that keeps the study.")] = "flyball-study.db",
    name: Annotated[
        str | None, typer.Option(help="Name of the study; default: a new one, or with --resume the latest.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study that was interrupted.")] = False,
    sampler: Annotated[str, typer.Option(help="tpe, random, or gp (seconds of CPU a suggestion).")] = "tpe",
    seed: Annotated[int, typer.Option(help="Seed of proposals and Poisson arrivals.", min=0)] = 0,
    settle: Annotated[
        float, typer.Option(help="Seconds of traffic before each window that are not counted.", min=0.0)
    ] = 0.5,
    apply: Annotated[
        bool,
        typer.Option("--apply", help="Leave the best configuration in force; default: what was found is put back."),
    ] = False,
    report: Annotated[Path, typer.Option(help="HTML report; a JSON file is written beside it.")] = Path(
        "flyball-report.html"
    ),
    trace: opt.Trace = "azure-conv",
    rate: opt.Rate = None,
    arrivals: opt.Arrivals = "poisson",
    speed: opt.Speed = 1.0,
    start: opt.Start = 0,
    requests: Annotated[int | None, typer.Option(help="Requests in a window.")] = None,
    duration: Annotated[
        float | None,
        typer.Option(help=f"Seconds of traffic in a window; default: {DEFAULT_DURATION_S:g} if no number is given."),
    ] = None,
    input_tokens: opt.InputTokens = None,
    output_tokens: opt.OutputTokens = None,
    scale_lengths: opt.ScaleLengths = 1.0,
    max_input: opt.MaxInput = None,
    max_output: opt.MaxOutput = None,
    prompt_seed: opt.PromptSeed = None,
    timeout: opt.Timeout = 30.0,
    vocab_size: opt.VocabSize = None,
    extensions: opt.Extensions = True,
    api_key: opt.ApiKey = None,
    engine_path: opt.EnginePath = None,
    engine_arg: opt.EngineArg = None,
    engine_env: opt.EngineEnv = None,
    engine_logs: opt.EngineLogs = None,
    platform: opt.Platform = None,
    ready_timeout: opt.ReadyTimeout = 600.0,
) -> None:
    """Search the knobs of an engine for the best configuration under an SLO, and compare it with the default.

    Each trial sets the knobs live, lets them settle and replays the same traffic. The study survives any interruption.
    """
    from flyball.cli import require

    require("tune", "optuna", "sqlalchemy", "scipy", "aiohttp", "httpx")
    if sampler == "gp":
        require("engine", "torch")
    import secrets

    import optuna
    from rich.console import Console

    from flyball.adapters.bench_files import check_writable
    from flyball.adapters.loadgen import HttpLoad
    from flyball.cli import tune_session
    from flyball.cli.bench import fit_lengths, make_workload
    from flyball.cli.tune_target import opened_target, target_options
    from flyball.core.slo import Slo, SloBound
    from flyball.tuner.measure import Rig
    from flyball.tuner.proposers import Strategy
    from flyball.tuner.space import parse_knobs
    from flyball.tuner.study import Problem

    _check_options(engine, url, apply=apply, repeats=repeats)
    objective = _objective(maximize, minimize)
    bounds = tuple(SloBound.parse(text) for text in slo or ())
    narrow = parse_knobs(knob or ())
    strategy = Strategy(sampler=sampler, seed=seed)
    check_writable(report)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console(stderr=True, highlight=False)

    with ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        stack.enter_context(_sole_writer(study))
        target, facts = stack.enter_context(opened_target(
            target_options(
                engine, model=model, url=url, api_key=api_key, path=engine_path, arguments=engine_arg,
                variables=engine_env, logs=engine_logs, platform=platform, ready_timeout_s=ready_timeout,
            ),
            console,
        ))  # fmt: skip
        lengths = fit_lengths(facts, scale=scale_lengths, max_input=max_input, max_output=max_output)

        def workload(variant: int) -> Workload:
            return make_workload(
                trace=trace, rate_rps=rate, arrivals=arrivals, speed=speed, start=start, count=requests,
                duration_s=DEFAULT_DURATION_S if requests is None and duration is None else duration,
                fixed=(input_tokens, output_tokens), lengths=lengths, seed=seed + variant,
            )  # fmt: skip

        load = _DoubtedLoad(HttpLoad(
            url=facts.url, model=facts.model, vocab_size=vocab_size or facts.vocab_size,
            prompt_seed=secrets.randbits(32) if prompt_seed is None else prompt_seed, timeout_s=timeout,
            extensions=extensions, protocol=facts.protocol, api_key=api_key,
        ))  # fmt: skip
        first = workload(0)
        rig = Rig(
            target=target, load=load, slo=Slo.from_bounds(bounds), workload=first,
            settle=_first_seconds(first, settle),
        )  # fmt: skip
        problem = Problem(
            lattice=_lattice(target, narrow, constraint or (), named_only=named_only), objective=objective,
            bounds=bounds, workload=first.source, service=facts.model,
        )  # fmt: skip
        found = tune_session.tune(
            problem, rig, strategy, trials=trials, pairs=[workload(i + 1) for i in range(repeats)],
            storage=study, name=name, resume=resume, apply=apply, console=console, restore=engine == "flyball",
        )  # fmt: skip
        tune_session.show(found)
        tune_session.write(found, report, target.url)
        if load.doubts:
            console.print(
                f"[bold red]in {len(load.doubts)} of {load.runs} windows the client was the bottleneck[/]; the last: "
                f"{load.doubts[-1]}"
            )
        console.print(f"report: {report} and {report.with_suffix('.json')}; study: {found.study} in {study}")


@dataclass
class _DoubtedLoad:
    """A load that notes each window which tells more about the client than about the server."""

    load: Load
    runs: int = 0
    doubts: list[str] = field(default_factory=list)

    def run(self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None) -> MetricsWindow:
        """Replay, and look at the client."""
        from flyball.adapters.loadgen import client_bound

        window = self.load.run(workload, slo, generation, progress)
        self.runs += 1
        if doubt := client_bound(window):
            self.doubts.append(doubt)
        return window


def _check_options(engine: str, url: str | None, *, apply: bool, repeats: int) -> None:
    from flyball.core.errors import InvalidInput

    if engine == "openai":
        raise InvalidInput(
            "an engine that is not named has no knobs to tune; measure it with `flyball bench --url URL`"
        )
    if apply and url is None:
        raise InvalidInput("--apply needs --url: the server that tune starts itself ends with the study")
    if repeats == 1:
        raise InvalidInput("one pair of windows gives no interval; give --repeats 2 or more, or 0 to compare nothing")


def _objective(maximize: str | None, minimize: str | None) -> Objective:
    from flyball.core.errors import InvalidInput
    from flyball.tuner.objective import Objective

    if maximize is not None and minimize is not None:
        raise InvalidInput(f"give --maximize {maximize} or --minimize {minimize}, not both; the other can be an --slo")
    if minimize is not None:
        return Objective.parse(minimize, maximise=False)
    return Objective.parse(maximize or "goodput")


def _lattice(
    target: EngineTarget, narrow: Mapping[str, str], constraints: Sequence[str], *, named_only: bool
) -> Lattice:
    """The target's knobs, narrowed to where looking is worth a trial, then by the user; with its known constraints."""
    from flyball.tuner.space import Lattice

    in_force = target.configuration()
    ranges = target.search_ranges()
    if named_only:
        ranges = {name: str(value).lower() for name, value in in_force.items()}
    known = [*target.constraints(), *constraints]
    return Lattice.of(target.space(), {**ranges, **narrow}, known, in_force, restarts=True)


def _first_seconds(workload: Workload, seconds: float) -> Workload | None:
    """The beginning of a workload, at least two requests of it; None for no time at all."""
    if seconds == 0:
        return None
    early = [r for i, r in enumerate(workload.requests) if i < 2 or r.arrival_s <= seconds]
    return replace(workload, requests=tuple(early))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end us as Ctrl-C does: in order."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {name: signal.signal(name, interrupt) for name in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def _sole_writer(study: str) -> Iterator[None]:
    """Keep a second `flyball tune` away from a study file; the lock goes with the process, however it ends."""
    import fcntl

    from flyball.core.errors import InvalidInput

    if "://" in study:
        yield
        return
    path = Path(study)
    if not path.parent.is_dir():
        raise InvalidInput(f"no folder {path.parent} for the study {path.name}; make it, or give another --study")
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInput(
                f"another flyball tune is writing {study}; wait for its end, or give another --study"
            ) from None
        yield
