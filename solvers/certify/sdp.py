"""Lower bounds of a relaxed cost of placements: a semidefinite program and its primal-dual algorithm (PDHG).

The Gram matrix X of a placement says how much of experts i and j stands together. With M [n, H] the share of each of n
experts on each of H holders (devices, or nodes), X = M M^T. M is not convex, X nearly: rows of M sum to one, so X is at
least J / H (J all ones) in the semidefinite order; its entries are not negative; and its spectral norm is at most a
holder's slots. Where every holder has c slots and experts stand whole, X - J / H lives on the vectors that sum to zero
within each layer, has trace n - n / H, and at most H - 1 eigenvalues m c (m layers at once).

What is minimised over these X is a sum of convex terms, each the largest of many linear functions of X. Dual variables
choose one linear function of each term, <dual matrix, X> + constant. Whatever they choose, the sum is linear in X, and
its least value over the space is one eigenvalue decomposition away: that is the bound, valid at any iteration; the
algorithm (Chambolle and Pock, J. Math. Imaging Vis. 40, 2011) only makes it good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.jit import kernel

STEP_LENGTH = 0.5
"""Length of a step in X, in experts over the cost: what served best from one layer on nodes to two on devices."""
THREADS = 2
"""Programs worked on at once; each is a run of small matrix operations, which more threads only get in the way of."""
CHUNK = 25
"""Iterations between two looks at the clock."""
SOLVED = 2e-3
"""A program is solved when its bound comes this near, relatively, to its relaxed cost."""
MAX_ITERATIONS = 2_000
"""Iterations of a program past which nothing is gained."""
ROUNDING = 1e-12
"""Relative error of an eigenvalue, taken off every bound; LAPACK's is some hundred times smaller."""
TRIANGLE_HOLDERS, TRIANGLE_ITEMS = 4, 128
"""Triangle inequalities are priced for few holders, where they bind, and few experts, as there are n choose 3."""


class PrimalDual:
    """One relaxed problem, solved for as long as is asked. Not thread-safe; several instances may run side by side."""

    def __init__(self, space: GramSpace, terms: Sequence[Term]) -> None:
        self._space, self._terms = space, terms
        self._gram = space.middle()
        for term in terms:
            term.start(self._gram)
        self._dual_matrix = self._sum_of_duals()
        scale = max(abs(sum(term.cost(self._gram) for term in terms)), 1e-300)
        self._step = STEP_LENGTH * space.items / scale
        self._steps = self._dual_steps()
        self.iterations = 0
        self.bound = self._line_bound()

    def run(self, iterations: int) -> float:
        """Iterates so often and returns the best bound so far."""
        for _ in range(iterations):
            moved = self._space.project(self._gram - self._step * self._dual_matrix)
            ahead = 2.0 * moved - self._gram
            self._gram = moved
            for term, step in zip(self._terms, self._steps, strict=True):
                term.dual_step(ahead, step)
            self._dual_matrix = self._sum_of_duals()
        self.iterations += iterations
        self.bound = max(self.bound, self._line_bound())
        return self.bound

    @property
    def relaxed_cost(self) -> float:
        """What the terms cost at the present X: near the best bound there is to find, once X meets all limits."""
        return float(sum(term.cost(self._gram) for term in self._terms))

    def solved(self, iterations: int, constant: float = 0.0) -> bool:
        """Whether nothing more is to be gained, or so many iterations are done. constant: beside the terms' cost."""
        if self.iterations >= iterations:
            return True
        cost = self.relaxed_cost
        return self.iterations > 0 and self.bound >= cost - SOLVED * abs(cost + constant)

    def _line_bound(self) -> float:
        return self._space.least(self._dual_matrix) + sum(term.constant() for term in self._terms)

    def _sum_of_duals(self) -> FloatArray:
        return np.asarray(sum((term.dual_matrix() for term in self._terms), np.zeros_like(self._gram)))

    def _dual_steps(self) -> list[float]:
        """As long as converges: the sum of steps times each map's squared norm is one over the step in X."""
        start = np.random.default_rng(0).random(self._gram.shape)
        start = start + start.T
        norms = [_norm(term.operator, start) for term in self._terms]

        def together(gram: FloatArray) -> FloatArray:
            parts = [term.operator(gram) / norm for term, norm in zip(self._terms, norms, strict=True)]
            return np.asarray(sum(parts, np.zeros_like(gram)))

        total = _norm(together, start)
        return [1.0 / (1.05 * total * norm * self._step) for norm in norms]


def _norm(operator: Callable[[FloatArray], FloatArray], start: FloatArray, rounds: int = 12) -> float:
    """Largest eigenvalue of a positive semidefinite map on matrices, by power iteration."""
    vector, norm = start / np.linalg.norm(start), 1.0
    for _ in range(rounds):
        image = operator(vector)
        norm = float(np.linalg.norm(image))
        if norm < 1e-300:
            return 1.0
        vector = image / norm
    return norm


