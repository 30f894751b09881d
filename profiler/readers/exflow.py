"""ExFlow's `trace.npy`: [tokens, layers], the one expert of each token in each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...placement.errors import FileFormatError, InputError
from ...placement.trace import RoutingTrace, id_dtype
from .arrays import are_choices, check_axes, npy_is, npy_table

ROWS = 1 << 16


def read_exflow(path: str | Path, *, num_experts: int | None = None) -> RoutingTrace:
    """Reads a top-1 trace whose experts are numbered 0..E-1 in every layer, or layer * E + e as in ExFlow's tables.

    Which of the two is told by the values. num_experts: E; without it, it is read off the values, which for the plain
    numbering takes the highest expert seen as the last. The file says nothing of sequences: all is one sequence.

    Raises:
        InputError: no such file.
        FileFormatError: not such an array, truncated, ids of neither numbering, [layers, tokens], or one layer's
            choices; or E cannot be told from the values, then pass num_experts.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    table = npy_table(source)
    check_axes(source, table)
    low, high = _ranges(table)
    experts, stride = _numbering(source, low, high, num_experts)
    if not stride and are_choices(table[:ROWS], experts):
        columns = table.shape[1]
        raise FileFormatError(
            f"{source}: no row of {columns} holds an expert twice, as {columns} layers would by chance: these are the "
            f"experts of each token in one layer, whose array is [tokens, 1, {columns}]. Save array[:, None], or, if "
            "the columns are layers, array[:, :, None]"
        )
    ids = np.empty((*table.shape, 1), id_dtype(experts))
    base = np.arange(table.shape[1]) * stride
    for first in range(0, len(table), ROWS):
        ids[first : first + ROWS, :, 0] = table[first : first + ROWS] - base
    try:
        return RoutingTrace.from_arrays(ids, num_experts=experts)
    except InputError as error:
        raise FileFormatError(f"{source}: {error}") from None


def is_exflow(path: Path) -> bool:
    """Whether `path` is an .npy file of whole numbers in two dimensions."""
    return path.is_file() and npy_is(path, 2)


def _ranges(table: npt.NDArray[Any]) -> tuple[list[int], list[int]]:
    """Smallest and largest value of each layer."""
    parts = [table[start : start + ROWS] for start in range(0, len(table), ROWS)]
    low = np.min([part.min(axis=0) for part in parts], axis=0)
    high = np.max([part.max(axis=0) for part in parts], axis=0)
    return [int(v) for v in low], [int(v) for v in high]


def _numbering(source: Path, low: list[int], high: list[int], num_experts: int | None) -> tuple[int, int]:
    """(E, what to take off each layer's values per layer)."""
    if min(low) < 0:
        layer = next(layer for layer, value in enumerate(low) if value < 0)
        raise FileFormatError(f"{source}: layer {layer} holds the expert id {low[layer]}; ids start at 0")
    layers = range(len(low))
    if num_experts is not None:
        if max(high) < num_experts:
            return num_experts, 0
        if all(low[i] // num_experts == high[i] // num_experts == i for i in layers):
            return num_experts, num_experts
        layer = next(i for i in layers if high[i] >= num_experts)
        raise FileFormatError(
            f"{source}: layer {layer} holds ids {low[layer]} to {high[layer]}; with {num_experts} experts they must "
            f"be from 0 to {num_experts - 1}, or from {layer * num_experts} to {(layer + 1) * num_experts - 1}"
        )
    least = max(high[i] // (i + 1) + 1 for i in layers)
    most = min((low[i] // i for i in layers if i), default=0)
    if len(low) > 1 and least <= most:
        if least < most:
            raise FileFormatError(
                f"{source}: experts are numbered layer by layer, with {least} to {most} experts a layer; pass "
                "num_experts"
            )
        return least, least
    if max(high) >= 65536:
        layer = high.index(max(high))
        raise FileFormatError(
            f"{source}: layer {layer} holds the expert id {high[layer]}; at most 65,536 experts are known"
        )
    return max(high) + 1, 0
