"""Charts of values over time or another quantity: lines, points, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .svg import (
    BOTTOM,
    CHARACTER,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Key,
    Plot,
    from_zero,
    label,
    legend,
    line,
    number_axis,
    padded,
    shape,
    svg,
    time_axis,
)

Form = Callable[[float], str]
SYMBOLS = {"series-a": "circle", "series-b": "square", "series-c": "diamond"}
"""Lines are told apart by the form of their dots and dashes, not by colour alone."""


@dataclass(frozen=True)
class Series:
    """Values over the same positions as all others of the chart; None leaves a gap. kind: class of its line."""

    name: str
    values: Sequence[float | None]
    kind: str


def time_chart(
    title: str,
    at: Sequence[float],
    series: Sequence[Series],
    form: Form,
    *,
    level: tuple[float, str] | None = None,
    alarms: Sequence[int] = (),
    span: tuple[float, float] | None = None,
) -> str:
    """Lines over time. at: seconds since 1970, in order. form: writes a value with its unit. level: a horizontal line
    and its name. alarms: positions of upright lines. span: what the axis shows; without it, from first to last."""
    if not at:
        return ""
    return _over(title, at, series, form, time_axis(*(span or (at[0], at[-1]))), level, alarms)


def line_chart(title: str, at: Sequence[float], series: Sequence[Series], form: Form, x_title: str) -> str:
    """Lines over another quantity."""
    return _over(title, at, series, form, number_axis(min(at), max(at), x_title, enclosing=False), None, ())


def _over(
    title: str,
    at: Sequence[float],
    series: Sequence[Series],
    form: Form,
    x_axis: Axis,
    level: tuple[float, str] | None,
    alarms: Sequence[int],
) -> str:
    known = [value for one in series for value in one.values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    if level is not None:
        known.append(level[0])
    keys = [Key(one.kind, one.name, symbol=SYMBOLS.get(one.kind, "")) for one in series]
    keys += [Key("level", level[1])] if level is not None else []
    keys += [Key("alarm", "alarm", "upright")] if alarms else []
    named, tall = legend(keys, WIDTH)
    titled = 16 if x_axis.title and not x_axis.over_time else 0
    height = HEIGHT + tall + titled
    low, high = from_zero(min(known), max(known))
    y_axis = number_axis(low, high, form=form)
    plot = Plot(x_axis, y_axis, LEFT, WIDTH - RIGHT, TOP + tall, height - BOTTOM - titled, room=0.02)
    parts = [*plot.axes(), *named]
    parts += [line("alarm", x, plot.top, x, plot.bottom) for x in (plot.across(at[i]) for i in alarms)]
    if level is not None:
        parts.append(line("level", plot.left, plot.down(level[0]), plot.right, plot.down(level[0])))
    for one in series:
        for run in _runs(one.values):
            points = " ".join(f"{plot.across(at[i]):.1f},{plot.down(value):.1f}" for i, value in run)
            parts.append(f'<polyline class="{one.kind}" points="{points}"/>')
            symbol = SYMBOLS.get(one.kind, "circle")
            parts += [shape(symbol, f"mark {one.kind}", plot.across(at[i]), plot.down(v), 3.0) for i, v in run]
    hover: dict[str, Any] = {
        "box": [plot.left, plot.top, plot.right, plot.bottom],
        "at": [round(plot.across(value), 1) for value in at],
        "told": [_told(x_axis, position, at, series, form, alarms) for position in range(len(at))],
    }
    if x_axis.over_time:
        hover["time"] = [x_axis.low, plot.across(x_axis.low), x_axis.high, plot.across(x_axis.high)]
    return svg(title, WIDTH, height, parts, hover)


def _told(
    x_axis: Axis, position: int, at: Sequence[float], series: Sequence[Series], form: Form, alarms: Sequence[int]
) -> list[Any]:
    where: Any = at[position] if x_axis.over_time else f"{at[position]:.4g} {x_axis.title}"
    values = [
        f"{one.name}: {form(value)}"
        for one in series
        for value in [one.values[position]]
        if value is not None and math.isfinite(value)
    ]
    # The script writes moments as the axis does.
    return [where, *values, *(["alarm"] if position in set(alarms) else [])]


def _runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    runs: list[list[tuple[int, float]]] = [[]]
    for position, value in enumerate(values):
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append((position, float(value)))
    return [run for run in runs if run]


@dataclass(frozen=True)
class Curve:
    """A line through its own points. dots: points of it that are marked, each with what it says."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]
    dots: Sequence[tuple[float, float, str]] = ()


