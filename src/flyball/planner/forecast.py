"""What the load will be when a replica started now is ready: forecasts with their uncertainty, by name.

A method is a pure step: a state, a sample of the arrival rate in, the next state out; from a state it gives the rate
expected some seconds ahead. How far it was off at that distance is measured on its own past forecasts (`Tracker`), so
that the uncertainty is the method's own, of this load, and not an assumption.

symbol   meaning                                                              unit
y        arrivals seen in a sample over its length                            1/s
l, b     level of the rate; its slope                                         1/s, 1/s²
h        how far ahead                                                        s
H        half-life of a memory: after H seconds a sample weighs half          s

naive      the last sample
ewma       l += (1 - 2^(-dt/H)) (y - l)
holt       level and slope (Holt, 1957), the slope fading with distance: l + b (1 - 2^(-h/D)) D / ln 2 (damped trend,
           Gardner and McKenzie, 1985)
seasonal   the rate a season before then, scaled by the last minutes over those a season before; holt until a season is
           known: given, or found as the lag at which the rates agree best with themselves (autocorrelation)
portfolio  whichever of the others was least off lately at this distance
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.numerics.markov import Floats

_ERROR_MEMORY_S = 900.0  # half-life of what is known about a method's errors
_PRIOR_ERROR = 0.1  # of the rate, before any forecast has come due
_PRIOR_WEIGHT = 4.0  # forecasts that the prior counts for
_SWITCH_GAIN = 0.9  # another method takes over once its error is under this share of the present one's
_SD_OF_MEAN_ERROR = 1.25  # standard deviation over mean absolute error, of a normal law
_MOST_PENDING = 512
_BIN_S, _MOST_BINS = 60.0, 3000  # of the seasonal method's memory: two days of minutes
_LEAST_LAG, _LEAST_OVERLAP = 5, 12  # bins
_PEAK_STEPS = 8  # moments looked at between now and the horizon
_SCALED_BY = 4  # bins that a season is compared with the one before by
_AGREED = 0.7  # autocorrelation that makes a season
_SHOCK = 6.0  # standard deviations of chance from which a change is no chance
_BEYOND_CHANCE = 3.0  # the rates' variance over a Poisson process's


class Sample(NamedTuple):
    """Arrivals over a while."""

    at_s: float  # its end
    rate_rps: float
    seconds: float  # its length

    @property
    def noise_var(self) -> float:
        """Variance of the rate by chance alone, were arrivals a Poisson process."""
        return max(self.rate_rps, 1.0 / self.seconds) / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A rate some time ahead, and one standard deviation of what it may be off."""

    mean_rps: float
    sd_rps: float
    method: str

    def upper(self, deviations: float) -> float:
        """The rate that is exceeded less often the more deviations are added; never below 0."""
        return max(self.mean_rps + deviations * self.sd_rps, 0.0)


