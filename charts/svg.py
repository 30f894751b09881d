"""Charts as SVG: what each is made of (a plot's place on the page, axes with round ticks, a legend), charts of values
over time or another quantity, matrices as shaded cells, and files of their own, as SVG or PNG. Classes say what a thing
is; the style sheet colours them for light and dark.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .._types import FloatArray, IntArray

STATIC = Path(__file__).parent / "static"
"""The style sheet and the script that pages with charts take in."""
WIDTH, HEIGHT = 560, 220
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 28
KEY = 20
"""Height of a row of the legend above a plot."""
CHARACTER = 7.0
"""Width of a character of a label, about."""


def svg(title: str, width: float, height: float, parts: Sequence[str], hover: Any = None) -> str:
    """A chart that names itself to screen readers. hover: what the script tells of what is pointed at."""
    data = "" if hover is None else f' data-chart="{escape(json.dumps(hover, separators=(",", ":")))}"'
    return (
        f'<svg class="chart" role="img" aria-label="{escape(title)}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"{data}>' + "".join(parts) + "</svg>"
    )


def label(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> str:
    """A piece of text."""
    place = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{place}>{escape(text)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


@dataclass(frozen=True)
class Axis:
    """From low to high, with labelled ticks within. title: what it is, with its unit. over_time: values are seconds
    since 1970."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    title: str = ""
    over_time: bool = False


def number_axis(
    low: float,
    high: float,
    title: str = "",
    form: Callable[[float], str] | None = None,
    *,
    enclosing: bool = True,
    whole: bool = False,
) -> Axis:
    """Round ticks, written with the digits in which they differ. enclosing: it begins and ends with one. form: writes
    ticks otherwise. whole: of things that are counted, which have no halves."""
    values = [value for value in ticks(low, high) if not whole or value == round(value)]
    write = form or axis_form(values, values[1] - values[0] if len(values) > 1 else 1.0)
    if enclosing:
        # Between two whole numbers it ends where the data do.
        ends = (min(values[0], low), max(values[-1], high)) if whole and values else (values[0], values[-1])
        return Axis(*ends, [(value, write(value)) for value in values], title)
    return Axis(low, high, [(value, write(value)) for value in values if low <= value <= high], title)


def axis_form(values: Sequence[float], step: float) -> Callable[[float], str]:
    """Writes values that are steps apart with six digits, or as many more as make them differ."""
    largest = max(map(abs, values), default=0.0)
    if not step > 0 or not largest > 0:
        return "{:.6g}".format
    # A step may be 2.5 of its power of ten.
    digits = math.floor(math.log10(largest)) - math.floor(math.log10(step)) + 2
    return f"{{:.{min(max(6, digits), MOST_DIGITS)}g}}".format


MOST_DIGITS = 15
"""Of a float64, that mean something."""


