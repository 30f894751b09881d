"""ExFlow's integer program, aggregated by expert pair and tightened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._types import FloatArray, IntArray
from ..placement.errors import SolveError, UnsupportedError
from .base import Budget
from .ilp import add_row
from .symmetry import forbidden_names, renaming

if TYPE_CHECKING:
    import pulp


SCALE = 1e6
"""Objective of a program whose every transition crosses: tolerances of 1e-6 then are a part in 1e12."""

MAX_PAIRS = 1_000_000
"""Pair variables beyond which building and holding the program takes minutes and gigabytes (about 3.4 kB each)."""


@dataclass(frozen=True)
class ExflowProgram:
    """The program and its meaning. The objective is SCALE times the share of transitions that cross devices.

    slots: [G]. break_layer, break_order: the layer whose experts name interchangeable devices, in that order.
    """

    model: pulp.LpProblem
    transitions: FloatArray
    slots: IntArray
    break_layer: int
    break_order: IntArray

    def start(self, device_of: IntArray) -> dict[str, float]:
        """A value for every variable from a placement [L, n]."""
        new = renaming(device_of[self.break_layer, self.break_order], self.slots.tolist())
        device_of = new[device_of]
        values = {
            _x(layer, i, g): float(device_of[layer, i] == g)
            for layer, i in np.ndindex(*device_of.shape)
            for g in np.flatnonzero(self.slots).tolist()
        }
        for layer, weights in enumerate(self.transitions):
            for i, j in np.argwhere(weights > 0).tolist():
                for g in np.flatnonzero(self.slots).tolist():
                    values[_z(layer, i, j, g)] = float(device_of[layer, i] == g and device_of[layer + 1, j] == g)
        return values

    def placement(self, values: Mapping[str, float]) -> IntArray:
        """[L, n] device of each expert."""
        layers, experts = len(self.transitions) + 1, self.transitions.shape[1]
        held = np.zeros((layers, experts, len(self.slots)))
        for layer, i in np.ndindex(layers, experts):
            for g in np.flatnonzero(self.slots).tolist():
                held[layer, i, g] = values[_x(layer, i, g)]
        return np.asarray(held.argmax(axis=2), dtype=np.int64)


def check_size(transitions: FloatArray, slots: IntArray) -> None:
    """Refuses transitions [L-1, n, n] on devices of slots [G] whose program would be too large.

    Raises:
        UnsupportedError: more than MAX_PAIRS pair variables.
    """
    pairs = int(np.count_nonzero(transitions)) * int(np.count_nonzero(slots))
    if pairs > MAX_PAIRS:
        raise UnsupportedError(
            f"ExFlow's program would have {pairs:,} pair variables (limit {MAX_PAIRS:,}): too large for an integer "
            "program; use form='staged' or form='bisect' if those are smaller, or the search solver"
        )


def exflow_program(transitions: FloatArray, slots: IntArray, budget: Budget) -> ExflowProgram:
    """Builds the program for transitions [L-1, n, n] (L >= 2, not all zero) and device slots [G] that sum to n.

    ExFlow (arXiv 2401.08383) has one variable a token and layer that says whether the token's two experts are apart.
    Tokens with the same pair have the same constraints, so one variable a pair, weighted by its tokens, is the same
    program. x[l,i,g]: expert i of layer l is on device g. z[l,i,j,g]: i and its successor j both are. Then

        minimise    share of transitions (i, j) without a z
        subject to  sum_g x[l,i,g] = 1,  sum_i x[l,i,g] = slots[g],  z <= x[l,i,g],  z <= x[l+1,j,g]
                    sum_j z[l,i,j,g] <= slots[g] x[l,i,g],   sum_i z[l,i,j,g] <= slots[g] x[l+1,j,g]

    The last two are products of the slot constraint with an x (reformulation-linearisation): no placement breaks
    them, and without them the relaxation is vacuous (x = 1/G keeps every transition local). Both the pairwise and the
    summed rows are kept: with either alone the search tree grew several times. Devices with equal slots can be
    renamed, so the experts of a middle layer take them in order of traffic.

    Raises:
        UnsupportedError: more than MAX_PAIRS pair variables. SolveError: the budget was spent half way.
    """
    import pulp

    check_size(transitions, slots)
    used = [int(g) for g in np.flatnonzero(slots)]
    layers, experts = len(transitions) + 1, transitions.shape[1]
    model = pulp.LpProblem("exflow", pulp.LpMinimize)

    x = [
        [{g: model.add_variable(_x(layer, i, g), 0, 1, pulp.LpInteger) for g in used} for i in range(experts)]
        for layer in range(layers)
    ]
    for layer in range(layers):
        for i in range(experts):
            add_row(model, [(x[layer][i][g], 1) for g in used], "==", 1)
        for g in used:
            add_row(model, [(x[layer][i][g], 1) for i in range(experts)], "==", int(slots[g]))
    objective: list[tuple[pulp.LpVariable, float]] = []
    scale = SCALE / float(transitions.sum())
    for layer, weights in enumerate(transitions):
        if budget.spent:
            raise SolveError(
                f"the time limit of {budget.seconds} s passed while ExFlow's program was being built; "
                "allow more seconds, or start from a given solution"
            )
        for g in used:
            z = np.full((experts, experts), None, dtype=object)
            for i, j in np.argwhere(weights > 0).tolist():
                z[i, j] = model.add_variable(_z(layer, i, j, g), 0, 1)
                objective.append((z[i, j], -scale * float(weights[i, j])))
                add_row(model, [(z[i, j], 1), (x[layer][i][g], -1)], "<=", 0)
                add_row(model, [(z[i, j], 1), (x[layer + 1][j][g], -1)], "<=", 0)
            for i in range(experts):
                for others, mine in ((z[i, :], x[layer][i][g]), (z[:, i], x[layer + 1][i][g])):
                    terms = [(v, 1.0) for v in others if v is not None]
                    if len(terms) > slots[g]:
                        add_row(model, [*terms, (mine, -float(slots[g]))], "<=", 0)
    model.setObjective(pulp.LpAffineExpression(objective, constant=SCALE))
    break_layer = min(layers // 2, layers - 2)
    order = np.argsort(-transitions[break_layer].sum(axis=1), kind="stable")
    for rank, g in forbidden_names(experts, slots.tolist()):
        if g in used:
            x[break_layer][order[rank]][g].upBound = 0
    return ExflowProgram(model, transitions, slots, break_layer, order)


def _x(layer: int, expert: int, device: int) -> str:
    return f"x_{layer}_{expert}_{device}"


def _z(layer: int, i: int, j: int, device: int) -> str:
    return f"z_{layer}_{i}_{j}_{device}"
