"""Lower bounds of a relaxed cost by a primal-dual walk (Chambolle and Pock, J. Math. Imaging Vis. 40, 2011).

Minimise over the space of Gram matrices X the sum of the terms' costs. Whatever the terms' multipliers are, replacing every
term by its line leaves a linear cost, whose least value over the space is one eigenvalue decomposition away: that
is the bound, valid at any iteration; the walk only makes it good.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .gram import FloatArray, GramSpace
from .terms import Term

PACE = 0.5
"""Length of a step in X, in experts over the cost: what served best from one layer on nodes to two on devices."""


class Saddle:
    """One relaxed problem, walked on as long as is asked. Not thread-safe; several instances may run side by side."""

    def __init__(self, space: GramSpace, terms: Sequence[Term]) -> None:
        self._space, self._terms = space, terms
        self._gram = space.middle()
        for term in terms:
            term.begin(self._gram)
        self._charge = self._total_charge()
        scale = max(abs(sum(term.cost(self._gram) for term in terms)), 1e-300)
        self._step = PACE * space.items / scale
        self._steps = self._dual_steps()
        self.iterations = 0
        self.bound = self._line_bound()

    def run(self, iterations: int) -> float:
        """Walks on and returns the best bound so far."""
        for _ in range(iterations):
            moved = self._space.project(self._gram - self._step * self._charge)
            ahead = 2.0 * moved - self._gram
            self._gram = moved
            for term, step in zip(self._terms, self._steps, strict=True):
                term.ascend(ahead, step)
            self._charge = self._total_charge()
        self.iterations += iterations
        self.bound = max(self.bound, self._line_bound())
        return self.bound

    @property
    def relaxed_cost(self) -> float:
        """What the terms cost at the walk's X: near the best bound there is to find, once X meets all limits."""
        return float(sum(term.cost(self._gram) for term in self._terms))

    def _line_bound(self) -> float:
        return self._space.least(self._charge) + sum(term.constant() for term in self._terms)

    def _total_charge(self) -> FloatArray:
        return np.asarray(sum((term.charge() for term in self._terms), np.zeros_like(self._gram)))

    def _dual_steps(self) -> list[float]:
        """As long as converges: the sum of steps times each map's squared norm is one over the step in X."""
        start = np.random.default_rng(0).random(self._gram.shape)
        start = start + start.T
        norms = [_norm(lambda gram, term=term: term.spread(gram), start) for term in self._terms]

        def together(gram: FloatArray) -> FloatArray:
            parts = [term.spread(gram) / norm for term, norm in zip(self._terms, norms, strict=True)]
            return np.asarray(sum(parts, np.zeros_like(gram)))

        total = _norm(together, start)
        return [1.0 / (1.05 * total * norm * self._step) for norm in norms]


def _norm(operator, start: FloatArray, rounds: int = 12) -> float:  # type: ignore[no-untyped-def]
    """Largest eigenvalue of a positive semidefinite map on matrices, by power iteration."""
    vector, norm = start / np.linalg.norm(start), 1.0
    for _ in range(rounds):
        image = operator(vector)
        norm = float(np.linalg.norm(image))
        if norm < 1e-300:
            return 1.0
        vector = image / norm
    return norm
