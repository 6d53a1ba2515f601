"""Who changed the live policy, when, and what the engine measured before and after: bounded, oldest forgotten first."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Value
from flyball.engine.config import RuntimeConfig
from flyball.engine.stats import EngineStats

KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyMetrics:
    """Rates over the time one version was in force, or has been so far."""

    seconds: float
    generation_tokens_per_s: float
    prompt_tokens_per_s: float  # computed, not cached
    finished_per_s: float  # answers that ended with stop or length
    preemptions_per_s: float
    prefix_hit_ratio: float  # cached prompt tokens over all; 0 where there were none
    mean_step_s: float  # 0 where there was no step


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigChange:
    """One applied change; version 1 is the start."""

    version: int
    generation: str
    changes: Mapping[str, tuple[Value, Value]]  # knob -> (before, after)
    values: Mapping[str, Value]  # all knobs, as they were from then on
    by: str  # who asked for it
    applied_at_step: int  # the first step under it is the next one
    wall_s: float  # seconds since 1970
    before: PolicyMetrics | None  # while the version before was in force; None for the start
    after: PolicyMetrics  # since then, up to the next change or now


@dataclass(frozen=True, slots=True)
class _Mark:
    runtime: RuntimeConfig
    by: str
    now_s: float
    wall_s: float
    stats: EngineStats


class ConfigHistory:
    """The last changes of one engine's policy."""

    def __init__(self) -> None:
        self._marks: deque[_Mark] = deque(maxlen=KEPT + 1)  # each change needs the one before it

    def record(self, runtime: RuntimeConfig, by: str, now_s: float, wall_s: float, stats: EngineStats) -> None:
        """A version comes into force."""
        snapshot = replace(stats, finished=dict(stats.finished), refused=dict(stats.refused))
        self._marks.append(_Mark(runtime, by, now_s, wall_s, snapshot))

    def values_of(self, version: int) -> dict[str, Value]:
        """The knobs of an earlier version; raises InvalidInput for one that is not remembered."""
        marks = list(self._marks)
        for mark in marks:
            if mark.runtime.version == version:
                return mark.runtime.values()
        raise InvalidInput(
            f"there is no version {version} to go back to; the history holds versions "
            f"{marks[0].runtime.version} to {marks[-1].runtime.version}"
        )

    def changes(self, now_s: float, stats: EngineStats) -> list[ConfigChange]:
        """Everything remembered, oldest first, with what was measured up to now."""
        marks = list(self._marks)
        ends = [*((mark.now_s, mark.stats) for mark in marks[1:]), (now_s, stats)]
        told = []
        for i, (mark, (end_s, end)) in enumerate(zip(marks, ends, strict=True)):
            before = marks[i - 1] if i else None
            if before is None and mark.runtime.version > 1:
                continue  # kept only for the next one's sake
            old = before.runtime.values() if before else {}
            values = mark.runtime.values()
            told.append(
                ConfigChange(
                    version=mark.runtime.version,
                    generation=mark.runtime.generation,
                    changes={k: (old[k], v) for k, v in values.items() if before and old[k] != v},
                    values=values,
                    by=mark.by,
                    applied_at_step=mark.stats.step,
                    wall_s=mark.wall_s,
                    before=_metrics(before.stats, mark.stats, mark.now_s - before.now_s) if before else None,
                    after=_metrics(mark.stats, end, end_s - mark.now_s),
                )
            )
        return told


def _metrics(start: EngineStats, end: EngineStats, seconds: float) -> PolicyMetrics:
    def rate(count: float) -> float:
        return count / seconds if seconds > 0 else 0.0

    def done(stats: EngineStats) -> int:
        return stats.finished.get("stop", 0) + stats.finished.get("length", 0)

    computed = end.prompt_tokens_computed - start.prompt_tokens_computed
    cached = end.prompt_tokens_cached - start.prompt_tokens_cached
    steps = end.step - start.step
    return PolicyMetrics(
        seconds=seconds,
        generation_tokens_per_s=rate(end.generation_tokens - start.generation_tokens),
        prompt_tokens_per_s=rate(computed),
        finished_per_s=rate(done(end) - done(start)),
        preemptions_per_s=rate(end.preemptions - start.preemptions),
        prefix_hit_ratio=cached / (cached + computed) if cached + computed else 0.0,
        mean_step_s=(end.step_seconds - start.step_seconds) / steps if steps else 0.0,
    )
