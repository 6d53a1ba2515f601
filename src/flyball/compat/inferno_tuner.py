"""The model tuner's and the model trainer's routes: what replicas show becomes alpha, beta and gamma.

Observations are ServerSpecs, one a replica, as llm-inferno's collector sends them; answers are ModelData in
milliseconds. All replicas count, not only the first, and what was learnt can be kept in a file over restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from flyball.adapters.calibration_files import read_calibrations, write_calibrations
from flyball.adapters.fields import Fields
from flyball.adapters.fleet_files import system_profile
from flyball.adapters.sweep_files import sweep_points
from flyball.compat.inferno_state import NotFound
from flyball.core.clock import Clock
from flyball.core.errors import FlyballError, InvalidInput
from flyball.core.fleet import IDENTIFIED_BELOW
from flyball.performance.fit import OperatingPoint, fit
from flyball.performance.queueing import queue_model
from flyball.planner.calibrate import Calibration, begin, observe

_MS = 1e-3
_PER_MINUTE = 1 / 60
_COLLECTED = 5  # observations before parameters are told (their TUNER_INIT_OBS)
_DEFAULT_BATCH = 256  # theirs, where a spec has none
_LEAST_TO_CALIBRATE = 2

Spec = dict[str, Any]
Pair = tuple[str, str]  # model, accelerator


class NothingTuned(FlyballError):
    """The observations do not yield parameters yet."""


class Tuner:
    """What was learnt of each model on each accelerator."""

    def __init__(self, *, law: str, clock: Clock, file: Path | None) -> None:
        self._law, self._clock, self._file, self._lock = law, clock, file, Lock()
        states = read_calibrations(file) if file else ()
        self._states: dict[Pair, Calibration] = {(s.model, s.accelerator): s for s in states}
        self._calibrated: set[Pair] = set()
        self._updated_s: dict[Pair, float] = {}
        self._error: dict[Pair, float] = {}

    def tune(self, body: object) -> Spec:
        """Learn from one cycle's replicas; told are all pairs among them with enough observations."""
        with self._lock:
            seen = _by_pair(body)
            for pair, points in seen.items():
                self._observe(pair, points)
            self._keep()
            told = [pair for pair in seen if len(self._states[pair].kept) >= _COLLECTED]
            if not told:
                counts = ", ".join(f"{m} on {a}: {len(self._states[m, a].kept)}" for m, a in seen)
                raise NothingTuned(f"still collecting ({counts or 'no replica has traffic'} of {_COLLECTED} seen)")
            return {"models": [self._spec(pair) for pair in told]}

    def calibrate(self, body: object) -> Spec:
        """Learn from a sweep of several loads, and forget what was learnt of these pairs before."""
        with self._lock:
            told = []
            for pair, points in _by_pair(body).items():
                if len(points) < _LEAST_TO_CALIBRATE:
                    continue
                state, report = observe(begin(*pair, law=self._law), points)
                if not state.identified:
                    continue
                self._states[pair], self._error[pair] = state, report.error
                self._updated_s[pair] = self._clock.wall_s()
                self._calibrated.add(pair)
                told.append(pair)
            self._keep()
            if not told:
                raise NothingTuned(
                    f"no pair has {_LEAST_TO_CALIBRATE} or more loads that determine its parameters (condition number "
                    f"at most {IDENTIFIED_BELOW:g}); send other loads and token mixes"
                )
            return {"models": [self._spec(pair) for pair in told]}

    def merge(self, body: Spec) -> Spec:
        """Given ModelData with what was learnt in place of what it says; unknown pairs come last."""
        with self._lock:
            learnt = {pair: self._spec(pair) for pair, s in self._states.items() if len(s.kept) >= _COLLECTED}
            merged = []
            fields = Fields(body, "body")
            for f, spec in zip(fields.each("models"), fields.items("models"), strict=True):
                profile = system_profile(f)
                found = learnt.pop((profile.model, profile.accelerator), None)
                merged.append(spec | {"perfParms": found["perfParms"]} if found else spec)
            return {"models": [*merged, *learnt.values()]}

    def parameters(self, model: str, accelerator: str) -> Spec:
        """What was learnt of one pair; `nis` is the mean relative error of the last cycle."""
        with self._lock:
            pair = (model, accelerator)
            if pair not in self._states or not self._states[pair].kept:
                raise NotFound(f"nothing was learnt of {model!r} on {accelerator!r} yet; send it to /tune")
            when = datetime.fromtimestamp(self._updated_s.get(pair, 0.0), UTC)
            return {
                "model": model,
                "accelerator": accelerator,
                **self._spec(pair)["perfParms"],
                "nis": self._error.get(pair, 0.0),
                "lastUpdated": when.isoformat().replace("+00:00", "Z"),
            }

    def warmup(self) -> Spec:
        """Whether some pair has too few observations yet, or there is none."""
        with self._lock:
            return {"warmingUp": any(len(s.kept) < _COLLECTED for s in self._states.values()) or not self._states}

    def status(self) -> Spec:
        """For each pair how much was seen, and whether a sweep is needed to tell its parameters apart."""
        with self._lock:
            return {"statuses": [self._status(pair, state) for pair, state in sorted(self._states.items())]}

    def _status(self, pair: Pair, state: Calibration) -> Spec:
        ill, ready = not state.identified, len(state.kept) >= _COLLECTED
        return {
            "model": pair[0],
            "accelerator": pair[1],
            "storePresent": True,
            "calibrated": pair in self._calibrated,
            "obsCount": len(state.kept),
            "obsTarget": _COLLECTED,
            "conditionNumber": state.condition_number,
            "illConditioned": ill,
            "needsCalibration": ready and ill and pair not in self._calibrated,
        }

    def _observe(self, pair: Pair, points: Sequence[OperatingPoint]) -> None:
        state, report = observe(self._states.get(pair) or begin(*pair, law=self._law), points)
        self._states[pair], self._error[pair] = state, report.error
        self._updated_s[pair] = self._clock.wall_s()

    def _spec(self, pair: Pair) -> Spec:
        profile = self._states[pair].profile()
        parameters = {"alpha": profile.alpha_s, "beta": profile.beta_s, "gamma": profile.gamma_s}
        return {
            "name": pair[0],
            "acc": pair[1],
            "accCount": 1,
            "maxBatchSize": profile.max_batch or _DEFAULT_BATCH,
            "perfParms": {name: value / _MS for name, value in parameters.items()},
        }

    def _keep(self) -> None:
        if self._file is not None:
            write_calibrations(self._file, [state for _, state in sorted(self._states.items())])