def time_axis(low: float, high: float) -> Axis:
    """Seconds since 1970, with ticks at full seconds, minutes, hours or days in UTC; the first says the date."""
    if high <= low:
        low, high = low - 30.0, high + 30.0
    step = next((step for step in TIME_STEPS if (high - low) / step <= MOST_TIMES), TIME_STEPS[-1])
    step *= max(1, math.ceil((high - low) / step / MOST_TIMES))
    first = math.ceil(low / step) * step
    marks = []
    for number in range(math.floor((high - first) / step) + 1):
        moment = EPOCH + timedelta(seconds=first + number * step)
        clock = moment.strftime("%H:%M:%S" if step < 60 else "%H:%M")
        date = moment.strftime("%b %d")
        if step >= 86400:
            text = date if number else moment.strftime("%b %d %Y")
        else:
            text = (
                f"{date} {clock}" if number == 0 or (moment.hour, moment.minute, moment.second) == (0, 0, 0) else clock
            )
        marks.append((first + number * step, text))
    return Axis(low, high, marks, "UTC", over_time=True)


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOST_TIMES = 4
MINUTE, HOUR, DAY = 60, 3600, 86400
TIME_STEPS = (
    *(1, 2, 5, 10, 20, 30),
    *(MINUTE * times for times in (1, 2, 5, 10, 20, 30)),
    *(HOUR * times for times in (1, 2, 3, 6, 12)),
    *(DAY * times for times in (1, 2, 7, 14, 30, 90, 365)),
)


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round values, the first and last of which enclose both."""
    if not high > low:
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    least = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(least))
    step = next(size * times for times in (1.0, 2.0, 2.5, 5.0, 10.0) if size * times >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(12, 2 - math.floor(math.log10(step)))
    return [round(number * step, decimals) for number in range(first, last + 1)]


def from_zero(low: float, high: float) -> tuple[float, float]:
    """From zero where that is not far away."""
    return (0.0 if 0 <= low < high - low else low), high


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Their range and a little more, but not below zero."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


@dataclass(frozen=True)
class Plot:
    """Where values stand on a chart, in pixels. room: share of the width left free at both ends, so that dots are not
    cut."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float
    room: float = 0.0

    def across(self, value: float) -> float:
        """Pixels from the left edge of the chart."""
        within = (value - self.x.low) / (self.x.high - self.x.low)
        return self.left + (self.right - self.left) * (self.room + (1 - 2 * self.room) * within)

    def down(self, value: float) -> float:
        """Pixels from the top edge of the chart."""
        return self.bottom - (self.bottom - self.top) * (value - self.y.low) / (self.y.high - self.y.low)

    def axes(self) -> list[str]:
        """Grid lines with their labels, and the titles of both axes."""
        parts = []
        for value, text in self.y.ticks:
            y = self.down(value)
            parts += [line("grid", self.left, y, self.right, y), label(self.left - 6, y + 4, text, "end")]
        free = -math.inf
        for value, text in self.x.ticks:
            x, wide = self.across(value), CHARACTER * len(text)
            begins = min(max(x - wide / 2, 0.0), self.right + RIGHT - wide)
            parts.append(line("grid", x, self.bottom, x, self.bottom + 4))
            if begins > free:
                parts.append(label(begins + wide / 2, self.bottom + 17, text, "middle"))
                free = begins + wide + 6
        if self.x.title and not self.x.over_time:
            parts.append(label((self.left + self.right) / 2, self.bottom + 36, self.x.title, "middle"))
        if self.y.title:
            parts.append(label(2, self.top - 13, self.y.title))
        return parts


SHAPES = {
    "circle": "M-1,0A1,1,0,1,0,1,0A1,1,0,1,0,-1,0Z",
    "diamond": "M0,-1.3L1.3,0L0,1.3L-1.3,0Z",
    "square": "M-1,-1H1V1H-1Z",
    "cross": "M-1,-1L1,1M-1,1L1,-1",
}


def shape(name: str, kind: str, x: float, y: float, size: float, hint: str = "") -> str:
    """One of `SHAPES`. told: what it says when pointed at."""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    place = f"translate({x:.1f},{y:.1f}) scale({size:g})"
    return f'<path class="{kind}" d="{SHAPES[name]}" transform="{place}">{title}</path>'


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line, a mark, a bar or an upright line of a kind, and its name."""

    kind: str
    name: str
    form: str = "line"
    symbol: str = ""


def legend(keys: Sequence[Key], width: float) -> tuple[list[str], int]:
    """A sample and a name for each, and their height."""
    parts, x, row = [], float(LEFT), 0
    for key in keys:
        wide = 44 + CHARACTER * len(key.name)
        if x > LEFT and x + wide > width:
            x, row = float(LEFT), row + 1
        y = TOP + KEY * row
        if key.form == "upright":
            parts.append(line(key.kind, x + 12, y - 8, x + 12, y + 8))
        elif key.form == "bar":
            parts.append(f'<rect class="{key.kind}" x="{x:.0f}" y="{y - 6}" width="24" height="12"/>')
        elif key.form == "line":
            parts.append(f'<polyline class="{key.kind}" points="{x:.0f},{y} {x + 24:.0f},{y}"/>')
        if key.symbol:
            size = 5.0 if key.form == "mark" else 3.0
            parts.append(shape(key.symbol, f"mark {key.kind}", x + 12, y, size))
        parts.append(label(x + 30, y + 4, key.name))
        x += wide
    return parts, KEY * (row + 1) if keys else 0


# Charts of values over time or another quantity: lines, points, bars.

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
        for x, y, hint in curve.dots:
            if x_axis.low <= x <= x_axis.high:
                parts.append(shape("circle", f"mark {curve.kind}", plot.across(x), plot.down(y), 4.0, hint))
        hover += [[round(plot.across(x), 1), round(plot.down(y), 1), f"{curve.name}: {form(x)}"] for x, y in within]
    return svg(title, width, height, parts, {"points": hover})


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot. symbol: one of `SHAPES`. name: in the legend. told: what it says when pointed at."""

    x: float
    y: float
    symbol: str
    name: str
    hint: str
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
    along, up = [mark.x for mark in marks], [mark.y for mark in marks]
    x_axis = number_axis(*padded(along), x_title, whole=all(value == round(value) for value in along))
    y_axis = number_axis(*padded(up), y_title)
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
        parts.append(shape(mark.symbol, kind, plot.across(mark.x), plot.down(mark.y), size, mark.hint))
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
            hint = escape(f"{name}: {form(values[row])} {part}")
            drawn.append(
                f'<rect class="part-{number}" x="{x:.1f}" y="{y}" width="{max(end - x, 0.0):.1f}" height="{thick}">'
                f"<title>{hint}</title></rect>"
            )
            begin += values[row]
    return svg(title, width, height, drawn)


