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
        list[str] | None,
        typer.Option(help="goodput (the default), throughput, output_tps or attainment; several: a Pareto front."),
    ] = None,
    minimize: Annotated[
        list[str] | None, typer.Option(help="A latency statistic instead, or besides, such as p95_ttft.")
    ] = None,
    trials: Annotated[
        int, typer.Option("--trials", "--budget", help="Configurations to measure, the default's included.", min=1)
    ] = 14,
    parallel: Annotated[
        int, typer.Option(help="Trials at once, each on an engine of its own that is started for it.", min=1)
    ] = 1,
    windows: Annotated[
        int,
        typer.Option(help="Most windows of a trial; it ends early once it is known well enough or has lost.", min=1),
    ] = 1,
    tolerance: Annotated[
        float, typer.Option(help="With --windows, the half width of the 95 % interval that is well enough, as a share.")
    ] = 0.05,
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
    study: Annotated[
        str, typer.Option(help="SQLite file that keeps the study, or a database URL.")
    ] = "flyball-study.db",
    name: Annotated[
        str | None, typer.Option(help="Name of the study; default: a new one, or with --resume the latest.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a study that was interrupted.")] = False,
    warm_start: Annotated[
        str | None,
        typer.Option(help="An earlier study that the sampler is told of: NAME in the same --study, or DATABASE#NAME."),
    ] = None,
    sampler: Annotated[
        str, typer.Option(help="flyball, tpe, random, gp, or the class of one of Optuna's, such as QMCSampler.")
    ] = "flyball",
    feasibility: Annotated[
        str, typer.Option(help="How our sampler learns what fails: gp, forest (SCOOT's rule) or none.")
    ] = "gp",
    law_prior: Annotated[
        bool,
        typer.Option("--law-prior/--no-law-prior", help="Our sampler expects what the fitted latency law predicts."),
    ] = True,
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
    accelerator: Annotated[
        str, typer.Option(help="Name of the accelerator in the latency profile, as in the fleet spec.")
    ] = "local",
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

    require("tune", "optuna", "sqlalchemy", "scipy", "sklearn", "aiohttp", "httpx")
    if sampler == "gp":
        require("engine", "torch")
    import secrets

    import optuna
    from rich.console import Console

    from flyball.adapters.bench_files import check_writable
    from flyball.adapters.loadgen import HttpLoad
    from flyball.cli import tune_session
    from flyball.cli.bench import fit_lengths, make_workload
    from flyball.cli.tune_target import first_start, opened_target, target_options
    from flyball.core.slo import Slo, SloBound
    from flyball.tuner.measure import Rig
    from flyball.tuner.patience import Patience
    from flyball.tuner.proposers import Strategy
    from flyball.tuner.space import parse_knobs
    from flyball.tuner.study import Problem

    _check_options(engine, url, apply=apply, repeats=repeats, parallel=parallel)
    objective, *also = _objectives(maximize or (), minimize or ())
    bounds = tuple(SloBound.parse(text) for text in slo or ())
    narrow = parse_knobs(knob or ())
    strategy, patience = (
        Strategy(sampler=sampler, seed=seed, feasibility=feasibility, law=law_prior),
        Patience(windows=windows, tolerance=tolerance),
    )
    check_writable(report)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console(stderr=True, highlight=False)

    with ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        stack.enter_context(_sole_writer(study))
        options = target_options(
            engine, model=model, url=url, api_key=api_key, path=engine_path, arguments=engine_arg,
            variables=engine_env, logs=engine_logs, platform=platform, ready_timeout_s=ready_timeout,
        )  # fmt: skip
        opened = [stack.enter_context(opened_target(options, console)) for _ in range(parallel)]
        (target, facts), *_ = opened
        lengths = fit_lengths(facts, scale=scale_lengths, max_input=max_input, max_output=max_output)

        def workload(variant: int) -> Workload:
            return make_workload(
                trace=trace, rate_rps=rate, arrivals=arrivals, speed=speed, start=start, count=requests,
                duration_s=DEFAULT_DURATION_S if requests is None and duration is None else duration,
                fixed=(input_tokens, output_tokens), lengths=lengths, seed=seed + variant,
            )  # fmt: skip

        prompts = secrets.randbits(32) if prompt_seed is None else prompt_seed
        loads = [
            _DoubtedLoad(HttpLoad(
                url=its.url, model=its.model, vocab_size=vocab_size or its.vocab_size, prompt_seed=prompts,
                timeout_s=timeout, extensions=extensions, protocol=its.protocol, api_key=api_key,
            ), each)
            for each, its in opened
        ]  # fmt: skip
        first = workload(0)
        rig, *others = (
            Rig(
                target=each, load=load, slo=Slo.from_bounds(bounds), workload=first,
                settle=_first_seconds(first, settle),
            )
            for (each, _), load in zip(opened, loads, strict=True)
        )  # fmt: skip
        problem = Problem(
            lattice=_lattice(target, narrow, constraint or (), named_only=named_only), objective=objective,
            bounds=bounds, workload=first.source, service=facts.model, also=tuple(also),
        )  # fmt: skip
        if engine != "flyball" and not resume:
            first_start(target, console)
        found = tune_session.tune(
            problem, rig, strategy, trials=trials, pairs=[workload(i + 1) for i in range(repeats)],
            storage=study, name=name, resume=resume, apply=apply, console=console, restore=engine == "flyball",
            others=others, patience=patience, alone="://" not in study,
            accelerator=accelerator, warm_start=warm_start,
        )  # fmt: skip
        if found.verdict.recommended is not None and engine != "flyball":
            found = replace(found, launch=target.command(found.verdict.recommended))
        tune_session.show(found, report)
        tune_session.write(found, report, target.url)
        if doubts := [doubt for load in loads for doubt in load.doubts]:
            console.print(
                f"[bold red]{len(doubts)} of {sum(load.runs for load in loads)} windows tell of the client, not of the "
                f"engine[/]; the last: {doubts[-1]}"
            )
        console.print(f"report: {report}, .json and .csv beside it; study: {found.study} in {study}")


