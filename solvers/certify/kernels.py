"""Compiled loops over tokens: how many holders a token's experts stand on, as a function of their Gram matrix.

With r[i] the others of a token's k experts that stand beside expert i, the holders it needs are the sum over i of
phi(r[i]), phi(r) = 1 / (1 + r): every holder counts one, split among the experts there. phi is taken piecewise linear
between whole numbers, exact for placements and convex. `slope` [T, k] picks a supporting line for each expert of each token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel


@kernel
def ascend_slopes(ids: Any, weight: Any, slope: Any, gram: Any, step: float, charge: Any) -> None:
    """One proximal step of the slopes towards what `gram` [n, n] makes dearest; adds weight * slope to charge [n, n]."""
    tokens, k = ids.shape
    for t in range(tokens):
        w = weight[t]
        for i in range(k):
            a = ids[t, i]
            beside = 0.0
            for j in range(k):
                if j != i:
                    beside += gram[a, ids[t, j]]
            wanted = slope[t, i] + step * w * beside
            chosen = 0.0
            for j in range(1, k):
                moved = wanted - step * w * j
                flat = 1.0 / (j + 1.0) - 1.0 / j
                if moved <= flat:
                    chosen = flat
                    break
                if moved < (1.0 / (j + 2.0) - 1.0 / (j + 1.0) if j + 1 < k else 0.0):
                    chosen = moved
                    break
            slope[t, i] = chosen
            for j in range(k):
                if j != i:
                    charge[a, ids[t, j]] += w * chosen


@kernel
def intercepts(ids: Any, weight: Any, slope: Any) -> float:
    """Sum of weight times where each supporting line meets r = 0: the least of phi(r) - slope * r over whole r."""
    tokens, k = ids.shape
    total = 0.0
    for t in range(tokens):
        for i in range(k):
            least = np.inf
            for r in range(k):
                least = min(least, 1.0 / (1.0 + r) - slope[t, i] * r)
            total += weight[t] * least
    return total


@kernel
def holders_needed(ids: Any, weight: Any, gram: Any) -> float:
    """Sum of weight times holders needed, by the piecewise linear phi; exact where `gram` is a placement's."""
    tokens, k = ids.shape
    total = 0.0
    for t in range(tokens):
        for i in range(k):
            beside = 0.0
            for j in range(k):
                if j != i:
                    beside += gram[ids[t, i], ids[t, j]]
            value = 1.0 / k
            for j in range(1, k):
                value = max(value, 1.0 / j + (beside - (j - 1.0)) * (1.0 / (j + 1.0) - 1.0 / j))
            total += weight[t] * value
    return total


@kernel
def spread_beside(ids: Any, weight: Any, gram: Any, result: Any) -> None:
    """Adds K^T K X to result, K X being weight * r of every expert of every token."""
    tokens, k = ids.shape
    for t in range(tokens):
        for i in range(k):
            beside = 0.0
            for j in range(k):
                if j != i:
                    beside += gram[ids[t, i], ids[t, j]]
            for j in range(k):
                if j != i:
                    result[ids[t, i], ids[t, j]] += weight[t] * weight[t] * beside


@kernel
def ascend_triangles(gram: Any, price: Any, pair: bool, step: float, charge: Any) -> float:
    """One projected step of the prices of all triangle inequalities; adds them to charge. Returns the prices' constant.

    Beside both of two, two are beside each other: X[i, j] + X[i, k] - X[j, k] <= 1 for each corner i of a triangle. pair: there
    are two holders only, so that of three items two share one: X[i, j] + X[i, k] + X[j, k] >= 1. price: [triangles, 3 or 4].
    """
    n = gram.shape[0]
    at = 0
    total = 0.0
    for i in range(n):
        for j in range(i + 1, n):
            for k in range(j + 1, n):
                x, y, z = gram[i, j], gram[i, k], gram[j, k]
                p0 = max(0.0, price[at, 0] + step * (x + y - z - 1.0))
                p1 = max(0.0, price[at, 1] + step * (x + z - y - 1.0))
                p2 = max(0.0, price[at, 2] + step * (y + z - x - 1.0))
                price[at, 0], price[at, 1], price[at, 2] = p0, p1, p2
                p3 = 0.0
                if pair:
                    p3 = max(0.0, price[at, 3] + step * (1.0 - x - y - z))
                    price[at, 3] = p3
                if p0 + p1 + p2 + p3 > 0.0:
                    charge[i, j] += p0 + p1 - p2 - p3
                    charge[i, k] += p0 - p1 + p2 - p3
                    charge[j, k] += p1 + p2 - p0 - p3
                    total += p3 - p0 - p1 - p2
                at += 1
    return total
