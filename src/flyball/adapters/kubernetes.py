"""Deployments and LeaderWorkerSets as a fleet's replicas (a `core.ports.Cluster`), through their scale subresource.

Only `spec.replicas` of the targets named is ever written, and only where it differs, so that a second writer shows as a
count that is not ours. A LeaderWorkerSet counts in groups: of its pods only the leaders are replicas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import httpx2
from lightkube import ApiError, Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Pod
from lightkube.types import PatchType

from flyball.adapters.prometheus import KnownReplica
from flyball.core.clock import Clock, SystemClock
from flyball.core.errors import ActuationFailed, ObservationFailed
from flyball.core.observation import Counts, Phase

FIELD_MANAGER = "flyball"
LeaderWorkerSet = create_namespaced_resource("leaderworkerset.x-k8s.io", "v1", "LeaderWorkerSet", "leaderworkersets")
_KINDS: Mapping[str, Any] = {"Deployment": Deployment, "LeaderWorkerSet": LeaderWorkerSet}
_LWS_NAME, _LWS_WORKER = "leaderworkerset.sigs.k8s.io/name", "leaderworkerset.sigs.k8s.io/worker-index"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleTarget:
    """An object whose replicas run one server on one accelerator."""

    accelerator: str
    name: str
    kind: Literal["Deployment", "LeaderWorkerSet"] = "Deployment"


class KubernetesCluster:
    """The targets of each server, in one namespace; it also knows their pods (`adapters.prometheus.Inventory`)."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        targets: Mapping[str, Sequence[ScaleTarget]],
        *,
        clock: Clock | None = None,
    ) -> None:
        self._client = client
        self._namespace = namespace
        self._targets = targets
        self._clock = clock or SystemClock()

    def scale(self, wanted: Counts) -> None:
        """Set replicas where they differ; an accelerator that is wanted but has no target is refused."""
        for server, counts in wanted.items():
            targets = {t.accelerator: t for t in self._targets.get(server, ())}
            for accelerator, count in counts.items():
                if accelerator not in targets:
                    if count:
                        raise ActuationFailed(
                            f"{server!r} has no scale target on {accelerator!r}; add one to the fleet"
                        )
                    continue
                self._set(targets[accelerator], count)

    def _set(self, target: ScaleTarget, count: int) -> None:
        try:
            if self._replicas(target) != count:
                self._client.patch(
                    _KINDS[target.kind].Scale, target.name, {"spec": {"replicas": count}}, namespace=self._namespace,
                    patch_type=PatchType.MERGE, field_manager=FIELD_MANAGER,
                )  # fmt: skip
        except (ApiError, httpx2.HTTPError) as error:
            raise ActuationFailed(f"cannot scale {target.kind} {target.name} to {count}: {error}") from None

    def _replicas(self, target: ScaleTarget) -> int:
        found = self._client.get(_KINDS[target.kind], target.name, namespace=self._namespace).to_dict()
        replicas = found.get("spec", {}).get("replicas")
        return 1 if replicas is None else int(replicas)  # Kubernetes' default

    def wanted(self, server: str) -> Mapping[str, int]:
        """What the targets' `spec.replicas` say."""
        try:
            return {t.accelerator: self._replicas(t) for t in self._targets.get(server, ())}
        except (ApiError, httpx2.HTTPError) as error:
            raise ObservationFailed(f"cannot read the scale targets of {server!r}: {error}") from None

    def replicas(self, server: str) -> list[KnownReplica]:
        """Their pods; a replica that has no pod yet is one that starts."""
        found: list[KnownReplica] = []
        try:
            for target in self._targets.get(server, ()):
                pods = self._pods(target)
                found += pods
                active = sum(p.phase != "draining" for p in pods)
                found += [
                    KnownReplica(
                        name=f"{target.name}/pending-{k}", accelerator=target.accelerator, phase="starting", age_s=0.0,
                        instance="",
                    )
                    for k in range(self._replicas(target) - active)
                ]  # fmt: skip
        except (ApiError, httpx2.HTTPError) as error:
            raise ObservationFailed(f"cannot read the replicas of {server!r}: {error}") from None
        return found

    def _pods(self, target: ScaleTarget) -> list[KnownReplica]:
        labels: dict[str, Any]
        if target.kind == "LeaderWorkerSet":
            labels = {_LWS_NAME: target.name, _LWS_WORKER: "0"}
        else:
            deployment = self._client.get(Deployment, target.name, namespace=self._namespace).to_dict()
            labels = deployment["spec"]["selector"].get("matchLabels", {})
        if not labels:
            return []
        pods = self._client.list(Pod, namespace=self._namespace, labels=labels)
        return [self._known(pod.to_dict(), target) for pod in pods]

    def _known(self, pod: Mapping[str, Any], target: ScaleTarget) -> KnownReplica:
        meta, status = pod["metadata"], pod.get("status", {})
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))
        phase: Phase = "draining" if meta.get("deletionTimestamp") else "ready" if ready else "starting"
        return KnownReplica(
            name=meta["name"],
            accelerator=target.accelerator,
            phase=phase,
            age_s=self._age_s(meta.get("creationTimestamp")),
            instance=meta["name"],
        )

    def _age_s(self, created: object) -> float:
        if isinstance(created, str):
            created = datetime.fromisoformat(created)
        if not isinstance(created, datetime):
            return 0.0
        return max(self._clock.wall_s() - created.astimezone(UTC).timestamp(), 0.0)
