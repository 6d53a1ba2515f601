"""The JSON Schema of our YAML fleet spec (draft 2020-12); `flyball plan --schema` prints it."""

from __future__ import annotations

from typing import Any

from flyball.core.fleet import LOWEST_PRIORITY, SATURATION_POLICIES

_Schema = dict[str, Any]


def _object(fields: _Schema, *required: str, about: str = "") -> _Schema:
    return {
        "type": "object",
        **({"description": about} if about else {}),
        "properties": fields,
        "required": list(required),
        "additionalProperties": False,
    }


def _number(about: str) -> _Schema:
    return {"type": "number", "minimum": 0, "description": about}


def _whole(about: str, low: int = 0) -> _Schema:
    return {"type": "integer", "minimum": low, "description": about}


def _text(about: str) -> _Schema:
    return {"type": "string", "description": about}


def _flag(about: str) -> _Schema:
    return {"type": "boolean", "description": about}


def _counts(about: str) -> _Schema:
    return {"type": "object", "description": about, "additionalProperties": {"type": "integer", "minimum": 0}}


_POWER = _object(
    {
        "idle_w": _number("watts when idle"),
        "full_w": _number("watts at full load"),
        "middle_w": _number("watts at a point between; without it the curve is straight"),
        "middle_at": _number("utilisation of that point, 0 to 1"),
    },
    "idle_w",
    "full_w",
)
_ACCELERATOR = _object(
    {
        "name": _text("as profiles call it"),
        "type": _text("what capacity counts; default: the name"),
        "units": _whole("cards of the type in one accelerator", 1),
        "cost_per_h": _number("in any unit, the same for all"),
        "startup_cost": _number("of starting it, once"),
        "power": _POWER,
        "memory_gb": _number("of the whole accelerator"),
        "memory_gb_s": _number("its bandwidth"),
        "compute_tflops": _number("dense, at the precision that is served"),
    },
    "name",
    "cost_per_h",
)
_PROFILE = _object(
    {
        "model": _text("its name"),
        "accelerator": _text("one of accelerators"),
        "alpha_ms": _number("milliseconds of a step"),
        "beta_ms": _number("milliseconds of a token computed"),
        "gamma_ms": _number("milliseconds of a cached token read"),
        "delta_ms": _number("fourth parameter, of queue models that have one"),
        "max_batch": _whole("most requests in a step; the best batch below it is searched for"),
        "at_tokens": _whole("output length that max_batch was stated for; it is then scaled, not searched"),
        "max_step_tokens": _whole("token budget of a step"),
        "kv_tokens": _whole("tokens that the KV cache holds; 0: not known"),
        "accelerators": _whole("that one replica takes", 1),
        "queue_model": _text("law that the numbers belong to"),
    },
    "model",
    "accelerator",
    "alpha_ms",
    "beta_ms",
    "gamma_ms",
)
_TARGETS = _object(
    {
        "slo": {"type": "array", "items": {"type": "string"}, "description": "such as mean_ttft<1s, p95_itl<50ms"},
        "output_tps": _number("tokens a second to hold ready"),
        "max_loss": _number("share of requests that may be turned away"),
    }
)
_CLASS = _object(
    {
        "name": _text("as servers call it"),
        "priority": {**_whole("1 is served first where capacity is short", 1), "maximum": LOWEST_PRIORITY},
        "targets": {"type": "object", "additionalProperties": _TARGETS, "description": "of each model"},
    },
    "name",
)
_CURRENT = _object(
    {
        "accelerator": _text("where it runs now"),
        "replicas": _whole("how many"),
        "cost_per_h": _number("of all of them"),
    }
)
_SERVER = _object(
    {
        "name": _text("of the server"),
        "class": _text("one of service_classes"),
        "model": _text("one of the profiles' models"),
        "arrival_rps": _number("requests per second"),
        "input_tokens": _number("mean of a request"),
        "output_tokens": _number("mean of a request"),
        "input_cv": _number("standard deviation of input tokens over their mean"),
        "output_cv": _number("standard deviation of output tokens over their mean"),
        "prefix_hit": _number("share of input tokens that are cached already"),
        "disaggregated": _flag("prefill and decode run on replicas of their own, planned as two servers"),
        "min_replicas": _whole("fewest"),
        "max_replicas": _whole("most", 1),
        "quota": _text("one of quotas"),
        "max_batch": _whole("in place of the profile's"),
        "max_queue": _whole("requests that may wait at a replica"),
        "keep_accelerator": _flag("stay on the accelerator it runs on"),
        "current": _CURRENT,
    },
    "name",
    "class",
    "model",
    "arrival_rps",
    "input_tokens",
    "output_tokens",
)


def _list(items: _Schema) -> _Schema:
    return {"type": "array", "items": items}


SCHEMA: _Schema = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Flyball fleet spec",
    **_object(
        {
            "accelerators": _list(_ACCELERATOR),
            "capacity": _counts("cards of each type; what is missing has none"),
            "profiles": _list(_PROFILE),
            "service_classes": _list(_CLASS),
            "servers": _list(_SERVER),
            "unlimited": _flag("plan as if every type were plentiful"),
            "heterogeneous": _flag("a server's replicas may run on several accelerators"),
            "quotas": {"type": "object", "additionalProperties": _counts("cards by type"), "description": "by name"},
            "budget_per_h": _number("most that all replicas together may cost"),
            "power_limit_w": _number("most that all accelerators together may draw"),
            "energy_price_per_kwh": _number("counts in the choice, beside the cost"),
            "horizon_h": _number("hours that a plan is expected to hold, over which start-up costs are spread"),
            "saturation_policy": {"enum": list(SATURATION_POLICIES), "description": "of the greedy solver"},
            "delayed_best_effort": _flag("of the greedy solver: best effort comes after every priority"),
        },
        "accelerators",
        "profiles",
        "service_classes",
        "servers",
    ),
}