@dataclass(frozen=True)
class GramSpace:
    """All X = J / H + R with 0 <= R <= cap in the semidefinite order and the trace of X within `trace`.

    layers: m, each with `experts` experts; n = m * experts. even: whether R is also zero on sums within a layer.
    """

    layers: int
    experts: int
    holders: int
    cap: float
    trace: tuple[float, float]
    even: bool

    @classmethod
    def of(cls, slots: IntArray, experts: int) -> GramSpace:
        """slots: [m, H] of each layer and holder. Without spare slots every expert stands whole, on one holder."""
        layers, holders = slots.shape
        items, spare = layers * experts, np.maximum(slots.sum(axis=1) - experts, 0)
        # An expert on c holders has a diagonal entry of at least 1 / c, and 1 - 1 / c is at most (c - 1) / 2.
        lowest = max(items / holders, items - float(spare.sum()) / 2)
        even = not spare.any() and bool((slots == slots[0, 0]).all())
        cap = float(np.minimum(slots.max(axis=1), experts).sum())
        return cls(layers, experts, holders, cap, (lowest, float(items)), even)

    @property
    def items(self) -> int:
        return self.layers * self.experts

    @cached_property
    def _basis(self) -> FloatArray:
        """[n, n - m] orthonormal, each column within one layer and summing to zero."""
        ones = np.column_stack([np.ones(self.experts), np.eye(self.experts)[:, :-1]])
        zero_sum = np.linalg.qr(ones)[0][:, 1:]
        return np.kron(np.eye(self.layers), zero_sum)

    @property
    def _trace_above(self) -> tuple[float, float]:
        """Least and largest trace of R."""
        base = self.items / self.holders
        return max(0.0, self.trace[0] - base), self.trace[1] - base

    def middle(self) -> FloatArray:
        """[n, n] the most symmetric member: every two experts together as much as any other two."""
        together = (self.items / self.holders - 1.0) / max(1, self.items - 1)
        return np.full((self.items, self.items), max(0.0, together)) + (1.0 - max(0.0, together)) * np.eye(self.items)

    def project(self, point: FloatArray) -> FloatArray:
        """[n, n] the nearest member to a symmetric matrix."""
        inner = point - 1.0 / self.holders
        if self.even:
            inner = self._basis.T @ inner @ self._basis
        values, vectors = np.linalg.eigh(inner)
        if self.even:
            vectors = self._basis @ vectors
        return np.asarray(1.0 / self.holders + (vectors * self._fit(values)) @ vectors.T)

    def least(self, cost: FloatArray) -> float:
        """A lower bound of <cost, X> over all members, exact but for rounding. cost: [n, n] symmetric."""
        inner = self._basis.T @ cost @ self._basis if self.even else cost
        values = np.linalg.eigvalsh(inner)
        low, high = self._trace_above
        filled = np.minimum(self.cap * np.arange(1, len(values) + 1), high)
        taken = np.diff(np.concatenate([[0.0], filled]))
        # Past the least trace only what lowers the sum is taken.
        needed = np.diff(np.concatenate([[0.0], np.minimum(filled, low)]))
        taken = np.where(values < 0.0, taken, needed)
        margin = ROUNDING * (float(np.abs(values).max(initial=0.0)) * high + float(np.abs(cost).sum()) / self.holders)
        return float(cost.sum() / self.holders + values @ taken - margin)

    def _fit(self, values: FloatArray) -> FloatArray:
        """The nearest eigenvalues within [0, cap] whose sum is within the trace: all shifted alike, then clipped."""
        low, high = self._trace_above
        plain = np.clip(values, 0.0, self.cap)
        target = float(np.clip(plain.sum(), low, high))
        if abs(target - plain.sum()) <= ROUNDING * max(1.0, high):
            return plain
        below, above = float(values.min()) - self.cap, float(values.max())
        for _ in range(60):
            shift = 0.5 * (below + above)
            if np.clip(values - shift, 0.0, self.cap).sum() > target:
                below = shift
            else:
                above = shift
        return np.asarray(np.clip(values - above, 0.0, self.cap))


class Term(Protocol):
    """A convex cost of X [n, n], the largest of many linear functions of which dual variables choose one.

    <dual_matrix(), X> + constant() is at most the cost, whatever the dual variables that the term can hold.
    """

    def start(self, gram: FloatArray) -> None:
        """Sets the dual variables to what suits X before anything better is known."""
        ...

    def dual_step(self, gram: FloatArray, step: float) -> None:
        """Moves the dual variables by a proximal step towards what X makes dearest."""
        ...

    def dual_matrix(self) -> FloatArray:
        """[n, n] symmetric coefficients of the linear function chosen."""
        ...

    def constant(self) -> float:
        """Its value at X = 0."""
        ...

    def cost(self, gram: FloatArray) -> float:
        """The term's own cost at X."""
        ...

    def operator(self, gram: FloatArray) -> FloatArray:
        """[n, n] K^T K X of the linear map whose image the dual variables price: tells how long steps may be."""
        ...


