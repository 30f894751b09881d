"""Baseline: experts in index order, what every engine does without a plan."""

from __future__ import annotations

import numpy as np

from ..placement.load_bound import device_load_certificate
from ..placement.problem import Problem
from .base import Budget, Feature, Needs, Solution


class Contiguous:
    """Slot i holds expert i mod E: equal contiguous blocks a device, spare slots from expert 0 on (as vLLM lays out)."""

    name = "contiguous"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        row = np.arange(problem.num_slots) % problem.model.experts
        table = np.tile(row, (problem.model.layers, 1))
        return Solution(table, device_load_certificate(problem, table))
