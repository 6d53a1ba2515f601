"""Pictures of many trials at once: the Pareto front, parallel coordinates, importances, the map of what is invalid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from flyball.tuner.charts import (
    BOTTOM,
    HEIGHT,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    Mark,
    draw_mark,
    span,
    svg,
    ticks,
    x_axis,
    y_axis,
)


def front(marks: Sequence[Mark], best: Sequence[Mark], x: str, y: str) -> str:
    """Two figures of each trial against each other; those that none beats in both are joined."""
    frame = Frame(x=span(m.x for m in marks), y=span(m.y for m in marks))
    steps = sorted(best, key=lambda m: m.x)
    path = "".join(f"{'L' if i else 'M'}{frame.px(m.x):.1f},{frame.py(m.y):.1f}" for i, m in enumerate(steps))
    parts = [y_axis(frame, y), x_axis(frame, ticks(*frame.x, 8), x)]
    parts += [f'<path class="best" d="{path}"/>'] if path else []
    parts += [draw_mark(frame, m) for m in marks]
    return svg(frame, parts, f"{y} against {x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One trial over parallel axes."""

    heights: tuple[float, ...]  # on each axis, from 0 at its foot to 1
    worth: float  # from 0 for the worst to 1 for the best
    feasible: bool
    title: str


def coordinates(names: Sequence[str], ends: Sequence[tuple[str, str]], lines: Sequence[Line]) -> str:
    """A line a trial through its value of each knob; the better the stronger, and dashed where a promise was broken."""
    frame = Frame(x=(0, len(names) - 1), y=(0, 1), left=70, height=HEIGHT)
    parts = []
    for line in sorted(lines, key=lambda line: (line.feasible, line.worth)):
        path = "".join(
            f"{'L' if i else 'M'}{frame.px(i) * 0.94:.1f},{frame.py(h):.1f}" for i, h in enumerate(line.heights)
        )
        kind = "through" if line.feasible else "through broken"
        parts.append(f'<path class="{kind}" style="opacity:{0.15 + 0.85 * line.worth**2:.2f}" d="{path}">'
                     f"<title>{escape(line.title)}</title></path>")  # fmt: skip
    for i, (name, (low, high)) in enumerate(zip(names, ends, strict=True)):
        x = frame.px(i) * 0.94
        parts.append(
            f'<line class="base" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.height - BOTTOM}"/>'
            f'<text class="tick" x="{x + 4:.1f}" y="{TOP + 9}">{escape(high)}</text>'
            f'<text class="tick" x="{x + 4:.1f}" y="{frame.height - BOTTOM - 4}">{escape(low)}</text>'
            f'<text class="axis" x="{x:.1f}" y="{frame.height - BOTTOM + (16 if i % 2 == 0 else 32)}" '
            f'text-anchor="{"end" if i and i == len(names) - 1 else "middle"}">{escape(name)}</text>'
        )
    return svg(frame, parts, "every trial over its knobs")


def bars(rows: Sequence[tuple[str, float]], label: str) -> str:
    """Shares as bars, one a row, the longest first."""
    frame = Frame(x=(0, 1), y=(0, len(rows)), height=TOP + BOTTOM + 26 * len(rows), left=220)
    parts = [x_axis(frame, [0, 0.25, 0.5, 0.75, 1], label)]
    for i, (name, share) in enumerate(rows):
        y = frame.py(len(rows) - i - 0.5)
        width = max(frame.px(share) - frame.left, 1)
        parts.append(
            f'<text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
            f'<rect class="bar" x="{frame.left}" y="{y - 8:.1f}" width="{width:.1f}" height="16" rx="3">'
            f"<title>{escape(name)} {share:.0%}</title></rect>"
        )
    return svg(frame, parts, label)


def plane(marks: Sequence[Mark], x: tuple[str, Sequence[str]], y: tuple[str, Sequence[str]]) -> str:
    """Trials over the levels of two knobs; marks that are not feasible stand out."""
    frame = Frame(x=(-0.5, len(x[1]) - 0.5), y=(-0.5, len(y[1]) - 0.5), left=80)
    every = max(1, math.ceil(len(x[1]) / 12))
    rows = range(0, len(y[1]), max(1, math.ceil(len(y[1]) / 8)))
    parts = [x_axis(frame, [float(i) for i in range(0, len(x[1]), every)], x[0], x[1])]
    for i in rows:
        height = frame.py(i)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text class="tick" x="{frame.left - 6}" y="{height + 4:.1f}" text-anchor="end">{escape(y[1][i])}</text>'
        )
    middle = (frame.height - BOTTOM + TOP) / 2
    parts.append(f'<text class="axis" transform="translate(14,{middle:.1f}) rotate(-90)" text-anchor="middle">'
                 f"{escape(y[0])}</text>")  # fmt: skip
    parts += [draw_mark(frame, m) for m in marks]
    return svg(frame, parts, f"which of the trials over {x[0]} and {y[0]} are invalid")
