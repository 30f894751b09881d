"""What no placement can beat on load vectors alone, window by window and layer by layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...placement.load_bound import least_layer_load
from ...placement.problem import Problem

FloatArray = npt.NDArray[np.float64]


def window_bounds(problem: Problem, loads: FloatArray) -> FloatArray:
    """[S, L] lower bounds of the largest device load over the mean, devices counted by speed; loads [S, L, E]."""
    speed = problem.topology.compute
    packed = least_layer_load(loads, problem.layer_slots) * (speed.sum() / speed.max())
    return np.asarray(np.maximum(loads.sum(axis=2), packed))
