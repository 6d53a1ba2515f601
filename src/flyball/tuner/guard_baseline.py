"""Whether what is in force is worse than the last known good: at once for a broken promise, with patience for noise.

m, v        mean and variance of the objective's gain under the last known good (exponential, at most HORIZON windows)
z           (m - gain) / sqrt(v): how much worse a window is, in standard deviations of the baseline
s           max(0, s + min(1, max(-1, z - SLACK))): regressions so far. A clear one adds 1, a slow decline a part of it
            each time, pure noise takes more than it adds (Page's CUSUM, 1954, clipped); a window that measured
            nothing adds 1

The gain of a window is its objective, larger is better. Pure: the state in, the state and what to do out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from flyball.tuner.guard_limits import Limits

HORIZON = 20  # windows that the baseline remembers
SLACK = 0.5  # of a standard deviation that a window may be worse without being a regression
FLOOR = 0.02  # least standard deviation, as a share of the mean: two equal windows do not make certainty

Action = Literal["keep", "rollback", "promote"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """One attributed window in two numbers."""

    gain: float  # larger is better; NaN: nothing could be measured
    violation: float = 0.0  # sum of the broken margins; 0: every promise was kept

    @property
    def bad(self) -> bool:
        """Whether it measured nothing usable."""
        return not (math.isfinite(self.gain) and math.isfinite(self.violation))


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Mean and variance of a stream of gains, and the mean of its violations."""

    count: int = 0
    mean: float = 0.0
    var: float = 0.0
    violation: float = 0.0

    def seen(self, judgement: Judgement) -> Level:
        """With one more window."""
        count = min(self.count + 1, HORIZON)
        rate = 1.0 / count
        delta = judgement.gain - self.mean
        mean = self.mean + rate * delta
        var = self.var + rate * (delta * (judgement.gain - mean) - self.var) if self.count else 0.0
        return Level(
            count=count, mean=mean, var=var, violation=self.violation + rate * (judgement.violation - self.violation)
        )

    @property
    def deviation(self) -> float:
        """Standard deviation of one window, with a floor."""
        return max(math.sqrt(max(self.var, 0.0)), FLOOR * abs(self.mean), 1e-12)


_NOTHING = Level()


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What the last known good does, and how what is in force compares."""

    good: Level = Level()
    trial: Level = Level()  # of what is in force, if that is another configuration
    since_s: float = 0.0  # when that came into force
    regressions: float = 0.0

    def changed(self, now_s: float) -> Baseline:
        """Another configuration is in force from now on."""
        return Baseline(good=self.good, trial=_NOTHING, since_s=now_s)

    def promoted(self) -> Baseline:
        """What is in force is the last known good now."""
        return Baseline(good=self.trial if self.trial.count else self.good)


def observe(
    state: Baseline, seen: Judgement, now_s: float, limits: Limits, *, trying: bool
) -> tuple[Baseline, Action, str]:
    """Judge one window: what to do, and why. `trying`: not the last known good is in force."""
    if not trying:
        return (state if seen.bad else replace(state, good=state.good.seen(seen))), "keep", "the last known good"
    good = state.good
    if not seen.bad and seen.violation > 0 and not (good.count and 0 < seen.violation <= good.violation):
        return state, "rollback", f"a promise is broken by {seen.violation:.3g} of its limit"
    z = math.inf if seen.bad else (good.mean - seen.gain) / good.deviation if good.count else 0.0
    if good.count and good.violation > 0 and not seen.bad and seen.violation < good.violation:
        z = -1.0  # closer to its promises than the last known good: whatever the objective, no regression
    worse = max(0.0, state.regressions + min(1.0, max(-1.0, z - SLACK)))
    state = replace(state, regressions=worse, trial=state.trial if seen.bad else state.trial.seen(seen))
    if worse >= limits.regressions:
        return state, "rollback", f"{worse:.3g} regressions against the baseline, {limits.regressions} are allowed"
    stable = now_s - state.since_s >= limits.stable_s and state.trial.count >= limits.stable_windows
    no_worse = not good.count or good.violation > 0 or state.trial.mean >= good.mean - 0.25 * good.deviation
    if stable and worse < 1 and no_worse:
        return state, "promote", f"as good as the baseline for {now_s - state.since_s:.3g} s"
    return state, "keep", "not long enough in force"
