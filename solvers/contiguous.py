"""Baseline: experts in index order, what every engine does without a plan."""

from __future__ import annotations

import numpy as np

from ..placement.load_bound import device_load_certificate
from ..placement.problem import Problem
from .base import Budget, Feature, Needs, Solution


class Contiguous:
    """Slot i holds expert i mod E: equal contiguous blocks a device, spare slots from expert 0 on (as vLLM lays out)."""

    name = "contiguous"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        experts, slots = problem.model.experts, problem.layer_slots.sum(axis=1)
        table = problem.slot_table([np.arange(count) % experts for count in slots])
        return Solution(table, device_load_certificate(problem, table))
