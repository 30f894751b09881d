"""What partitioners leave undone: exactly as many experts a device as it has slots, and devices that suit
neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from .routing import Routing

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def equal_parts(part: IntArray, affinity: FloatArray, slots: IntArray) -> IntArray:
    """[E] the closest parts of exact sizes: experts leave where they are least missed.

    part: [E]. affinity: [E, E] weight of keeping two experts together. slots: [G].
    """
    member = np.eye(len(slots))[part]
    # Staying counts a little even without any weight, so that exact parts are left alone.
    gain = affinity @ member + 1e-6 * (1.0 + affinity.max()) * member
    owner = np.repeat(np.arange(len(slots)), slots)
    _, columns = linear_sum_assignment(gain[:, owner], maximize=True)
    return np.asarray(owner[columns])


def align_layers(device_of: IntArray, routing: Routing) -> IntArray:
    """Renames each layer's parts, in sweeps, so that transitions stay on devices first and on nodes second."""
    transitions, node_of = routing.transitions, routing.node_of
    result = device_of.copy()
    devices = routing.devices
    member = np.eye(devices)
    near = member + 0.5 * (node_of[:, None] == node_of[None, :])
    for _ in range(5):
        for layer in range(len(result)):
            here = member[result[layer]]
            gain = np.zeros((devices, devices))
            if layer > 0:
                gain += here.T @ transitions[layer - 1].T @ member[result[layer - 1]] @ near
            if layer < len(transitions):
                gain += here.T @ transitions[layer] @ member[result[layer + 1]] @ near
            _, renamed = linear_sum_assignment(gain, maximize=True)
            result[layer] = renamed[result[layer]]
    return result
