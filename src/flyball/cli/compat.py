"""`flyball compat`: services that stand in for others', with their routes and bodies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="compat", help="Serve others' APIs, for those who come from elsewhere.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass  # so that a single command keeps its name


@app.command("inferno")
def inferno(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8080,
    token: Annotated[
        str | None, typer.Option(envvar="FLYBALL_COMPAT_TOKEN", help="Ask for 'Authorization: Bearer TOKEN'.")
    ] = None,
    queue_model: Annotated[
        str, typer.Option(help="Queue model: v3, or v3-compat with the recorded defects of the original.")
    ] = "v3",
    state: Annotated[Path | None, typer.Option(help="File in which the tuner keeps what it learns.")] = None,
) -> None:
    """Serve llm-inferno's queue-analysis, optimizer, model-tuner and model-trainer routes."""
    from flyball.cli import require

    require("plan", "scipy", "highspy")
    import uvicorn

    from flyball.compat.inferno import create_app
    from flyball.performance.queueing import queue_model as model_named

    model_named(queue_model)  # complains about a wrong name
    uvicorn.run(create_app(token=token, law=queue_model, state=state), host=host, port=port, log_level="warning")