@dataclass(frozen=True, slots=True)
class State:
    """What a method remembers: level, slope, and of the seasonal one mean rates by bin of time."""

    at_s: float = -math.inf
    level: float = math.nan
    slope: float = 0.0
    bins: tuple[float, ...] = ()  # of whole bins, the last one ending at `bin_s`
    bin_s: float = -math.inf
    open_bin: tuple[float, float] = (0.0, 0.0)  # arrivals and seconds in the bin that is not whole yet
    season: int = 0  # bins; 0: none known


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to forecast; `update` and `ahead` are pure."""

    level_s: float = 0.0  # half-life of the level; 0: the last sample is the level
    slope_s: float = 0.0  # half-life of the slope; 0: no slope
    fade_s: float = 600.0  # distance after which half of the slope is no longer believed
    seasonal: bool = False
    season_s: float = 0.0  # length of the season; 0: to be found

    def update(self, state: State, sample: Sample) -> State:
        """Learn a sample."""
        if math.isnan(state.level):
            return State(sample.at_s, sample.rate_rps, bin_s=sample.at_s)
        dt = max(sample.at_s - state.at_s, 1e-9)
        gain = 1.0 - math.exp2(-dt / self.level_s) if self.level_s else 1.0
        expected = state.level + state.slope * dt
        if self.level_s and abs(sample.rate_rps - expected) > _SHOCK * math.sqrt(max(sample.noise_var, expected / dt)):
            return self._shocked(state, sample, dt)
        level = max(expected + gain * (sample.rate_rps - expected), 0.0)
        slope = state.slope
        if self.slope_s:
            slope += (1.0 - math.exp2(-dt / self.slope_s)) * ((level - state.level) / dt - slope)
        moved = replace(state, at_s=sample.at_s, level=level, slope=slope)
        return self._binned(moved, sample, dt) if self.seasonal else moved

    def _shocked(self, state: State, sample: Sample, dt: float) -> State:
        """Another load has begun: its rate is the level at once, and what the slope was says nothing of it."""
        moved = replace(state, at_s=sample.at_s, level=sample.rate_rps, slope=0.0)
        return self._binned(moved, sample, dt) if self.seasonal else moved

    @property
    def _bin_s(self) -> float:
        """A minute, or a ninety-sixth of a season that is longer than that many minutes."""
        return max(_BIN_S, self.season_s / 96.0)

    def _binned(self, state: State, sample: Sample, dt: float) -> State:
        arrivals, seconds = state.open_bin[0] + sample.rate_rps * dt, state.open_bin[1] + dt
        if seconds < self._bin_s - 1e-6:
            return replace(state, open_bin=(arrivals, seconds))
        bins = (*state.bins, arrivals / seconds)[-_MOST_BINS:]
        season = round(self.season_s / self._bin_s) if self.season_s else found_season(bins, self._bin_s)
        return replace(state, bins=bins, bin_s=sample.at_s, open_bin=(0.0, 0.0), season=season)

    def _then(self, state: State, horizon_s: float) -> float | None:
        """The rate a season before then, scaled to the present level; None while no season is known and whole."""
        season, bins = state.season, state.bins
        if not season or len(bins) < season + 2:
            return None

        def rate(at_s: float) -> float:  # of the season's same phase, most recent whole one, a little smoothed
            place = (at_s - state.bin_s) / self._bin_s - 0.5
            place -= season * math.ceil((place + 1.0) / season)
            low = math.floor(place)
            share = place - low
            index = len(bins) + low
            return bins[max(index, 0)] * (1.0 - share) + bins[max(min(index + 1, len(bins) - 1), 0)] * share

        before = sum(bins[max(len(bins) - season - _SCALED_BY, 0) : len(bins) - season])
        scale = sum(bins[-_SCALED_BY:]) / before if before > 0 else 1.0
        return rate(state.at_s + horizon_s) * min(max(scale, 0.8), 1.25)

    def ahead(self, state: State, horizon_s: float) -> float:
        """The rate expected then."""
        seasonal = self._then(state, horizon_s) if self.seasonal else None
        if seasonal is not None:
            return seasonal
        reach_s = self.fade_s * (1.0 - math.exp2(-horizon_s / self.fade_s)) / math.log(2.0)
        return max(state.level + state.slope * reach_s, 0.0)


def found_season(bins: tuple[float, ...], bin_s: float) -> int:
    """The lag in bins at which rates agree best with themselves, or 0 where there is none to be sure of.

    It must have been seen one and a half times, explain more than chance does, and agree to 7 tenths.
    """
    count = len(bins)
    if count < _LEAST_OVERLAP + _LEAST_LAG:
        return 0
    x = np.array(bins) - np.mean(bins)
    if float(x @ x) / count < _BEYOND_CHANCE * max(float(np.mean(bins)), 1e-9) / bin_s:
        return 0
    most = min(count - _LEAST_OVERLAP, int(count / 1.5))
    agreements = [_agreement(x[:-lag], x[lag:]) for lag in range(_LEAST_LAG, most + 1)]
    best = max(agreements, default=0.0)
    if best < _AGREED:
        return 0
    peaks = (
        k for k in range(1, len(agreements) - 1)
        if agreements[k] >= best - 0.05 and agreements[k - 1] < agreements[k] >= agreements[k + 1]
    )  # fmt: skip
    return next((k + _LEAST_LAG for k in peaks), 0)  # of multiples of one season the shortest


def _agreement(a: Floats, b: Floats) -> float:
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else 0.0


METHODS: Mapping[str, Method] = {
    "naive": Method(),
    "ewma": Method(level_s=60.0),
    "holt": Method(level_s=60.0, slope_s=180.0),
    "seasonal": Method(level_s=60.0, slope_s=180.0, seasonal=True),
}
PORTFOLIO = ("ewma", "holt", "seasonal")
NAMES = (*METHODS, "portfolio")


class _Pending(NamedTuple):
    due_s: float
    mean_rps: float


@dataclass(frozen=True, slots=True)
class Tracked:
    """One method's state, its forecasts that are not due yet, and how far off those were that are."""

    state: State = field(default_factory=State)
    pending: tuple[_Pending, ...] = ()
    off_rps: float = 0.0  # sum of errors beyond what chance explains, fading
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """The memory of a forecaster: each method's, and which is believed."""

    tracked: Mapping[str, Tracked]
    chosen: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecaster:
    """Forecasts at one horizon that may change slowly, such as the measured start-up time of a replica."""

    methods: Mapping[str, Method]

    def start(self) -> Outlook:
        """Before the first sample."""
        return Outlook({name: Tracked() for name in self.methods}, next(iter(self.methods)))

    def update(self, outlook: Outlook, sample: Sample, horizon_s: float) -> Outlook:
        """Learn a sample, score the forecasts that it settles, and note what is expected at the horizon."""
        tracked = {
            name: _track(self.methods[name], old, sample, horizon_s) for name, old in outlook.tracked.items()
        }  # fmt: skip
        return Outlook(tracked, self._best(tracked, outlook.chosen, sample.rate_rps))

    def _best(self, tracked: Mapping[str, Tracked], present: str, rate_rps: float) -> str:
        errors = {name: _deviation(one, rate_rps) for name, one in tracked.items()}
        best = min(errors, key=lambda name: errors[name])
        return best if errors[best] < _SWITCH_GAIN * errors[present] else present

    def ahead(self, outlook: Outlook, horizon_s: float) -> Forecast:
        """The believed method's forecast; the uncertainty is that of the distance its errors were measured at."""
        one = outlook.tracked[outlook.chosen]
        if math.isnan(one.state.level):
            return Forecast(mean_rps=0.0, sd_rps=0.0, method=outlook.chosen)
        sd = _deviation(one, one.state.level)
        mean = self.methods[outlook.chosen].ahead(one.state, horizon_s)
        return Forecast(mean_rps=mean, sd_rps=sd, method=outlook.chosen)

    def peak(self, outlook: Outlook, horizon_s: float) -> float:
        """The most that is expected between now and then: what is there must last until that is over."""
        one = outlook.tracked[outlook.chosen]
        if math.isnan(one.state.level):
            return 0.0
        method = self.methods[outlook.chosen]
        return max(method.ahead(one.state, horizon_s * k / _PEAK_STEPS) for k in range(_PEAK_STEPS + 1))

    def level(self, outlook: Outlook) -> float:
        """The rate now, chance smoothed away as the believed method does."""
        level = outlook.tracked[outlook.chosen].state.level
        return 0.0 if math.isnan(level) else level


