"""The cheapest sequence of placements, layer after layer, up to the renaming of devices that are alike.

Such devices may be renamed throughout a plan without changing its cost. So a layer's state is a placement up to
renaming, the cost between two layers' states is the least over the second's renamings, and following the cheapest path
fixes each layer's names in turn. 8 experts on 4 devices: 105 states instead of 2,520 placements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..placement.errors import SolveError
from ..placement.problem import Problem
from .base import Budget
from .placements import PlacementSpace

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

BLOCK_PAIRS = 1 << 21
"""Pairs of placements priced at once: bounds memory to some tens of MB."""


class Predecessors(Protocol):
    """Called with a layer and reached[a], [R], the least cost of a path to each of its placements.

    Returns for each placement [R] of the next layer the least of reached[a] and the cost of the pair, over all a and
    renamings of the latter; which a; which renaming. A pair's cost must not change when both are renamed alike.
    """

    def __call__(self, layer: int, reached: FloatArray) -> tuple[FloatArray, IntArray, IntArray]: ...


class PairCost(Protocol):
    """Cost between two layers' placements, unchanged when both are renamed alike.

    Called with a layer, representatives [A] of it and renamings [H, G] of the next layer's; returns [H, A, R].
    """

    def __call__(self, layer: int, left: IntArray, relabellings: IntArray) -> FloatArray: ...


def cheapest_placements(
    space: PlacementSpace, unary: Sequence[FloatArray], predecessors: Predecessors, budget: Budget
) -> tuple[IntArray, float]:
    """[L, E] device of each expert, and the least sum of unary[l] [R] and pair costs (Viterbi 1967).

    Raises:
        SolveError: the budget's seconds ran out; nothing short of the whole chain proves or places anything.
    """
    reached = unary[0]
    steps: list[tuple[IntArray, IntArray]] = []
    for layer, costs in enumerate(unary[1:]):
        check_time(budget, layer, len(unary))
        least, state, name = predecessors(layer, reached)
        steps.append((state, name))
        reached = least + costs
    path, names = [int(reached.argmin())], []
    for came_from, named in reversed(steps):
        names.append(int(named[path[-1]]))
        path.append(int(came_from[path[-1]]))
    devices = np.arange(len(space.slots))
    device_of = np.empty((len(unary), space.representatives.shape[1]), dtype=np.int64)
    for layer, here in enumerate(reversed(path)):
        if layer:
            devices = devices[space.relabellings[names[-layer]]]
        device_of[layer] = devices[space.representatives[here]]
    return device_of, float(reached.min())


def by_pairs(space: PlacementSpace, pair: PairCost) -> Predecessors:
    """Predecessors found by pricing every pair, some tens of MB at a time."""
    states = len(space.representatives)
    height = max(1, min(len(space.relabellings), BLOCK_PAIRS // states**2))
    width = max(1, BLOCK_PAIRS // (states * height))

    def predecessors(layer: int, reached: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        least, state, name = np.full(states, np.inf), np.zeros(states, np.int64), np.zeros(states, np.int64)
        for left in range(0, states, width):
            some = np.arange(left, min(left + width, states))
            for first in range(0, len(space.relabellings), height):
                costs = pair(layer, some, space.relabellings[first : first + height]) + reached[some][:, None]
                flat = costs.reshape(-1, states)
                row = flat.argmin(axis=0)
                better = flat[row, np.arange(states)] < least
                least = np.where(better, flat[row, np.arange(states)], least)
                state = np.where(better, some[row % len(some)], state)
                name = np.where(better, first + row // len(some), name)
        return least, state, name

    return predecessors


def allowed_states(problem: Problem, space: PlacementSpace) -> npt.NDArray[np.bool_]:
    """[L, R] which placements respect the problem's pinned and forbidden devices.

    Raises:
        SolveError: no placement of a layer does; the layer is named.
    """
    placed = space.representatives
    allowed = np.ones((problem.model.layers, len(placed)), dtype=bool)
    for (layer, expert), device in problem.pinned.items():
        allowed[layer] &= placed[:, expert] == device
    for (layer, expert), devices in problem.forbidden.items():
        allowed[layer] &= ~np.isin(placed[:, expert], devices)
    stuck = np.flatnonzero(~allowed.any(axis=1))
    if len(stuck):
        raise SolveError(
            f"no placement of MoE layer {stuck[0]} respects its pinned and forbidden devices with "
            f"{list(space.slots)} slots a device; loosen Problem.pinned or Problem.forbidden there"
        )
    return allowed


def check_time(budget: Budget, layer: int, layers: int) -> None:
    """Raises SolveError once the budget's seconds are spent; tells the listener of progress otherwise."""
    if budget.spent:
        raise SolveError(
            f"chain had come to layer {layer} of {layers} when its {budget.seconds} s ran out, and has no plan before "
            "the last; give it more time, or use a solver that stops early (search, exflow, moetuner)"
        )
    budget.report(None, None, f"layer {layer} of {layers}")
