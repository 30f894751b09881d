"""A search's answer with its certificate: the bound that the time given can prove."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import numpy.typing as npt

from ...placement.errors import SolveError
from ...placement.plan import Certificate
from ...placement.problem import Problem
from ..base import Budget
from ..chain import Chain, fastest_step
from .judge import Judge

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Answer = tuple[IntArray, Certificate, FloatArray]

UNASKED = 0.05
"""Part of a time limit that may go into the bound when no time for it was asked."""
QUICK_SECONDS = 0.5
"""Estimated seconds a proof may take that nobody asked for, without a time limit."""


def certified(judge: Judge, answer: Answer, budget: Budget, seconds: float) -> Answer:
    """The answer (slot table [L, P], certificate, shares [L, P]) after `seconds` spent on its bound; with 0, little.

    Where a layer has few placements they are all gone through, and the answer is the best of them. Ctrl-C ends it with what
    is proven so far. Tells of better bounds as they are found.
    """
    scenario, problem = judge.scenario, judge.problem
    table, _, shares = answer
    if scenario.steps is None:
        return answer
    from ..certify.proof import risk_bound

    # Replaying a large model takes seconds, and the plan stays the same while its bound rises.
    found = judge.certificate(table, shares)

    def tell(bound: float) -> None:
        judge.proven = max(judge.proven, bound)
        budget.report(found.value, min(found.value, max(found.bound or bound, bound)), "bound")

    unasked = None if budget.seconds is None else UNASKED * budget.seconds
    given = seconds if seconds > 0 else unasked
    with suppress(KeyboardInterrupt):
        if (best := _best_of_all(judge, given)) is not None:
            tell(best[1])
            better = judge.figures(best[0], np.ones(best[0].shape)).mean() < judge.figures(table, shares).mean()
            if better and _within_reach(problem, best[0]):
                table, shares = best[0], np.ones(best[0].shape)
        else:
            figures = judge.figures(table, shares)
            tell(risk_bound(problem, scenario.steps, scenario.workload, figures, judge.reference, given, tell))
    return table, judge.certificate(table, shares), shares


def _within_reach(problem: Problem, table: IntArray) -> bool:
    """Whether a placement [L, P] moves no more from the plan in force than allowed."""
    if problem.current is None or problem.max_moves is None:
        return True
    held = problem.current.holds[np.arange(len(table))[:, None], table, problem.slot_device]
    return int((~held).sum()) <= problem.max_moves


def _best_of_all(judge: Judge, seconds: float | None) -> tuple[IntArray, float] | None:
    """(slot table, mean step time) of the best of all placements, if there is time to go through them."""
    problem, steps = judge.problem, judge.scenario.steps
    if steps is None or steps.source is not None or problem.objective.risk != "mean":
        return None
    if problem.has_replicas or problem.tolerates or not problem.layers_alike:
        return None
    work = Chain().work(problem, steps=steps.num_steps)
    if work is None or work > (QUICK_SECONDS if seconds is None else seconds):
        return None
    try:
        found = fastest_step(problem, Budget(seconds), steps, "scenario")
    except SolveError:
        return None
    # What certifies is the sum along the path, which its own replay only meets up to rounding.
    bound = found.certificate.bound
    return None if bound is None else (found.physical_to_logical, bound)
