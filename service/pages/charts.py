"""Charts as SVG, drawn with classes that the style sheet colours for light and dark. Every chart names itself to screen
readers; the page puts its figures in a table below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from ..._types import FloatArray

WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 28
KEY = 20
"""Height of the line above a plot that says what its level means."""
LEVELS = 9
"""Shades of a heat map, in classes h0 to h8."""


@dataclass(frozen=True)
class Series:
    """Values over the same positions as all others of the chart; None leaves a gap. kind: class of its line."""

    name: str
    values: Sequence[float | None]
    kind: str


def line_chart(
    title: str,
    labels: Sequence[str],
    series: Sequence[Series],
    *,
    level: tuple[float, str] | None = None,
    marks: Sequence[int] = (),
) -> str:
    """Lines from the oldest on the left. level: a horizontal line and its name. marks: positions that stand out."""
    known = [value for line in series for value in line.values if value is not None]
    if level is not None:
        known.append(level[0])
    if not known or not labels:
        return ""
    ticks = _ticks(*_from_zero(min(known), max(known)))
    low, high = ticks[0], ticks[-1]
    width, tall = WIDTH - LEFT - RIGHT, HEIGHT + (KEY if level is not None else 0)
    top = tall - HEIGHT + TOP
    across = [LEFT + width * (i + 0.5) / len(labels) for i in range(len(labels))]

    def down(value: float) -> float:
        return top + (HEIGHT - TOP - BOTTOM) * (1.0 - (value - low) / (high - low))

    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(tick):.1f}" y2="{down(tick):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{down(tick) + 4:.1f}" text-anchor="end">{tick:.6g}</text>'
        for tick in ticks
    ]
    parts += [
        f'<line class="alarm" x1="{across[i]:.1f}" x2="{across[i]:.1f}" y1="{top}" y2="{tall - BOTTOM}"/>'
        for i in marks
    ]
    if level is not None:
        y = down(level[0])
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        # Told above the plot: beside its line the name would stand on others.
        parts.append(f'<line class="level" x1="{LEFT}" x2="{LEFT + 24}" y1="{TOP}" y2="{TOP}"/>')
        parts.append(f'<text class="tick" x="{LEFT + 30}" y="{TOP + 4}">{escape(level[1])}</text>')
    for line in series:
        for run in _runs(line.values):
            points = " ".join(f"{across[i]:.1f},{down(value):.1f}" for i, value in run)
            parts.append(f'<polyline class="{line.kind}" points="{points}"/>')
            parts += [
                f'<circle class="{line.kind}" cx="{across[i]:.1f}" cy="{down(value):.1f}" r="2.5"/>' for i, value in run
            ]
    for position in sorted({0, len(labels) // 2, len(labels) - 1}):
        anchor = "start" if position == 0 else "end" if position == len(labels) - 1 else "middle"
        parts.append(
            f'<text class="tick" x="{across[position]:.1f}" y="{tall - 8}" text-anchor="{anchor}">'
            f"{escape(labels[position])}</text>"
        )
    return _svg(title, WIDTH, tall, parts)


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot. kind: which of `SHAPES` it is drawn as. told: what it says when pointed at."""

    x: float
    y: float
    kind: str
    told: str
    large: bool


SHAPES = {
    "circle": "M-1,0A1,1,0,1,0,1,0A1,1,0,1,0,-1,0Z",
    "diamond": "M0,-1.3L1.3,0L0,1.3L-1.3,0Z",
    "square": "M-1,-1H1V1H-1Z",
    "cross": "M-1,-1L1,1M-1,1L1,-1",
}


