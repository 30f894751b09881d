"""Parts of a relaxed cost, each the largest of many linear functions of a Gram matrix X.

Every part holds multipliers that choose one of its linear functions, <charge(), X> + constant(): a lower bound of the
part's cost for any multipliers it can hold. `ascend` moves them towards what a given X makes dearest.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .gram import FloatArray, IntArray
from .kernels import ascend_slopes, ascend_triangles, holders_needed, intercepts, spread_beside


class Term(Protocol):
    """A convex cost of X [n, n] by its supporting lines."""

    def begin(self, gram: FloatArray) -> None:
        """Sets the multipliers to what suits X before anything better is known."""
        ...

    def ascend(self, gram: FloatArray, step: float) -> None:
        """Moves the multipliers by a proximal step."""
        ...

    def charge(self) -> FloatArray:
        """[n, n] symmetric coefficients of the line chosen."""
        ...

    def constant(self) -> float:
        """The line's value at X = 0."""
        ...

    def cost(self, gram: FloatArray) -> float:
        """The part's own cost at X."""
        ...

    def spread(self, gram: FloatArray) -> FloatArray:
        """[n, n] K^T K X of the linear map whose image the multipliers price: tells how long steps may be."""
        ...


class Entries:
    """Entries of X stay within [lower, upper]: costs nothing, but no X outside is allowed."""

    def __init__(self, lower: FloatArray, upper: FloatArray) -> None:
        self._lower, self._upper = lower, upper
        self._price = np.zeros_like(lower)

    def begin(self, gram: FloatArray) -> None:
        pass

    def ascend(self, gram: FloatArray, step: float) -> None:
        wanted = self._price + step * gram
        self._price = wanted - step * np.clip(wanted / step, self._lower, self._upper)

    def charge(self) -> FloatArray:
        return self._price

    def constant(self) -> float:
        return -float(np.maximum(self._price * self._lower, self._price * self._upper).sum())

    def cost(self, gram: FloatArray) -> float:
        return 0.0

    def spread(self, gram: FloatArray) -> FloatArray:
        return gram


class RowSums:
    """Sums of X over each layer's experts stay within [lower, upper] ([m] each, the same for every row)."""

    def __init__(self, layers: int, experts: int, lower: FloatArray, upper: FloatArray) -> None:
        self._member = np.kron(np.eye(layers), np.ones((experts, 1)))
        self._lower, self._upper = lower, upper
        self._price = np.zeros_like(self._member)

    def begin(self, gram: FloatArray) -> None:
        pass

    def ascend(self, gram: FloatArray, step: float) -> None:
        wanted = self._price + step * (gram @ self._member)
        self._price = wanted - step * np.clip(wanted / step, self._lower, self._upper)

    def charge(self) -> FloatArray:
        return _symmetric(self._price @ self._member.T)

    def constant(self) -> float:
        return -float(np.maximum(self._price * self._lower, self._price * self._upper).sum())

    def cost(self, gram: FloatArray) -> float:
        return 0.0

    def spread(self, gram: FloatArray) -> FloatArray:
        return _symmetric(gram @ self._member @ self._member.T)


class SlowestDevice:
    """Sum over rounds of weight times the longest time of any holder, where expert i's holder takes (X @ work)[i].

    work: [R, Q, n] seconds in each of R rounds by each of Q rooflines. weight: [R]. floor: [R] seconds known otherwise.
    """

    def __init__(self, work: FloatArray, weight: FloatArray, floor: FloatArray) -> None:
        self._rounds, self._kinds, self._items = work.shape
        self._work = (work * weight[:, None, None]).reshape(-1, self._items)
        self._floor = floor * weight
        self._odds = np.zeros((self._rounds, self._kinds * self._items + 1))
        self._odds[:, -1] = 1.0

    def begin(self, gram: FloatArray) -> None:
        pass

    def ascend(self, gram: FloatArray, step: float) -> None:
        times = (self._work @ gram).reshape(self._rounds, -1)
        self._odds = simplex_rows(self._odds + step * np.column_stack([times, self._floor]))

    def charge(self) -> FloatArray:
        return _symmetric(self._odds[:, :-1].reshape(-1, self._items).T @ self._work)

    def constant(self) -> float:
        return float(self._odds[:, -1] @ self._floor)

    def cost(self, gram: FloatArray) -> float:
        times = (self._work @ gram).reshape(self._rounds, -1)
        return float(np.maximum(times.max(axis=1), self._floor).sum())

    def spread(self, gram: FloatArray) -> FloatArray:
        return _symmetric((gram @ self._work.T) @ self._work)


