"""The report's pictures as inline SVG: no library, no script, no font; colours come from the page's style.

Every mark carries a <title>, which browsers show when the pointer rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 320  # of a full picture, in user units
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 40  # room for the labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One trial in a picture."""

    x: float
    y: float
    feasible: bool
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Where data lands on the paper."""

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT

    def px(self, x: float) -> float:
        """Horizontal place of a value."""
        low, high = self.x
        return self.left + (x - low) / (high - low) * (self.width - self.left - RIGHT)

    def py(self, y: float) -> float:
        """Vertical place of a value, which grows upwards."""
        low, high = self.y
        return self.height - BOTTOM - (y - low) / (high - low) * (self.height - TOP - BOTTOM)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them.

    >>> ticks(0, 13.4)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.7)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def convergence(marks: Sequence[Mark], best_so_far: Sequence[float | None], default: float | None, label: str) -> str:
    """Value of each trial in turn, the best promise-keeping one so far as a line, the default as a dashed one."""
    values = [m.y for m in marks]
    frame = Frame(x=(-0.5, len(marks) - 0.5), y=span([*values, *([default] if default is not None else [])]))
    parts = [
        y_axis(frame, label),
        x_axis(frame, [float(i) for i in range(0, len(marks), max(1, math.ceil(len(marks) / 20)))], "trial"),
    ]
    if default is not None:
        y = frame.py(default)
        parts.append(
            f'<line class="default" x1="{frame.left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="default-label" x="{WIDTH - RIGHT}" y="{y - 6:.1f}" text-anchor="end">default</text>'
        )
    parts.append(_steps(frame, best_so_far))
    parts.extend(draw_mark(frame, m) for m in marks)
    return svg(frame, parts, f"{label} of {len(marks)} trials in order")


def scatter(marks: Sequence[Mark], names: Sequence[str], label: str, title: str) -> str:
    """Value against one knob's levels, which stand at equal distances."""
    frame = Frame(x=(-0.5, len(names) - 0.5), y=span([m.y for m in marks]), width=WIDTH / 2 - 10, height=220, left=48)
    every = max(1, math.ceil(len(names) / 8))
    shown = [float(i) for i in range(0, len(names), every)]
    parts = [y_axis(frame, label, count=4), x_axis(frame, shown, title, names)]
    parts.extend(draw_mark(frame, m) for m in marks)
    return svg(frame, parts, f"{label} against {title}")


def pairs(rows: Sequence[tuple[float, float]], label: str) -> str:
    """Default and best of each pair, joined; one row a pair."""
    height = TOP + BOTTOM + 30 * len(rows)
    frame = Frame(x=span([v for row in rows for v in row]), y=(0, len(rows)), height=height, left=70)
    parts = [x_axis(frame, ticks(*frame.x, 6), label)]
    for i, (default, best) in enumerate(rows):
        y = frame.py(len(rows) - i - 0.5)
        a, b = frame.px(default), frame.px(best)
        parts.append(
            f'<text class="tick" x="58" y="{y + 4:.1f}" text-anchor="end">pair {i + 1}</text>'
            f'<line class="join" x1="{a:.1f}" x2="{b:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle class="was" cx="{a:.1f}" cy="{y:.1f}" r="6"><title>default {default:.4g}</title></circle>'
            f'<circle class="feasible" cx="{b:.1f}" cy="{y:.1f}" r="6"><title>best {best:.4g}</title></circle>'
        )
    return svg(frame, parts, f"{label} of default and best, pair by pair")


def span(values: Iterable[float]) -> tuple[float, float]:
    """Limits with some air; from zero unless the values sit far above it."""
    seen = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(seen), max(seen)
    low = 0.0 if 0 <= low < 0.7 * high else low
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low - (air if low else 0.0), high + air)


def _steps(frame: Frame, best: Sequence[float | None]) -> str:
    path = ""
    for i, value in enumerate(best):
        if value is not None:
            y = f"{frame.py(value):.1f}"
            path += f"H{frame.px(i - 0.5):.1f}V{y}" if path else f"M{frame.px(i):.1f},{y}"
    return f'<path class="best" d="{path}H{frame.px(len(best) - 0.5):.1f}"/>' if path else ""


def draw_mark(frame: Frame, mark: Mark) -> str:
    """A dot where every promise was kept, else a cross."""
    x, y = frame.px(mark.x), frame.py(mark.y if math.isfinite(mark.y) else frame.y[1])
    title = f"<title>{escape(mark.title)}</title>"
    if mark.feasible:
        return f'<circle class="feasible" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
    cross = f"M{x - 4.5:.1f},{y - 4.5:.1f}l9,9m0,-9l-9,9"
    return f'<g class="infeasible"><path class="hit" d="{cross}"/><path d="{cross}"/>{title}</g>'


def y_axis(frame: Frame, label: str, count: int = 5) -> str:
    """Grid lines with their values, and the label."""
    parts = []
    for value in ticks(*frame.y, count):
        y = frame.py(value)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{frame.left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    middle = (frame.height - BOTTOM + TOP) / 2
    parts.append(
        f'<text class="axis" transform="translate(14,{middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(label)}</text>"
    )
    return "".join(parts)


def x_axis(frame: Frame, values: Sequence[float], label: str, names: Sequence[str] | None = None) -> str:
    """The base line with values or names under it, and the label."""
    base = frame.height - BOTTOM
    parts = [f'<line class="base" x1="{frame.left}" x2="{frame.width - RIGHT}" y1="{base}" y2="{base}"/>']
    parts.extend(
        f'<text class="tick" x="{frame.px(v):.1f}" y="{base + 16}" text-anchor="middle">'
        f"{escape(names[int(v)] if names else f'{v:g}')}</text>"
        for v in values
    )
    middle = (frame.left + frame.width - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{base + 34}" text-anchor="middle">{escape(label)}</text>')
    return "".join(parts)


def svg(frame: Frame, parts: Iterable[str], label: str) -> str:
    """The picture of these parts."""
    return (
        f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
