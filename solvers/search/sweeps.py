"""Sweeps of linear assignment: with both neighbour layers fixed and no replicas, the placement of one layer that keeps
most transitions on their device is an exact linear assignment. A start for context-coherent search."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def assignment_sweeps(
    transitions: FloatArray,
    device_of: IntArray,
    slot_device: IntArray,
    allowed: npt.NDArray[np.bool_],
    sweeps: int = 20,
) -> IntArray:
    """[L, E] devices after sweeping until no layer improves.

    transitions: [L-1, E, E]. device_of: [L, E] start. slot_device: [P], P = E. allowed: [L, E, G].
    """
    from scipy.optimize import linear_sum_assignment

    layers, _ = device_of.shape
    devices = int(slot_device.max()) + 1
    placed = device_of.copy()
    hot = np.eye(devices)
    for sweep in range(sweeps):
        changed = False
        order = range(layers) if sweep % 2 == 0 else range(layers - 1, -1, -1)
        for layer in order:
            gain = np.zeros((placed.shape[1], devices))
            if layer:
                gain += transitions[layer - 1].T @ hot[placed[layer - 1]]
            if layer < layers - 1:
                gain += transitions[layer] @ hot[placed[layer + 1]]
            kept = gain[np.arange(len(gain)), placed[layer]].sum()
            barred = np.where(allowed[layer], gain, -1e18)
            rows, slots = linear_sum_assignment(barred[:, slot_device], maximize=True)
            chosen = slot_device[slots]
            if gain[rows, chosen].sum() > kept * (1 + 1e-12) + 1e-9:
                placed[layer] = chosen
                changed = True
        if not changed:
            break
    return placed
