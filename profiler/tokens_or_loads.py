"""Whether a bare array of whole numbers holds the experts that tokens chose, or tokens counted by expert."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..placement.errors import FileFormatError
from .readers.routed_arrays import MAGIC, Ids, npy_mapped, npy_mapped_table, npz_arrays
from .readers.routed_experts import ROUTED, is_filled

MOST_LAYERS = 512
"""More rows than any model has layers."""
MOST_TOP_K = 64
LOOKED_AT = 1 << 16
CHANCE = 9.0
"""Expected meetings of equal numbers in a row, had they been counts: that none is seen then has chance e^-9, 1 in 8,100."""


def check_tokens(source: Path, num_experts: int | None) -> None:
    """Lets an .npy or .npz pass whose numbers are surely, or nearly so, expert ids; other files pass unseen.

    The same bytes can be ids [tokens, layers] or [tokens, layers, top_k], and loads [layers, experts] or
    [windows, layers, experts]. They are ids where one of these holds:

    - an array of an .npz is named as engines name routed experts;
    - `num_experts` is given, no number reaches it, and the last axis has another length (loads have that length);
    - [tokens, layers] (or top_k 1): more rows than any model has layers (512), and than any layer's numbers span;
    - [tokens, layers, top_k]: no row of at most 64 numbers holds one twice (blank rows apart), though of counts in the same
      range 9 pairs or more would be expected to be equal; and rows do not add up to one total in all layers, as
      loads do, every token choosing as many experts in each.

    Raises:
        FileFormatError: both readings are possible; says how to tell. Or damaged.
    """
    for array in _arrays(source):
        if array.size and not _surely_ids(array[:LOOKED_AT], num_experts):
            shape = list(array.shape)
            ids, loads = (
                ("[tokens, layers]", "[layers, experts]")
                if array.ndim == 2
                else ("[tokens, layers, top_k]", "[windows, layers, experts]")
            )
            raise FileFormatError(
                f"{source}: whole numbers {shape} up to {int(array.max()):,} may be expert ids {ids} or loads {loads}. If they "
                'are ids, say so: read_any(path, kind="tokens"), or moeplace import --as tokens. Bare tables of loads are '
                "not read: make RoutingStatistics of them in Python, with write_statistics for a file"
            )


def _arrays(source: Path) -> list[Ids]:
    """The arrays that nothing but their numbers tells of."""
    if not source.is_file():
        return []
    with source.open("rb") as handle:
        start = handle.read(len(MAGIC))
    if start == MAGIC:
        table = npy_mapped_table(source)
        return [npy_mapped(source) if table is None else table]
    if not start.startswith(b"PK"):
        return []
    arrays = npz_arrays(source)
    return [] if any(name.endswith(ROUTED) for name in arrays) else list(arrays.values())


def _surely_ids(array: Ids, num_experts: int | None) -> bool:
    if num_experts is not None and array.shape[-1] != num_experts and int(array.max()) < num_experts:
        return True
    if array.ndim == 2 or array.shape[2] == 1:
        table = array.reshape(len(array), -1).astype(np.int64)
        return len(table) > max(MOST_LAYERS, int(np.ptp(table, axis=0).max()) + 1)
    ids = array.astype(np.int64)
    top_k, span = ids.shape[2], int(ids.max()) + 1
    chosen = (ids > 0).any(axis=2)
    meetings = int(chosen.sum()) * top_k * (top_k - 1) / 2 / max(span, 1)
    if top_k > MOST_TOP_K or meetings < CHANCE or not is_filled(ids).all():
        return False
    used = ids[:, chosen.any(axis=0)].sum(axis=2)
    return used.shape[1] < 2 or bool((np.ptp(used, axis=1) > 0).any())
