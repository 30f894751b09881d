"""Several starts, one multistart: a short cold walk from each tells, layer by layer, which basin is the deepest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ..._types import FloatArray, IntArray
from ..base import Budget
from .annealer import Annealer
from .kernel_types import RiskWeights

# How many proposals a round gets, so that a time limit is met and a cooling still ends cold.


FIRST_ROUND = 20
"""Proposals of the first timed round: a few milliseconds to a second, enough to learn the speed."""


class CoolingSchedule:
    """Deals `proposals` evenly over rounds; with a time limit, what is left of the time evenly over rounds left."""

    def __init__(
        self, budget: Budget, proposals: int, rounds: int = 12, reserve: float = 0.0, first: int = FIRST_ROUND
    ) -> None:
        """reserve: seconds to leave over at the end. first: proposals of the first round under a time limit."""
        self._budget, self.rounds, self._reserve, self._first = budget, rounds, reserve, first
        self._even = max(1, proposals // rounds)
        self._given = 0
        self._per_proposal: float | None = None
        self._beside = 0.0
        self._ended: float | None = None

    def proposals(self, round_: int) -> int:
        """Proposals for this round, the first being 0."""
        if self._budget.left is None:
            self._given = self._even
        elif self._per_proposal is None:
            self._given = self._first
        else:
            share = max(0.0, self._budget.left - self._reserve) / max(1, self.rounds - round_) - self._beside
            self._given = max(1, int(share / self._per_proposal))
        return self._given

    @property
    def spent(self) -> bool:
        """Whether there is no time left for another round."""
        return self._budget.left is not None and self._budget.left <= self._reserve

    @property
    def expected(self) -> float:
        """Proposals a layer gets over all rounds, as far as is known; none before the first timed round."""
        if self._budget.left is None:
            return float(self._even * self.rounds)
        return 0.0 if self._per_proposal is None else self._budget.left / self._per_proposal

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """Around a round: learns what a proposal takes, and what is spent between rounds."""
        start = self._budget.elapsed
        if self._ended is not None:
            self._beside = start - self._ended
        yield
        self._ended = self._budget.elapsed
        self._per_proposal = max(self._ended - start, 1e-6) / self._given


Start = tuple[list[IntArray], list[FloatArray]]

EFFORT = 20
"""A walk gets one part in so many of all effort."""
WARM, COLD = 3e-2, 1e-3
"""Temperatures of the walks, in typical changes: cold enough to stay in the basin a start lies in."""


def multistart(
    annealer: Annealer, starts: Sequence[Start], risks: Sequence[RiskWeights], budget: Budget, proposals: int
) -> Start:
    """(slot tables, shares) of the best layers after a walk from each start. Layers must not depend on each other."""
    if len(starts) == 1:
        return starts[0]
    runners = []
    for start in starts:
        brief = Budget(None if budget.left is None else budget.left / EFFORT, budget.seed)
        annealer.start(*start, risks)
        schedule = CoolingSchedule(brief, max(1, proposals // EFFORT), rounds=2)
        for turn in range(2):
            with schedule.timing():
                annealer.run(risks, schedule.proposals(turn), WARM, COLD)
        runners.append(annealer.states)
    best = [min(layers, key=lambda state: state.value).best for layers in zip(*runners, strict=True)]
    return [layer.slot_expert for layer in best], [layer.share for layer in best]
