"""Baselines that every comparison carries: experts in index order, dealt out in turn, and at random."""

from __future__ import annotations

import numpy as np

from .._types import IntArray
from ..placement.bounds import device_load_certificate
from ..placement.problem import Problem
from ..placement.validation import generator
from .base import Budget, Feature, Needs, Solution


class Contiguous:
    """Slot i holds expert i mod E, what every engine does without a plan.

    Equal contiguous blocks a device, spare slots from expert 0 on, as vLLM lays out.
    """

    name = "contiguous"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS, Feature.SPREAD_REPLICAS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        table = problem.index_order
        return Solution(table, device_load_certificate(problem, table))


class RoundRobin:
    """Expert e on device e mod G, a full device being passed over; spare slots go to experts 0, 1, ... in turn.

    vLLM's `round_robin` placement strategy. A spare slot takes the next expert its device does not hold yet, since a
    second copy there would serve nothing.
    """

    name = "round_robin"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS, Feature.SPREAD_REPLICAS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        experts, layers = problem.model.experts, range(problem.model.layers)
        table = problem.slot_table([_deal_in_turn(problem.layer_slot_device(layer), experts) for layer in layers])
        return Solution(table, device_load_certificate(problem, table))


def _deal_in_turn(slot_device: IntArray, experts: int) -> IntArray:
    """[P] expert of each slot, the slots [P] (with their non-decreasing devices) taking experts in rounds."""
    slots = len(slot_device)
    place_in_device = np.arange(slots) - np.searchsorted(slot_device, slot_device)
    order = np.lexsort((slot_device, place_in_device))
    row = np.empty(slots, dtype=np.int64)
    row[order[:experts]] = np.arange(experts)
    holds = np.zeros((int(slot_device[-1]) + 1, experts), dtype=bool)
    holds[slot_device[order[:experts]], np.arange(experts)] = True
    turn = 0
    for slot in order[experts:]:
        device = slot_device[slot]
        upcoming = (turn + np.arange(experts)) % experts
        absent = upcoming[~holds[device, upcoming]]
        row[slot] = absent[0] if len(absent) else upcoming[0]
        holds[device, row[slot]] = True
        turn = (int(row[slot]) + 1) % experts
    return row


class RandomPlacement:
    """Experts shuffled over the slots; spare slots go to experts drawn at random, as evenly as they divide."""

    name = "random"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget) -> Solution:
        rng = generator(budget.seed)
        experts, rows = problem.model.experts, list[IntArray]()
        for layer in range(problem.model.layers):
            device = problem.layer_slot_device(layer)
            whole, spare = divmod(len(device), experts)
            row = rng.permutation(np.append(np.tile(np.arange(experts), whole), rng.permutation(experts)[:spare]))
            _separate_copies(row, device, experts, rng)
            rows.append(row)
        table = problem.slot_table(rows)
        return Solution(table, device_load_certificate(problem, table))


def _separate_copies(row: IntArray, device: IntArray, experts: int, rng: np.random.Generator) -> None:
    """Swaps slots, in place, so that a device holds an expert twice only where no single swap avoids it."""
    copies = np.zeros((int(device[-1]) + 1, experts), dtype=np.int64)
    np.add.at(copies, (device, row), 1)
    for slot in np.flatnonzero(copies[device, row] > 1):
        here, expert = device[slot], row[slot]
        if copies[here, expert] < 2:
            continue
        partners = np.flatnonzero((copies[device, expert] == 0) & (copies[here, row] == 0))
        if len(partners):
            other = rng.choice(partners)
            there, guest = device[other], row[other]
            copies[[here, there], expert] += (-1, 1)
            copies[[here, there], guest] += (1, -1)
            row[slot], row[other] = guest, expert
