"""`flyball bench`: load a server with real traffic and report what its clients see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flyball.cli import load_options as opt

if TYPE_CHECKING:
    from rich.console import Console

    from flyball.adapters.bench_files import BenchResult
    from flyball.adapters.server_facts import ServerFacts
    from flyball.adapters.traces import Lengths
    from flyball.core.metrics import MetricsWindow
    from flyball.core.ports import Load
    from flyball.core.slo import Slo, SloBound
    from flyball.core.workload import Workload

DEFAULT_REQUESTS = 200


def run(
    url: Annotated[str, typer.Option(help="Address of an OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    trace: opt.Trace = "azure-conv",
    rate: opt.Rate = None,
    arrivals: opt.Arrivals = "poisson",
    speed: opt.Speed = 1.0,
    start: opt.Start = 0,
    requests: Annotated[
        int | None, typer.Option(help=f"Requests to send; default: {DEFAULT_REQUESTS} if no duration is given.")
    ] = None,
    duration: opt.Duration = None,
    input_tokens: opt.InputTokens = None,
    output_tokens: opt.OutputTokens = None,
    scale_lengths: opt.ScaleLengths = 1.0,
    max_input: opt.MaxInput = None,
    max_output: opt.MaxOutput = None,
    slo: opt.SloBounds = None,
    seed: Annotated[int, typer.Option(help="Seed of Poisson arrivals.", min=0)] = 0,
    prompt_seed: opt.PromptSeed = None,
    warmup: Annotated[int, typer.Option(help="Requests sent before, not counted.", min=0)] = 0,
    timeout: opt.Timeout = 600.0,
    model: Annotated[str | None, typer.Option(help="Model to ask for; default: the server's first.")] = None,
    vocab_size: opt.VocabSize = None,
    extensions: opt.Extensions = True,
    api_key: opt.ApiKey = None,
    out: Annotated[Path | None, typer.Option(help="Write the result to this JSON file.")] = None,
    save_requests: Annotated[bool, typer.Option(help="Keep every request's times in the JSON file.")] = False,
) -> None:
    """Load a server, open loop, and report latency percentiles, throughput, SLO attainment and goodput."""
    from flyball.cli import require

    require("tune", "aiohttp", "httpx")
    import secrets

    from rich.console import Console

    from flyball.adapters.bench_files import BenchResult, check_writable, write_bench
    from flyball.adapters.loadgen import HttpLoad, client_bound
    from flyball.adapters.server_facts import ask_server
    from flyball.core.errors import EngineFailed, InvalidInput
    from flyball.core.slo import Slo, SloBound

    bounds = tuple(SloBound.parse(text) for text in slo or ())
    if out is not None:
        check_writable(out)
    if not timeout > 0:
        raise InvalidInput(f"a request cannot be given up after {timeout:g} s; give a timeout above 0")
    facts = ask_server(url, model=model, api_key=api_key)
    workload = make_workload(
        trace=trace,
        rate_rps=rate,
        arrivals=arrivals,
        speed=speed,
        start=start,
        count=DEFAULT_REQUESTS if requests is None and duration is None else requests,
        duration_s=duration,
        fixed=(input_tokens, output_tokens),
        lengths=fit_lengths(facts, scale=scale_lengths, max_input=max_input, max_output=max_output),
        seed=seed,
    )
    load = HttpLoad(
        url=facts.url,
        model=facts.model,
        vocab_size=vocab_size or facts.vocab_size,
        prompt_seed=secrets.randbits(32) if prompt_seed is None else prompt_seed,
        warmup=warmup,
        timeout_s=timeout,
        extensions=extensions,
        api_key=api_key,
    )
    console = Console(stderr=True, markup=False, highlight=False)
    console.print(f"{facts.model} at {facts.url}: {workload.source}")
    if load.vocab_size is None:
        console.print("prompts are words, about a token each: the server tells no vocab_size (or give --vocab-size)")
    window = _measure(load, workload, Slo.from_bounds(bounds), facts, console)
    try:
        generation = ask_server(url, model=model, api_key=api_key).generation
    except EngineFailed as error:  # the failures it caused are counted; they are the result
        console.print(f"after the bench: {error}")
        generation = facts.generation
    if generation != facts.generation:
        raise EngineFailed(
            f"the server's configuration changed during the bench, from {facts.generation} to {generation}, so "
            "the result belongs to neither and is thrown away; run it again while nobody tunes"
        )
    doubt = client_bound(window)
    result = BenchResult.of(
        window,
        configuration=facts.configuration,
        model=facts.model,
        url=facts.url,
        workload=workload.source,
        slo=tuple(map(str, bounds)),
        seed=seed,
        prompt_seed=load.prompt_seed,
        client_bound=doubt is not None,
        keep_traces=save_requests,
    )
    if out is not None:
        write_bench(out, result)
    _print(result, window, bounds, load.failures, doubt)
    if not result.completed:
        raise typer.Exit(1)


def make_workload(
    *,
    trace: str,
    rate_rps: float | None,
    speed: float,
    start: int,
    count: int | None,
    duration_s: float | None,
    fixed: tuple[int | None, int | None],
    lengths: Lengths,
    seed: int,
    arrivals: str = "poisson",
) -> Workload:
    """The load that the options describe."""
    from dataclasses import replace

    from flyball.adapters.arrivals import Arrivals
    from flyball.adapters.traces import generated, read_trace, recorded, trace_path
    from flyball.core.errors import InvalidInput

    rows = read_trace(trace_path(trace))
    name = trace
    for field, tokens in zip(("input_tokens", "output_tokens"), fixed, strict=True):
        if tokens is not None:
            if tokens < 1:
                raise InvalidInput(f"{field} is {tokens}; a request needs at least 1")
            rows = tuple(replace(row, prefix_ids=(), **{field: tokens}) for row in rows)
            name += f" with {field}={tokens}"
    process = Arrivals.parse(arrivals)
    if rate_rps is None:
        if process.process != "poisson":
            raise InvalidInput(
                f"{process} arrivals need a mean rate; give --rate, or leave --arrivals out for the trace's"
            )
        return recorded(rows, name=name, start=start, count=count, duration_s=duration_s, speed=speed, lengths=lengths)
    if speed != 1:
        raise InvalidInput(f"speed {speed:g} scales a trace's own timing and rate {rate_rps:g} replaces it; give one")
    return generated(
        rows, name=name, start=start, count=count, duration_s=duration_s, rate_rps=rate_rps, seed=seed, lengths=lengths,
        arrivals=process,
    )  # fmt: skip


def fit_lengths(facts: ServerFacts, *, scale: float, max_input: int | None, max_output: int | None) -> Lengths:
    """Limits under which every request fits the model's context, where the server tells it."""
    from flyball.adapters.traces import Lengths
    from flyball.core.errors import InvalidInput

    context = facts.max_model_len
    if context is not None:
        if max_output is None:
            max_output = max(1, min(context // 4, context - (max_input or 1)))
        if max_input is None:
            max_input = max(1, context - max_output)
        if max_input + max_output > context:
            raise InvalidInput(
                f"{max_input} tokens in and {max_output} out exceed the {context} of {facts.model}'s context; "
                "lower --max-input or --max-output"
            )
    return Lengths(scale=scale, max_input=max_input, max_output=max_output)


def _measure(load: Load, workload: Workload, slo: Slo, facts: ServerFacts, console: Console) -> MetricsWindow:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("requests done"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("", total=len(workload.requests))
        return load.run(workload, slo, facts.generation, lambda done, _: bars.update(task, completed=done))


def _print(
    result: BenchResult,
    window: MetricsWindow,
    bounds: tuple[SloBound, ...],
    failures: dict[str, str],
    doubt: str | None,
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title=f"{result.completed} of {result.requests} requests completed in {result.duration_s:.1f} s")
    for column in ("ms", "mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    rows = (("TTFT", result.ttft_s), ("TPOT", result.tpot_s), ("ITL", result.itl_s), ("E2E", result.e2e_s),
            ("send lag", result.lag_s))  # fmt: skip
    for label, summary in rows:
        table.add_row(label, *(_ms(getattr(summary, c)) for c in ("mean", "p50", "p90", "p95", "p99", "max")))
    console.print(table)
    console.print(
        f"arrivals {result.arrival_rps:.2f}/s, completed {result.throughput_rps:.2f}/s, "
        f"{result.output_tps:,.0f} output tokens/s; on average {result.mean_input_tokens:,.0f} tokens in, "
        f"{result.mean_output_tokens:,.0f} out, {result.mean_concurrency:.1f} requests in the server"
    )
    for bound in bounds:
        seen_s = window.statistic(bound)
        verdict = "[green]kept[/]" if window.margin(bound) <= 0 else "[red]broken[/]"
        console.print(f"SLO {bound}: {verdict}, measured {seen_s * 1e3:,.1f} ms")
    if bounds:
        console.print(
            f"attainment {result.attainment:.1%}, goodput {result.goodput_rps:.2f}/s (requests that met every SLO)"
        )
    for kind, count in result.errors.items():
        console.print(
            f"[red]{count} failed: {kind}[/]" + (f" ({escape(failures[kind])})" if failures.get(kind) else "")
        )
    if doubt:
        console.print(f"[bold red]not trustworthy: the client was the bottleneck[/] ({doubt})")


def _ms(seconds: float) -> str:
    """Milliseconds to about four digits."""
    ms = seconds * 1e3
    return f"{ms:,.{0 if ms >= 1000 else 1 if ms >= 100 else 2}f}"
