"""How evenly a placement spreads average load, and how evenly any placement could."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .plan import Certificate, equal_shares
from .problem import Problem

LOAD_OBJECTIVE = "device load max/mean on average loads, mean over layers"

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def device_loads(
    load: FloatArray, table: IntArray, shares: FloatArray, slot_device: IntArray, devices: int
) -> FloatArray:
    """[L, G] load of each device from expert loads [L, E], a slot table [L, P] and its shares [L, P]."""
    slot_load = np.take_along_axis(load, table, axis=1) * shares
    result = np.zeros((len(load), devices))
    np.add.at(result.T, slot_device, slot_load.T)
    return result


def load_imbalance_bound(problem: Problem) -> FloatArray:
    """[L] a lower bound of the largest device load over the mean device load, for every placement of the problem.

    Two arguments: the largest device carries at least the mean; and the heaviest expert's load, shared over as many
    replicas as the spare slots allow, stands on some device whole.
    """
    load = problem.statistics.total_load
    mean = load.sum(axis=1) / problem.num_devices
    replicas = min(problem.num_slots - problem.model.experts + 1, problem.num_devices)
    heaviest = load.max(axis=1) / replicas
    return np.where(mean > 0, np.maximum(1.0, heaviest / np.where(mean > 0, mean, 1.0)), 1.0)


def device_load_certificate(problem: Problem, table: IntArray, shares: FloatArray | None = None) -> Certificate:
    """The placement's average-load imbalance, mean over layers, with a bound that holds for every placement."""
    used = equal_shares(table, problem.model.experts) if shares is None else shares
    load = problem.statistics.total_load
    loads = device_loads(load, table, used, problem.slot_device, problem.num_devices)
    mean = load.sum(axis=1) / problem.num_devices
    imbalance = np.where(mean > 0, loads.max(axis=1) / np.where(mean > 0, mean, 1.0), 1.0)
    return Certificate(LOAD_OBJECTIVE, float(imbalance.mean()), float(load_imbalance_bound(problem).mean()))
