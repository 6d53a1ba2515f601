"""The command line: parse, wire, print. Each command lives in a module of its own and imports its part when called."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Annotated

import typer

from flyball import __version__
from flyball.core.errors import FlyballError, MissingExtra

app = typer.Typer(
    name="flyball",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="The governor for LLM serving: serve, tune and plan so that the latency promise is kept at the least cost.",
)


def require(extra: str, *modules: str) -> None:
    """Raise MissingExtra, naming what to install, unless every module can be imported."""
    missing = [module for module in modules if not _found(module)]
    if missing:
        raise MissingExtra(
            f"this command needs {', '.join(missing)}, which is not installed; run: pip install 'flyball[{extra}]'"
        )


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


def _version(show: bool) -> None:
    if show:
        typer.echo(f"flyball {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@functools.cache  # once a process, however often it is asked for
def _register() -> None:
    from flyball.cli import (
        bench,
        compat,
        config,
        control,
        demo,
        engines,
        fit,
        hold,
        operator,
        plan,
        quantize,
        serve,
        simulate,
        train_tiny,
        tune,
    )

    app.command("bench")(bench.run)
    app.add_typer(compat.app, name="compat")
    app.add_typer(config.app, name="config")
    app.command("control")(control.run)
    app.command("demo")(demo.run)
    app.add_typer(engines.app, name="engines")
    app.command("fit")(fit.run)
    app.add_typer(hold.app, name="hold")
    app.command("operator")(operator.run)
    app.command("plan")(plan.run)
    app.command("quantize")(quantize.run)
    app.command("serve")(serve.run)
    app.command("simulate")(simulate.run)
    app.command("train-tiny")(train_tiny.run)
    app.command("tune")(tune.run)


def main() -> None:
    """Run the command line; a user's mistake ends in one sentence and exit code 2, Ctrl-C in 130 (typer's)."""
    _register()
    try:
        app()
    except FlyballError as error:
        typer.echo(f"flyball: {error}", err=True)
        sys.exit(2)