# Matrices as shaded cells, with what the shades mean.

MOST_CELLS = 64
"""Rows and columns of a heat map: a page grows with neither devices nor layers."""
MOST_LINES = 32
"""Between cells: more of them would hide these."""
LEVELS = 9
"""Shades, in classes h0 to h8, or around a middle d0 to d8."""
Palette = Literal["sequential", "diverging"]
MOST_LABELS = 16


@dataclass(frozen=True)
class Side:
    """What rows or columns are: `title` says of what ("to device"), `names` each one. lines: positions before which a
    line stands, drawn where they are at most `MOST_LINES`. labels: (position, text) instead of the names."""

    title: str
    names: Sequence[str]
    lines: Sequence[float] = ()
    labels: Sequence[tuple[float, str]] | None = None


@dataclass(frozen=True)
class Shades:
    """What the shades mean: values from low to high, and how they are written."""

    low: float
    high: float
    form: Callable[[float], str]
    palette: Palette = "sequential"

    def level(self, values: FloatArray) -> FloatArray:
        """The shade of each value; -1 where there is none."""
        span = self.high - self.low if self.high > self.low else 1.0
        shade = np.clip(np.floor((np.nan_to_num(values) - self.low) / span * LEVELS), 0, LEVELS - 1)
        return np.asarray(np.where(np.isnan(values), -1, shade))


def heat_map(
    title: str, values: FloatArray, rows: Side, columns: Side, shades: Shades, *, written: bool = False
) -> str:
    """A cell a value [rows, columns]; NaN leaves one empty. Of more than `MOST_CELLS` rows or columns, neighbours share
    a cell, which shows the greatest of them. written: cells carry their value."""
    row_group, column_group = (math.ceil(len(side.names) / MOST_CELLS) for side in (rows, columns))
    values = _binned(_binned(values, row_group, 0), column_group, 1)
    row_names, column_names = _grouped(rows.names, row_group), _grouped(columns.names, column_group)
    tall, wide = values.shape
    cell_x = max(4.0, min(56.0, (WIDTH - LEFT - RIGHT) / wide))
    cell_y = max(4.0, min(24.0, 420.0 / tall))
    top, left = TOP + 16, LEFT
    right, bottom = left + wide * cell_x, top + tall * cell_y
    prefix = "h" if shades.palette == "sequential" else "d"
    level = shades.level(values)
    cells = "".join(
        f'<path class="{prefix}{shade}" d="{_outline(level == shade)}"/>'
        for shade in range(LEVELS)
        if (level == shade).any()
    )
    parts = [f'<g transform="translate({left},{top}) scale({cell_x:.3f},{cell_y:.3f})">{cells}</g>']
    if max(tall, wide) <= MOST_LINES:
        parts += [line("gap", left, y, right, y) for y in (top + i * cell_y for i in range(1, tall))]
        parts += [line("gap", x, top, x, bottom) for x in (left + i * cell_x for i in range(1, wide))]
    if written:
        parts += [
            label(
                left + (column + 0.5) * cell_x,
                top + (row + 0.5) * cell_y + 4,
                f"{values[row, column]:.3g}",
                "middle",
                "in-dark" if level[row, column] > LEVELS // 2 else "in-light",
            )
            for row in range(tall)
            for column in range(wide)
            if level[row, column] >= 0
        ]
    for before in rows.lines if len(rows.lines) <= MOST_LINES else ():
        y = top + before / row_group * cell_y
        parts.append(line("node", left, y, right, y))
    for before in columns.lines if len(columns.lines) <= MOST_LINES else ():
        x = left + before / column_group * cell_x
        parts.append(line("node", x, top, x, bottom))
    for place, text in _labels(rows, rows.names, row_group, MOST_LABELS):
        parts.append(label(left - 6, top + place * cell_y + 4, text, "end"))
    widest = max((len(text) for _, text in _labels(columns, columns.names, column_group, MOST_LABELS)), default=1)
    fitting = max(2, min(MOST_LABELS, int((right - left) / (CHARACTER * widest + 8))))
    for place, text in _labels(columns, columns.names, column_group, fitting):
        parts.append(label(left + place * cell_x, bottom + 14, text, "middle"))
    parts.append(label(2, top - 8, f"{rows.title} by {columns.title}"))
    parts += _scale(bottom + 28, shades, prefix)
    hover = {
        "cells": [left, top, cell_x, cell_y],
        "rows": [rows.title, list(row_names)],
        "columns": [columns.title, list(column_names)],
        "values": [[None if math.isnan(value) else shades.form(value) for value in row] for row in values.tolist()],
    }
    scale_width = LEFT + 14 * LEVELS + 110
    return svg(title, max(right, scale_width) + RIGHT, bottom + 46, parts, hover)


