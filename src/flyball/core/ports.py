"""Where the world begins: the protocols that real and simulated adapters implement alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from flyball.core.knobs import Configuration, Space
from flyball.core.metrics import MetricsWindow
from flyball.core.observation import Counts, FleetState
from flyball.core.slo import Slo
from flyball.core.workload import Workload

LoadProgress = Callable[[int, int], None]  # requests done, requests in all


class Target(Protocol):
    """Something that serves under a configuration: an engine in process, a server, a simulation."""

    def space(self) -> Space:
        """The knobs that can be set, with this engine's bounds and defaults."""
        ...

    def configuration(self) -> Configuration:
        """The values in force now."""
        ...

    def apply(self, values: Configuration) -> str:
        """Set some knobs, all or none, and return the generation in force once they act.

        Raises InvalidKnob when a value is refused and EngineFailed when the engine is gone.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """Which engine it is, in its own words."""

    name: str
    version: str = ""  # empty where it does not tell


class EngineTarget(Target, Protocol):
    """A target that is a whole engine: one that may need a restart to change, and that can be told apart from others.

    `apply` makes every knob of the space act, by a restart where its `live` is false. `configuration` raises
    EngineFailed once if the engine died since the last `apply`; a stopped engine's are the values of its next start.
    """

    @property
    def url(self) -> str:
        """Address of its OpenAI-compatible API, without /v1; the same before and after a restart."""
        ...

    def identity(self) -> EngineIdentity:
        """Name and version of the engine."""
        ...

    def constraints(self) -> tuple[str, ...]:
        """Relations between its knobs that the engine is known to insist on, as expressions over their names."""
        ...

    def search_ranges(self) -> Mapping[str, str]:
        """Where looking is worth a trial, by knob (`LOW..HIGH`, `A,B,C`); one value for knobs to leave alone."""
        ...

    def command(self, values: Configuration) -> str:
        """What a person types to run the engine with these values."""
        ...

    def metrics(self) -> dict[str, float]:
        """The engine's own readings by our names (`adapters.engines.readings`); what it does not tell is left out."""
        ...

    def stop(self) -> None:
        """End what was started here and wait until it is gone; a server that was found running stays."""
        ...

    def __enter__(self) -> Self:
        """Itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        ...


class Load(Protocol):
    """Sends a workload, open loop, and measures what its clients see."""

    def run(self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None) -> MetricsWindow:
        """Replay the workload once; failed requests are counted in the window, never raised."""
        ...


class MetricsSource(Protocol):
    """Where a fleet's state is read: a Prometheus server, files, a simulation."""

    def observe(self, window_s: float) -> FleetState:
        """The fleet now, with sums and means over the last `window_s` seconds.

        What one replica does not report is marked in its view; raises ObservationFailed when nothing can be read.
        """
        ...


class Cluster(Protocol):
    """Where replicas run: Kubernetes, local processes, a simulation."""

    def scale(self, wanted: Counts) -> None:
        """Bring the named servers to these replicas by accelerator; counts are absolute, so repeating is harmless.

        New replicas start, those too many drain: they take no new request and end with their last. Servers not named
        keep what they have. Raises ActuationFailed when the cluster refuses; what it refused has changed nothing.
        """
        ...
