"""How many transitions any placement can keep on one device: a bound that needs no search."""

from __future__ import annotations

import numpy as np

from .._types import FloatArray, IntArray
from .base import Budget


def local_weight_bound(transitions: FloatArray, slots: IntArray, budget: Budget, share: float = 0.2) -> float:
    """An upper bound of the weight of transitions [L-1, n, n] that any placement on devices of `slots` [G] keeps local.

    An expert shares its device with at most C = max(slots) experts of the next layer, and the other way round: the
    heaviest choice of pairs under that rule is a transportation problem a layer pair. Its optimum equals the root
    relaxation of `exflow_program` for equal slots. Each is solved as a linear program and the bound taken from its
    dual values by weak duality, so rounding cannot make it invalid. Layer pairs past `share` of what is left of the
    budget get the looser bound of the heaviest C successors of each expert.
    """
    limit = None if budget.left is None else budget.elapsed + share * budget.left
    largest = int(slots.max())
    total = 0.0
    for weights in transitions:
        late = limit is not None and budget.elapsed > limit
        loose = min(_heaviest(weights, largest), _heaviest(weights.T, largest))
        total += loose if late else min(loose, _transport_bound(weights, largest))
    return total


def _heaviest(weights: FloatArray, count: int) -> float:
    return float(np.sort(weights, axis=1)[:, -count:].sum())


def _transport_bound(weights: FloatArray, count: int) -> float:
    """Upper bound of max sum w y, rows and columns of y summing to at most `count`, 0 <= y <= 1."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    rows, columns = np.nonzero(weights)
    if not len(rows):
        return 0.0
    experts, pairs = len(weights), np.arange(len(rows))
    limits = csr_array(
        (np.ones(2 * len(rows)), (np.concatenate([rows, experts + columns]), np.concatenate([pairs, pairs]))),
        shape=(2 * experts, len(rows)),
    )
    scale = float(weights.max())
    solved = linprog(  # type: ignore[call-overload]  # sparse A_ub is documented, the stubs lack it
        -weights[rows, columns] / scale,
        A_ub=limits,
        b_ub=np.full(2 * experts, float(count)),
        bounds=(0, 1),
        method="highs",
    )
    if solved.status != 0:
        return float(weights.sum())
    price = np.maximum(0.0, -np.asarray(solved.ineqlin.marginals)) * scale
    rest = np.maximum(0.0, weights - price[:experts, None] - price[None, experts:])
    return float(count * price.sum() + rest.sum())
