"""A quick good placement for affinity: where the integer program starts from."""

from __future__ import annotations

import numpy as np

from .._types import FloatArray, IntArray
from .base import Budget

RESTARTS = 8


def local_weight(transitions: FloatArray, device_of: IntArray) -> float:
    """Weight of transitions [L-1, n, n] whose two experts share a device, by device_of [L, n]."""
    together = device_of[:-1, :, None] == device_of[1:, None, :]
    return float(transitions[together].sum())


def assignment_sweeps(transitions: FloatArray, slots: IntArray, budget: Budget, restarts: int = RESTARTS) -> IntArray:
    """[L, n] device of each expert; slots [G] sum to n.

    With both neighbour layers fixed, one layer's best placement is a linear assignment of experts to slots, solved
    exactly; layers take turns until none improves. The best of several random starts is returned, of fewer when the
    budget is spent.
    """
    layers = len(transitions) + 1
    slot_device = np.repeat(np.arange(len(slots)), slots)
    rng = np.random.default_rng(budget.seed)
    best: IntArray = np.tile(slot_device, (layers, 1))
    best_weight = local_weight(transitions, best)
    for _ in range(restarts):
        device_of = np.tile(rng.permutation(slot_device), (layers, 1))
        for layer in range(1, layers):
            device_of[layer] = _best_layer(transitions[:layer], device_of[: layer + 1], layer, slot_device)
        weight = local_weight(transitions, device_of)
        while not budget.spent:
            for layer in range(layers):
                device_of[layer] = _best_layer(transitions, device_of, layer, slot_device)
            before, weight = weight, local_weight(transitions, device_of)
            if weight <= before:
                break
        if weight > best_weight:
            best, best_weight = device_of, weight
        if budget.spent:
            break
    return best


def _best_layer(transitions: FloatArray, device_of: IntArray, layer: int, slot_device: IntArray) -> IntArray:
    """[n] the best devices of one layer's experts while its neighbours stay."""
    from scipy.optimize import linear_sum_assignment

    member = np.eye(int(slot_device.max()) + 1)
    gain = np.zeros((len(slot_device), len(member)))
    if layer > 0:
        gain += transitions[layer - 1].T @ member[device_of[layer - 1]]
    if layer < len(transitions):
        gain += transitions[layer] @ member[device_of[layer + 1]]
    _, columns = linear_sum_assignment(gain[:, slot_device], maximize=True)
    return np.asarray(slot_device[columns])
