"""Homes for experts that are copied by the step: few copies, short steps.

A device needs a copy taken off it whenever it has more than the planner's target, and hardly ever two. So the search
lowers the tokens above the target, summed over devices and steps, by exchanging the homes of two experts, from the plan
that is best without copies and from the balanced one. Whole placements are then priced as `evaluate` does, with the
planner's own copies, and the best is kept.
"""

from __future__ import annotations

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.errors import UnsupportedError
from ...placement.jit import kernel
from ...placement.problem import Problem
from ..base import Budget, Solution
from .annealer import Start
from .evaluator import Evaluator, better
from .scenario import Scenario
from .starts import even_shares

HOT, COLD = 0.03, 1e-4
"""Temperatures, in mean device loads a step."""


def check_online(problem: Problem, scenario: Scenario) -> None:
    """Raises UnsupportedError for counts alone, and for a limit of moves."""
    if scenario.steps is None:
        raise UnsupportedError(
            f"online={problem.objective.online} copies experts by the step, counts tell of none; record tokens"
        )
    if problem.max_moves is not None:
        raise UnsupportedError("Problem.max_moved_bytes and Objective.online do not go together; leave one of them out")


def search_homes(
    problem: Problem, budget: Budget, scenario: Scenario, allowed: BoolArray, starts: list[Start], proposals: int
) -> Solution:
    """The best of the starts and of what exchanges make of each."""
    evaluator = Evaluator(problem, scenario)
    best = min((evaluator.answer(*start) for start in starts), key=lambda answer: answer.value)
    budget.report(best.value, best.bound, "start")
    rng = np.random.default_rng(budget.seed)
    for tables, _ in starts:
        homes = []
        for layer, table in enumerate(tables):
            if budget.spent:
                homes.append(table)
                continue
            homes.append(
                exchange_homes(
                    scenario.loads[:, layer],
                    table,
                    problem.layer_slot_device(layer),
                    allowed[layer],
                    problem.objective.online_slack,
                    proposals,
                    int(rng.integers(1 << 31)),
                )
            )
        best = better(best, evaluator.answer(homes, even_shares(problem, homes)))
        budget.report(best.value, best.bound, "homes for copies")
    return Solution(
        best.table, best.certificate, shares=best.shares, stop="finished" if budget.seconds is None else "time limit"
    )


@kernel
def exchange_homes(
    load: FloatArray,
    table: IntArray,
    slot_device: IntArray,
    allowed: BoolArray,
    slack: float,
    proposals: int,
    seed: int,
) -> IntArray:
    """[P] the slot table with the least tokens above target met in annealing. load: [S, E] of each step; table: [P];
    slot_device: [P]; allowed: [E, G]."""
    np.random.seed(seed)
    steps, devices = load.shape[0], allowed.shape[1]
    slots = len(table)
    table = table.copy()
    carried = np.zeros((devices, steps))
    mean, target = np.zeros(steps), np.zeros(steps)
    for s in range(steps):
        mean[s] = max(load[s].sum() / devices, 1e-300)
        target[s] = max(np.floor(mean[s] * (1.0 + slack)), np.ceil(mean[s]))
    by_expert = np.ascontiguousarray(load.T)
    for p in range(slots):
        carried[slot_device[p]] += by_expert[table[p]]
    value = 0.0
    for g in range(devices):
        value += _excess(carried[g], target, mean)
    least, best = value, table.copy()
    cooling = (COLD / HOT) ** (1.0 / max(1, proposals))
    temperature = HOT
    for _ in range(proposals):
        temperature *= cooling
        p, q = np.random.randint(slots), np.random.randint(slots)
        a, b = slot_device[p], slot_device[q]
        if a == b or not allowed[table[p], b] or not allowed[table[q], a]:
            continue
        more = by_expert[table[q]] - by_expert[table[p]]
        first, second = carried[a] + more, carried[b] - more
        change = _excess(first, target, mean) + _excess(second, target, mean)
        change -= _excess(carried[a], target, mean) + _excess(carried[b], target, mean)
        if change > 0.0 and np.random.random() >= np.exp(-change / temperature):
            continue
        carried[a], carried[b] = first, second
        table[p], table[q] = table[q], table[p]
        value += change
        if value < least - 1e-12:
            least = value
            best = table.copy()
    return best


@kernel
def _excess(carried: FloatArray, target: FloatArray, mean: FloatArray) -> float:
    """Above the target, in mean loads, a step on average."""
    total = 0.0
    for s in range(len(carried)):
        total += max(0.0, carried[s] - target[s]) / mean[s]
    return total / len(carried)
