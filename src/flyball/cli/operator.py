"""`flyball operator`: the fleet's loop inside Kubernetes, driven by custom resources."""

from __future__ import annotations

from typing import Annotated

import typer


def run(
    namespace: Annotated[
        list[str] | None, typer.Option(help="Namespaces to govern; default: all of the cluster.")
    ] = None,
    peering: Annotated[
        str | None,
        typer.Option(help="Name of a peering object: of several operators the one of highest priority acts."),
    ] = None,
    priority: Annotated[int, typer.Option(help="Ours among the peers.", min=0)] = 0,
) -> None:
    """Govern the Fleet resources of a cluster; credentials are kubectl's, or the pod's own."""
    from flyball.cli import require

    require("cluster", "kopf", "lightkube", "httpx", "prometheus_client")
    import kopf
    from lightkube import Client

    from flyball.controller.operator import registry

    kopf.run(
        registry=registry(Client(field_manager="flyball")),
        standalone=peering is None,
        peering_name=peering,
        priority=priority,
        namespaces=namespace or (),
        clusterwide=not namespace,
    )
