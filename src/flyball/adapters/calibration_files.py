"""Calibrations on disk, schema `flyball.calibration/1`: what was learnt of every model and accelerator, over restarts.

The file is replaced as a whole (written beside it, synced, renamed), so that a reader, or a crash in between, finds the
old state or the new one and never half of one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flyball.adapters.fields import Fields, read_fields
from flyball.core.errors import InvalidInput
from flyball.numerics.kalman import Belief
from flyball.numerics.markov import Floats
from flyball.performance.fit import OperatingPoint
from flyball.planner.calibrate import Calibration, Seen

SCHEMA = "flyball.calibration/1"
_NUMBERS = (
    "arrival_rps", "input_tokens", "output_tokens", "max_step_tokens", "ttft_s", "itl_s",
)  # fmt: skip
_LOG_LIMIT = 100.0  # of a log parameter: e^100 is no latency


def write_calibrations(path: Path, states: Sequence[Calibration]) -> None:
    """Keep the states, in place of whatever the file held."""
    body = {"schema": SCHEMA, "calibrations": [_body(state) for state in states]}
    text = json.dumps(body, indent=1, allow_nan=False) + "\n"
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as new:
            new.write(text)
            new.flush()
            os.fsync(new.fileno())
        Path(new.name).replace(path)
    except OSError as error:
        raise InvalidInput(f"cannot write {path} ({error.strerror}); give a file in a folder that exists") from None


def read_calibrations(path: Path) -> tuple[Calibration, ...]:
    """The states kept; of a file that does not exist yet, none."""
    if not path.exists():
        return ()
    fields = read_fields(path)
    if fields.text("schema", "") != SCHEMA:
        raise InvalidInput(f"{path} is not a {SCHEMA} file; give one that `flyball fit --state` wrote, or a new name")
    return tuple(_calibration(f) for f in fields.each("calibrations"))


def _body(state: Calibration) -> dict[str, Any]:
    return {
        **{
            name: getattr(state, name)
            for name in (
                "model", "accelerator", "queue_model", "generation", "cycle", "noise", "condition_number", "changes",
                "outliers",
            )
        },
        "prior": _belief_body(state.prior),
        "belief": _belief_body(state.belief),
        "kept": [asdict(seen.point) | {"cycle": seen.cycle} for seen in state.kept],
        "suspects": [asdict(seen.point) | {"cycle": seen.cycle} for seen in state.suspects],
    }  # fmt: skip


def _belief_body(belief: Belief) -> dict[str, Any]:
    return {"log_mean": belief.mean.tolist(), "log_covariance": belief.covariance.tolist()}


def _calibration(f: Fields) -> Calibration:
    return Calibration(
        model=f.text("model", None),
        accelerator=f.text("accelerator", None),
        queue_model=f.text("queue_model", None),
        generation=f.text("generation"),
        prior=_belief(f.inside("prior")),
        belief=_belief(f.inside("belief")),
        kept=tuple(_seen(s) for s in f.each("kept")),
        suspects=tuple(_seen(s) for s in f.each("suspects")),
        cycle=f.whole("cycle"),
        noise=f.number("noise", None),
        condition_number=f.number("condition_number", None),
        changes=f.whole("changes"),
        outliers=f.whole("outliers"),
    )


def _belief(f: Fields) -> Belief:
    mean, covariance = _array(f, "log_mean", (3,)), _array(f, "log_covariance", (3, 3))
    if not np.allclose(covariance, covariance.T) or (np.linalg.eigvalsh(covariance) <= 0).any():
        raise InvalidInput(f"{f.path}.log_covariance is no covariance; remove the file, or restore it from a copy")
    return Belief(mean, covariance)


def _array(f: Fields, key: str, shape: tuple[int, ...]) -> Floats:
    try:
        array = np.array(f.items(key), dtype=np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != shape or not (np.abs(array) <= _LOG_LIMIT).all():
        raise InvalidInput(
            f"{f.path}.{key} is no array of {' x '.join(map(str, shape))} numbers within {_LOG_LIMIT:g}; "
            "remove the file, or restore it from a copy"
        )
    return array


def _seen(f: Fields) -> Seen:
    numbers = {name: f.number(name, None) for name in _NUMBERS}
    point = OperatingPoint(max_batch=f.whole("max_batch", low=1), max_queue=f.whole("max_queue"), **numbers)
    return Seen(point=point, cycle=f.whole("cycle"))
