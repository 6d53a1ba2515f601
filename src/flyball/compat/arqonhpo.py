"""`ArqonSolver` and `ArqonProbe` as programs written for arqonhpo 0.3.3 call them: same JSON, same calls.

    from flyball.compat.arqonhpo import ArqonSolver          # was: from arqonhpo import ArqonSolver

What differs, on purpose:

- Every proposal lies within its bounds, whatever their size and scale; equal seeds and tells give equal proposals.
- An unknown key is refused by name, where it was ignored.
- `"direction": "maximize"` says that larger values are better; without it values are minimised, as ever. Programs whose
  value is a reward (their serving example tells -1000 for a broken SLO and minus the cost otherwise, to a minimiser)
  need it: either the key, or `from flyball.compat.arqonhpo import ArqonMaximizer as ArqonSolver`, which changes the
  import only.
- A result may have `"constraints": {name: margin}` (above 0: broken) for the names in the configuration's
  `"constraints"`, so that a broken promise needs no penalty; and `"failed": "why"`, in place of a value.
- `"budget": null` never ends. `ask_one` forgets when the world changes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Knob, Space
from flyball.tuner.objective import Score
from flyball.tuner.online.cube import Cube, low_discrepancy
from flyball.tuner.online.tuner import Direction, Failure, OnlineTuner, Result

_KEYS = ("seed", "budget", "bounds", "probe_ratio", "strategy_params", "direction", "constraints", "proposer")
_RESULT_KEYS = ("eval_id", "params", "value", "cost", "constraints", "failed")
_SCALES = ("Linear", "Log", "Periodic")
_ENDLESS = 1 << 62
_BATCH = 4  # trials of one `ask` after the probe


class ArqonSolver:
    """Ask for a batch or for one, tell what it was worth.

    >>> solver = ArqonSolver('{"seed": 42, "budget": 50, "bounds": {"x": {"min": -10, "max": 10}}}')
    >>> while (candidate := solver.ask_one()) is not None:
    ...     value = (candidate["x"] - 2) ** 2
    ...     solver.seed(json.dumps([{"params": candidate, "value": value, "cost": 1.0}]))
    >>> solver.get_history_len()
    50
    """

    DIRECTION: ClassVar[Direction] = "minimize"

    def __init__(self, config_json: str) -> None:
        config = _config(config_json)
        self._budget = _budget(config["budget"])
        self._probe = max(1, math.ceil(_ratio(config.get("probe_ratio", 0.2)) * (self._budget or 50)))
        space, periodic = _space(config["bounds"])
        self._tuner = OnlineTuner(
            space, direction=config.get("direction", self.DIRECTION), seed=config["seed"], periodic=periodic,
            constraints=_names(config.get("constraints", ())), proposer=config.get("proposer", "auto"),
        )  # fmt: skip
        self._cube = Cube(space, periodic)
        self._probed = False

    def ask(self) -> list[dict[str, float]] | None:
        """The next batch: first a spread of the whole space, then what was learnt; None at the end of the budget."""
        left = self._left()
        if left <= 0:
            return None
        if not self._probed:
            self._probed = True
            count = min(self._probe, left)
            shift = np.random.default_rng(self._tuner._seed).random(self._cube.size)
            points = self._cube.snap(low_discrepancy(0, count, self._cube.size, shift))
            return [_floats(self._cube.values(u)) for u in points]
        return [_floats(t.values) for t in self._tuner.ask(min(_BATCH, left))]

    def ask_one(self) -> dict[str, float] | None:
        """One candidate, for a live service; None at the end of the budget."""
        return None if self._left() <= 0 else _floats(self._tuner.ask().values)

    def tell(self, results_json: str) -> None:
        """Results of a batch: a list of {"eval_id", "params", "value", "cost"}."""
        for values, result in _results(results_json, self._tuner.constraints):
            self._tuner.add(self._match(values), result)

    def seed(self, seed_json: str) -> None:
        """Results, asked for or not: a list of {"params", "value", "cost"}."""
        self.tell(seed_json)

    def get_history_len(self) -> int:
        """How many results were told."""
        return self._tuner.told

    def best(self) -> dict[str, Any] | None:
        """The best candidate that kept every constraint, with its value."""
        best = self._tuner.best()
        return None if best is None else {"params": _floats(best.values), "value": best.score.value}

    def _left(self) -> int:
        return _ENDLESS if self._budget is None else self._budget - self._tuner.told

    def _match(self, values: Mapping[str, float]) -> Mapping[str, float]:
        for name, value in values.items():
            self._tuner.space[name].check(value)
        return values


class ArqonMaximizer(ArqonSolver):
    """An `ArqonSolver` to which larger values are better, unless its configuration says otherwise."""

    DIRECTION = "maximize"


class ArqonProbe:
    """Points of low discrepancy, each computed from its number alone.

    >>> probe = ArqonProbe('{"seed": 1, "budget": 10, "bounds": {"x": {"min": 0, "max": 1}}}', seed=7)
    >>> probe.sample_range(3, 2)[1] == probe.sample_at(4)
    True
    """

    def __init__(self, config_json: str, seed: int = 42) -> None:
        space, periodic = _space(_config(config_json)["bounds"])
        self._cube = Cube(space, periodic)
        self._shift = np.random.default_rng(_whole(seed, "seed")).random(self._cube.size)

    def sample_at(self, index: int) -> dict[str, float]:
        """The point of this number, from 0."""
        return self.sample_range(index, 1)[0]

    def sample_range(self, start: int, count: int) -> list[dict[str, float]]:
        """The points of these numbers."""
        first, many = _whole(start, "start"), _whole(count, "count")
        points = self._cube.snap(low_discrepancy(first, many, self._cube.size, self._shift))
        return [_floats(self._cube.values(u)) for u in points]


def _config(text: str) -> dict[str, Any]:
    config = _parse(text, "the configuration")
    if not isinstance(config, Mapping):
        raise InvalidInput("the configuration is no JSON object; give seed, budget and bounds")
    if missing := [key for key in ("seed", "budget", "bounds") if key not in config]:
        raise InvalidInput(f"the configuration lacks {', '.join(missing)}; add it")
    if unknown := [key for key in config if key not in _KEYS]:
        raise InvalidInput(f"the configuration has the unknown key {', '.join(map(repr, unknown))}; known: "
                           f"{', '.join(_KEYS)}")  # fmt: skip
    if config.get("strategy_params"):
        raise InvalidInput(
            f"strategy_params {config['strategy_params']} has no meaning here; leave it out, or name a proposer"
        )
    return dict(config) | {"seed": _whole(config["seed"], "seed")}


def _space(bounds: object) -> tuple[Space, list[str]]:
    if not isinstance(bounds, Mapping) or not bounds:
        raise InvalidInput("bounds is no JSON object with at least one parameter; give {name: {min, max}}")
    knobs, periodic = [], []
    for name, bound in bounds.items():
        if not isinstance(bound, Mapping) or not {"min", "max"} <= set(bound) <= {"min", "max", "scale"}:
            raise InvalidInput(f"the bound of {name} is {bound!r}; give min, max and, if not Linear, scale")
        low, high = _finite(bound["min"], f"min of {name}"), _finite(bound["max"], f"max of {name}")
        scale = bound.get("scale", "Linear")
        if scale not in _SCALES:
            raise InvalidInput(f"the scale of {name} is {scale!r}; use {', '.join(_SCALES)}")
        knobs.append(Knob(name=str(name), kind="float", default=low, low=low, high=high, log=scale == "Log"))
        if scale == "Periodic":
            periodic.append(str(name))
    return Space(tuple(knobs)), periodic


def _results(text: str, constraints: Sequence[str]) -> list[tuple[dict[str, float], Result]]:
    found = []
    results = _parse(text, "the results")
    if not isinstance(results, list):
        raise InvalidInput("the results are no JSON list; give [{params, value, cost}]")
    for result in results:
        if not isinstance(result, Mapping) or not isinstance(result.get("params"), Mapping):
            raise InvalidInput(f"the result {result!r} has no params; give {{params, value, cost}}")
        if unknown := [key for key in result if key not in _RESULT_KEYS]:
            raise InvalidInput(f"a result has the unknown key {', '.join(map(repr, unknown))}; known: "
                               f"{', '.join(_RESULT_KEYS)}")  # fmt: skip
        found.append(({str(k): float(_finite(v, str(k))) for k, v in result["params"].items()},
                      _result(result, constraints)))  # fmt: skip
    return found


def _result(result: Mapping[str, Any], constraints: Sequence[str]) -> Result:
    if result.get("failed"):
        return Failure(str(result["failed"]))
    value = result.get("value")
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidInput(f"a result's value is {value!r}; give a number, or failed with the reason")
    if not constraints:
        return float(value)
    margins = result.get("constraints", {})
    if not isinstance(margins, Mapping):
        raise InvalidInput(f"a result's constraints are {margins!r}; give {{name: margin}}")
    return Score(value=float(value), margins={str(k): float(v) for k, v in margins.items()})


def _parse(text: str, what: str) -> Any:  # noqa: ANN401  # JSON
    try:
        return json.loads(text)
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{what} is not JSON ({error}); give a JSON text") from None


def _finite(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidInput(f"{what} is {value!r}; give a number")
    return float(value)


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidInput(f"{what} is {value!r}; give a whole number of at least 0")
    return value


def _budget(value: object) -> int | None:
    return None if value is None else _whole(value, "budget")


def _ratio(value: object) -> float:
    ratio = _finite(value, "probe_ratio")
    if not 0 <= ratio <= 1:
        raise InvalidInput(f"probe_ratio is {ratio}; give a share from 0 to 1")
    return ratio


def _names(given: object) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(n, str) for n in given):
        raise InvalidInput(f"constraints is {given!r}; give a list of names")
    return tuple(given)


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
