"""Slot tables in which layers use different numbers of slots."""

from __future__ import annotations

import numpy as np

from moeplace.placement.plan import EMPTY


def empty_some(rng: np.random.Generator, table: np.ndarray) -> None:
    """Empties slots of a table [L, P] at random, in place, as many of a layer as chance has it; every expert keeps
    one."""
    for row in table:
        for slot in rng.permutation(len(row))[: int(rng.integers(len(row)))]:
            if rng.random() < 0.5 and row[slot] != EMPTY and (row == row[slot]).sum() > 1:
                row[slot] = EMPTY