def _outline(here: FloatArray) -> str:
    """A path over the cells that are set, each run of a row in one piece."""
    pieces = []
    for row, line_of in enumerate(here):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], line_of.astype(np.int8), [0]])))
        pieces += [f"M{begin},{row}h{end - begin}v1h{begin - end}z" for begin, end in edges.reshape(-1, 2).tolist()]
    return "".join(pieces)


def _binned(values: FloatArray, group: int, axis: int) -> FloatArray:
    if group == 1:
        return values
    return np.asarray(np.fmax.reduceat(values, range(0, values.shape[axis], group), axis=axis))


def _grouped(names: Sequence[str], group: int) -> list[str]:
    if group == 1:
        return list(names)
    starts = range(0, len(names), group)
    return [f"{names[start]} to {names[min(start + group, len(names)) - 1]}" for start in starts]


def _labels(side: Side, names: Sequence[str], group: int, most: int) -> list[tuple[float, str]]:
    """Where labels stand, in cells, and what they say: at most so many, the first of each group."""
    if side.labels is not None:
        every = max(1, math.ceil(len(side.labels) / most))
        return [(place / group, text) for place, text in side.labels[::every]]
    cells = math.ceil(len(names) / group)
    every = max(1, math.ceil(cells / most))
    return [(cell + 0.5, names[cell * group]) for cell in range(0, cells, every)]


def _scale(y: float, shades: Shades, prefix: str) -> list[str]:
    """All shades, with the values at both ends."""
    low, high = shades.form(shades.low), shades.form(shades.high)
    left = max(float(LEFT), CHARACTER * len(low) + 8)
    parts = [label(left - 6, y + 10, low, "end")]
    parts += [
        f'<rect class="{prefix}{shade} scale" x="{left + 14 * shade:.0f}" y="{y:.1f}" width="14" height="12"/>'
        for shade in range(LEVELS)
    ]
    return [*parts, label(left + 14 * LEVELS + 6, y + 10, high)]


# What both the dashboard and reports map.


def load_shades(loads: Sequence[FloatArray]) -> Shades:
    """Around 1.0, the even share, as far as these loads over the mean go; at most to none and twice the mean."""
    largest = max(float(np.abs(load - 1.0).max()) for load in loads)
    span = next((span for span in (0.1, 0.2, 0.5) if largest <= span), 1.0)
    return Shades(1.0 - span, 1.0 + span, "{:.2f}".format, "diverging")


def load_map(title: str, load: FloatArray, moe_layers: Sequence[int], node_size: IntArray, shades: Shades) -> str:
    """[L, G] loads over the mean: a row a device, a column a layer."""
    layers = Side("MoE layer", [str(layer) for layer in moe_layers])
    return heat_map(title, load.T, devices("device", node_size), layers, shades)


