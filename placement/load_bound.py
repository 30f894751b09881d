"""How evenly a placement spreads average load, and how evenly any placement could."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .layer_slots import alike_layers
from .plan import Certificate, equal_shares
from .problem import Problem

LOAD_OBJECTIVE = "device load max/mean on average loads, mean over layers"

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def device_loads(
    load: FloatArray, table: IntArray, shares: FloatArray, slot_device: IntArray, devices: int
) -> FloatArray:
    """[L, G] load of each device from expert loads [L, E], a slot table [L, P] and its shares [L, P] (0 in empty slots)."""
    slot_load = np.take_along_axis(load, table, axis=1) * shares
    result = np.zeros((len(load), devices))
    np.add.at(result.T, slot_device, slot_load.T)
    return result


def load_imbalance_bound(problem: Problem) -> FloatArray:
    """[L] a lower bound of the largest device load over the mean device load, for every placement and shares."""
    load = problem.statistics.total_load
    mean = load.sum(axis=1) / problem.num_devices
    least = least_layer_load(load, problem.layer_slots)
    return np.maximum(1.0, np.where(mean > 0, least / np.where(mean > 0, mean, 1.0), 1.0))


def least_layer_load(load: FloatArray, layer_slots: IntArray) -> FloatArray:
    """[..., L] `least_device_load` of loads [..., L, E] in each layer's slots [L, G]."""
    result = np.empty(load.shape[:-1])
    for slots, layers in alike_layers(layer_slots):
        mine = load[..., layers, :]
        result[..., layers] = least_device_load(mine.reshape(-1, load.shape[-1]), slots).reshape(mine.shape[:-1])
    return result


def least_device_load(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] a lower bound of the largest device load, for loads [L, E] in slots [G], however placed and shared."""
    heaviest_first = -np.sort(-load, axis=1)
    arguments = (_fill_by_capacity, _split_heavy, _crowd_heavy)
    return np.asarray(np.maximum.reduce([argument(heaviest_first, slots) for argument in arguments]))


def _fill_by_capacity(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] The level at which devices together hold the whole load, each at most that of as many experts as it has slots.

    The mean where slots are many; more where a device with few slots cannot reach it. load: [L, E], heaviest first.
    """
    sums = np.concatenate([np.zeros((len(load), 1)), np.cumsum(load, axis=1)], axis=1)
    most = np.sort(sums[:, np.minimum(slots, load.shape[1])], axis=1)
    devices = len(slots)
    below = np.cumsum(most, axis=1) - most
    # With the g least capable devices full, the others share what is left; the level is the largest such share, since
    # filling a device that needs not be full, or sparing one that must be, only lowers it.
    return np.asarray(((sums[:, -1:] - below) / (devices - np.arange(devices))).max(axis=1))


def _split_heavy(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] An expert's load over its replicas, spare slots going where they lower the largest such figure.

    Giving each to the expert with the largest load a replica is optimal. load: [L, E], heaviest first.
    """
    rows, replicas = np.arange(len(load)), np.ones(load.shape)
    # Beyond a replica a device another one lowers nothing, so that many spare slots never matter.
    devices = int((slots > 0).sum())
    for _ in range(min(int(slots.sum()) - load.shape[1], load.shape[1] * (devices - 1))):
        replicas[rows, (load / replicas).argmax(axis=1)] += 1
    return np.asarray((load / np.minimum(replicas, devices)).max(axis=1))


def _crowd_heavy(load: FloatArray, slots: IntArray) -> FloatArray:
    """[L] By pigeonholes: of enough heavy experts without a replica, some device holds more than j.

    At least that many, less the spare slots, have none; the device carries the lightest j + 1 of them, and, where no
    slot is spare, the lightest experts of all in its other slots. load: [L, E], heaviest first.
    """
    experts, spare = load.shape[1], int(slots.sum()) - load.shape[1]
    sums = np.concatenate([np.zeros((len(load), 1)), np.cumsum(load, axis=1)], axis=1)
    best = np.zeros(len(load))
    for j in range(int(slots.max())):
        heavy = int(np.minimum(slots, j).sum()) + 1 + spare
        if heavy > experts:
            break
        carried = sums[:, heavy] - sums[:, heavy - 1 - j]
        if spare == 0:
            others = int(slots[slots > j].min()) - 1 - j
            carried = carried + sums[:, experts] - sums[:, experts - others]
        best = np.maximum(best, carried)
    return best


def device_load_certificate(problem: Problem, table: IntArray, shares: FloatArray | None = None) -> Certificate:
    """The placement's average-load imbalance, mean over layers, with a bound that holds for every placement."""
    used = equal_shares(table, problem.model.experts) if shares is None else shares
    load = problem.statistics.total_load
    loads = device_loads(load, table, used, problem.slot_device, problem.num_devices)
    mean = load.sum(axis=1) / problem.num_devices
    imbalance = np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)
    # A layer without any load is no balanced one: it counts only where all are so.
    counted = mean > 0 if mean.any() else mean == 0
    value = max(1.0, float(imbalance[counted].mean()))
    # A balanced placement meets the bound but for rounding, and no bound may lie above its value.
    return Certificate(LOAD_OBJECTIVE, value, min(value, float(load_imbalance_bound(problem)[counted].mean())))
