"""ExFlow: place experts by an integer program so that tokens change device between layers as seldom as possible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._types import FloatArray, IntArray
from ..placement.errors import SolveError
from ..placement.plan import RELATIVE_TOLERANCE, Certificate
from ..placement.problem import Problem
from .base import Budget, Feature, Needs, Solution, fill_slots
from .chain import TRANSITIONS_OBJECTIVE
from .exflow_bound import local_weight_bound
from .exflow_program import SCALE, check_size, exflow_program
from .exflow_stages import Stage, stages
from .exflow_start import assignment_sweeps, local_weight
from .ilp import check_backend, solve_ilp

BOUND_SHARE = 0.2
"""Part of the time left that goes into the semidefinite bound before the program."""
UNLIMITED_ITERATIONS = 300
"""Iterations of that bound where no time limit is given."""


class Exflow:
    """The integer program of Yao et al., "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts
    Model Inference" (ExFlow, arXiv 2401.08383): as many experts on a device as it has slots, fewest transitions
    between devices. Its variables are by expert pair, exactly equivalent to the paper's by token (see
    `exflow_program`); with top-k routing every pair of a token's experts in neighbouring layers counts 1/k.
    """

    name = "exflow"
    supports = frozenset({Feature.UNEVEN_SLOTS})
    needs = frozenset({Needs.TRANSITIONS})

    def solve(
        self,
        problem: Problem,
        budget: Budget,
        *,
        backend: str = "highs",
        form: str = "direct",
        warm_start: bool = True,
    ) -> Solution:
        """Places the experts; see `Solver` for the contract.

        backend: "highs" or "cbc". form: "direct" divides all devices at once; "staged" nodes first, then the devices
        of each node, so that the slow links count most; "bisect" in halves. warm_start: begin from assignment sweeps,
        so that there is always a plan and never a worse one, nor one worse than `Problem.current`; False is the program alone. Handing a program of a
        hundred thousand variables to a backend takes about five seconds, which a shorter time limit cannot cut.

        The bound holds for any placement, whatever the form: the best of a transportation bound (`local_weight_bound`), a
        semidefinite one (`kept_at_most`) and what the backend proved of the first program, since what crosses between groups of
        devices crosses between devices. Later programs only see what earlier ones left together; their bounds prove
        nothing about the whole and are not used. So only a form of one program can prove its plan optimal.

        Raises:
            InputError: unknown backend or form. UnsupportedError: no transitions, or too large a program.
            SolveError: no placement in time (without warm_start).
        """
        check_backend(backend)
        transitions, slots = problem.statistics.total_transitions, problem.slots_per_device
        stage = stages(problem.topology.node_of, slots, form)
        total = float(transitions.sum())
        if stage is None or total == 0.0:
            table = np.tile(np.arange(problem.model.experts), (problem.model.layers, 1))
            return Solution(table, Certificate(TRANSITIONS_OBJECTIVE, 0.0, 0.0))
        check_size(transitions, stage.group_slots(slots))
        kept = min(local_weight_bound(transitions, slots, budget), _semidefinite_bound(transitions, slots, budget))
        floor = max(0.0, 1.0 - kept / total)
        run = _Run(slots, floor, backend, warm_start, budget, stage.total_effort(slots))
        device_of = run.place(transitions, stage, first=True)
        current = _current_devices(problem) if warm_start else None
        if current is not None and local_weight(transitions, current) > local_weight(transitions, device_of):
            device_of = current
        value = max(0.0, 1.0 - local_weight(transitions, device_of) / total)
        bound = min(run.bound, value)
        budget.report(value, bound)
        return Solution(
            fill_slots(device_of),
            Certificate(TRANSITIONS_OBJECTIVE, value, bound),
            stop="finished" if run.finished else "time limit",
        )


def _current_devices(problem: Problem) -> IntArray | None:
    """[L, E] device of each expert in the plan in force, or None where there is none with these slots and one of each."""
    current = problem.current
    if current is None or not np.array_equal(current.slots_per_device, problem.layer_slots):
        return None
    return np.asarray(current.holds.argmax(axis=2)) if (current.replicas == 1).all() else None


def _semidefinite_bound(transitions: FloatArray, slots: IntArray, budget: Budget) -> float:
    """Most weight kept, in a fifth of the time left, or without a limit in a number of iterations that brings most of it."""
    # Compiled kernels: loading them takes a second, which importing the package must not.
    from .certify.transitions import kept_at_most

    if budget.left is None:
        return kept_at_most(transitions, slots, np.inf, UNLIMITED_ITERATIONS)
    return kept_at_most(transitions, slots, BOUND_SHARE * budget.left)


@dataclass
class _Run:
    """One solve going through its stages. bound: of the whole problem's crossing share, raised as more is proven."""

    slots: IntArray
    bound: float
    backend: str
    warm_start: bool
    budget: Budget
    effort_left: float
    finished: bool = True

    def place(self, transitions: FloatArray, stage: Stage, first: bool = False) -> IntArray:
        """[L, n] device of each of the n experts a layer that this stage and those after it divide."""
        group_of = self.divide(transitions, stage, first)
        if not any(stage.parts):
            return np.array([group[0] for group in stage.groups])[group_of]
        device_of = np.empty_like(group_of)
        layers = len(group_of)
        for index, (group, part) in enumerate(zip(stage.groups, stage.parts, strict=True)):
            members = np.nonzero(group_of == index)[1].reshape(layers, -1)
            if part is None or not members.size:
                inner = np.full(members.shape, group[0], dtype=np.int64)
            else:
                inside = [w[np.ix_(a, b)] for w, a, b in zip(transitions, members, members[1:], strict=False)]
                inner = self.place(np.array(inside), part)
            np.put_along_axis(device_of, members, inner, axis=1)
        return device_of

    def divide(self, transitions: FloatArray, stage: Stage, first: bool) -> IntArray:
        """[L, n] group of each expert, by one integer program."""
        slots, budget, whole = stage.group_slots(self.slots), self.budget, first and not any(stage.parts)
        effort = stage.effort(self.slots)
        stop_at = None if budget.left is None else budget.elapsed + budget.left * effort / self.effort_left
        self.effort_left -= effort
        if not whole:
            budget.report(None, self.bound, f"dividing {int(slots.sum())} experts a layer among {len(slots)} groups")
        total = float(transitions.sum())
        if total == 0.0:
            return np.tile(np.repeat(np.arange(len(slots)), slots), (len(transitions) + 1, 1))
        start = assignment_sweeps(transitions, slots, budget) if self.warm_start else None
        if start is not None and whole:
            value = 1.0 - local_weight(transitions, start) / total
            budget.report(value, self.bound, "assignment sweeps")
            if value <= self.bound * (1.0 + RELATIVE_TOLERANCE):
                return start
        try:
            program = exflow_program(transitions, slots, budget)
        except SolveError:
            if start is None:
                raise
            self.finished = False
            return start
        result = solve_ilp(
            program.model,
            budget,
            backend=self.backend,
            seconds=None if stop_at is None else max(0.0, stop_at - budget.elapsed),
            start=None if start is None else program.start(start),
            report=self.tell if whole else None,
        )
        self.finished &= result.finished
        if first and result.bound is not None:
            self.bound = max(self.bound, result.bound / SCALE)
        return program.placement(result.values)

    def tell(self, value: float, bound: float | None) -> None:
        """News from inside the program, where it is the only one."""
        self.budget.report(value / SCALE, max(self.bound, (bound or 0.0) / SCALE))