def _by_pair(body: object) -> dict[Pair, list[OperatingPoint]]:
    """Observations of replicas with traffic, by model and accelerator."""
    if not isinstance(body, list) or not body:
        raise InvalidInput("the body is not a list of replicas; give a list of ServerSpecs with their currentAlloc")
    seen: dict[Pair, list[OperatingPoint]] = {}
    for index, item in enumerate(body):
        f = Fields(item, f"body[{index}]")
        current = f.inside("currentAlloc")
        load = current.inside("load")
        rate, ttft, itl = load.number("arrivalRate"), current.number("ttftAverage"), current.number("itlAverage")
        tokens_in, tokens_out = load.number("avgInTokens"), load.number("avgOutTokens")
        if not (rate and ttft and itl and tokens_in and tokens_out):
            continue  # no traffic, or nothing measured
        batch = current.whole("maxBatch") or f.whole("maxBatchSize") or _DEFAULT_BATCH
        point = OperatingPoint(
            arrival_rps=rate * _PER_MINUTE,
            input_tokens=tokens_in,
            output_tokens=tokens_out,
            max_batch=batch,
            max_queue=f.whole("maxQueueSize"),
            ttft_s=ttft * _MS,
            itl_s=itl * _MS,
        )
        seen.setdefault((f.text("model", None), current.text("accelerator", None)), []).append(point)
    return seen


def train(body: object, law: str) -> Spec:
    """Fit a data set, as model-trainer's service does: parameters in milliseconds, and their errors."""
    points = sweep_points(body, "body", max_batch=_DEFAULT_BATCH)
    found = fit(points, queue_model(law), robust=False)
    ttft, itl = np.array([p.ttft_s for p in points]), np.array([p.itl_s for p in points])
    return {
        "OptimizedParms": {
            "alpha": found.alpha_s / _MS,
            "beta": found.beta_s / _MS,
            "gamma": found.gamma_s / _MS,
        },
        "AnalysisResults": {
            "avgErrTTFT": float(np.abs(np.array(found.ttft_errors) * ttft).mean()) / _MS,
            "avgErrITL": float(np.abs(np.array(found.itl_errors) * itl).mean()) / _MS,
            "avgErrWeighted": found.loss,
            "conditionNumber": found.condition_number,
        },
    }
