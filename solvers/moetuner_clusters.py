"""MoETuner's first program: a layer's experts in clusters of even load."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._types import FloatArray, IntArray
from .base import Budget
from .ilp import add_row, solve_ilp
from .symmetry import forbidden_names, renaming

SCALE = 1e6
"""A layer's load inside the program, so that solver tolerances are small beside it."""


@dataclass(frozen=True)
class LayerClusters:
    """A layer's clusters. cluster_of: [E]. deviation: sum of abs(cluster load - target), in tokens. bound: no clusters
    of these sizes deviate less.
    """

    cluster_of: IntArray
    deviation: float
    bound: float
    finished: bool


def cluster_layer(
    load: FloatArray,
    sizes: IntArray,
    targets: FloatArray,
    budget: Budget,
    *,
    backend: str = "highs",
    tolerance: float = 0.0,
    seconds: float | None = None,
    warm_start: bool = True,
) -> LayerClusters:
    """Minimises sum_c abs(load of cluster c - targets[c]) with sizes[c] experts in cluster c.

    load: [E]. sizes, targets: [G], sizes summing to E. tolerance: relative gap to stop at, or the same fraction of
    the mean target as an absolute gap, whichever is met first: the best deviation is often nearly 0, where a relative
    gap never closes.

    Raises:
        SolveError: no clusters found in time (without warm_start).
    """
    import pulp

    total = float(load.sum())
    packed = _packed(load, sizes, targets)
    if total == 0.0 or np.count_nonzero(sizes) == 1:
        deviation = _deviation(load, packed, targets)
        return LayerClusters(packed, deviation, deviation, True)
    scale = SCALE / total
    used = [int(c) for c in np.flatnonzero(sizes)]
    model = pulp.LpProblem("moetuner_clusters", pulp.LpMinimize)
    inside = [{c: model.add_variable(_inside(i, c), 0, 1, pulp.LpInteger) for c in used} for i in range(len(load))]
    misses = {c: model.add_variable(_miss(c), 0) for c in used}
    for row in inside:
        add_row(model, [(a, 1) for a in row.values()], "==", 1)
    for c in used:
        add_row(model, [(row[c], 1) for row in inside], "==", int(sizes[c]))
        held = [(row[c], scale * float(load[i])) for i, row in enumerate(inside)]
        add_row(model, [*held, (misses[c], -1)], "<=", scale * float(targets[c]))
        add_row(model, [*held, (misses[c], 1)], ">=", scale * float(targets[c]))
    # A cluster without experts misses its whole target, whatever the others do.
    lost = float(targets[sizes == 0].sum())
    model.setObjective(pulp.LpAffineExpression([(d, 1) for d in misses.values()], constant=scale * lost))
    order = np.argsort(-load, kind="stable")
    kinds = list(zip(sizes.tolist(), targets.tolist(), strict=True))
    for rank, c in forbidden_names(len(load), kinds):
        if c in used:
            inside[order[rank]][c].upBound = 0
    start = None
    if warm_start:
        named = renaming(packed[order], kinds)[packed]
        start = {_inside(i, c): float(named[i] == c) for i in range(len(load)) for c in used}
        loads = np.bincount(named, weights=load, minlength=len(sizes))
        start |= {_miss(c): scale * abs(float(loads[c] - targets[c])) for c in used}
    result = solve_ilp(
        model,
        budget,
        backend=backend,
        seconds=seconds,
        relative_gap=tolerance,
        absolute_gap=tolerance * SCALE / len(used),
        start=start,
    )
    chosen = np.array([[result.values[_inside(i, c)] for c in used] for i in range(len(load))])
    cluster_of = np.array(used)[chosen.argmax(axis=1)]
    deviation = _deviation(load, cluster_of, targets)
    bound = max(lost, 0.0 if result.bound is None else result.bound / scale)
    return LayerClusters(cluster_of, deviation, min(bound, deviation), result.finished)


def _deviation(load: FloatArray, cluster_of: IntArray, targets: FloatArray) -> float:
    held = np.bincount(cluster_of, weights=load, minlength=len(targets))
    return float(np.abs(held - targets).sum())


def _packed(load: FloatArray, sizes: IntArray, targets: FloatArray) -> IntArray:
    """[E] clusters by descending load, each expert to the cluster furthest below its target that has room."""
    room, missing = sizes.copy(), targets.astype(np.float64).copy()
    cluster_of = np.empty(len(load), dtype=np.int64)
    for i in np.argsort(-load, kind="stable"):
        c = int(np.where(room > 0, missing, -np.inf).argmax())
        cluster_of[i] = c
        room[c] -= 1
        missing[c] -= load[i]
    return cluster_of


def _inside(expert: int, cluster: int) -> str:
    return f"a_{expert}_{cluster}"


def _miss(cluster: int) -> str:
    return f"d_{cluster}"
