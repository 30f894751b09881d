"""Matrices as shaded cells, with what the shades mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .._types import FloatArray, IntArray
from .svg import CHARACTER, LEFT, RIGHT, TOP, WIDTH, label, line, svg

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
        f'<path class="{prefix}{shade}" d="{_runs(level == shade)}"/>'
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


def _runs(here: FloatArray) -> str:
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
