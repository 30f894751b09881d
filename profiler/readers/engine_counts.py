"""What readers of engines' records share: layers that never counted are dropped, statistics come from what is left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...placement.errors import FileFormatError, InputError
from ...placement.statistics import RoutingStatistics

MOST_EXPERTS = 65536


def statistics_of(
    source: Path, load: Iterable[npt.NDArray[Any]], layers: Sequence[int], top_k: int | None = None
) -> RoutingStatistics:
    """Statistics of windows of [L, E] counts, without the windows and the layers in which nothing was counted.

    layers: absolute indices of the L layers. A dense layer counts nothing, and is how engines number the layers after
    it.
    Memory: the counts once more, in float64; each window is let go once it is copied, where the caller lets it go.

    Raises:
        FileFormatError: negative or non-finite counts, or nothing counted at all.
    """
    used = np.zeros(len(layers), np.bool_)
    windows: list[npt.NDArray[Any]] = []
    for window, counts in enumerate(load):
        if counts.min() < 0:
            layer, expert = (int(i) for i in np.argwhere(counts < 0)[0])
            raise FileFormatError(
                f"{source}: window {window}, layer {layers[layer]}, expert {expert} counts {counts[layer, expert]} "
                "tokens; counts start at 0"
            )
        counted = counts.any(axis=1)
        if counted.any():
            used |= counted
            windows.append(counts)
    if not windows:
        raise FileFormatError(f"{source}: every count is 0; record while the engine serves requests")
    load_WLE = np.empty((len(windows), int(used.sum()), windows[0].shape[1]), np.float64)
    windows.reverse()
    for row in load_WLE:
        counts = windows.pop()
        row[:] = counts if used.all() else counts[used]
    # Not writable, so that it is taken as it is.
    load_WLE.flags.writeable = False
    names = [layer for layer, counted in zip(layers, used, strict=True) if counted]
    try:
        return RoutingStatistics.from_counts(load_WLE, moe_layers=names, top_k=top_k)
    except InputError as error:
        raise FileFormatError(f"{source}: {error}") from None


def whole_number(source: Path, field: str, value: object, least: int = 0, most: int = (1 << 62)) -> int:
    """The value, when it is a whole number in the range.

    Raises:
        FileFormatError: it is not; file and field are named.
    """
    if type(value) is not int or not least <= value <= most:
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:60] + "..."
        raise FileFormatError(f"{source}: {field} is {shown}, expected a whole number from {least} to {most}")
    return value
