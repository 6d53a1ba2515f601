"""Where the world begins: the protocols that real and simulated adapters implement alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flyball.core.knobs import Configuration, Space
from flyball.core.metrics import MetricsWindow
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


class Load(Protocol):
    """Sends a workload, open loop, and measures what its clients see."""

    def run(self, workload: Workload, slo: Slo, generation: str, progress: LoadProgress | None = None) -> MetricsWindow:
        """Replay the workload once; failed requests are counted in the window, never raised."""
        ...
