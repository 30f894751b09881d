"""Time spent on a better lower bound: pieces of the step time, walked on side by side until the clock says stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...placement.problem import Problem
from ...placement.step_bound import layer_seconds_bound
from ...placement.steps import Steps
from .gram import FloatArray
from .pieces import Level, Piece, Pieces, levels

THREADS = 2
"""Pieces walked on at once; each is a run of small matrix operations, which more threads only get in the way of."""
CHUNK = 25
"""Iterations between two looks at the clock."""
CLOSED = 2e-3
"""A piece is done when its bound comes this near, relatively, to its relaxed problem's cost."""
MOST = 2_000
"""Iterations of a piece past which nothing is gained."""


class StepCertificate:
    """A lower bound, over all plans of a problem, of the steps' seconds weighted by `weight` [S] (summing to one).

    It begins as the bound of single terms and never falls; `improve` spends time on it.
    """

    def __init__(self, problem: Problem, steps: Steps, weight: FloatArray) -> None:
        self._problem, self._steps, self._weight = problem, steps, weight
        single = weight @ layer_seconds_bound(steps, problem)
        self._single = float(single.sum())
        # A replica near the token's home is not one and the same for all tokens, which Gram matrices would have it be.
        chosen_near = problem.objective.replica_choice == "nearest" and problem.has_replicas
        self._levels: list[Level] = [] if chosen_near else levels(problem)
        self._pieces: list[list[Piece]] = []
        # Where tokens return home a piece is a layer, and the better bound of each layer counts.
        dispatched = problem.objective.execution == "dispatch_combine" or problem.model.layers == 1
        self._known = single if dispatched else None

    @property
    def bound(self) -> float:
        """Seconds."""
        if not self._pieces:
            return self._single
        # The pieces cut the step time alike on both levels, so that each may be bounded on the better one.
        best = np.max([[piece.constant + piece.saddle.bound for piece in pieces] for pieces in self._pieces], axis=0)
        if self._known is not None:
            best = np.maximum(best, self._known)
        return max(self._single, float(best.sum()))

    def improve(
        self, seconds: float, tell: Callable[[float], None] = lambda bound: None, iterations: int = MOST
    ) -> float:
        """Walks on for about so many seconds, less when nothing is left to gain; tells the bound as it rises.

        iterations: of a piece, at most (rounded up to whole chunks).
        """
        end = time.perf_counter() + seconds
        with ThreadPoolExecutor(THREADS) as pool:
            for number, level in enumerate(self._levels):
                if time.perf_counter() >= end:
                    break
                if number == len(self._pieces):
                    made = self._make(level, pool, end)
                    if made is None:
                        break
                    self._pieces.append(made)
                for open_ in self._rounds(self._pieces[number], iterations):
                    if time.perf_counter() >= end:
                        break
                    list(pool.map(lambda piece: _walk(piece, end), open_))
                    tell(self.bound)
        return self.bound

    def _make(self, level: Level, pool: ThreadPoolExecutor, end: float) -> list[Piece] | None:
        """All pieces of a level, or None when the time is up before."""
        pieces = Pieces(self._problem, self._steps, self._weight, level)

        def make(span: tuple[int, ...]) -> Piece | None:
            return pieces.make(span) if time.perf_counter() < end else None

        made = list(pool.map(make, pieces.spans()))
        whole = [piece for piece in made if piece is not None]
        return whole if len(whole) == len(made) else None

    @staticmethod
    def _rounds(pieces: list[Piece], iterations: int) -> Iterator[list[Piece]]:
        """The pieces that still have something to gain, again and again."""
        while open_ := [piece for piece in pieces if not _closed(piece, iterations)]:
            yield open_


def _walk(piece: Piece, end: float) -> None:
    if time.perf_counter() < end:
        piece.saddle.run(CHUNK)


def _closed(piece: Piece, iterations: int) -> bool:
    if piece.saddle.iterations >= iterations:
        return True
    cost = piece.saddle.relaxed_cost
    return piece.saddle.iterations > 0 and piece.saddle.bound >= cost - CLOSED * abs(cost + piece.constant)
