"""At most so many experts moved from the plan in force, over all layers: who may move how many.

Every layer walks inside its own limit and remembers the best placement at each distance from the plan in force. Where
layers do not depend on each other, the cheapest mix of these placements within the budget is a multiple-choice knapsack,
solved exactly; it also tells what a move is worth, which layers are charged on their next walk. Where they do, limits
that never exceed the budget together are dealt anew after each round from what layers left unused.
"""

from __future__ import annotations

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.errors import SolveError
from ...placement.problem import Problem
from .annealer import Annealer, Placed
from .kernel_types import MoveLimit, no_move_limit

HEADROOM = 4
"""MoveRules beyond its part of the budget that a layer may at least try."""


class MoveBudget:
    """Sets an annealer's limits, and reads the answer from what its layers remember."""

    def __init__(self, problem: Problem, annealer: Annealer, coupled: bool, price: float = 0.0) -> None:
        """coupled: whether layers' values depend on their neighbours'. The annealer has been given its start, which must
        lie within the budget.

        Raises:
            SolveError: it does not; the bytes needed are named.
        """
        assert problem.current is not None
        assert problem.max_moves is not None
        self._problem, self._engine, self.coupled = problem, annealer, coupled
        self._most, self.price = problem.max_moves, price
        # Copies: arrays that may not be written are another type to compiled code.
        self._held = [held.copy() for held in problem.current.holds]
        self._turn = 0
        needed = int(self._moved().sum())
        if needed > self._most:
            raise SolveError(
                f"slots and constraints alone move {needed} experts of the current plan "
                f"({needed * problem.model.bytes_per_expert:.4g} bytes), Problem.max_moved_bytes is "
                f"{problem.max_moved_bytes:.4g}: allow that many, or ask for slots and constraints that the current plan "
                "keeps to (no expert twice on a device)"
            )
        self.deal()

    def deal(self) -> None:
        """New limits around what the layers' present placements have moved."""
        moved, layers = self._moved(), len(self._held)
        spare = self._most - int(moved.sum())
        if self.coupled:
            # Whom the remainder goes to changes from round to round.
            turns = (np.arange(layers) - self._turn) % layers
            most = moved + spare // layers + (turns < spare % layers)
            self._turn += spare % layers
        else:
            most = moved + np.maximum(HEADROOM, np.maximum(moved // 2, -(-2 * spare // layers)))
        self._limit(np.minimum(most, np.minimum(self._most, self._problem.layer_slots.sum(axis=1))))

    def forget(self) -> None:
        """Values remembered so far no longer compare."""
        self._limit(np.array([limit.most for limit in self._engine.limits]), keep=False)

    def _limit(self, most: IntArray, keep: bool = True) -> None:
        known = self._engine.limits
        kept = np.zeros(len(most), np.int64) if self.coupled else most + 1
        self._engine.limits = [
            MoveLimit(held, int(cap), self.price, *_memory(limit if keep else no_move_limit(), int(count), int(slots)))
            for held, cap, count, limit, slots in zip(
                self._held, most, kept, known, self._problem.layer_slots.sum(axis=1), strict=True
            )
        ]

    def _moved(self) -> IntArray:
        """[L] experts each layer's present placement has moved."""
        return np.array(
            [
                (~held[state.now.slot_expert, self._problem.layer_slot_device(layer)]).sum()
                for layer, (held, state) in enumerate(zip(self._held, self._engine.states, strict=True))
            ]
        )

    def answer(self) -> list[Placed]:
        """The best placements within the budget."""
        if self.coupled:
            return [state.now for state in self._engine.states]
        limits = self._engine.limits
        chosen, worth = cheapest_mix([limit.value for limit in limits], self._most)
        self.price = worth
        placed = []
        for layer, (count, limit, state) in enumerate(zip(chosen, limits, self._engine.states, strict=True)):
            share = np.zeros(state.now.share.shape)
            share[limit.slot_expert[count], self._problem.layer_slot_device(layer)] = limit.slot_share[count]
            placed.append(Placed(limit.slot_expert[count].copy(), share, state.now.cost))
        return placed


def _memory(known: MoveLimit, count: int, slots: int) -> tuple[FloatArray, IntArray, FloatArray]:
    """Room for the best placement at `count` distances, with those already known."""
    value, slot_expert, slot_share = (
        np.full(count, np.inf),
        np.zeros((count, slots), np.int64),
        np.zeros((count, slots)),
    )
    same = min(count, len(known.value))
    if same:
        value[:same] = known.value[:same]
        slot_expert[:same] = known.slot_expert[:same]
        slot_share[:same] = known.slot_share[:same]
    return value, slot_expert, slot_share


def cheapest_mix(values: list[FloatArray], most: int) -> tuple[list[int], float]:
    """One count a layer, at most `most` in all, with the least sum of values[layer][count]; and what one more is worth.

    values: [K] a layer, inf where unknown; every layer has a finite value within the budget. Exact, by dynamic
    programming over layers; of equals the lower counts.
    """
    least = np.zeros(most + 1)
    came: list[IntArray] = []
    for value in values:
        best, count = np.full(most + 1, np.inf), np.zeros(most + 1, np.int64)
        for k in np.flatnonzero(np.isfinite(value[: most + 1])):
            total = np.full(most + 1, np.inf)
            total[k:] = least[: most + 1 - k] + value[k]
            better = total < best
            best[better], count[better] = total[better], k
        least = best
        came.append(count)
    at = most
    chosen = []
    for count in reversed(came):
        chosen.append(int(count[at]))
        at -= chosen[-1]
    # Over a tenth of the budget: the last move alone says little.
    width = min(most, max(1, most // 10))
    before = least[most - width] if most else np.inf
    worth = float((before - least[most]) / width) if np.isfinite(before) else 0.0
    return chosen[::-1], worth
