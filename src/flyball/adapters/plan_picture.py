"""A plan's trade-offs as one SVG picture: a stepped or a straight line over numbers, with its points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 860, 420, 70, 24, 56, 56
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5", "#718096")
_TICKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a picture."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    stepped: bool = False  # a value holds until the next
    dashed: bool = False
    marked: bool = False  # with its points


def picture(lines: Sequence[Line], *, title: str, across: str, up: str) -> str:
    """An SVG document; axes begin at 0."""
    x_top, y_top = (_round_up(max(max(v, default=0.0) for v in of)) for of in (
        [line.xs for line in lines], [line.ys for line in lines]))  # fmt: skip
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="13"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{_LEFT}" y="24" font-size="16">{escape(title)}</text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(across)}</text>',
        f'<text transform="translate(18,{(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(up)}</text>",
    ]
    for i in range(_TICKS + 1):
        x, y = _x(i / _TICKS), _y(i / _TICKS)
        parts.append(
            f'<path d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{y_top * i / _TICKS:g}</text>'
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x_top * i / _TICKS:g}</text>'
        )
    place = _LEFT
    for line, colour in zip(lines, _COLOURS * (len(lines) // len(_COLOURS) + 1), strict=False):
        parts.append(_drawn(line, colour, x_top, y_top))
        parts.append(
            f'<path d="M{place},44h22" stroke="{colour}" stroke-width="2.5"{_dash(line)}/>'
            f'<text x="{place + 28}" y="48">{escape(line.name)}</text>'
        )
        place += 48 + 7 * len(line.name)
    return "".join(parts) + "</svg>\n"


def _drawn(line: Line, colour: str, x_top: float, y_top: float) -> str:
    points = [(_x(x / x_top), _y(y / y_top)) for x, y in zip(line.xs, line.ys, strict=True)]
    if not points:
        return ""
    path = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for x, y in points[1:]:
        path += f"H{x:.1f}V{y:.1f}" if line.stepped else f"L{x:.1f},{y:.1f}"
    drawn = f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{_dash(line)}/>'
    if not line.marked:
        return drawn
    return drawn + "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{colour}"><title>{x:g}: {y:g}</title></circle>'
        for (px, py), x, y in zip(points, line.xs, line.ys, strict=True)
    )


def _dash(line: Line) -> str:
    return ' stroke-dasharray="6 4"' if line.dashed else ""


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _round_up(value: float) -> float:
    """A round number of at least the value, that ticks divide well."""
    if value <= 0:
        return 1.0
    step = 10.0 ** math.floor(math.log10(value / _TICKS))
    return next(
        m * step * _TICKS for m in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if m * step * _TICKS >= value * (1 - 1e-9)
    )