def scatter(title: str, x_title: str, y_title: str, marks: Sequence[Mark], *, more_is_better: bool = False) -> str:
    """Points, and the staircase that no point lies below. more_is_better: of x; less of it is better otherwise."""
    if not marks:
        return ""
    across, up = (_ticks(*_padded([getattr(mark, axis) for mark in marks])) for axis in ("x", "y"))
    left, right, low, high = across[0], across[-1], up[0], up[-1]
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT + 60

    def place(x: float, y: float) -> tuple[float, float]:
        along = LEFT + wide * (x - left) / (right - left)
        return along, TOP + 16 + (tall - TOP - BOTTOM - 34) * (1.0 - (y - low) / (high - low))

    bottom = place(left, low)[1]
    parts = []
    for tick in up:
        y = place(left, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in across:
        x = place(tick, low)[0]
        anchor = "end" if tick == right else "middle"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="{anchor}">{tick:.6g}</text>')
    stairs = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in _stairs(marks, more_is_better))
    parts.append(f'<polyline class="stairs" points="{stairs}"/>')
    # What is in force is not hidden by others at its place.
    for mark in sorted(marks, key=lambda mark: (mark.kind == "cross", mark.large)):
        x, y = place(mark.x, mark.y)
        size = 6.0 if mark.large else 3.5
        parts.append(
            f'<path class="mark {mark.kind}{" large" if mark.large else ""}" d="{SHAPES[mark.kind]}" '
            f'transform="translate({x:.1f},{y:.1f}) scale({size})"><title>{escape(mark.told)}</title></path>'
        )
    parts.append(
        f'<text class="tick" x="{LEFT + wide / 2:.0f}" y="{tall - 4}" text-anchor="middle">{escape(x_title)}</text>'
        f'<text class="tick" x="{LEFT - 50}" y="{TOP + 2}">{escape(y_title)}</text>'
    )
    return _svg(title, WIDTH, tall, parts)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


def _stairs(marks: Sequence[Mark], more_is_better: bool) -> list[tuple[float, float]]:
    corners: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: (-mark.x if more_is_better else mark.x, mark.y)):
        if not corners:
            corners.append((mark.x, mark.y))
        elif mark.y < corners[-1][1]:
            corners += [(mark.x, corners[-1][1]), (mark.x, mark.y)]
    return corners


def heat_map(
    title: str, values: FloatArray, rows: Sequence[str], columns: Sequence[str], *, low: float, high: float
) -> str:
    """A cell a value [rows, columns], shaded from `low` to `high`; the cell tells its value when pointed at."""
    tall, wide = values.shape
    cell_x = max(4.0, min(40.0, (WIDTH - LEFT - RIGHT) / wide))
    cell_y = max(3.0, min(24.0, 420.0 / tall))
    span = high - low if high > low else 1.0
    parts = []
    for row in range(tall):
        for column in range(wide):
            value = float(values[row, column])
            shade = min(LEVELS - 1, max(0, int((value - low) / span * LEVELS)))
            told = escape(f"{rows[row]}, {columns[column]}: {value:.4g}")
            parts.append(
                f'<rect class="h{shade}" x="{LEFT + column * cell_x:.1f}" y="{TOP + row * cell_y:.1f}" '
                f'width="{cell_x:.2f}" height="{cell_y:.2f}"><title>{told}</title></rect>'
            )
    for row in range(0, tall, max(1, math.ceil(tall / 16))):
        y = TOP + (row + 0.5) * cell_y + 4
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" text-anchor="end">{escape(rows[row])}</text>')
    for column in range(0, wide, max(1, math.ceil(wide / 16))):
        x = LEFT + (column + 0.5) * cell_x
        y = TOP + tall * cell_y + 14
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(columns[column])}</text>'
        )
    return _svg(title, LEFT + wide * cell_x + RIGHT, TOP + tall * cell_y + BOTTOM, parts)


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg class="chart" role="img" aria-label={quoteattr(title)} viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}">'
    )
    return head + "".join(parts) + "</svg>"


def _from_zero(low: float, high: float) -> tuple[float, float]:
    """From zero where that is not far away, and of some width."""
    if high <= low:
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    return (0.0 if 0 <= low < high - low else low), high


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round values, the first and last of which enclose both."""
    least = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(least))
    step = next(size * times for times in (1.0, 2.0, 2.5, 5.0, 10.0) if size * times >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    runs: list[list[tuple[int, float]]] = [[]]
    for position, value in enumerate(values):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((position, float(value)))
    return [run for run in runs if run]
