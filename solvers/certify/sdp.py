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

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.jit import kernel
from .blas import one_blas_thread

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
MOST_TRIPLED = 5
"""Experts of a token, of which triples are looked at; their number rises with its cube."""
WAY_SPEED, WAY_STEP = 2.0, 0.15
"""Of the busier way: how far odds of functions move beside those of splits; references and parts, by shares of
tokens."""
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
        with one_blas_thread():
            self._steps = self._dual_steps()
            self.bound = self._line_bound()
        self.iterations = 0

    def run(self, iterations: int) -> float:
        """Iterates so often and returns the best bound so far."""
        with one_blas_thread():
            for _ in range(iterations):
                moved = self._space.project(self._gram - self._step * self._dual_matrix)
                ahead = 2.0 * moved - self._gram
                self._gram = moved
                for term, step in zip(self._terms, self._steps, strict=True):
                    term.dual_step(ahead, step)
                self._dual_matrix = self._sum_of_duals()
            self.bound = max(self.bound, self._line_bound())
        self.iterations += iterations
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
    """Sum over rounds of weight times the longest time of any holder, where expert i's holder takes (X @ work)[i]; or
    what is known of all rounds together, if that is more.

    work: [R, Q, n] seconds in each of R rounds by each of Q rooflines. weight: [R]. floor: [R] seconds known otherwise.
    least: weighted seconds of all rounds known otherwise.
    """

    def __init__(self, work: FloatArray, weight: FloatArray, floor: FloatArray, least: float = 0.0) -> None:
        self._rounds, self._kinds, self._items = work.shape
        self._work = (work * weight[:, None, None]).reshape(-1, self._items)
        self._floor = floor * weight
        self._least = max(least, float(self._floor.sum()))
        # Of holders and of the floor in each round; each row sums to what is not laid on `least`.
        self._odds = np.zeros((self._rounds, self._kinds * self._items + 1))
        self._odds[:, -1] = 1.0
        self._rest = 0.0

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        times = (self._work @ gram).reshape(self._rounds, -1)
        moved = self._odds + step * np.column_stack([times, self._floor])
        if self._least > float(self._floor.sum()):
            self._odds, self._rest = shared_simplex(moved, self._rest + step * self._least)
        else:
            self._odds = simplex_rows(moved)

    def dual_matrix(self) -> FloatArray:
        return _symmetric(self._odds[:, :-1].reshape(-1, self._items).T @ self._work)

    def constant(self) -> float:
        return float(self._odds[:, -1] @ self._floor) + self._rest * self._least

    def cost(self, gram: FloatArray) -> float:
        times = (self._work @ gram).reshape(self._rounds, -1)
        return max(float(np.maximum(times.max(axis=1), self._floor).sum()), self._least)

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


