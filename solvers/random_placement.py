"""Baseline: a random placement, drawn anew for each layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..placement.load_bound import device_load_certificate
from ..placement.problem import Problem
from .base import Budget, Feature, Needs, Solution

IntArray = npt.NDArray[np.int64]


class RandomPlacement:
    """Experts shuffled over the slots; spare slots go to experts drawn at random, as evenly as they divide."""

    name = "random"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        rng = np.random.default_rng(budget.seed)
        experts, rows = problem.model.experts, list[IntArray]()
        for layer in range(problem.model.layers):
            device = problem.layer_slot_device(layer)
            whole, spare = divmod(len(device), experts)
            row = rng.permutation(np.append(np.tile(np.arange(experts), whole), rng.permutation(experts)[:spare]))
            _part_copies(row, device, experts, rng)
            rows.append(row)
        table = problem.slot_table(rows)
        return Solution(table, device_load_certificate(problem, table))


def _part_copies(row: IntArray, device: IntArray, experts: int, rng: np.random.Generator) -> None:
    """Swaps slots, in place, so that a device holds an expert twice only where no single swap avoids it."""
    held = np.zeros((int(device[-1]) + 1, experts), dtype=np.int64)
    np.add.at(held, (device, row), 1)
    for slot in np.flatnonzero(held[device, row] > 1):
        here, expert = device[slot], row[slot]
        if held[here, expert] < 2:
            continue
        partners = np.flatnonzero((held[device, expert] == 0) & (held[here, row] == 0))
        if len(partners):
            other = rng.choice(partners)
            there, guest = device[other], row[other]
            held[[here, there], expert] += (-1, 1)
            held[[here, there], guest] += (1, -1)
            row[slot], row[other] = guest, expert