def device_map(title: str, values: FloatArray, node_size: IntArray, shades: Shades, *, written: bool = False) -> str:
    """Something from each device (row) to each (column), [G, G]."""
    rows, columns = devices("from device", node_size), devices("to device", node_size)
    return heat_map(title, values, rows, columns, shades, written=written)


def devices(title: str, node_size: IntArray) -> Side:
    """Devices in nodes of these sizes, with a line before each node but the first."""
    ends = np.cumsum(node_size).tolist()
    return Side(title, [str(device) for device in range(ends[-1])], ends[:-1])


# Charts as files of their own: SVG with its style inside, and PNG made of it.

MARGIN, HEAD, LINE = 16, 26, 18
FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")


def stacked(charts: Sequence[tuple[str, str, str]]) -> str:
    """One SVG of charts below each other, each (title, caption, SVG), in the light palette."""
    sized = [(title, caption, chart, *_size(chart)) for title, caption, chart in charts]
    width = max((wide for *_, wide, _ in sized), default=0.0) + 2 * MARGIN
    y, parts = float(MARGIN), []
    for title, caption, chart, _, tall in sized:
        parts.append(f'<text class="title" x="{MARGIN}" y="{y + 16:.0f}">{escape(title)}</text>')
        y += HEAD
        for row in textwrap.wrap(caption, int((width - 2 * MARGIN) / CHARACTER)):
            parts.append(f'<text class="caption" x="{MARGIN}" y="{y + 12:.0f}">{escape(row)}</text>')
            y += LINE
        # What only a page's script reads is left out.
        inner = re.sub(r' data-chart="[^"]*"', "", chart, count=1)
        parts.append(inner.replace("<svg ", f'<svg x="{MARGIN}" y="{y + 6:.0f}" ', 1))
        y += tall + 6 + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" width="{width:.0f}" height="{y:.0f}" '
        f'viewBox="0 0 {width:.0f} {y:.0f}"><style>{_style()}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


def png(svg: str, zoom: float = 1.0) -> bytes:
    """A picture of an SVG that `stacked` made, `zoom` pixels for one of its units.

    Raises:
        ImportError: the extra `plot` is not installed. RuntimeError: this machine has no fonts to write with.
    """
    import resvg_py

    folders = [folder for folder in (Path(name).expanduser() for name in FONTS) if folder.is_dir()]
    family = next((name for name, file in FAMILIES if any(_fonts(folder, file) for folder in folders)), None)
    if not any(_fonts(folder, "*.[to]tf") for folder in folders) and not Path("/System").is_dir():
        raise RuntimeError(
            f"there are no fonts on this machine (none in {', '.join(FONTS)}): install some (fonts-dejavu-core), or "
            "write .svg or .html"
        )
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, zoom=zoom, sans_serif_family=family, font_family=family))


FAMILIES = (("DejaVu Sans", "DejaVuSans.ttf"), ("Liberation Sans", "LiberationSans-Regular.ttf"))
"""What Linux machines have for sans-serif, with a file of it."""


@cache
def _fonts(folder: Path, pattern: str) -> bool:
    return next(folder.rglob(pattern), None) is not None


def _size(chart: str) -> tuple[float, float]:
    size = re.search(r'width="([\d.]+)" height="([\d.]+)"', chart)
    assert size is not None
    return float(size[1]), float(size[2])


def _style() -> str:
    """The charts' style sheet with its light colours written in: not every viewer knows variables."""
    text = (STATIC / "charts.css").read_text(encoding="utf-8")
    head, _, rest = text.partition("}")
    colours = dict(re.findall(r"(--[\w-]+): ([^;]+);", head))
    # The first block names the light colours, the second those for the dark; what is shown over a page follows.
    rest = rest[rest.index("\n}\n") + 3 :]
    rules = [line for line in rest.splitlines() if not line.startswith(("#tip", ".chart[data-chart"))]
    style = re.sub(r"var\((--[\w-]+)\)", lambda name: colours[name[1]], "\n".join(rules))
    return (
        style.replace("system-ui, -apple-system, ", "")
        + f".paper {{ fill: {colours['--paper']}; }} .caption {{ fill: {colours['--muted']}; }} "
        + f".title {{ fill: {colours['--text']}; font-size: 15px; font-weight: bold; }}"
    )
