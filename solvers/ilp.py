"""Runs a PuLP model and says what was really found and proven.

PuLP reports a time-limited incumbent as `Optimal`, and its HiGHS and CBC interfaces keep neither the dual bound nor a
warm start. Both are read and set here, so that nothing is called optimal without a bound that proves it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..placement.errors import InputError, SolveError, nearest
from ..placement.plan import RELATIVE_TOLERANCE
from .base import Budget

if TYPE_CHECKING:
    import pulp

BACKENDS = ("highs", "cbc")


@dataclass(frozen=True)
class IlpRequest:
    """What a backend is told. seconds: wall clock from `asked` on, None for no limit. Gaps at or below which it may stop. start: a
    value for every variable, by name. report: called with (value, bound) of solutions found, where the backend can.
    """

    seconds: float | None = None
    seed: int = 0
    relative_gap: float = 0.0
    absolute_gap: float = 0.0
    start: Mapping[str, float] | None = None
    report: Callable[[float, float | None], None] = lambda value, bound: None
    asked: float = field(default_factory=time.perf_counter)

    def seconds_left(self) -> float | None:
        """What is left to search in, when handing the model over took until now and reading the answer takes as long."""
        if self.seconds is None:
            return None
        spent = time.perf_counter() - self.asked
        return max(0.01, self.seconds - 2.0 * spent)


@dataclass(frozen=True)
class BackendRun:
    """How a backend ended. Values of a solution, if any was found, are in the model's variables."""

    found: bool
    infeasible: bool
    finished: bool
    bound: float | None


@dataclass(frozen=True)
class IlpResult:
    """A solution of a minimisation.

    value: the objective of `values` (by variable name). bound: no solution is below it; None when the backend proved
    nothing. finished: the backend stopped by itself, at optimality or within the gap asked for, not at the time limit.
    """

    value: float
    bound: float | None
    finished: bool
    values: Mapping[str, float]

    @property
    def status(self) -> Literal["optimal", "feasible"]:
        """Optimal only where the bound meets the value."""
        if self.bound is None:
            return "feasible"
        return "optimal" if self.value - self.bound <= RELATIVE_TOLERANCE * max(1.0, abs(self.value)) else "feasible"


def check_backend(name: str) -> None:
    """Refuses an unknown backend.

    Raises:
        InputError: the nearest known one is named.
    """
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is unknown; {nearest(name, BACKENDS)}")


def add_row(model: pulp.LpProblem, terms: Iterable[tuple[pulp.LpVariable, float]], sense: str, rhs: float) -> None:
    """Adds `sum of coefficient times variable <sense> rhs`, sense "<=", "==" or ">=", variables all different.

    Several times faster than PuLP's operators, which copy the expression at every step.
    """
    import pulp

    senses = {"<=": pulp.LpConstraintLE, "==": pulp.LpConstraintEQ, ">=": pulp.LpConstraintGE}
    model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(list(terms)), senses[sense], rhs=rhs))


def solve_ilp(
    model: pulp.LpProblem,
    budget: Budget,
    *,
    backend: str = "highs",
    seconds: float | None = None,
    relative_gap: float = 0.0,
    absolute_gap: float = 0.0,
    start: Mapping[str, float] | None = None,
    report: Callable[[float, float | None], None] | None = None,
) -> IlpResult:
    """Minimises `model` with HiGHS ("highs", in process) or CBC ("cbc", the program PuLP brings).

    seconds: a limit below what is left of `budget`. start: a feasible value for every variable (not checked); the
    result is never worse than it, whatever the backend makes of it. report: told of each solution
    better than the start, by HiGHS only.

    Raises:
        InputError: unknown backend, or a model that maximises.
        SolveError: no solution exists, or none was found in time and no start was given.
        UnsupportedError: CBC is not installed here.
    """
    import pulp

    check_backend(backend)
    if model.sense != pulp.LpMinimize:
        raise InputError(f"solve_ilp: model {model.name!r} maximises; state it as a minimisation")
    limits = [limit for limit in (seconds, budget.left) if limit is not None]
    limit = min(limits) if limits else None
    given = None if start is None else _valued(model, start)
    best = math.inf if given is None else given[0]

    def tell(value: float, bound: float | None) -> None:
        if report is not None and value < best:
            report(value, bound)

    request = IlpRequest(limit, budget.seed, relative_gap, absolute_gap, start, tell)
    run = _runner(backend)(model, request) if limit is None or limit > 0 else BackendRun(False, False, False, None)
    if run.infeasible:
        raise SolveError(f"the integer program {model.name!r} has no solution ({backend})")
    candidates: list[tuple[float, Mapping[str, float]]] = []
    if run.found:
        candidates.append(_valued(model, {v.name: float(v.varValue or 0.0) for v in model.variables()}))
    if given is not None:
        candidates.append(given)
    if not candidates:
        raise SolveError(
            f"{backend} found no solution of the integer program {model.name!r} ({len(model.variables()):,} variables) "
            f"within {limit or 0.0:.1f} s; allow more seconds, or let it start from a given solution"
        )
    value, values = min(candidates, key=lambda candidate: candidate[0])
    return IlpResult(value, run.bound, run.finished, values)


def _runner(backend: str) -> Callable[[pulp.LpProblem, IlpRequest], BackendRun]:
    if backend == "cbc":
        from .ilp_cbc import run_cbc

        return run_cbc
    from .ilp_highs import run_highs

    return run_highs


def _valued(model: pulp.LpProblem, values: Mapping[str, float]) -> tuple[float, Mapping[str, float]]:
    objective: Any = model.objective
    return float(objective.constant) + sum(values[v.name] * c for v, c in objective.items()), values
