"""The cheapest sequence of placements, layer after layer, up to the renaming of devices that are alike.

Such devices may be renamed throughout a plan without changing its cost. So a layer's state is a placement up to
renaming, the cost between two layers' states is the least over the second's renamings, and following the cheapest path
fixes each layer's names in turn. 8 experts on 4 devices: 105 states instead of 2,520 placements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..placement.errors import SolveError
from ..placement.problem import Problem
from .base import Budget
from .placements import PlacementSpace
from .viterbi import cheapest_path

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

BLOCK_PAIRS = 1 << 21
"""Pairs of placements priced at once: bounds memory to some tens of MB."""


class PairCost(Protocol):
    """Cost between two layers' placements, unchanged when both are renamed alike.

    Called with a layer, representatives [A] of it and [B] of the next layer, and renamings [H, G] of the latter;
    returns [H, A, B].
    """

    def __call__(self, layer: int, left: IntArray, right: IntArray, relabellings: IntArray) -> FloatArray: ...


def cheapest_placements(
    space: PlacementSpace, unary: Sequence[FloatArray], pair: PairCost, budget: Budget
) -> tuple[IntArray, float]:
    """[L, E] device of each expert, and the least sum of unary[l] [R] and pair costs.

    Raises:
        SolveError: the budget's seconds ran out; nothing short of the whole chain proves or places anything.
    """
    everything = np.arange(len(space.representatives))

    def nearest_names(layer: int) -> FloatArray:
        check_time(budget, layer, len(unary))
        best = np.full((len(everything), len(everything)), np.inf)
        for left, names in _blocks(space):
            np.minimum(best[left], pair(layer, everything[left], everything, names).min(axis=0), out=best[left])
        return best

    states, value = cheapest_path(unary, nearest_names)
    device_of = np.empty((len(unary), space.representatives.shape[1]), dtype=np.int64)
    device_of[0] = space.representatives[states[0]]
    name = np.arange(len(space.slots))
    for layer, (here, after) in enumerate(zip(states[:-1, None], states[1:, None], strict=True)):
        costs = np.concatenate(
            [
                pair(layer, here, after, space.relabellings[first : first + BLOCK_PAIRS]).ravel()
                for first in range(0, len(space.relabellings), BLOCK_PAIRS)
            ]
        )
        name = name[space.relabellings[costs.argmin()]]
        device_of[layer + 1] = name[space.representatives[after[0]]]
    return device_of, value


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


def _blocks(space: PlacementSpace) -> Iterator[tuple[slice, IntArray]]:
    """Left placements and renamings, few enough at a time."""
    states, names = len(space.representatives), space.relabellings
    height = max(1, min(len(names), BLOCK_PAIRS // states**2))
    width = max(1, BLOCK_PAIRS // (states * height))
    for left in range(0, states, width):
        for first in range(0, len(names), height):
            yield slice(left, left + width), names[first : first + height]
