"""A plan in force as the start of a search: itself where it fits the problem, else the nearest placement that does."""

from __future__ import annotations

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.errors import SolveError
from ...placement.plan import Plan
from ...placement.problem import Problem
from ..base import Budget
from ..mip import solve_program
from .tolerant_start import placement_program

PROGRAM_SECONDS = 30.0
"""For the program of one layer; 256 experts on 32 devices take a fraction of a second."""


def from_current(
    problem: Problem, current: Plan, allowed: BoolArray, failures: BoolArray
) -> tuple[list[IntArray], list[FloatArray]]:
    """Slot tables [P_l] and shares [E, G], one of each a layer, with the fewest experts moved from `current`.

    allowed: [L, E, G]. failures: [F, G], in each of which every expert must keep a replica.

    Raises:
        SolveError: no placement respects the problem's constraints, or none was found in time.
    """
    load = problem.statistics.workload_load.sum(axis=0)
    tables, shares = [], []
    for layer, held in enumerate(current.holds):
        usable = _layer_fits(problem, layer, held, allowed[layer], failures)
        kept = held if usable else _nearest(held, problem.layer_slots[layer], allowed[layer], failures, load[layer])
        tables.append(np.concatenate([np.flatnonzero(column) for column in kept.T]).astype(np.int64))
        free = usable and problem.objective.split == "free"
        shares.append(current.device_share[layer].copy() if free else kept / kept.sum(axis=1, keepdims=True))
    return tables, shares


def fits(problem: Problem, current: Plan, allowed: BoolArray, failures: BoolArray) -> bool:
    """Whether a plan in force is itself an answer to the problem: its slots and every constraint kept, no expert twice on
    a device, and equal shares where the objective wants them."""
    if not np.array_equal(current.slots_per_device, problem.layer_slots):
        return False
    even = current.holds / np.maximum(current.holds.sum(axis=2, keepdims=True), 1)
    return all(
        _layer_fits(problem, layer, held, allowed[layer], failures) for layer, held in enumerate(current.holds)
    ) and (problem.objective.split == "free" or bool(np.allclose(current.device_share, even)))


def _layer_fits(problem: Problem, layer: int, held: BoolArray, allowed: BoolArray, failures: BoolArray) -> bool:
    return bool(
        (held.sum(axis=0) == problem.layer_slots[layer]).all()
        and not (held & ~allowed).any()
        and not any((held[:, failure].sum(axis=1) == held.sum(axis=1)).any() for failure in failures)
    )


def _nearest(held: BoolArray, slots: IntArray, allowed: BoolArray, failures: BoolArray, load: FloatArray) -> BoolArray:
    """[E, G] the placement without an expert twice on a device that holds most of what is held."""
    # Of equally near ones, replicas of what has most load; together these count less than one move.
    weight = 0.5 / slots.sum() * load / max(load.max(), 1e-300)
    program = placement_program("nearest placement", -(held + weight[:, None]), slots, allowed, failures)
    found = solve_program(
        program, Budget(seconds=PROGRAM_SECONDS), backend="highs", start=held.ravel().astype(np.float64)
    )
    if found.stop == "interrupted":
        raise KeyboardInterrupt
    if found.values is None:
        raise SolveError(
            "no placement near the current plan was found that respects slots, pinned and forbidden devices and failures; "
            "loosen them, or leave out Problem.current"
        )
    return np.asarray(found.values.reshape(held.shape) > 0.5)
