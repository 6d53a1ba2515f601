"""`flyball operator`: the fleet's loop inside Kubernetes, driven by custom resources."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from flyball.adapters.fleet_export import FleetsMetrics


def run(
    namespace: Annotated[
        list[str] | None, typer.Option(help="Namespaces to govern; default: all of the cluster.")
    ] = None,
    peering: Annotated[
        str | None,
        typer.Option(help="Name of a peering object: of several operators the one of highest priority acts."),
    ] = None,
    priority: Annotated[int, typer.Option(help="Ours among the peers.", min=0)] = 0,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Serve decisions as metrics (wva_* and flyball_*) on this port, for HPA and KEDA.", min=0),
    ] = None,
    metrics_address: Annotated[str, typer.Option(help="Address to serve them on; in a pod 0.0.0.0.")] = "127.0.0.1",
) -> None:
    """Govern the Fleet resources of a cluster; credentials are kubectl's, or the pod's own."""
    from flyball.cli import require

    require("cluster", "kopf", "lightkube", "httpx", "prometheus_client")
    import kopf
    from lightkube import Client

    from flyball.controller.operator import registry

    kopf.run(
        registry=registry(Client(field_manager="flyball"), _metrics(metrics_port, metrics_address)),
        standalone=peering is None,
        peering_name=peering,
        priority=priority,
        namespaces=namespace or (),
        clusterwide=not namespace,
    )


def _metrics(port: int | None, address: str) -> FleetsMetrics:
    from prometheus_client import start_http_server

    from flyball.adapters.fleet_export import FleetsMetrics
    from flyball.core.errors import InvalidInput

    metrics = FleetsMetrics()
    if port is not None:
        try:
            start_http_server(port, addr=address, registry=metrics.registry)
        except OSError as error:
            raise InvalidInput(f"cannot serve metrics on {address}:{port} ({error}); give a free port") from None
    return metrics