class HoldersNeeded:
    """Sum over tokens of weight times how many holders its experts stand on.

    ids: [T, k] items, distinct within a token. weight: [T].
    """

    def __init__(self, ids: IntArray, weight: FloatArray, items: int) -> None:
        # Tokens of the same experts are one of more weight.
        chosen, which = _distinct_rows(np.sort(ids, axis=1), items)
        self._ids = np.ascontiguousarray(chosen)
        self._weight = np.bincount(which, weights=weight)
        self._slope = np.zeros(chosen.shape)
        self._charge = np.zeros((items, items))

    def begin(self, gram: FloatArray) -> None:
        # A step far longer than any slope: each line then supports phi at X itself.
        self.ascend(gram, 1e6 / max(float(self._weight.min()), 1e-300))

    def ascend(self, gram: FloatArray, step: float) -> None:
        self._charge = np.zeros_like(self._charge)
        ascend_slopes(self._ids, self._weight, self._slope, gram, step, self._charge)

    def charge(self) -> FloatArray:
        return _symmetric(self._charge)

    def constant(self) -> float:
        return float(intercepts(self._ids, self._weight, self._slope))

    def cost(self, gram: FloatArray) -> float:
        return float(holders_needed(self._ids, self._weight, gram))

    def spread(self, gram: FloatArray) -> FloatArray:
        result = np.zeros_like(gram)
        spread_beside(self._ids, self._weight, gram, result)
        return _symmetric(result)


def _distinct_rows(rows: IntArray, items: int) -> tuple[IntArray, IntArray]:
    """Rows [R, k] that differ, and for each row which of them it is."""
    k = rows.shape[1]
    if items**k > 1 << 64:
        chosen, which = np.unique(rows, axis=0, return_inverse=True)
        return chosen, which.ravel()
    # As one number each, which sorts some fifty times faster.
    key = rows.astype(np.uint64) @ np.array([items**place for place in range(k)], dtype=np.uint64)
    _, first, which = np.unique(key, return_index=True, return_inverse=True)
    return rows[first], which.ravel()


class Linear:
    """<cost, X> as it is: one line, nothing to choose. cost: [n, n] symmetric."""

    def __init__(self, cost: FloatArray, constant: float = 0.0) -> None:
        self._cost, self._constant = cost, constant

    def begin(self, gram: FloatArray) -> None:
        pass

    def ascend(self, gram: FloatArray, step: float) -> None:
        pass

    def charge(self) -> FloatArray:
        return self._cost

    def constant(self) -> float:
        return self._constant

    def cost(self, gram: FloatArray) -> float:
        return self._constant + float((self._cost * gram).sum())

    def spread(self, gram: FloatArray) -> FloatArray:
        return np.zeros_like(gram)


def split_between_two(ids: IntArray, weight: FloatArray, items: int) -> Linear:
    """`HoldersNeeded` where there are two holders only: a token split between them cuts at most k^2 / 4 of its pairs.

    One line a token, 1 + (pairs apart) / floor(k^2 / 4): sharper than any of phi's, which do not know of the two.
    """
    k = ids.shape[1]
    split = max(1, k * k // 4)
    cost = np.zeros((items, items))
    for i in range(k):
        for j in range(k):
            if i != j:
                np.add.at(cost, (ids[:, i], ids[:, j]), -0.5 * weight / split)
    return Linear(cost, float(weight.sum()) * (1.0 + k * (k - 1) / 2.0 / split))


class Triangles:
    """No X in which i stands with j and with k, but they not with each other. Costs nothing.

    items: n, some 100 at most, as all n choose 3 triangles are priced. holders: two more is known of two.
    """

    def __init__(self, items: int, holders: int) -> None:
        self._pair = holders == 2
        count = items * (items - 1) * (items - 2) // 6
        self._price = np.zeros((count, 4 if self._pair else 3))
        self._charge, self._constant = np.zeros((items, items)), 0.0

    def begin(self, gram: FloatArray) -> None:
        pass

    def ascend(self, gram: FloatArray, step: float) -> None:
        self._charge = np.zeros_like(self._charge)
        self._constant = float(ascend_triangles(gram, self._price, self._pair, step, self._charge))

    def charge(self) -> FloatArray:
        return _symmetric(self._charge)

    def constant(self) -> float:
        return self._constant

    def cost(self, gram: FloatArray) -> float:
        return 0.0

    def spread(self, gram: FloatArray) -> FloatArray:
        # Each entry is in n - 2 triangles, three times; two entries share at most one.
        n = len(gram)
        total = gram.sum(axis=1)
        beside = total[:, None] + total[None, :] - 2.0 * gram
        result = (4.0 if self._pair else 3.0) * (n - 2) * gram + (0.0 if self._pair else -1.0) * beside
        np.fill_diagonal(result, 0.0)
        return np.asarray(0.5 * result)


def simplex_rows(points: FloatArray) -> FloatArray:
    """[R, n] each row's nearest point of the simplex (entries not negative, sum one)."""
    falling = -np.sort(-points, axis=1)
    over = np.cumsum(falling, axis=1) - 1.0
    count = np.arange(1, points.shape[1] + 1)
    support = (falling * count > over).sum(axis=1)
    shift = over[np.arange(len(points)), support - 1] / support
    return np.asarray(np.maximum(points - shift[:, None], 0.0))


def _symmetric(matrix: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (matrix + matrix.T))
