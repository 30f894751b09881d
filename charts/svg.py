"""What every chart is made of: a plot's place on the page, axes with round ticks, a legend. Classes say what a thing
is; the style sheet colours them for light and dark."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

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
    low: float, high: float, title: str = "", form: Callable[[float], str] | None = None, *, enclosing: bool = True
) -> Axis:
    """Round ticks, written with the digits in which they differ. enclosing: it begins and ends with one. form: writes
    ticks otherwise."""
    values = ticks(low, high)
    write = form or axis_form(values, values[1] - values[0])
    if enclosing:
        return Axis(values[0], values[-1], [(value, write(value)) for value in values], title)
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


def shape(name: str, kind: str, x: float, y: float, size: float, told: str = "") -> str:
    """One of `SHAPES`. told: what it says when pointed at."""
    title = f"<title>{escape(told)}</title>" if told else ""
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
