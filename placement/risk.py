"""One figure from many step times, as the objective's risk asks."""

from __future__ import annotations

import numpy as np

from .._types import FloatArray, IntArray
from .errors import InputError
from .objective import Objective


def risk_value(
    step_seconds: FloatArray,
    step_workload: IntArray,
    objective: Objective,
    best: FloatArray | None = None,
    weight: FloatArray | None = None,
) -> float:
    """The objective's figure, in seconds a step.

    step_seconds: [S]. step_workload: [S] codes. best: [W] mean step time of each workload's own best plan, which
    "regret" measures against. weight: [S] how much each counts, as windows do by their tokens; None for all alike. What
    weighs nothing is not looked at.

    Raises:
        InputError: regret without `best`.
    """
    if weight is not None:
        counted = weight > 0
        step_seconds, step_workload, weight = step_seconds[counted], step_workload[counted], weight[counted]
    if objective.tail is not None:
        return weighted_mean(step_seconds, tail_weight(step_seconds, objective.tail, weight))
    if objective.risk == "mean":
        return weighted_mean(step_seconds, weight)
    codes = np.unique(step_workload)
    parts = [step_workload == code for code in codes]
    means = np.array([weighted_mean(step_seconds[part], None if weight is None else weight[part]) for part in parts])
    if objective.risk == "worst_workload":
        return float(means.max())
    if best is None:
        raise InputError("risk 'regret' needs the mean step time of each workload's own best plan")
    return float((means - best[codes]).max())


def tail_weight(figures: FloatArray, tail: float, weight: FloatArray | None = None) -> FloatArray:
    """[S] what each of `figures` [S] counts in the mean of the largest 1 - tail of them, all together 1.

    weight: [S] that part is one of weight, the last taken in part; None: one of their number, rounded, at least one.
    """
    order = np.argsort(figures)[::-1]
    taken = np.zeros(len(figures))
    if weight is None:
        taken[order[: max(1, round(len(figures) * (1.0 - tail)))]] = 1.0
    else:
        before = np.cumsum(weight[order]) - weight[order]
        taken[order] = np.clip((1.0 - tail) * weight.sum() - before, 0.0, weight[order])
    return np.asarray(taken / taken.sum())


def weighted_mean(figures: FloatArray, weight: FloatArray | None) -> float:
    """Of figures [S] by weight [S]; None: all alike."""
    if weight is None:
        return float(figures.mean())
    # Above the least of those that count, so that rounding does not end below it.
    least = figures[weight > 0].min()
    return float(least + weight @ (figures - least) / weight.sum())


# A risk as a weighted sum of step times: the weights that make a lower bound of one a lower bound of the other. Every
# risk here is the largest of such sums over a set of weights (its dual form; for cvar Rockafellar and Uryasev, J.
# Risk 2, 2000), so that for any weights of the set, bounding the sum over all plans bounds the risk over all plans.


NEAR = 0.01
"""Workloads within this of the worst, relatively, share its weight: a good plan has several that are the worst."""


def risk_weights(
    step_seconds: FloatArray,
    step_workload: IntArray,
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
