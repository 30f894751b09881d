"""Names that can be exchanged without changing anything (equal devices, equal clusters), and one way to choose them.

Along a fixed order of items, names that are alike are taken in order of first use. Every solution has exactly one
renaming that does so, so an integer program may forbid names that it cannot have.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from .._types import IntArray


def renaming(names: IntArray, kinds: Sequence[Hashable]) -> IntArray:
    """[G] new name of each name, given the [n] names items take in order and the kind of each of the G names."""
    new = np.arange(len(kinds))
    for alike in _groups(kinds):
        used = [name for name in dict.fromkeys(names.tolist()) if name in alike]
        new[used + [name for name in alike if name not in used]] = alike
    return new


def forbidden_names(items: int, kinds: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """(rank, name) for each name that the item of that rank may not take: the r-th may open at most the r-th name."""
    for alike in _groups(kinds):
        for rank in range(min(items, len(alike))):
            for name in alike[rank + 1 :]:
                yield rank, name


def _groups(kinds: Sequence[Hashable]) -> list[list[int]]:
    return [[name for name, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