class Entries:
    """Entries of X stay within [lower, upper]: costs nothing, but no X outside is allowed."""

    def __init__(self, lower: FloatArray, upper: FloatArray) -> None:
        self._lower, self._upper = lower, upper
        self._price = np.zeros_like(lower)

    @classmethod
    def of(cls, space: GramSpace, slots: IntArray) -> Entries:
        """Shares of two experts on one holder are between none and all.

        With spare slots an expert need not stand whole. slots: [m, H] of each layer and holder.
        """
        lower, upper = np.zeros((space.items, space.items)), np.ones((space.items, space.items))
        spare = np.maximum(slots.sum(axis=1) - space.experts, 0)
        np.fill_diagonal(lower, np.repeat(1.0 / np.minimum(spare + 1, space.holders), space.experts))
        return cls(lower, upper)

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        moved = self._price + step * gram
        self._price = moved - step * np.clip(moved / step, self._lower, self._upper)

    def dual_matrix(self) -> FloatArray:
        return self._price

    def constant(self) -> float:
        return -float(np.maximum(self._price * self._lower, self._price * self._upper).sum())

    def cost(self, gram: FloatArray) -> float:
        return 0.0

    def operator(self, gram: FloatArray) -> FloatArray:
        return gram


class RowSums:
    """Sums of X over each layer's experts stay within [lower, upper] ([m] each, the same for every row)."""

    def __init__(self, layers: int, experts: int, lower: FloatArray, upper: FloatArray) -> None:
        self._member = np.kron(np.eye(layers), np.ones((experts, 1)))
        self._lower, self._upper = lower, upper
        self._price = np.zeros_like(self._member)

    @classmethod
    def of(cls, space: GramSpace, slots: IntArray) -> RowSums:
        """What stands beside an expert is what its holder holds: as many as it has slots, or fewer with spare slots.

        slots: [m, H] of each layer and holder.
        """
        whole = slots.sum(axis=1) == space.experts
        upper = np.minimum(slots.max(axis=1), space.experts).astype(np.float64)
        return cls(space.layers, space.experts, np.where(whole, slots.min(axis=1), 0).astype(np.float64), upper)

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        moved = self._price + step * (gram @ self._member)
        self._price = moved - step * np.clip(moved / step, self._lower, self._upper)

    def dual_matrix(self) -> FloatArray:
        return _symmetric(self._price @ self._member.T)

    def constant(self) -> float:
        return -float(np.maximum(self._price * self._lower, self._price * self._upper).sum())

    def cost(self, gram: FloatArray) -> float:
        return 0.0

    def operator(self, gram: FloatArray) -> FloatArray:
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

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        times = (self._work @ gram).reshape(self._rounds, -1)
        self._odds = simplex_rows(self._odds + step * np.column_stack([times, self._floor]))

    def dual_matrix(self) -> FloatArray:
        return _symmetric(self._odds[:, :-1].reshape(-1, self._items).T @ self._work)

    def constant(self) -> float:
        return float(self._odds[:, -1] @ self._floor)

    def cost(self, gram: FloatArray) -> float:
        times = (self._work @ gram).reshape(self._rounds, -1)
        return float(np.maximum(times.max(axis=1), self._floor).sum())

    def operator(self, gram: FloatArray) -> FloatArray:
        return _symmetric((gram @ self._work.T) @ self._work)


class HoldersNeeded:
    """Sum over tokens of weight times how many holders its experts stand on.

    With r[i] the others of a token's k experts that stand beside expert i, the holders it needs are the sum over i of
    phi(r[i]), phi(r) = 1 / (1 + r): every holder counts one, split among the experts there. phi is taken piecewise
    linear between whole numbers, exact for placements and convex. A slope for each expert of each token picks the
    linear function.

    ids: [T, k] items, distinct within a token. weight: [T].
    """

    def __init__(self, ids: IntArray, weight: FloatArray, items: int) -> None:
        # Tokens of the same experts are one of more weight.
        chosen, which = _distinct_rows(np.sort(ids, axis=1), items)
        self._ids = np.ascontiguousarray(chosen)
        self._weight = np.bincount(which, weights=weight)
        self._slope = np.zeros(chosen.shape)
        self._dual = np.zeros((items, items))

    def start(self, gram: FloatArray) -> None:
        # A step far longer than any slope: each linear function then supports phi at X itself.
        self.dual_step(gram, 1e6 / max(float(self._weight.min()), 1e-300))

    def dual_step(self, gram: FloatArray, step: float) -> None:
        self._dual = np.zeros_like(self._dual)
        step_slopes(self._ids, self._weight, self._slope, gram, step, self._dual)

    def dual_matrix(self) -> FloatArray:
        return _symmetric(self._dual)

    def constant(self) -> float:
        return float(intercepts(self._ids, self._weight, self._slope))

    def cost(self, gram: FloatArray) -> float:
        return float(holders_needed(self._ids, self._weight, gram))

    def operator(self, gram: FloatArray) -> FloatArray:
        result = np.zeros_like(gram)
        add_operator(self._ids, self._weight, gram, result)
        return _symmetric(result)


