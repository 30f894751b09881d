"""The proven lower bound of a plan's step time, made better with the time given.

It begins as the bound of single terms. Time goes first into the sets of experts that a device can hold (`device_sets`,
`partition`), where there are few enough, then into semidefinite relaxations of single layers or neighbouring ones
(`relaxations`, `sdp`), until the clock says stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.bounds import compute_bound, layer_seconds_bound
from ...placement.objective import risk_weights
from ...placement.problem import Problem
from ...placement.steps import Steps
from ..base import working_seconds
from .device_sets import DeviceSets, sets_fit
from .partition import least_over_partitions
from .relaxations import Level, Relaxation, Relaxations, levels
from .sdp import CHUNK, MAX_ITERATIONS, THREADS

QUICK_ITERATIONS = 50
"""Iterations that bring most of what there is to gain."""
QUICK_SECONDS = 0.7
"""What a bound may cost that nobody asked for, on one core of 2020."""
SET_SECONDS = 3e-5
"""A layer's bound by sets, for each set, on one core of 2020."""
FEW_SETS = 3_000
"""Sets that cost next to nothing, so that on several nodes copies inside them are looked at, too."""
SET_PART = 0.7
"""Of the time, what may go into sets."""


def risk_bound(
    problem: Problem,
    steps: Steps,
    workload: IntArray,
    step_seconds: FloatArray,
    reference: FloatArray | None,
    seconds: float | None,
    report: Callable[[float], None] = lambda bound: None,
) -> float:
    """A lower bound of the risk of every plan for `problem` on `steps`, in seconds a step.

    Args:
        problem: which every plan is for.
        steps: S steps.
        workload: [S] of each step.
        step_seconds: [S] of the best plan known, which tells what steps matter.
        reference: what regret is measured against.
        seconds: time to spend; None takes what a little work gives, the same every time.
        report: called with the bound as it rises.
    """
    weight, offset = risk_weights(step_seconds, workload, problem.objective, reference, steps.weight, steps.batch)
    # Steps without weight need not be looked at.
    counted = np.flatnonzero(weight > 0)
    certificate = StepCertificate(problem, steps.select(counted), weight[counted])
    if seconds is not None:
        certificate.improve(seconds, lambda bound: report(bound + offset))
    elif (iterations := _quick_iterations(problem, steps)) > 0:
        certificate.improve(np.inf, iterations=iterations)
    return certificate.bound + offset


class StepCertificate:
    """A lower bound, over all plans of a problem, of the steps' seconds weighted by `weight` [S] (summing to one).

    It begins as the bound of single terms and never falls; `improve` spends time on it.
    """

    def __init__(self, problem: Problem, steps: Steps, weight: FloatArray) -> None:
        self._problem, self._steps, self._weight = problem, steps, weight
        # [L] of a layer with the dispatch into it, and of its compute alone.
        self._layer = weight @ layer_seconds_bound(steps, problem)
        self._work: FloatArray | None = None
        # A replica chosen by where the token lives or by the step is not one and the same for all tokens, which Gram
        # matrices would have it be.
        chosen = problem.objective.replica_choice != "share" and problem.has_replicas
        self._levels: list[Level] = [] if chosen else levels(problem, steps)
        self._bounds: list[_LevelBound] = []
        # Where tokens return home a relaxation is of one layer, and the better bound of each layer counts.
        self._by_layer = problem.objective.execution == "dispatch_combine" or problem.model.layers == 1

    @property
    def bound(self) -> float:
        """Seconds."""
        whole = float(self._layer.sum())
        if not self._bounds:
            return whole
        # The relaxations share out the step time alike on all levels, so that each may be bounded on the better one.
        best = np.max([level.bounds() for level in self._bounds], axis=0)
        if self._by_layer:
            best = np.maximum(best, self._layer)
        return max(whole, float(best.sum()))

    def improve(
        self, seconds: float, report: Callable[[float], None] = lambda bound: None, iterations: int = MAX_ITERATIONS
    ) -> float:
        """Works on the bound for about so many seconds, less when nothing is left to gain, and returns it.

        Args:
            seconds: to spend. Without a limit (inf) sets are left out.
            report: called with the bound as it rises.
            iterations: of a relaxation, at most (rounded up to whole chunks).
        """
        begin = working_seconds()
        end = begin + seconds
        with ThreadPoolExecutor(THREADS) as pool:
            if self._work is None and sets_fit(self._problem) and np.isfinite(seconds):
                self._go_through_sets(pool, begin + SET_PART * seconds)
                report(self.bound)
            for number, level in enumerate(self._levels):
                if working_seconds() >= end:
                    break
                if number == len(self._bounds):
                    self._bounds.append(self._relaxed(level, pool, end))
                for unsolved in self._bounds[number].rounds(iterations):
                    if working_seconds() >= end:
                        break
                    list(pool.map(lambda relaxation: _iterate(relaxation, end), unsolved))
                    report(self.bound)
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

    def _relaxed(self, level: Level, pool: ThreadPoolExecutor, end: float) -> _LevelBound:
        """The relaxations of a level, as many as there is time to make."""
        known_work = self._work is not None and level.holders < self._problem.num_devices
        relaxations = Relaxations(self._problem, self._steps, self._weight, level, self._work if known_work else None)

        def make(span: tuple[int, ...]) -> Relaxation | None:
            return relaxations.make(span) if working_seconds() < end else None

        spans = relaxations.spans()
        return _LevelBound(list(pool.map(make, spans)), np.array([relaxations.known(span) for span in spans]))


class _LevelBound:
    """The relaxations of a level.

    known: [relaxations] what is known of each before the first iteration, or where it was not made.
    """

    def __init__(self, relaxations: list[Relaxation | None], known: FloatArray) -> None:
        self._relaxations, self._known = relaxations, known

    def bounds(self) -> FloatArray:
        """[relaxations] seconds."""
        return np.maximum([-np.inf if each is None else each.bound for each in self._relaxations], self._known)

    def rounds(self, iterations: int) -> Iterator[list[Relaxation]]:
        """The relaxations that still have something to gain, again and again."""
        made = [relaxation for relaxation in self._relaxations if relaxation is not None]
        while unsolved := [each for each in made if not each.solver.solved(iterations, each.constant)]:
            yield unsolved


def _iterate(relaxation: Relaxation, end: float) -> None:
    if working_seconds() < end:
        relaxation.solver.run(CHUNK)


def _quick_iterations(problem: Problem, steps: Steps) -> int:
    """Iterations that cost about `QUICK_SECONDS`, by sizes and not by the clock; 0 where the set-up costs more."""
    coherent = problem.objective.execution == "context_coherent"
    items = problem.model.experts * (2 if coherent else 1)
    pairs = len(steps.expert_ids) * problem.model.top_k**2 * (2 if coherent else 1)
    layers = problem.model.layers
    setting_up, iteration = layers * pairs * 4e-8, layers * (4e-9 * items**3 + 3e-9 * pairs)
    return int(min(QUICK_ITERATIONS, max(0.0, QUICK_SECONDS - setting_up) / iteration))
