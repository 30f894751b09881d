"""Lower bounds over partitions of experts into sets, by a linear program whose columns are sets.

Whatever set a given expert is in, a step takes at least what that set alone costs. With x[A] the chance that A is one
of the sets, each figure k is thus at least the sum over sets A of expert i of x[A] cost[k, A], for every i. Sets are
added as the program's prices ask for them (Gilmore and Gomory, Oper. Res. 9, 1961), prices being taken from an interior
point, which spares most of the rounds (Gondzio, Gonzalez-Brevis and Munari, Eur. J. Oper. Res. 224, 2013).
"""

from __future__ import annotations

import numpy as np

from ..._types import FloatArray, IntArray
from ..base import working_seconds
from ..mip.highs import QuietHighs
from .sdp import ROUNDING

CLOSE = 2e-3
"""Rounds end when the bound is this near, relatively, to the value of the program's own sets."""
ADDED, FIRST = 400, 800
"""Sets added a round, and to begin with."""
TRUSTED = 1e-4
"""Relative tolerance of an interior point: prices need not be better than that, as the bound holds for any."""
ROUNDS = 50


def least_over_partitions(members: IntArray, cost: FloatArray, sets: int, seconds: float) -> float:
    """A lower bound, over all partitions of experts into `sets` of the sets `members` [A, c], of the sum over k of the
    largest cost[k, A] among the partition's sets. cost: [K, A], not negative; members in lexicographic order.

    Ends when nothing is left to gain or the seconds are spent; -inf when they were too few.
    """
    end = working_seconds() + seconds
    if members.shape[1] == 1:
        return float(cost.max(axis=1).sum())
    scale = float(cost.mean(axis=1).sum())
    if scale <= 0.0:
        return 0.0
    program = _Program(members, cost / scale, sets)
    best = -np.inf
    for _ in range(ROUNDS):
        left = end - working_seconds()
        if left <= 0.0 or not program.solve(left):
            break
        best = max(best, program.bound)
        if best >= program.value * (1.0 - CLOSE) or not program.add_cheapest():
            break
    return best * scale


class _Program:
    """The program of some of the sets: minimise the sum of figures t[k] that are at least what every expert's set
    costs.

    value: of the last solution. bound: a lower bound over all sets, by its prices.
    """

    def __init__(self, members: IntArray, cost: FloatArray, sets: int) -> None:
        self._members, self._cost, self._sets = members, cost, sets
        self._figures, self._experts = len(cost), int(members.max()) + 1
        self._inside = np.zeros(len(members), dtype=bool)
        self._prices = cost.sum(axis=0)
        self.value, self.bound = np.inf, -np.inf
        self._solver = QuietHighs()
        options: dict[str, bool | float | str] = {
            "output_flag": False,
            "solver": "ipm",
            "run_crossover": "off",
            "ipm_optimality_tolerance": TRUSTED,
        }
        for name, value in options.items():
            self._solver.setOptionValue(name, value)
        self._frame()
        self._add(self._first())

    def _frame(self) -> None:
        """Figures as columns, and the rows: t[k] less the chances' costs, for each k and expert; an expert's chances
        sum to one."""
        figures, experts = self._figures, self._experts
        rows = figures * experts
        none, nothing, ones, most = np.zeros(rows, np.int32), np.zeros(0), np.ones(rows), np.full(rows, np.inf)
        self._solver.addCols(
            figures, ones[:figures], np.zeros(figures), most[:figures], 0, none[:figures], none[:0], nothing
        )
        figure_of = np.repeat(np.arange(figures, dtype=np.int32), experts)
        self._solver.addRows(rows, np.zeros(rows), most, rows, np.arange(rows, dtype=np.int32), figure_of, ones)
        self._solver.addRows(experts, ones[:experts], ones[:experts], 0, none[:experts], none[:0], nothing)

    def _first(self) -> IntArray:
        """Sets of whole partitions, so that there is a solution, and the cheapest ones."""
        size = self._members.shape[1]
        if len(self._members) <= 4 * FIRST:
            return np.arange(len(self._members))
        weights = self._experts ** np.arange(size - 1, -1, -1)
        rng = np.random.default_rng(0)
        partitions = max(1, FIRST * size // (2 * self._experts))
        drawn = np.concatenate([rng.permutation(self._experts) for _ in range(partitions)]).reshape(-1, size)
        # In lexicographic order the sets' keys rise.
        places = np.searchsorted(self._members @ weights, np.sort(drawn, axis=1) @ weights)
        return np.unique(np.concatenate([places, np.argpartition(self._prices, FIRST // 2)[: FIRST // 2]]))

    def add_cheapest(self) -> bool:
        """Adds sets whose reduced prices are lowest and below zero; whether there were any."""
        some = min(ADDED, len(self._prices) - 1)
        cheapest = np.argpartition(self._prices, some)[: some + 1]
        return self._add(cheapest[self._prices[cheapest] < -ROUNDING])

    def _add(self, sets: IntArray) -> bool:
        new = sets[~self._inside[sets]]
        if not len(new):
            return False
        self._inside[new] = True
        members = self._members[new]
        rows = np.arange(self._figures + 1)[None, :, None] * self._experts + members[:, None, :]
        values = np.concatenate([-self._cost[:, new].T, np.ones((len(new), 1))], axis=1)
        zero, width = np.zeros(len(new)), rows[0].size
        self._solver.addCols(
            len(new),
            zero,
            zero,
            np.full(len(new), np.inf),
            rows.size,
            np.arange(len(new), dtype=np.int32) * width,
            rows.ravel().astype(np.int32),
            np.repeat(values, members.shape[1], axis=1).ravel(),
        )
        return True

    def solve(self, seconds: float) -> bool:
        """Takes new prices; False when there are none in the time."""
        # The limit is on all runs of a solver together.
        self._solver.setOptionValue("time_limit", self._solver.getRunTime() + seconds)
        self._solver.run()
        duals = np.asarray(self._solver.getSolution().row_dual)
        split = self._figures * self._experts
        if len(duals) != split + self._experts or not np.isfinite(duals).all():
            return False
        # Any weights of the experts bound a figure, if they are not negative and sum to one.
        over = np.maximum(duals[:split].reshape(self._figures, self._experts), 0.0) + ROUNDING
        self._take(over / over.sum(axis=1, keepdims=True), duals[split:])
        self.value = float(self._solver.getInfo().objective_function_value)
        return True

    def _take(self, over: FloatArray, paid: FloatArray) -> None:
        """Prices sets by weights of experts [K, E] and what each pays [E]. No set is cheaper than the cheapest: that
        bounds every partition, whatever the prices are."""
        charged, size = np.zeros(len(self._members)), self._members.shape[1]
        for figure, weight in zip(self._cost, over, strict=True):
            charged += figure * sum(weight[self._members[:, place]] for place in range(size))
        self._prices = charged - paid[self._members].sum(axis=1)
        margin = ROUNDING * self._sets * (float(charged.max()) + float(np.abs(paid).sum()))
        self.bound = float(paid.sum() + self._sets * self._prices.min() - margin)
