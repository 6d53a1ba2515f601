"""Saving what a proposer knows as JSON, and putting it back exactly, random numbers included."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.tuner.online.cube import Cube
from flyball.tuner.online.local import Hop, Step
from flyball.tuner.online.points import Points

_TUPLES: Mapping[str, Any] = {"Hop": Hop, "Step": Step}


def save(value: Any) -> Any:  # noqa: ANN401  # whatever a proposer holds
    """Plain data for an attribute of a proposer."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, np.ndarray):
        return {"array": save(value.tolist()), "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, np.random.Generator):
        return {"random": save(value.bit_generator.state)}
    if isinstance(value, Points):
        return {"points": attributes(value)}
    if isinstance(value, tuple) and type(value).__name__ in _TUPLES:
        return {"named": type(value).__name__, "items": [save(v) for v in value]}
    if isinstance(value, tuple):
        return {"tuple": [save(v) for v in value]}
    if isinstance(value, deque):
        return {"deque": [save(v) for v in value]}
    if isinstance(value, list):
        return [save(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {k: save(v) for k, v in value.items()}}
    raise AssertionError(f"a proposer holds a {type(value).__name__}, which cannot be saved")


def attributes(thing: object) -> dict[str, Any]:
    """All attributes of a proposer but its cube, which is made from the space again."""
    return {name: save(value) for name, value in vars(thing).items() if not isinstance(value, Cube)}


def put_back(thing: Any, saved: Mapping[str, Any]) -> None:  # noqa: ANN401  # any proposer
    """Set the attributes of a proposer to what was saved."""
    for name, value in saved.items():
        setattr(thing, name, load(value))


def load(value: Any) -> Any:  # noqa: ANN401  # the inverse of `save`
    """What `save` was given."""
    if isinstance(value, list):
        return [load(v) for v in value]
    if not isinstance(value, Mapping):
        return value
    match value:
        case {"float": text}:
            return float(text)
        case {"array": items, "dtype": dtype, "shape": shape}:
            return np.array(load(items), dtype=dtype).reshape(shape)
        case {"random": state}:
            generator = np.random.default_rng(0)
            generator.bit_generator.state = load(state)
            return generator
        case {"points": saved}:
            points = Points(
                room=saved["room"], size=saved["size"], constraints=saved["constraints"], spread_out=saved["spread_out"]
            )
            put_back(points, saved)
            return points
        case {"named": name, "items": items}:
            return _TUPLES[name](*(load(v) for v in items))
        case {"tuple": items}:
            return tuple(load(v) for v in items)
        case {"deque": items}:
            return deque(load(v) for v in items)
        case {"dict": items}:
            return {k: load(v) for k, v in items.items()}
    raise InvalidInput(f"the saved state holds {dict(value)}, which is none of ours; give what `save` wrote")
