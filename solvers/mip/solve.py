"""Solves a program within a budget by a named backend, or by several that share the time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

from ..._types import FloatArray
from ...placement.errors import InputError, UnsupportedError, nearest
from ..base import Budget
from .program import FEASIBLE, Backend, Feature, Program, Request, Result

PORTFOLIO = "portfolio"

_CLASSES = {
    "highs": (".highs", "Highs"),
    "cpsat": (".cpsat", "CpSat"),
    "cbc": (".cbc", "Cbc"),
}
"""Where each backend is. Their libraries are imported with them, when first used."""

BACKENDS = (PORTFOLIO, *_CLASSES)
"""Names that programs may be solved by."""

FIRST_SHARE, PLAN_SHARE = 0.1, 0.5
"""Parts of a portfolio's time: for HiGHS, in which small programs end; for CP-SAT, whose plans are the best; HiGHS,
whose bounds are, gets the rest."""


def check_backend(name: str) -> None:
    """Refuses a backend that is unknown.

    Raises:
        InputError: the nearest known one is named.
    """
    if name not in BACKENDS:
        raise InputError(f"backend {name!r} is unknown; {nearest(name, BACKENDS)}")


def backend_named(name: str) -> Backend:
    """The backend of that name.

    Raises:
        InputError: unknown name; the nearest is named. UnsupportedError: its library cannot be imported.
    """
    if name not in _CLASSES:
        raise InputError(f"backend {name!r} is unknown; {nearest(name, _CLASSES)}")
    module, cls = _CLASSES[name]
    try:
        made: Backend = getattr(import_module(module, __package__), cls)()
    except ImportError as error:
        raise UnsupportedError(
            f"backend {name!r} cannot be loaded ({error}); install its library, or use another: {', '.join(_CLASSES)}"
        ) from error
    return made


def solve_program(
    program: Program,
    budget: Budget,
    *,
    backend: str = PORTFOLIO,
    seconds: float | None = None,
    relative_gap: float = 0.0,
    absolute_gap: float = 0.0,
    start: FloatArray | None = None,
    report: Callable[[float, float | None], None] | None = None,
) -> Result:
    """Minimises a program.

    Without a limit of time, the same seed gives the same result.

    Args:
        program: What to solve.
        budget: Gives the seed, and the time together with `seconds`.
        backend: A name of BACKENDS. "portfolio": HiGHS where there is
            no limit of time or no integer variable, else HiGHS, CP-SAT and HiGHS again share the time.
        seconds: A limit below what is left of `budget`.
        relative_gap, absolute_gap: At or below which a backend may stop.
        start: [n] values to begin from. Feasible ones are never answered by worse; others are hints.
        report: Told (value, bound) of each solution better than all before it, by backends with NEWS.

    Returns:
        The best solution found and the best bound proven, or why there is none (see `Result.solution`).

    Raises:
        InputError: unknown backend. UnsupportedError: the backend cannot take this program, or its library is missing.
        SolveError: the backend failed.
    """
    limits = [limit for limit in (seconds, budget.left) if limit is not None]
    limit = min(limits) if limits else None
    tell = _Better(report)
    request = Request(limit, None, budget.seed, relative_gap, absolute_gap, start, tell)
    start_result = None
    if start is not None and program.violation(start) <= FEASIBLE:
        value = program.value(start)
        start_result = Result("start", "time limit", start, value, -math.inf)
        tell.value = value
    if limit is not None and limit <= 0:
        check_backend(backend)
        result = Result(backend, "time limit", None, math.inf, -math.inf)
    elif backend == PORTFOLIO:
        result = _portfolio(program, request)
    else:
        result = _checked(program, backend).solve(program, request)
    if start_result is not None and start_result.value <= result.value:
        # What was given counts by its own objective, whatever a backend made of it.
        result = replace(
            result,
            values=start_result.values,
            value=start_result.value,
            bound=min(result.bound, start_result.value),
            infeasible=False,
        )
    return replace(result, seconds=request.spent)


def _checked(program: Program, name: str) -> Backend:
    backend = backend_named(name)
    needed = Feature.INTEGERS if program.integral.any() else Feature.CONTINUOUS
    if needed not in backend.features:
        able = [other for other in _CLASSES if needed in backend_named(other).features]
        raise UnsupportedError(f"backend {name!r} does not take {needed.value}; these do: {', '.join(able)}")
    return backend


def _portfolio(program: Program, request: Request) -> Result:
    """HiGHS alone where nothing limits it, else HiGHS, CP-SAT and HiGHS one after the other, each from the best so
    far."""
    if request.seconds is None or not program.integral.any():
        return backend_named("highs").solve(program, request)
    end, best = request.seconds, None
    for name, share in (("highs", FIRST_SHARE), ("cpsat", FIRST_SHARE + PLAN_SHARE), ("highs", 1.0)):
        start = request.start if best is None or best.values is None else best.values
        left = max(0.01, share * end - request.spent)
        result = backend_named(name).solve(
            program, replace(request, seconds=left, start=start, asked=time.perf_counter())
        )
        best = result if best is None else best_of(best, result)
        gap = max(request.absolute_gap, request.relative_gap * abs(best.value))
        if best.stop == "interrupted" or best.status in ("optimal", "infeasible") or best.value - best.bound <= gap:
            return best
    assert best is not None
    return best


def best_of(one: Result, other: Result) -> Result:
    """The better solution of two results of one program, the better bound, and how the second ended."""
    if one.infeasible or other.infeasible:
        return one if one.infeasible else other
    better = one if one.value <= other.value else other
    bound = min(max(one.bound, other.bound), better.value)
    return replace(other, backend=better.backend, values=better.values, value=better.value, bound=bound)


class _Better:
    """Passes on news of solutions better than all before, with the best bound so far."""

    def __init__(self, report: Callable[[float, float | None], None] | None) -> None:
        self.report = report
        self.value, self.bound = math.inf, -math.inf

    def __call__(self, value: float, bound: float | None) -> None:
        self.bound = max(self.bound, -math.inf if bound is None else bound)
        if self.report is not None and value < self.value:
            self.value = value
            self.report(value, min(self.bound, value) if math.isfinite(self.bound) else None)