@kernel
def step_slopes(ids: Any, weight: Any, slope: Any, gram: Any, step: float, dual: Any) -> None:
    """One proximal step of the slopes towards what `gram` [n, n] makes dearest; adds weight * slope to dual [n, n]."""
    tokens, k = ids.shape
    for t in range(tokens):
        w = weight[t]
        for i in range(k):
            a = ids[t, i]
            beside = 0.0
            for j in range(k):
                if j != i:
                    beside += gram[a, ids[t, j]]
            target = slope[t, i] + step * w * beside
            chosen = 0.0
            for j in range(1, k):
                moved = target - step * w * j
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
                    dual[a, ids[t, j]] += w * chosen


@kernel
def intercepts(ids: Any, weight: Any, slope: Any) -> float:
    """Sum of weight times where each linear function meets r = 0: the least of phi(r) - slope * r over whole r."""
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
def add_operator(ids: Any, weight: Any, gram: Any, result: Any) -> None:
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


class Linear:
    """<cost, X> as it is: one linear function, nothing to choose. cost: [n, n] symmetric."""

    def __init__(self, cost: FloatArray, constant: float = 0.0) -> None:
        self._cost, self._constant = cost, constant

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        pass

    def dual_matrix(self) -> FloatArray:
        return self._cost

    def constant(self) -> float:
        return self._constant

    def cost(self, gram: FloatArray) -> float:
        return self._constant + float((self._cost * gram).sum())

    def operator(self, gram: FloatArray) -> FloatArray:
        return np.zeros_like(gram)


def split_between_two(ids: IntArray, weight: FloatArray, items: int) -> Linear:
    """`HoldersNeeded` where there are two holders only: a token split between them cuts at most k^2 / 4 of its pairs.

    One linear function a token, 1 + (pairs apart) / floor(k^2 / 4): sharper than any of phi's, which do not know of the
    two.
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
        self._dual, self._constant = np.zeros((items, items)), 0.0

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        self._dual = np.zeros_like(self._dual)
        self._constant = float(step_triangles(gram, self._price, self._pair, step, self._dual))

    def dual_matrix(self) -> FloatArray:
        return _symmetric(self._dual)

    def constant(self) -> float:
        return self._constant

    def cost(self, gram: FloatArray) -> float:
        return 0.0

    def operator(self, gram: FloatArray) -> FloatArray:
        # Each entry is in n - 2 triangles, three times; two entries share at most one.
        n = len(gram)
        total = gram.sum(axis=1)
        beside = total[:, None] + total[None, :] - 2.0 * gram
        result = (4.0 if self._pair else 3.0) * (n - 2) * gram + (0.0 if self._pair else -1.0) * beside
        np.fill_diagonal(result, 0.0)
        return np.asarray(0.5 * result)


@kernel
def step_triangles(gram: Any, price: Any, pair: bool, step: float, dual: Any) -> float:
    """One projected step of the prices of all triangle inequalities; adds them to dual. Returns the prices' constant.

    Beside both of two, two are beside each other: X[i, j] + X[i, k] - X[j, k] <= 1 for each corner i of a triangle.
    pair: there are two holders only, so that of three items two share one: X[i, j] + X[i, k] + X[j, k] >= 1. price:
    [triangles, 3 or 4].
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
                    dual[i, j] += p0 + p1 - p2 - p3
                    dual[i, k] += p0 - p1 + p2 - p3
                    dual[j, k] += p1 + p2 - p0 - p3
                    total += p3 - p0 - p1 - p2
                at += 1
    return total


def simplex_rows(points: FloatArray) -> FloatArray:
    """[R, n] each row's nearest point of the simplex (entries not negative, sum one)."""
    falling = -np.sort(-points, axis=1)
    over = np.cumsum(falling, axis=1) - 1.0
    count = np.arange(1, points.shape[1] + 1)
    support = (falling * count > over).sum(axis=1)
    shift = over[np.arange(len(points)), support - 1] / support
    return np.asarray(np.maximum(points - shift[:, None], 0.0))


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


def _symmetric(matrix: FloatArray) -> FloatArray:
    return np.asarray(0.5 * (matrix + matrix.T))
