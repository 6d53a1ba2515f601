"""The time-line of a simulated server as one SVG picture: load, replicas by phase, promises kept, who waits."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from flyball.adapters.simulated_report import ServerReport

_WIDTH, _LEFT, _RIGHT, _HEIGHT, _GAP, _TOP = 960, 70, 20, 120, 46, 64
_MOST_POINTS = 400  # of a line: more would not be seen
_INK, _GRID, _BLUE, _GREEN, _AMBER, _GREY, _RED = (
    "#222", "#ddd", "#2b6cb0", "#2f855a", "#d69e2e", "#a0aec0", "#c53030"
)  # fmt: skip

Floats = NDArray[np.float64]


def picture(server: ServerReport, title: str) -> str:
    """An SVG document."""
    columns = {name: _thinned(values, name) for name, values in server.timeline.items()}
    times = columns["time_s"]
    end_s = float(times[-1]) if len(times) else 1.0
    asked, ready = columns["wanted"], columns["ready"]
    panels = [
        _Panel("requests/s", [(columns["arrival_rps"], _BLUE, "arrivals")]),
        _Panel(
            "replicas",
            [
                (ready + columns["draining"] + columns["starting"], _AMBER, "starting"),
                (ready + columns["draining"], _GREY, "draining"),
                (ready, _GREEN, "ready"),
            ],
            filled=True,
            line=(asked, _INK, "asked for"),
        ),
        _Panel("attainment %", [(100 * columns["attainment"], _GREEN, "requests that saw what was promised")], top=100),
        _Panel("requests", [(columns["running"], _BLUE, "running"), (columns["waiting"], _RED, "waiting")]),
    ]
    height = _TOP + len(panels) * (_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" '
        f'font-size="12" fill="{_INK}"><rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_LEFT}" y="26" font-size="17" font-weight="bold">{escape(title)}</text>',
    ]
    for index, panel in enumerate(panels):
        parts.append(panel.drawn(_TOP + index * (_HEIGHT + _GAP), times, end_s))
    return "\n".join([*parts, "</svg>\n"])


def _thinned(values: Floats, name: str) -> Floats:
    """At most so many points, each the mean of its neighbours (of times, the first)."""
    group = max(-(-len(values) // _MOST_POINTS), 1)
    starts = np.arange(0, len(values), group)
    if name == "time_s":
        return values[starts]
    known = ~np.isnan(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    counts = np.add.reduceat(known, starts)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


class _Panel:
    """One diagram of several curves over time."""

    def __init__(
        self,
        label: str,
        curves: Sequence[tuple[Floats, str, str]],
        *,
        filled: bool = False,
        line: tuple[Floats, str, str] | None = None,
        top: float | None = None,
    ) -> None:
        self.label, self.curves, self.filled, self.line = label, curves, filled, line
        values = [c[0] for c in (*curves, *((line,) if line else ()))]
        self.top = top or max((float(np.nanmax(v)) for v in values if (~np.isnan(v)).any()), default=1.0) * 1.05 or 1.0

    def drawn(self, y: float, times: Floats, end_s: float) -> str:
        """As SVG elements, its upper edge at y."""
        inner = _WIDTH - _LEFT - _RIGHT
        xs = _LEFT + inner * times / max(end_s, 1e-9)

        def ys(values: Floats) -> Floats:
            return y + _HEIGHT * (1 - np.clip(values / self.top, 0.0, 1.0))

        parts = [f'<text x="{_LEFT}" y="{y - 8:.0f}" font-weight="bold">{escape(self.label)}</text>']
        for share in (0.0, 0.5, 1.0):
            at = y + _HEIGHT * (1 - share)
            parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_GRID}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{share * self.top:.3g}</text>')
        for hour in range(5):
            label = _time(end_s * hour / 4)
            x = _LEFT + inner * hour / 4
            parts.append(f'<text x="{x:.0f}" y="{y + _HEIGHT + 16:.0f}" text-anchor="middle">{label}</text>')
        for values, colour, _ in self.curves:
            parts.append(_path(xs, ys(values), colour, y + _HEIGHT if self.filled else None))
        if self.line:
            parts.append(_path(xs, ys(self.line[0]), self.line[1], None))
        x = _LEFT + 120.0
        for _, colour, name in (*self.curves, *((self.line,) if self.line else ())):
            parts.append(f'<rect x="{x:.0f}" y="{y - 17:.0f}" width="10" height="10" fill="{colour}"/>')
            parts.append(f'<text x="{x + 14:.0f}" y="{y - 8:.0f}">{escape(name)}</text>')
            x += 30 + 7 * len(name)
        return "\n".join(parts)


def _path(xs: Floats, ys: Floats, colour: str, floor: float | None) -> str:
    """A curve, or the area above a floor; interrupted where nothing is known."""
    points = [(x, y) for x, y in zip(xs.tolist(), ys.tolist(), strict=True) if not np.isnan(y)]
    if not points:
        return ""
    told = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    if floor is None:
        return f'<polyline points="{told}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    return f'<polygon points="{points[0][0]:.1f},{floor} {told} {points[-1][0]:.1f},{floor}" fill="{colour}"/>'


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.0f} h"
