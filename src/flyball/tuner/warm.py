"""A warm start: what an earlier study found, told to the sampler of a new one as observations with their provenance.

They are copied into the new study, which then needs the earlier one no more. They inform the sampler and are no trials:
the default is measured first, then the best of the earlier study, and what the new study finds rests on its own
windows alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from flyball.core.errors import InvalidInput
from flyball.tuner.objective import Score
from flyball.tuner.proposers import Observation
from flyball.tuner.space import Lattice
from flyball.tuner.trials import Trial

_WARM = "flyball:warm_start"  # key of the user attribute


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """An earlier study: what it was made for, and its finished trials."""

    name: str
    storage: str
    problem: Mapping[str, Any]  # `Problem.describe`
    trials: Sequence[Trial]


def fitting(earlier: Earlier, wanted: Mapping[str, Any], lattice: Lattice) -> list[Trial]:
    """The trials of an earlier study that tell something of a new one (`Problem.describe`, its lattice).

    Raises InvalidInput where it was made for something else, or holds no configuration of this space.
    """
    cannot = f"the study {earlier.name!r} cannot warm this one"
    for key in ("objective", "slo", "workload", "service"):
        if earlier.problem[key] != wanted[key]:
            raise InvalidInput(
                f"{cannot}: it was made with {key} {earlier.problem[key]}, not {wanted[key]}, and such values are not "
                "comparable; give the same, or start cold"
            )
    axes = [axis.knob.name for axis in lattice.axes]
    if missing := [name for name in axes if any(name not in trial.values for trial in earlier.trials)]:
        raise InvalidInput(
            f"{cannot}: it never set {', '.join(missing)}; search what it searched (--knob, --named-only), or start "
            "cold"
        )
    rest = {**lattice.base, **lattice.fixed}
    chosen = [
        trial
        for trial in earlier.trials
        if all(rest.get(name, value) == value for name, value in trial.values.items() if name not in axes)
    ]
    if not chosen:
        raise InvalidInput(
            f"{cannot}: in none of its {len(earlier.trials)} trials the knobs that are fixed here have the same "
            "values; fix them as it did, or start cold"
        )
    return chosen


def begin(study: optuna.Study, earlier: Earlier, chosen: Sequence[Trial], lattice: Lattice) -> None:
    """Copy trials of an earlier study into a new one."""
    axes = [axis.knob.name for axis in lattice.axes]
    study.set_user_attr(_WARM, {
        "study": earlier.name,
        "storage": earlier.storage,
        "observations": [
            {"trial": t.number, "values": {name: t.values[name] for name in axes}, "score": _plain(t.score)}
            for t in chosen
        ],
    })  # fmt: skip


def _plain(score: Score) -> dict[str, Any]:
    return {"value": score.value, "margins": dict(score.margins), "failure": score.failure, "also": list(score.also)}


def observations(study: optuna.Study) -> list[Observation]:
    """What a study was warmed with; nothing if it began cold."""
    warm = study.user_attrs.get(_WARM)
    return [
        Observation(
            values=row["values"], score=Score(**{**row["score"], "also": tuple(row["score"]["also"])}), earlier=True
        )
        for row in (warm["observations"] if warm else ())
    ]


def provenance(study: optuna.Study) -> str | None:
    """Where a study's observations came from, in words; None if it began cold."""
    warm = study.user_attrs.get(_WARM)
    return f"{len(warm['observations'])} trials of {warm['study']}" if warm else None
