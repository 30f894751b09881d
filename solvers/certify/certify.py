"""Time spent on a better lower bound: sets of a device gone through, and relaxed pieces of the step time walked on, until the
clock says stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..._types import FloatArray
from ...placement.bounds import compute_bound, layer_seconds_bound
from ...placement.problem import Problem
from ...placement.steps import Steps
from ..base import working_seconds
from .device_sets import DeviceSets, sets_fit
from .partition import least_over_partitions
from .pieces import Level, Piece, Pieces, levels

THREADS = 2
"""Pieces walked on at once; each is a run of small matrix operations, which more threads only get in the way of."""
CHUNK = 25
"""Iterations between two looks at the clock."""
CLOSED = 2e-3
"""A piece is done when its bound comes this near, relatively, to its relaxed problem's cost."""
MOST = 2_000
"""Iterations of a piece past which nothing is gained."""
SET_SECONDS = 3e-5
"""A layer's bound by sets, for each set, on one core of 2020."""
FEW_SETS = 3_000
"""Sets that cost next to nothing, so that on several nodes copies inside them are looked at, too."""
SET_PART = 0.7
"""Of the time, what may go into sets."""


class StepCertificate:
    """A lower bound, over all plans of a problem, of the steps' seconds weighted by `weight` [S] (summing to one).

    It begins as the bound of single terms and never falls; `improve` spends time on it.
    """

    def __init__(self, problem: Problem, steps: Steps, weight: FloatArray) -> None:
        self._problem, self._steps, self._weight = problem, steps, weight
        # [L] of a layer with the dispatch into it, and of its compute alone.
        self._layer = weight @ layer_seconds_bound(steps, problem)
        self._work: FloatArray | None = None
        # A replica near the token's home is not one and the same for all tokens, which Gram matrices would have it be.
        chosen_near = problem.objective.replica_choice == "nearest" and problem.has_replicas
        self._levels: list[Level] = [] if chosen_near else levels(problem)
        self._cuts: list[_Cut] = []
        # Where tokens return home a piece is a layer, and the better bound of each layer counts.
        self._apart = problem.objective.execution == "dispatch_combine" or problem.model.layers == 1

    @property
    def bound(self) -> float:
        """Seconds."""
        whole = float(self._layer.sum())
        if not self._cuts:
            return whole
        # The pieces cut the step time alike on all levels, so that each may be bounded on the better one.
        best = np.max([cut.bounds() for cut in self._cuts], axis=0)
        if self._apart:
            best = np.maximum(best, self._layer)
        return max(whole, float(best.sum()))

    def improve(
        self, seconds: float, tell: Callable[[float], None] = lambda bound: None, iterations: int = MOST
    ) -> float:
        """Walks on for about so many seconds, less when nothing is left to gain; tells the bound as it rises.

        iterations: of a piece, at most (rounded up to whole chunks). Without a limit of seconds sets are left out.
        """
        begin = working_seconds()
        end = begin + seconds
        with ThreadPoolExecutor(THREADS) as pool:
            if self._work is None and sets_fit(self._problem) and np.isfinite(seconds):
                self._go_through_sets(pool, begin + SET_PART * seconds)
                tell(self.bound)
            for number, level in enumerate(self._levels):
                if working_seconds() >= end:
                    break
                if number == len(self._cuts):
                    self._cuts.append(self._cut(level, pool, end))
                for open_ in self._cuts[number].rounds(iterations):
                    if working_seconds() >= end:
                        break
                    list(pool.map(lambda piece: _walk(piece, end), open_))
                    tell(self.bound)
        return self.bound

    def _go_through_sets(self, pool: ThreadPoolExecutor, end: float) -> None:
        """Bounds every layer by the sets that a device can hold, as far as the time goes."""
        problem, layers = self._problem, self._problem.model.layers
        sets = DeviceSets(problem, self._steps, self._weight)
        if layers * len(sets.members) * SET_SECONDS > THREADS * (end - working_seconds()):
            return
        # Where copies between nodes decide, they are not of a device's set, and compute is bounded by itself.
        several = problem.topology.num_nodes > 1
        work = self._weight @ compute_bound(self._steps.loads().astype(np.float64), problem)

        def one(layer: int) -> None:
            figures = sets.work(layer)
            if several:
                left = end - working_seconds()
                work[layer] = max(work[layer], least_over_partitions(sets.members, figures, sets.devices, left))
            if not several or len(sets.members) <= FEW_SETS:
                figures = np.concatenate([figures, sets.transfers(layer)])
                left = end - working_seconds()
                least = least_over_partitions(sets.members, figures, sets.devices, left)
                self._layer[layer] = max(self._layer[layer], least)

        list(pool.map(lambda layer: one(layer) if working_seconds() < end else None, range(layers)))
        self._work = work

    def _cut(self, level: Level, pool: ThreadPoolExecutor, end: float) -> _Cut:
        """The pieces of a level, as many as there is time to make."""
        alone = self._work is not None and level.holders < self._problem.num_devices
        pieces = Pieces(self._problem, self._steps, self._weight, level, self._work if alone else None)

        def make(span: tuple[int, ...]) -> Piece | None:
            return pieces.make(span) if working_seconds() < end else None

        spans = pieces.spans()
        return _Cut(list(pool.map(make, spans)), np.array([pieces.known(span) for span in spans]))


class _Cut:
    """The pieces of a level; known: [pieces] what is known of each before it is walked on, or where it was not made."""

    def __init__(self, pieces: list[Piece | None], known: FloatArray) -> None:
        self._pieces, self._known = pieces, known

    def bounds(self) -> FloatArray:
        """[pieces] seconds."""
        found = [-np.inf if piece is None else piece.constant + piece.saddle.bound for piece in self._pieces]
        return np.maximum(found, self._known)

    def rounds(self, iterations: int) -> Iterator[list[Piece]]:
        """The pieces that still have something to gain, again and again."""
        made = [piece for piece in self._pieces if piece is not None]
        while open_ := [piece for piece in made if not _closed(piece, iterations)]:
            yield open_


def _walk(piece: Piece, end: float) -> None:
    if working_seconds() < end:
        piece.saddle.run(CHUNK)


def _closed(piece: Piece, iterations: int) -> bool:
    if piece.saddle.iterations >= iterations:
        return True
    cost = piece.saddle.relaxed_cost
    return piece.saddle.iterations > 0 and piece.saddle.bound >= cost - CLOSED * abs(cost + piece.constant)
