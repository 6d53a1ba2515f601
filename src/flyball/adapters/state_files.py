"""A fleet's states in a file: one JSON object a line, as `flyball control` reads them (docs/guide/control.md)."""

from __future__ import annotations

import math
from pathlib import Path

from flyball.adapters.fields import Fields, parse_json
from flyball.core.errors import InvalidInput
from flyball.core.observation import FleetState, Phase, ReplicaView, ServerView

PHASES: tuple[Phase, ...] = ("ready", "starting", "draining")


def read_states(path: Path) -> tuple[FleetState, ...]:
    """Every state of a file, in order."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the states {path} ({error}); give a file of one JSON object a line") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path.name}:{number}"
            found.append(_state(Fields(parse_json(line, where), where)))
    if not found:
        raise InvalidInput(f"{path} holds no state; give a file of one JSON object a line")
    return tuple(found)


def _state(f: Fields) -> FleetState:
    f.only("now_s", "window_s", "servers")
    return FleetState(
        now_s=f.number("now_s", None),
        window_s=f.number("window_s", None, low=1e-3),
        servers={name: _server(name, one) for name, one in f.inside("servers").entries()},
    )


def _server(name: str, f: Fields) -> ServerView:
    f.only("arrivals", "queued", "input_tokens", "output_tokens", "completed", "good", "wanted", "replicas")
    return ServerView(
        name=name,
        arrivals=f.whole("arrivals") if "arrivals" in f else None,
        queued=f.whole("queued"),
        input_tokens=f.number("input_tokens", math.nan),
        output_tokens=f.number("output_tokens", math.nan),
        completed=f.whole("completed"),
        good=f.whole("good") if "good" in f else None,
        wanted=dict(f.inside("wanted").numbers()),
        replicas=tuple(_replica(one) for one in f.each("replicas")),
    )


def _replica(f: Fields) -> ReplicaView:
    f.only(
        "name", "accelerator", "phase", "age_s", "reported", "running", "waiting", "kv_used", "kv_capacity_tokens",
        "arrivals", "completed", "itl_s", "ttft_s",
    )  # fmt: skip
    return ReplicaView(
        name=f.text("name", None),
        accelerator=f.text("accelerator", None),
        phase=f.choice("phase", PHASES),
        age_s=f.number("age_s"),
        reported=f.flag("reported", True),
        running=f.number("running"),
        waiting=f.number("waiting"),
        kv_used=f.number("kv_used"),
        kv_capacity_tokens=f.whole("kv_capacity_tokens"),
        arrivals=f.whole("arrivals"),
        completed=f.whole("completed"),
        itl_s=f.number("itl_s", math.nan),
        ttft_s=f.number("ttft_s", math.nan),
    )