class SplitBetweenTwo:
    """Sum over tokens of weight times the holders its experts need, of two: `HoldersNeeded`, and sharper.

    A token whose experts are apart has at least two of the three pairs of some triple apart, and at most floor(k^2 / 4)
    of all its pairs. So it needs 1 + max(pairs apart of a triple / 2 over all triples, pairs apart of all /
    floor(k^2 / 4)) holders at least, and exactly so many where X is a placement's. Of four experts no linear functions
    of pairs say more (they are the facets of the envelope over all 8 ways to part four); of more than `MOST_TRIPLED`
    only all pairs count. Which function is taken is chosen by odds of each token.

    ids: [T, k] items, distinct within a token. weight: [T].
    """

    def __init__(self, ids: IntArray, weight: FloatArray, items: int) -> None:
        # Tokens of the same experts are one of more weight.
        chosen, which = _distinct_rows(np.sort(ids, axis=1), items)
        self._ids = np.ascontiguousarray(chosen)
        self._weight = np.bincount(which, weights=weight)
        k = chosen.shape[1]
        pair = {both: place for place, both in enumerate(itertools.combinations(range(k), 2))}
        self._pairs = np.array(list(pair), np.int64).reshape(-1, 2)
        triples = list(itertools.combinations(range(k), 3)) if 4 <= k <= MOST_TRIPLED else []
        self._triples = np.array([[pair[a, b], pair[a, c], pair[b, c]] for a, b, c in triples], np.int64).reshape(-1, 3)
        # All pairs of a token, in the last place.
        self._odds = np.zeros((len(chosen), len(triples) + 1))
        self._odds[:, -1] = 1.0
        self._all = 1.0 / max(1, k * k // 4)
        self._dual, self._constant = np.zeros((items, items)), 0.0
        self._move(np.zeros((items, items)), 0.0)

    def _move(self, gram: FloatArray, step: float) -> None:
        self._dual = np.zeros_like(self._dual)
        self._constant = float(
            step_splits(
                self._ids, self._weight, self._pairs, self._triples, self._all, self._odds, gram, step, self._dual
            )
        )

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        self._move(gram, step)

    def dual_matrix(self) -> FloatArray:
        return _symmetric(self._dual)

    def constant(self) -> float:
        return self._constant

    def cost(self, gram: FloatArray) -> float:
        apart = 1.0 - gram[self._ids[:, self._pairs[:, 0]], self._ids[:, self._pairs[:, 1]]]
        split = self._all * apart.sum(axis=1)
        for triple in self._triples:
            split = np.maximum(split, 0.5 * apart[:, triple].sum(axis=1))
        return float(self._weight @ (1.0 + split))

    def operator(self, gram: FloatArray) -> FloatArray:
        result = np.zeros_like(gram)
        add_splits(self._ids, self._weight, self._pairs, self._triples, self._all, gram, result)
        return _symmetric(result)


@kernel
def step_splits(
    ids: Any, weight: Any, pairs: Any, triples: Any, all_pairs: float, odds: Any, gram: Any, step: float, dual: Any
) -> float:
    """One projected step of each token's odds towards the functions that `gram` [n, n] makes dearest; adds weight *
    coefficients to dual [n, n], upper triangle, and returns the constant.

    pairs: [P, 2] places in a token. triples: [F, 3] of pairs. odds: [T, F + 1].
    """
    tokens = len(ids)
    count, functions = len(pairs), odds.shape[1]
    apart, charge = np.empty(count), np.empty(count)
    moved, falling = np.empty(functions), np.empty(functions)
    total = 0.0
    for t in range(tokens):
        if step > 0.0 and functions > 1:
            whole = 0.0
            for p in range(count):
                apart[p] = 1.0 - gram[ids[t, pairs[p, 0]], ids[t, pairs[p, 1]]]
                whole += apart[p]
            for f in range(functions - 1):
                moved[f] = odds[t, f] + step * 0.5 * (
                    apart[triples[f, 0]] + apart[triples[f, 1]] + apart[triples[f, 2]]
                )
            moved[functions - 1] = odds[t, functions - 1] + step * all_pairs * whole
            shift = simplex_shift(moved, falling)
            for f in range(functions):
                odds[t, f] = max(0.0, moved[f] - shift)
        for p in range(count):
            charge[p] = all_pairs * odds[t, functions - 1]
        for f in range(functions - 1):
            half = 0.5 * odds[t, f]
            if half > 0.0:
                for place in range(3):
                    charge[triples[f, place]] += half
        w = weight[t]
        total += w
        for p in range(count):
            total += w * charge[p]
            dual[ids[t, pairs[p, 0]], ids[t, pairs[p, 1]]] -= w * charge[p]
    return total


@kernel
def simplex_shift(moved: Any, falling: Any) -> float:
    """What is taken off every value, and none below 0, to come to the simplex's nearest point; as `simplex_rows` for
    one short row, without new memory. falling: as long as moved, written over."""
    for f in range(len(moved)):
        place = f
        while place > 0 and falling[place - 1] < moved[f]:
            falling[place] = falling[place - 1]
            place -= 1
        falling[place] = moved[f]
    over, shift = -1.0, 0.0
    for f in range(len(moved)):
        over += falling[f]
        if falling[f] * (f + 1) <= over:
            break
        shift = over / (f + 1)
    return shift


@kernel
def add_splits(ids: Any, weight: Any, pairs: Any, triples: Any, all_pairs: float, gram: Any, result: Any) -> None:
    """Adds K^T K X to result, K X being sqrt(weight) * every function of every token: odds move alike in all tokens."""
    count = len(pairs)
    beside, charge = np.empty(count), np.empty(count)
    for t in range(len(ids)):
        whole = 0.0
        for p in range(count):
            beside[p] = gram[ids[t, pairs[p, 0]], ids[t, pairs[p, 1]]]
            whole += beside[p]
        for p in range(count):
            charge[p] = all_pairs * all_pairs * whole
        for f in range(len(triples)):
            of = 0.25 * (beside[triples[f, 0]] + beside[triples[f, 1]] + beside[triples[f, 2]])
            for place in range(3):
                charge[triples[f, place]] += of
        for p in range(count):
            result[ids[t, pairs[p, 0]], ids[t, pairs[p, 1]]] += weight[t] * charge[p]


class BusierWay:
    """Sum over tokens of weight, plus what is sent between two holders the busier way: `SplitBetweenTwo`, and sharper.

    Of tokens that stand on one holder, an expert's, those that the other holder's experts need go one way or the other:
    with weight a copy's time on both ways together, twice the weight on its own. The busier way takes at least

    - half of both, which is the split's cost;
    - whatever goes to the holder of any reference item, or leaves it, which is seen from where tokens stand beside the
      reference. With references mixed by any weights that sum to one it is an average of such ways.

    Items o (where the token stands), e (one it needs) and r (the reference) are parted between two, so that a copy goes
    to r's holder, o apart from r and some e beside it, at least as often as each of these functions of pairs apart, d,
    says, for every e and every two of them: (d_or + d_oe - d_er) / 2, d_or - (d_er + d_fr - d_ef) / 2,
    d_or + (d_oe + d_of + d_ef) / 2 - 1, and 0. All others being exact, they are the facets of the lower envelope over
    the eight ways to part o, e, f and r. What leaves is the same with 1 - d_xr for d_xr.

    ids: [T, k] items, where a token stands and then what it needs, distinct. weight: [T]. Bounds hold whatever odds,
    references and parts of the two ways are chosen; they are moved by steps of their own towards what costs most. These
    steps may end below it: where references stand on both holders, no function of their mixture need tell more than 0.
    """

    def __init__(self, ids: IntArray, weight: FloatArray, items: int) -> None:
        rows = np.column_stack([ids[:, 0], np.sort(ids[:, 1:], axis=1)])
        chosen, which = _distinct_rows(rows, items)
        self._ids = np.ascontiguousarray(chosen)
        self._weight = 2.0 * np.bincount(which, weights=weight)
        self._split, self._total = SplitBetweenTwo(ids, weight, items), float(weight.sum())
        self._pairs, *self._ways = _way_functions(ids.shape[1])
        self._odds = [np.zeros((len(chosen), len(way.constant))) for way in self._ways]
        for odds in self._odds:
            odds[:, -1] = 1.0
        led = np.bincount(ids[:, 0], weights=weight, minlength=items)
        owners = np.argsort(led)[-np.count_nonzero(led) :]
        some = max(1, len(owners) // 4)
        # More comes to where few tokens stand, more leaves where many do.
        self._references = np.zeros((2, items))
        self._references[0, owners[:some]] = self._references[1, owners[-some:]] = 1.0 / some
        self._parts = np.array([1.0, 0.0, 0.0])
        self._dual, self._constant = [np.zeros((items, items))] * 2, [0.0, 0.0]

    def start(self, gram: FloatArray) -> None:
        pass

    def dual_step(self, gram: FloatArray, step: float) -> None:
        self._split.dual_step(gram, step)
        sent = [self._split.cost(gram) - self._total]
        for number, (way, odds) in enumerate(zip(self._ways, self._odds, strict=True)):
            reference = self._references[number]
            inside, beside = np.zeros_like(gram), np.zeros(len(gram))
            self._constant[number] = constant = float(
                step_ways(
                    self._ids,
                    self._weight,
                    self._pairs,
                    way.pair,
                    way.times,
                    way.constant,
                    odds,
                    gram,
                    gram @ reference,
                    WAY_SPEED * step,
                    inside,
                    beside,
                )
            )
            self._dual[number] = _symmetric(inside + np.outer(beside, reference))
            by_reference = constant + float((inside * gram).sum()) + gram @ beside
            sent.append(float(by_reference @ reference))
            ahead = reference + WAY_STEP * (by_reference - by_reference.mean()) / self._total
            self._references[number] = simplex_rows(ahead[None])[0]
        self._parts = simplex_rows((self._parts + WAY_STEP * np.array(sent) / self._total)[None])[0]

    def dual_matrix(self) -> FloatArray:
        both = zip(self._parts[1:], self._dual, strict=True)
        return np.asarray(self._parts[0] * self._split.dual_matrix() + sum(part * dual for part, dual in both))

    def constant(self) -> float:
        split = self._split.constant() - self._total
        return self._total + float(self._parts @ np.array([split, *self._constant]))

    def cost(self, gram: FloatArray) -> float:
        sent = [self._split.cost(gram) - self._total]
        for way, reference in zip(self._ways, self._references, strict=True):
            sent.append(
                float(
                    sent_one_way(
                        self._ids, self._weight, self._pairs, way.pair, way.times, way.constant, gram, gram @ reference
                    )
                )
            )
        return self._total + max(sent)

    def operator(self, gram: FloatArray) -> FloatArray:
        return 2.0 * self._split.operator(gram)


class _WayFunctions(NamedTuple):
    """F linear functions of pairs apart: constant + the sum of times * each pair, the last of them 0.

    pair: [F, 4] places of pairs. times: [F, 4]. constant: [F].
    """

    pair: IntArray
    times: FloatArray
    constant: FloatArray


def _way_functions(k: int) -> tuple[IntArray, _WayFunctions, _WayFunctions]:
    """Pairs [P, 2] of the k items of a token and a reference, the last; functions of what comes to the reference's
    holder, and of what leaves it."""
    pairs = list(itertools.combinations(range(k + 1), 2))
    place = {frozenset(pair): number for number, pair in enumerate(pairs)}
    owner, others, reference = 0, range(1, k), k
    coming: list[tuple[float, dict[tuple[int, int], float]]] = [
        (0.0, {(owner, reference): 0.5, (owner, e): 0.5, (e, reference): -0.5}) for e in others
    ]
    if k <= MOST_TRIPLED:
        for e, f in itertools.combinations(others, 2):
            coming.append((0.0, {(owner, reference): 1.0, (e, reference): -0.5, (f, reference): -0.5, (e, f): 0.5}))
            coming.append((-1.0, {(owner, reference): 1.0, (owner, e): 0.5, (owner, f): 0.5, (e, f): 0.5}))
    coming.append((0.0, {}))
    # Beside the reference is apart from it on the other holder.
    leaving = [
        (
            constant + sum(times for pair, times in of.items() if reference in pair),
            {pair: -times if reference in pair else times for pair, times in of.items()},
        )
        for constant, of in coming
    ]
    ways = []
    for functions in (coming, leaving):
        pair, times = np.zeros((len(functions), 4), np.int64), np.zeros((len(functions), 4))
        for row, (_, of) in enumerate(functions):
            for column, (both, value) in enumerate(of.items()):
                pair[row, column], times[row, column] = place[frozenset(both)], value
        ways.append(_WayFunctions(pair, times, np.array([constant for constant, _ in functions])))
    return np.array(pairs, np.int64), ways[0], ways[1]


@kernel
def step_ways(
    ids: Any,
    weight: Any,
    pairs: Any,
    function: Any,
    times: Any,
    constant: Any,
    odds: Any,
    gram: Any,
    beside: Any,
    step: float,
    inside: Any,
    charged: Any,
) -> float:
    """One projected step of each token's odds towards the functions that `gram` [n, n] makes dearest; adds weight *
    coefficients of pairs of items to inside [n, n], of those with the reference to charged [n], and returns the
    constant.

    beside: [n] of each item with the reference. function, times, constant: see `_WayFunctions`. odds: [T, F].
    """
    k, count, functions = ids.shape[1], len(pairs), len(constant)
    apart, charge = np.empty(count), np.empty(count)
    moved, falling = np.empty(functions), np.empty(functions)
    total = 0.0
    for t in range(len(ids)):
        for p in range(count):
            a, b = pairs[p, 0], pairs[p, 1]
            apart[p] = 1.0 - (beside[ids[t, a]] if b == k else gram[ids[t, a], ids[t, b]])
            charge[p] = 0.0
        for f in range(functions):
            value = constant[f]
            for q in range(4):
                value += times[f, q] * apart[function[f, q]]
            moved[f] = odds[t, f] + step * value
        shift = simplex_shift(moved, falling)
        w = weight[t]
        for f in range(functions):
            odds[t, f] = max(0.0, moved[f] - shift)
            if odds[t, f] > 0.0:
                total += w * odds[t, f] * constant[f]
                for q in range(4):
                    charge[function[f, q]] += odds[t, f] * times[f, q]
        for p in range(count):
            a, b = pairs[p, 0], pairs[p, 1]
            total += w * charge[p]
            if b == k:
                charged[ids[t, a]] -= w * charge[p]
            else:
                inside[ids[t, a], ids[t, b]] -= w * charge[p]
    return total


@kernel
def sent_one_way(
    ids: Any, weight: Any, pairs: Any, function: Any, times: Any, constant: Any, gram: Any, beside: Any
) -> float:
    """Sum of weight times the largest function of each token."""
    k, count = ids.shape[1], len(pairs)
    apart = np.empty(count)
    total = 0.0
    for t in range(len(ids)):
        for p in range(count):
            a, b = pairs[p, 0], pairs[p, 1]
            apart[p] = 1.0 - (beside[ids[t, a]] if b == k else gram[ids[t, a], ids[t, b]])
        most = 0.0
        for f in range(len(constant)):
            value = constant[f]
            for q in range(4):
                value += times[f, q] * apart[function[f, q]]
            most = max(most, value)
        total += weight[t] * most
    return total


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


def shared_simplex(points: FloatArray, rest: float) -> tuple[FloatArray, float]:
    """The nearest rows [R, n] and number, none negative, where each row sums to one less the number.

    A row that sums to s is the point less a shift, clipped at zero; the further s rises the less the shift, which is
    how fast the distance grows. So s is where all shifts together and the number's come to nothing.
    """
    falling = -np.sort(-points, axis=1)
    above = np.cumsum(falling, axis=1)
    count = np.arange(1, points.shape[1] + 1)
    low, high = 0.0, 1.0
    for _ in range(40):
        size = 0.5 * (low + high)
        if ((above - size) / count).max(axis=1).sum() > rest - (1.0 - size):
            low = size
        else:
            high = size
    shift = ((above - high) / count).max(axis=1)
    rows = np.maximum(points - shift[:, None], 0.0)
    # What bounds must not rely on a root: rows are made to sum to what they should.
    rows *= (high / np.maximum(rows.sum(axis=1), 1e-300))[:, None]
    return np.asarray(rows), 1.0 - high


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
