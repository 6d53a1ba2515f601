"""`flyball compat`: services that stand in for others', with their routes and bodies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from flyball.compat.inferno_state import FleetState
    from flyball.compat.inferno_world import Scaler, World
    from flyball.core.fleet import FleetSpec
    from flyball.core.ports import MetricsSource

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
    spec: Annotated[Path | None, typer.Option(help="The fleet that /collect tells of; needs --prometheus.")] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Prometheus server that /collect reads; else it tells of the fleet that was set.")
    ] = None,
    engine: Annotated[
        Literal["flyball", "vllm", "sglang"], typer.Option(help="Whose names the metrics in Prometheus have.")
    ] = "flyball",
    label: Annotated[str, typer.Option(help="Label of the metrics that holds the server's name.")] = "server",
    kubernetes: Annotated[
        bool, typer.Option(help="Let /update scale the Deployments in its kube-resources; else the fleet that was set.")
    ] = False,
    namespace: Annotated[str, typer.Option(help="Of the Deployments, as /collect tells it.")] = "default",
) -> None:
    """Serve llm-inferno's queue-analysis, optimizer, tuner, trainer, collector and actuator routes."""
    from flyball.cli import require

    require("plan", "scipy", "highspy")
    require("engine", "fastapi", "uvicorn", "pydantic")
    import uvicorn

    from flyball.compat.inferno import create_app
    from flyball.performance.queueing import queue_model as model_named

    model_named(queue_model)  # complains about a wrong name
    world = _world(spec, prometheus, engine, label, kubernetes, namespace)
    uvicorn.run(
        create_app(token=token, law=queue_model, state=state, world=world), host=host, port=port, log_level="warning"
    )


def _world(
    spec: Path | None, prometheus: str | None, engine: str, label: str, kubernetes: bool, namespace: str
) -> Callable[[FleetState], World]:
    from flyball.adapters.fleet_files import read_fleet
    from flyball.cli import require
    from flyball.compat.inferno_world import World
    from flyball.core.errors import InvalidInput

    if (spec is None) != (prometheus is None):
        raise InvalidInput("--spec and --prometheus belong together; give both, or none of them")
    fleet: FleetSpec | None = None
    source: MetricsSource | None = None
    if spec is not None and prometheus is not None:
        require("cluster", "httpx")
        from flyball.adapters.prometheus import PrometheusClient, PrometheusSource, ServerQuery, gateway_queries

        fleet = read_fleet(spec)
        queries = {
            s.name: ServerQuery(
                engine=engine, matchers={label: s.name}, accelerator=s.current.accelerator, **gateway_queries(s.name)
            )
            for s in fleet.servers
        }
        source = PrometheusSource(PrometheusClient(prometheus), queries)
    scale = _scaler() if kubernetes else None
    return lambda state: World(state, spec=fleet, source=source, scale=scale, space=namespace)


def _scaler() -> Scaler:
    from flyball.cli import require

    require("cluster", "lightkube")
    from lightkube import Client

    from flyball.adapters.kubernetes import FIELD_MANAGER, KubernetesCluster, ScaleTarget

    client = Client(field_manager=FIELD_MANAGER)

    def scale(*, space: str, name: str, server: str, accelerator: str, replicas: int) -> None:
        target = ScaleTarget(accelerator=accelerator, name=name)
        KubernetesCluster(client, space, {server: (target,)}).scale({server: {accelerator: replicas}})

    return scale
