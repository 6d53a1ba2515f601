"""The options that say which traffic is sent; `bench` and `tune` share them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Trace = Annotated[
    str, typer.Option("--trace", "--workload", help="azure-conv, azure-code (both bundled), or a CSV or JSONL file.")
]
Rate = Annotated[
    float | None, typer.Option(help="Arrivals a second with the trace's lengths; default: the trace's own timing.")
]
Arrivals = Annotated[
    str,
    typer.Option(
        help="With --rate: poisson, constant, gamma:SHAPE, burst:SIZE, step:FACTOR:AT_S, ramp:FACTOR:OVER_S or "
        "diurnal:SHARE:PERIOD_S."
    ),
]
Speed = Annotated[float, typer.Option(help="Replay the trace's timing this many times as fast.")]
Start = Annotated[int, typer.Option(help="First row of the trace to use, from 0.")]
Duration = Annotated[float | None, typer.Option(help="Seconds to keep sending.")]
InputTokens = Annotated[int | None, typer.Option(help="Every prompt this long, not as in the trace.")]
OutputTokens = Annotated[int | None, typer.Option(help="Every answer this long, not as in the trace.")]
ScaleLengths = Annotated[float, typer.Option(help="Multiply the trace's lengths, before they are cut.")]
MaxInput = Annotated[
    int | None, typer.Option(help="Cut prompts to this many tokens; default: what the model's context leaves.")
]
MaxOutput = Annotated[
    int | None, typer.Option(help="Cut answers to this many tokens; default: a quarter of the model's context.")
]
SloBounds = Annotated[
    list[str] | None, typer.Option(help="A promise such as 'p95_ttft<500ms'; may be given several times.")
]
PromptSeed = Annotated[
    int | None,
    typer.Option(help="Seed of the prompts' words; default: a new one, so that no prefix is cached already.", min=0),
]
Timeout = Annotated[float, typer.Option(help="Seconds after which a request is given up.")]
VocabSize = Annotated[
    int | None, typer.Option(help="Token ids a prompt may use, where the server does not say; else text is sent.")
]
Extensions = Annotated[
    bool, typer.Option(help="Ask for ignore_eos and return_token_ids, which OpenAI's own API refuses.")
]
EnginePath = Annotated[
    str | None, typer.Option(help="The engine's executable, or the virtual environment that holds it.")
]
EngineArg = Annotated[
    list[str] | None,
    typer.Option(help="Added to the engine's command line, as --flag=value; may be given several times."),
]
EngineEnv = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, added to the engine's environment; may be given several times.")
]
EngineLogs = Annotated[Path | None, typer.Option(help="Folder that keeps the engine's output.")]
Platform = Annotated[
    str | None, typer.Option(help="cpu, gpu, gpu-70gb, ...: whose defaults hold; default: as the engine is installed.")
]
ReadyTimeout = Annotated[float, typer.Option(help="Seconds for the engine to become ready.", min=1.0)]
ApiKey = Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Bearer token.")]
