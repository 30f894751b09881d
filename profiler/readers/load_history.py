"""Recorded load histories of the ADRS benchmark: {"load_history": [{"logical_expert_load": [L][E]}, ...]}."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..._types import FloatArray
from ...placement.errors import FileFormatError, InputError
from ...placement.statistics import RoutingStatistics
from ..files import json_items
from .arrays import MOST_EXPERTS
from .engine_counts import statistics_of
from .tables import check_order, nested_numbers

START = 4096
FIELD = "logical_expert_load"
ENTRIES_LOOKED_AT = 64


def is_load_history(path: Path) -> bool:
    """Whether `path` is a JSON object that begins with a load history."""
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        start = handle.read(START)
    return start.lstrip().startswith(b"{") and b'"load_history"' in start


def read_load_history(path: str | Path, *, entries_per_window: int = 1) -> RoutingStatistics:
    """Reads a history of loads, in order, one entry at a time.

    entries_per_window: entries summed into a window; the benchmark's protocol solves on window i of 100 entries and
    judges on i + 1. What is left over at the end is a shorter window. Layers are numbered from 0 in the history,
    without dense ones. Memory: the windows, a few times, and one entry.

    Raises:
        InputError: no such file, entries_per_window below 1.
        FileFormatError: no such record, damaged, cut off, entries that differ in shape, or axes in another order.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    if entries_per_window < 1:
        raise InputError(f"entries_per_window ({entries_per_window}) must be at least 1")
    windows: list[FloatArray] = []
    with source.open("rb") as handle:
        for number, entry in enumerate(json_items(handle, str(source), "load_history.item")):
            load = _load(source, number, entry)
            if windows and load.shape != windows[0].shape:
                raise FileFormatError(
                    f"{source}: load_history[{number}].{FIELD} has shape {load.shape}, the first {windows[0].shape}"
                )
            if number % entries_per_window:
                windows[-1] += load
            else:
                windows.append(load)
    if not windows:
        raise FileFormatError(f"{source}: load_history is empty or missing, or no list; expected a list of loads")
    check_order(f"{source}: {FIELD}", np.stack(windows[:ENTRIES_LOOKED_AT]))
    layers = range(len(windows[0]))
    windows.reverse()
    return statistics_of(source, (windows.pop() for _ in range(len(windows))), layers)


def _load(source: Path, number: int, entry: Any) -> FloatArray:
    """[L, E] of one entry."""
    rows = entry.get(FIELD) if isinstance(entry, dict) else None
    where = f"load_history[{number}].{FIELD}"
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise FileFormatError(f"{source}: {where} is not [layers][experts] of numbers")
    numbers = nested_numbers(source, where, rows)
    if numbers.ndim != 2 or numbers.shape[1] > MOST_EXPERTS:
        raise FileFormatError(f"{source}: {where} is not [layers][experts] of numbers")
    return numbers.astype(np.float64)