def curves(
    title: str, x_axis: Axis, y_axis: Axis, drawn: Sequence[Curve], *, width: float, height: float, form: Form
) -> str:
    """Curves of several things over the same axes. form: writes a value of the horizontal axis."""
    named, tall = legend([Key(curve.kind, curve.name) for curve in drawn], width)
    plot = Plot(x_axis, y_axis, LEFT, width - RIGHT, TOP + tall + 18, height - BOTTOM - 18)
    parts = [*plot.axes(), *named]
    hover = []
    # The first of them lies on top.
    for curve in reversed(drawn):
        within = [(x, y) for x, y in curve.points if x_axis.low <= x <= x_axis.high]
        points = " ".join(f"{plot.across(x):.1f},{plot.down(y):.1f}" for x, y in within)
        parts.append(f'<polyline class="{curve.kind}" points="{points}"/>')
        for x, y, told in curve.dots:
            if x_axis.low <= x <= x_axis.high:
                parts.append(shape("circle", f"mark {curve.kind}", plot.across(x), plot.down(y), 4.0, told))
        hover += [[round(plot.across(x), 1), round(plot.down(y), 1), f"{curve.name}: {form(x)}"] for x, y in within]
    return svg(title, width, height, parts, {"points": hover})


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot. symbol: one of `SHAPES`. name: in the legend. told: what it says when pointed at."""

    x: float
    y: float
    symbol: str
    name: str
    told: str
    large: bool


POINT_KINDS = {
    "in force": ("cross", "in force"),
    "nothing asked": ("circle", "nothing asked"),
    "device": ("diamond", "survives device failures"),
    "node": ("square", "survives node failures"),
}
"""Symbol and name of a plan on a front, by what it was asked to survive."""


def scatter(
    title: str,
    x_title: str,
    y_title: str,
    marks: Sequence[Mark],
    *,
    more_is_better: bool = False,
    width: float = WIDTH,
    height: float = HEIGHT + 80,
) -> str:
    """Points, and the staircase that no point lies below. more_is_better: of x; less of it is better otherwise."""
    if not marks:
        return ""
    x_axis, y_axis = (
        number_axis(*padded([getattr(mark, axis) for mark in marks]), name)
        for axis, name in (("x", x_title), ("y", y_title))
    )
    names = {mark.name: mark.symbol for mark in marks}
    named, tall = legend([Key(_kind(symbol), name, "mark", symbol) for name, symbol in names.items()], width)
    # Room beside the axis: a mark on it would hide what the axis says.
    plot = Plot(x_axis, y_axis, LEFT, width - RIGHT, TOP + tall + 18, height + tall - BOTTOM - 18, room=0.02)
    stairs = " ".join(f"{plot.across(x):.1f},{plot.down(y):.1f}" for x, y in _stairs(marks, more_is_better))
    parts = [*plot.axes(), *named, f'<polyline class="stairs" points="{stairs}"/>']
    # What is in force is not hidden by others at its place.
    for mark in sorted(marks, key=lambda mark: (mark.symbol == "cross", mark.large)):
        kind = f"mark {_kind(mark.symbol)}{'' if mark.large else ' faint'}"
        size = 6.0 if mark.large else 3.5
        parts.append(shape(mark.symbol, kind, plot.across(mark.x), plot.down(mark.y), size, mark.told))
    return svg(title, width, height + tall, parts)


def _kind(symbol: str) -> str:
    return {"circle": "series-a", "square": "series-b", "diamond": "series-c"}.get(symbol, symbol)


def _stairs(marks: Sequence[Mark], more_is_better: bool) -> list[tuple[float, float]]:
    corners: list[tuple[float, float]] = []
    for mark in sorted(marks, key=lambda mark: (-mark.x if more_is_better else mark.x, mark.y)):
        if not corners:
            corners.append((mark.x, mark.y))
        elif mark.y < corners[-1][1]:
            corners += [(mark.x, corners[-1][1]), (mark.x, mark.y)]
    return corners


def stacked_bars(
    title: str,
    names: Sequence[str],
    parts_of: Sequence[tuple[str, Sequence[float]]],
    x_title: str,
    form: Form,
    *,
    width: float,
) -> str:
    """A bar a name, of parts one after another. parts_of: each part's name, and its value for each name."""
    named, tall = legend([Key(f"part-{i}", name, "bar") for i, (name, _) in enumerate(parts_of)], width)
    left = 16 + CHARACTER * max(map(len, names))
    most = max(sum(values[i] for _, values in parts_of) for i in range(len(names)))
    thick, gap = 16, 8
    height = TOP + tall + (thick + gap) * len(names) + 8 + BOTTOM + 18
    x_axis = number_axis(0.0, most, x_title)
    plot = Plot(x_axis, Axis(0.0, 1.0, []), left, width - RIGHT, TOP + tall, height - BOTTOM - 18)
    drawn = [*plot.axes(), *named]
    for row, name in enumerate(names):
        y, begin = plot.top + 4 + (thick + gap) * row, 0.0
        drawn.append(label(left - 8, y + 12, name, "end", "name"))
        for number, (part, values) in enumerate(parts_of):
            x, end = plot.across(begin), plot.across(begin + values[row])
            told = escape(f"{name}: {form(values[row])} {part}")
            drawn.append(
                f'<rect class="part-{number}" x="{x:.1f}" y="{y}" width="{max(end - x, 0.0):.1f}" height="{thick}">'
                f"<title>{told}</title></rect>"
            )
            begin += values[row]
    return svg(title, width, height, drawn)
