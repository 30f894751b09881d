"""Plain sweeps of linear assignment: one layer at a time against its neighbours, until nothing improves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplace.solvers.base import Budget
from moeplace.solvers.exflow import assignment_sweeps

from .routing import Routing

IntArray = npt.NDArray[np.int64]


def assignment(routing: Routing) -> dict[str, IntArray]:
    """One setting: transitions, eight random starts."""
    return {"transitions": assignment_sweeps(routing.transitions, routing.slots, Budget(60.0, routing.seed))}
