"""One figure from many step times, as the objective's risk asks: mean, cvar, worst workload or regret.

Figures [S] are seconds of steps, or of windows, whose weights [S] say how much each counts. Workloads are codes [S]
into W names, kinds codes of the batch that a step is of: a tail is taken of the steps of each kind, since the slowest
of all are only those of the largest kind. Every risk is the largest weighted sum of figures over a set of weights (its
dual form; for cvar Rockafellar and Uryasev, J. Risk 2, 2000): `risk_value` is that largest sum, `risk_weights` are the
weights that reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._types import FloatArray, IntArray
from .errors import InputError
from .objective import Objective

NEAR = 0.01
"""Workloads within this of the worst, relatively, share its weight: a good plan has several that are the worst."""


def risk_value(
    step_seconds: FloatArray,
    step_workload: IntArray,
    objective: Objective,
    best: FloatArray | None = None,
    weight: FloatArray | None = None,
    kind: IntArray | None = None,
) -> float:
    """The objective's figure, in seconds a step.

    Args:
        step_seconds: [S] seconds of each step.
        step_workload: [S] codes of the workload of each.
        objective: names the risk.
        best: [W] mean step time of each workload's own best plan, which "regret" measures against.
        weight: [S] how much each counts, as windows do by their tokens; None for all alike. What weighs nothing is not
            looked at.
        kind: [S] codes of the kinds of steps; None for one.

    Raises:
        InputError: regret without `best`.
    """
    if weight is not None:
        counted = weight > 0
        step_seconds, step_workload, weight = step_seconds[counted], step_workload[counted], weight[counted]
        kind = None if kind is None else kind[counted]
    if objective.tail is not None:
        return weighted_mean(step_seconds, tail_weight(step_seconds, objective.tail, weight, kind))
    if objective.risk == "mean":
        return weighted_mean(step_seconds, weight)
    codes, means = workload_means(step_seconds, step_workload, weight)
    if objective.risk == "worst_workload":
        return float(means.max())
    if best is None:
        raise InputError("risk 'regret' needs the mean step time of each workload's own best plan")
    return float((means - best[codes]).max())


def risk_weights(
    step_seconds: FloatArray,
    step_workload: IntArray,
    objective: Objective,
    best: FloatArray | None = None,
    weight: FloatArray | None = None,
    kind: IntArray | None = None,
) -> tuple[FloatArray, float]:
    """Weights that make a lower bound of a weighted sum of step times a lower bound of the risk, over all plans.

    Args:
        step_seconds: [S] of a plan, for which the two are (nearly) the same.
        step_workload: [S] codes of the workload of each.
        objective: names the risk.
        best: [W] as in `risk_value`.
        weight: [S] as in `risk_value`, every step above 0.
        kind: [S] as in `risk_value`.

    Returns:
        ([S] weights summing to one, offset): for any plan, weights @ its step seconds + offset is at most its risk.
    """
    if objective.tail is not None:
        return tail_weight(step_seconds, objective.tail, weight, kind), 0.0
    each = np.full(len(step_seconds), 1.0 / len(step_seconds)) if weight is None else weight / weight.sum()
    if objective.risk == "mean":
        return each, 0.0
    codes, means = workload_means(step_seconds, step_workload, weight)
    own = np.zeros(len(codes)) if best is None or objective.risk != "regret" else best[codes]
    worst = (means - own) >= (means - own).max() - NEAR * means.max()
    part, group = worst / worst.sum(), np.searchsorted(codes, step_workload)
    return (part / np.bincount(group, weights=each))[group] * each, -float(part @ own)


def tail_weight(
    figures: FloatArray, tail: float, weight: FloatArray | None = None, kind: IntArray | None = None
) -> FloatArray:
    """[S] what each of `figures` [S] counts in the mean of the largest 1 - tail of them, all together 1.

    weight: [S] that part is one of weight, the last taken in part; None: one of their number, rounded, at least one.
    kind: [S] codes of kinds, of each of which the largest are taken; each counts by its weight.
    """
    if kind is not None and len(codes := np.unique(kind)) > 1:
        even = np.full(len(figures), 1.0 / len(figures)) if weight is None else weight
        result = np.zeros(len(figures))
        for code in codes:
            mine = kind == code
            result[mine] = tail_weight(figures[mine], tail, even[mine]) * even[mine].sum()
        return np.asarray(result / result.sum())
    order = np.argsort(figures)[::-1]
    taken = np.zeros(len(figures))
    if weight is None:
        taken[order[: max(1, round(len(figures) * (1.0 - tail)))]] = 1.0
    else:
        before = np.cumsum(weight[order]) - weight[order]
        taken[order] = np.clip((1.0 - tail) * weight.sum() - before, 0.0, weight[order])
    return np.asarray(taken / taken.sum())


def workload_means(
    figures: FloatArray, workload: IntArray, weight: FloatArray | None = None
) -> tuple[IntArray, FloatArray]:
    """([V] codes of the workloads that are there, [V] means of their figures [S] by weight [S], all alike without)."""
    codes = np.unique(workload)
    parts = [workload == code for code in codes]
    means = [weighted_mean(figures[part], None if weight is None else weight[part]) for part in parts]
    return codes, np.array(means)


def best_by_workload(
    figures: Sequence[FloatArray], workload: IntArray, workloads: int, weight: FloatArray | None = None
) -> FloatArray:
    """[W] the least mean step time that any of several plans has on each workload, 0 where it has no step.

    Regret among these plans is measured against it. figures: [S] of each plan. weight: [S] as in `risk_value`.
    """
    best = np.zeros(workloads)
    codes = np.unique(workload)
    best[codes] = np.min([workload_means(of_plan, workload, weight)[1] for of_plan in figures], axis=0)
    return best


def weighted_mean(figures: npt.NDArray[Any], weight: FloatArray | None) -> float:
    """Of figures [S] by weight [S]; None: all alike."""
    return float(weighted_means(figures, weight))


def weighted_means(figures: npt.NDArray[Any], weight: FloatArray | None) -> FloatArray:
    """[...] of figures [S, ...] by weight [S]; None: all alike."""
    if weight is None:
        return np.asarray(figures.mean(axis=0))
    values = figures.astype(np.float64)
    # Above the least of those that count, so that rounding does not end below it.
    least = values[weight > 0].min(axis=0)
    return np.asarray(least + np.tensordot(weight, values - least, axes=1) / weight.sum())


def percentiles(figures: FloatArray, ranks: Sequence[float], weight: FloatArray | None) -> list[float]:
    """Of figures [S], that part of which by weight [S] lies at or below (None: all alike, between two figures)."""
    if weight is None:
        return [float(value) for value in np.percentile(figures, ranks)]
    order = np.argsort(figures)
    reached = np.cumsum(weight[order])
    at = np.searchsorted(reached, np.asarray(ranks) / 100.0 * reached[-1] * (1 - 1e-12))
    return [float(figures[order[i]]) for i in np.minimum(at, len(order) - 1)]
