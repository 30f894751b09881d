"""Baseline: experts dealt out like cards, vLLM's `round_robin` placement strategy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..placement.load_bound import device_load_certificate
from ..placement.problem import Problem
from .base import Budget, Feature, Needs, Solution

IntArray = npt.NDArray[np.int64]


class RoundRobin:
    """Expert e on device e mod G, a full device being passed over; spare slots go to experts 0, 1, ... in turn.

    A spare slot takes the next expert its device does not hold yet, since a second copy there would serve nothing.
    """

    name = "round_robin"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        experts, layers = problem.model.experts, range(problem.model.layers)
        table = problem.slot_table([deal(problem.layer_slot_device(layer), experts) for layer in layers])
        return Solution(table, device_load_certificate(problem, table))


def deal(slot_device: IntArray, experts: int) -> IntArray:
    """[P] expert of each slot, the slots [P] (with their non-decreasing devices) taking experts in rounds."""
    slots = len(slot_device)
    place_in_device = np.arange(slots) - np.searchsorted(slot_device, slot_device)
    order = np.lexsort((slot_device, place_in_device))
    row = np.empty(slots, dtype=np.int64)
    row[order[:experts]] = np.arange(experts)
    held = np.zeros((int(slot_device[-1]) + 1, experts), dtype=bool)
    held[slot_device[order[:experts]], np.arange(experts)] = True
    turn = 0
    for slot in order[experts:]:
        device = slot_device[slot]
        upcoming = (turn + np.arange(experts)) % experts
        free = upcoming[~held[device, upcoming]]
        row[slot] = free[0] if len(free) else upcoming[0]
        held[device, row[slot]] = True
        turn = (int(row[slot]) + 1) % experts
    return row
