"""A risk as a weighted sum of step times: the weights that make a lower bound of one a lower bound of the other.

Every risk here is the largest of such sums over a set of weights (its dual form; for cvar Rockafellar and Uryasev, J. Risk 2,
2000), so that for any weights of the set, bounding the sum over all plans bounds the risk over all plans.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .objective import Objective
from .risk import tail_weight

FloatArray = npt.NDArray[np.float64]

NEAR = 0.01
"""Workloads within this of the worst, relatively, share its weight: a good plan has several that are the worst."""


def risk_weights(
    step_seconds: FloatArray,
    step_workload: npt.NDArray[np.int64],
    objective: Objective,
    best: FloatArray | None = None,
) -> tuple[FloatArray, float]:
    """([S] weights summing to one, offset): for any plan, weights @ its step seconds + offset is at most its risk.

    Chosen so that for a plan of these step_seconds [S] the two are (nearly) the same. step_workload, best: as in `risk_value`.
    """
    count = len(step_seconds)
    if objective.tail is not None:
        return tail_weight(step_seconds, objective.tail), 0.0
    if objective.risk == "mean":
        return np.full(count, 1.0 / count), 0.0
    codes, group = np.unique(step_workload, return_inverse=True)
    size = np.bincount(group)
    mean = np.bincount(group, weights=step_seconds) / size
    own = np.zeros(len(codes)) if best is None or objective.risk != "regret" else best[codes]
    worst = (mean - own) >= (mean - own).max() - NEAR * mean.max()
    part = worst / worst.sum()
    return (part / size)[group], -float(part @ own)
