"""Which recorded windows count how much beside their tokens, so that balancing their weighted mean serves the objective's risk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...placement.problem import Problem
from ...placement.risk import tail_weight
from .scenario import Scenario

FloatArray = npt.NDArray[np.float64]

LEAST_EXCESS = 1e-9


class WindowWeights:
    """`weight` [S], summing to 1, and what is learnt from a plan's figures about it.

    Under `worst_workload` and `regret` the workloads that lie above the others gain weight in proportion (multiplicative
    weights, Arora, Hazan and Kale 2012), which raises the mean of what is left to the worst. `reference` [W] is what
    regret is measured against.
    """

    def __init__(self, problem: Problem, scenario: Scenario) -> None:
        self._objective = problem.objective
        self._workload = scenario.workload
        self._learnt = 0
        self.reference: FloatArray | None = None
        self._even = scenario.step_weight
        size = np.bincount(scenario.workload, weights=self._even)
        self._part = self._even / size[scenario.workload]
        """[S] what each window is of its workload."""
        if problem.objective.risk in ("worst_workload", "regret"):
            self.weight = self._part / (size > 0).sum()
        else:
            self.weight = self._even

    def learn(self, figures: FloatArray, bound: FloatArray) -> None:
        """Shifts weight to where `figures` [S] of a plan lie high; bound: [S]."""
        tail = self._objective.tail
        if tail is not None:
            self._shift(tail_weight(figures, tail, self._even))
        elif self._objective.risk != "mean":
            base = bound if self.reference is None else self.reference[self._workload]
            above = np.bincount(self._workload, weights=(figures - base) * self._part)[self._workload]
            # A loss may be negative under regret, its reference being a plan found, not the best there is.
            above = np.maximum(above - min(0.0, float(above.min())), LEAST_EXCESS)
            self._shift(self.weight * above)

    def _shift(self, towards: FloatArray) -> None:
        # By less each time (fictitious play), else two sets of windows would take turns for ever.
        self._learnt += 1
        self.weight = self.weight + (towards / towards.sum() - self.weight) / (self._learnt + 1)