@dataclass
class _DoubtedLoad:
    """A load that notes each window which tells more about the client than about the engine, or contradicts it."""

    load: Load
    target: EngineTarget  # asked for its own readings before and after each window
    runs: int = 0
    doubts: list[str] = field(default_factory=list)

    def run(self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None) -> MetricsWindow:
        """Replay, and look at both sides."""
        from flyball.adapters.engines.readings import disagreement
        from flyball.adapters.loadgen import client_bound

        before = self._readings()
        window = self.load.run(workload, slo, generation, progress)
        self.runs += 1
        if doubt := client_bound(window) or disagreement(window, before, self._readings()):
            self.doubts.append(doubt)
        return window

    def _readings(self) -> Mapping[str, float]:
        """None from an engine that tells no metrics, or that has died: the window's failures then say so."""
        from flyball.core.errors import EngineFailed

        try:
            return self.target.metrics()
        except EngineFailed:
            return {}


def _check_options(engine: str, url: str | None, *, apply: bool, repeats: int, parallel: int) -> None:
    from flyball.core.errors import InvalidInput

    if engine == "openai":
        raise InvalidInput(
            "an engine that is not named has no knobs to tune; measure it with `flyball bench --url URL`"
        )
    if apply and url is None:
        raise InvalidInput("--apply needs --url: the server that tune starts itself ends with the study")
    if parallel > 1 and url is not None:
        raise InvalidInput(
            f"--parallel {parallel} needs as many engines and --url names one; leave --url out: tune then starts them"
        )
    if repeats == 1:
        raise InvalidInput("one pair of windows gives no interval; give --repeats 2 or more, or 0 to compare nothing")


def _objectives(maximize: Sequence[str], minimize: Sequence[str]) -> list[Objective]:
    """All that is wanted, the first decides."""
    from flyball.core.errors import InvalidInput
    from flyball.tuner.objective import Objective

    if repeated := [metric for metric in maximize if metric in minimize]:
        raise InvalidInput(f"give --maximize {repeated[0]} or --minimize {repeated[0]}, not both")
    wanted = [Objective.parse(metric) for metric in maximize]
    wanted += [Objective.parse(metric, maximise=False) for metric in minimize]
    return wanted or [Objective.parse("goodput")]


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
