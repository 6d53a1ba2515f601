"""One measurement: set a configuration, let it settle under traffic, replay the workload, check that nothing moved."""

from __future__ import annotations

from dataclasses import dataclass

from flyball.core.errors import VersionConflict
from flyball.core.knobs import Configuration
from flyball.core.metrics import MetricsWindow
from flyball.core.ports import Load, LoadProgress, Target
from flyball.core.slo import Slo
from flyball.core.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Rig:
    """A service under test and the traffic it is tested with."""

    target: Target
    load: Load
    slo: Slo
    workload: Workload
    settle: Workload | None = None  # replayed before each window and not counted

    def measure(
        self, values: Configuration, workload: Workload | None = None, progress: LoadProgress | None = None
    ) -> MetricsWindow:
        """The window of one configuration.

        Raises InvalidKnob or EngineFailed when the configuration cannot be served, and VersionConflict when somebody
        else changed it meanwhile: such a window belongs to no configuration.
        """
        generation = self.target.apply(values)
        applied = dict(self.target.configuration())
        if self.settle is not None:
            self.load.run(self.settle, self.slo, generation)
        window = self.load.run(workload or self.workload, self.slo, generation, progress)
        if (now := dict(self.target.configuration())) != applied:
            moved = ", ".join(f"{k} {applied.get(k)} -> {now[k]}" for k in now if now[k] != applied.get(k))
            raise VersionConflict(
                f"the configuration changed while it was measured ({moved}); let nothing else set the knobs of a "
                "service that is being tuned"
            )
        return window
