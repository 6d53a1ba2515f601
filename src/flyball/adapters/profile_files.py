"""Latency profiles on disk, schema `flyball.profile/1`: written by `flyball fit`, read by `flyball plan --profile`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flyball.adapters.fields import Fields, read_fields
from flyball.core.errors import InvalidInput
from flyball.core.fleet import LatencyProfile

SCHEMA = "flyball.profile/1"


def write_profiles(path: Path, profiles: Sequence[LatencyProfile]) -> None:
    """Write profiles as JSON, in seconds."""
    body = {"schema": SCHEMA, "profiles": [asdict(profile) for profile in profiles]}
    try:
        path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {path} ({error.strerror}); give a file in a folder that exists") from None


def read_profiles(path: Path) -> tuple[LatencyProfile, ...]:
    """Read profiles back."""
    fields = read_fields(path)
    if fields.text("schema", "") != SCHEMA:
        raise InvalidInput(f"{path} is not a {SCHEMA} file; give one that `flyball fit --out` wrote")
    return tuple(_profile(f) for f in fields.each("profiles"))


def _profile(f: Fields) -> LatencyProfile:
    return LatencyProfile(
        model=f.text("model", None),
        accelerator=f.text("accelerator", None),
        alpha_s=f.number("alpha_s", None),
        beta_s=f.number("beta_s", None),
        gamma_s=f.number("gamma_s", None),
        delta_s=f.number("delta_s"),
        max_batch=f.whole("max_batch"),
        at_tokens=f.whole("at_tokens"),
        max_step_tokens=f.whole("max_step_tokens"),
        accelerators=f.whole("accelerators", 1, low=1),
        generation=f.text("generation"),
        queue_model=f.text("queue_model", "v3"),
        log_covariance=_numbers(f, "log_covariance"),
        condition_number=f.number("condition_number", None) if "condition_number" in f else None,
    )


def _numbers(f: Fields, key: str) -> tuple[float, ...]:
    values = f.items(key)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        raise InvalidInput(f"{f.path}.{key} holds something that is no number; give 9 numbers, or leave it out")
    return tuple(float(v) for v in values)
