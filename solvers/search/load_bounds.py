"""What no placement can beat on load vectors alone, window by window and layer by layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...placement.load_bound import least_layer_load
from ...placement.problem import Problem

FloatArray = npt.NDArray[np.float64]


def window_bounds(problem: Problem, loads: FloatArray) -> FloatArray:
    """[S, L] lower bounds of the largest device load over the mean, devices counted by speed, at least 1.

    loads: [S, L, E], each layer of each window summing to 1, or to 0 where it is empty.
    """
    speed = problem.topology.compute
    packed = least_layer_load(loads, problem.layer_slots) * (speed.sum() / speed.max())
    return np.asarray(np.maximum(1.0, packed))
