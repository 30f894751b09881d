"""Gram matrices of placements, relaxed: X[i, j] is how much of experts i and j stands together.

With M [n, H] the share of each of n experts on each of H holders (devices, or nodes), X = M M^T. M is not convex, X nearly:
rows of M sum to one, so X is at least J / H (J all ones) in the semidefinite order; its entries are not negative; and
its spectral norm is at most a holder's slots. Where every holder has c slots and experts stand whole, X - J / H lives on
the vectors that sum to zero within each layer, has trace n - n / H, and at most H - 1 eigenvalues m c (m layers at once).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

ROUNDING = 1e-12
"""Relative error of an eigenvalue, taken off every bound; LAPACK's is some hundred times smaller."""


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
    def _room(self) -> tuple[float, float]:
        base = self.items / self.holders
        return max(0.0, self.trace[0] - base), self.trace[1] - base

    def middle(self) -> FloatArray:
        """[n, n] the most symmetric member: every two experts together as much as any other two."""
        kept = (self.items / self.holders - 1.0) / max(1, self.items - 1)
        return np.full((self.items, self.items), max(0.0, kept)) + (1.0 - max(0.0, kept)) * np.eye(self.items)

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
        low, high = self._room
        filled = np.minimum(self.cap * np.arange(1, len(values) + 1), high)
        taken = np.diff(np.concatenate([[0.0], filled]))
        # Past the least trace only what lowers the sum is taken.
        needed = np.diff(np.concatenate([[0.0], np.minimum(filled, low)]))
        taken = np.where(values < 0.0, taken, needed)
        margin = ROUNDING * (float(np.abs(values).max(initial=0.0)) * high + float(np.abs(cost).sum()) / self.holders)
        return float(cost.sum() / self.holders + values @ taken - margin)

    def _fit(self, values: FloatArray) -> FloatArray:
        """The nearest eigenvalues within [0, cap] whose sum is within the trace: all shifted alike, then clipped."""
        low, high = self._room
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