def _track(method: Method, old: Tracked, sample: Sample, horizon_s: float) -> Tracked:
    due = [p for p in old.pending if p.due_s <= sample.at_s]
    off_rps, weight = old.off_rps, old.weight
    if due:
        fade = math.exp2(-(sample.at_s - old.state.at_s) / _ERROR_MEMORY_S)
        error = due[-1].mean_rps - sample.rate_rps
        off_rps = off_rps * fade + math.sqrt(max(error * error - sample.noise_var, 0.0))
        weight = weight * fade + 1.0
    state = method.update(old.state, sample)
    if state.season and not old.state.season:  # what it said before it knew the season says nothing of it now
        off_rps, weight = 0.0, 0.0
        old = Tracked(old.state)
    later = [p for p in old.pending if p.due_s > sample.at_s][-_MOST_PENDING:]
    later.append(_Pending(sample.at_s + horizon_s, method.ahead(state, horizon_s)))
    return Tracked(state, tuple(later), off_rps, weight)


def _deviation(one: Tracked, rate_rps: float) -> float:
    """From mean absolute errors: one shock must not be feared for as long as squares would."""
    prior = _PRIOR_ERROR * rate_rps / _SD_OF_MEAN_ERROR
    return _SD_OF_MEAN_ERROR * (one.off_rps + _PRIOR_WEIGHT * prior) / (one.weight + _PRIOR_WEIGHT)


def forecaster(name: str, *, season_s: float = 0.0) -> Forecaster:
    """The forecaster of this name; `season_s` is the length of the load's season, or 0 to look for one.

    >>> one = forecaster("ewma")
    >>> outlook = one.update(one.start(), Sample(0.0, 8.0, 60.0), 60.0)
    >>> one.ahead(outlook, 60.0).mean_rps
    8.0
    """
    if name not in NAMES:
        raise InvalidInput(f"unknown forecast {name!r}; use one of {', '.join(NAMES)}")
    methods = {n: METHODS[n] for n in (PORTFOLIO if name == "portfolio" else (name,))}
    return Forecaster(methods={n: replace(m, season_s=season_s) if m.seasonal else m for n, m in methods.items()})
