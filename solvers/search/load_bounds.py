"""What no placement can beat on load vectors alone, window by window and layer by layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...placement.load_bound import least_device_load
from ...placement.problem import Problem

FloatArray = npt.NDArray[np.float64]


def window_bounds(problem: Problem, loads: FloatArray) -> FloatArray:
    """[S, L] lower bounds of the largest device load over the mean, devices counted by speed; loads [S, L, E]."""
    speed = problem.topology.compute
    flat = loads.reshape(-1, loads.shape[2])
    packed = least_device_load(flat, problem.slots_per_device) * (speed.sum() / speed.max())
    return np.asarray(np.maximum(flat.sum(axis=1), packed).reshape(loads.shape[:2]))
