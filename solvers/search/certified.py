"""The certificate of a search's answer, with the bound that the time given can prove."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import numpy.typing as npt

from ...placement.plan import Certificate
from ..base import Budget
from .judge import Judge

FloatArray = npt.NDArray[np.float64]

UNASKED = 0.05
"""Part of a time limit that may go into the bound when no time for it was asked."""


def certified(
    judge: Judge, table: npt.NDArray[np.int64], shares: FloatArray, budget: Budget, seconds: float
) -> Certificate:
    """Spends `seconds` on the bound of judge's risk; with 0, little. Ctrl-C ends it with what is proven so far.

    table, shares: [L, P] the answer. Tells of better bounds as they are found.
    """
    scenario = judge.scenario
    if scenario.steps is None:
        return judge.certificate(table, shares)
    from ..certify.proof import risk_bound

    figures = judge.figures(table, shares)

    def tell(bound: float) -> None:
        judge.proven = max(judge.proven, bound)
        found = judge.certificate(table, shares)
        budget.report(found.value, found.bound, "bound")

    unasked = None if budget.seconds is None else UNASKED * budget.seconds
    spent = seconds if seconds > 0 else unasked
    with suppress(KeyboardInterrupt):
        tell(risk_bound(judge.problem, scenario.steps, scenario.workload, figures, judge.reference, spent, tell))
    return judge.certificate(table, shares)
