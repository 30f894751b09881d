"""Charts in characters, for logs, pipes and terminals that show no images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .._types import FloatArray
from .svg import axis_form

LEVELS = "▁▂▃▄▅▆▇█"
WIDTH = 48
"""Characters of a picture beside its labels."""
MOST_ROWS = 64
ROWS = 10
LONGEST_NAME = 40


def text_map(names: Sequence[str], values: FloatArray, low: float, high: float) -> list[str]:
    """A row a name, a character a column of [rows, columns] (or some, drawn by the greatest of them), from low to high;
    at the right the row's greatest. Of more than `MOST_ROWS` rows the first."""
    # Neighbours are drawn by the worse of them: a mean would hide what is looked for.
    columns = [part.max(axis=1) for part in np.array_split(values, min(values.shape[1], WIDTH), axis=1)]
    wide = max(map(len, names))
    lines = []
    for row, name in enumerate(names[:MOST_ROWS]):
        cells = "".join(_level((column[row] - low) / (high - low)) for column in columns)
        lines.append(f"{name:<{wide}}  {cells}  {values[row].max():.2f}")
    return [*lines, *([f"... and {len(names) - MOST_ROWS} more"] if len(names) > MOST_ROWS else [])]


def text_histograms(samples: Mapping[str, FloatArray], low: float, high: float) -> list[str]:
    """A line a name: where its values lie between low and high, the median as |."""
    shown, span = {_short(name): values for name, values in samples.items()}, (high - low) or 1.0
    wide = max(map(len, shown))
    lines = []
    for name, values in shown.items():
        counts, _ = np.histogram(values, bins=WIDTH - 8, range=(low, low + span))
        top = max(1, int(counts.max()))
        cells = [" " if not count else LEVELS[int((len(LEVELS) - 1) * count / top)] for count in counts]
        cells[min(len(cells) - 1, int((np.median(values) - low) / span * len(cells)))] = "|"
        lines.append(f"{name:<{wide}}  {''.join(cells)}".rstrip())
    return lines


def text_lines(rows: Mapping[str, FloatArray], low: float, high: float) -> list[str]:
    """A line a name, a character a value (or some, drawn by the greatest), from low to high; at the right the
    greatest."""
    drawn = {_short(name): values for name, values in rows.items()}
    return text_map(list(drawn), np.stack(list(drawn.values())), low, high)


def text_points(
    points: Sequence[tuple[float, float, bool]], x_title: str, y_form: str, x_form: str = "{:.6g}"
) -> list[str]:
    """(x, y, best): the best as *, others as o."""
    if not points:
        return []
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    left = 0.0 if 0.0 <= left < right - left else left
    grid = [[" "] * WIDTH for _ in range(ROWS)]
    # The best are drawn over others at their place.
    for x, y, best in sorted(points, key=lambda point: point[2]):
        row = 0 if high == low else round((high - y) / (high - low) * (ROWS - 1))
        grid[row][0 if right == left else round((x - left) / (right - left) * (WIDTH - 1))] = "*" if best else "o"
    write = axis_form([low, high], high - low)
    labels = [y_form.format(write(high)), *[""] * (ROWS - 2), y_form.format(write(low))]
    wide = max(10, *map(len, labels))
    lines = [f"{label:>{wide}} │{''.join(cells)}".rstrip() for label, cells in zip(labels, grid, strict=True)]
    first, last = x_form.format(left), "" if right == left else x_form.format(right)
    return [
        *lines,
        f"{'':>{wide}} └{'─' * WIDTH}",
        f"{'':>{wide + 2}}{first}{last:>{WIDTH - len(first)}}".rstrip(),
        f"{'':>{wide + 2}}{x_title}",
    ]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _level(share: float) -> str:
    return " " if math.isnan(share) else LEVELS[int(min(max(share, 0.0) * len(LEVELS), len(LEVELS) - 1.0))]
