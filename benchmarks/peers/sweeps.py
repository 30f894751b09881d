"""Plain sweeps of linear assignment: one layer at a time against its neighbours, until nothing improves."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplace.solvers.base import Budget
from moeplace.solvers.exflow_start import assignment_sweeps

from .equal import align_layers
from .routing import Routing

IntArray = npt.NDArray[np.int64]


def assignment(routing: Routing) -> dict[str, IntArray]:
    """Transitions, eight random starts; with several nodes also with devices renamed so that nodes keep tokens too."""
    swept = assignment_sweeps(routing.transitions, routing.slots, Budget(60.0, routing.seed))
    return {"transitions": swept, "aligned": align_layers(swept, routing.transitions, routing.node_of)}
