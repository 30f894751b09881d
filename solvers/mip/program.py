"""An integer program as arrays, what a backend is asked about it, what it answers, and who is asked (`solve_program`).

    minimise    cost x + constant
    subject to  row_lower <= A x <= row_upper,  lower <= x <= upper,  x[integral] whole

A is held in compressed sparse rows, which HiGHS takes as they are. Programs of half a million variables are built in
half a second; an object a variable and row, as in PuLP, takes thirty times as long and three times the memory.

Names that can be exchanged without changing anything (equal devices, equal clusters) are taken in order of first use
along a fixed order of items. Every solution has exactly one renaming that does so, so a program may forbid names that
it cannot have.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.errors import InputError, SolveError, UnsupportedError, nearest
from ...placement.plan import RELATIVE_TOLERANCE
from ..base import Budget

if TYPE_CHECKING:
    from scipy.sparse import csr_array


FEASIBLE = 1e-6
"""How far a row or a bound may be missed, relative to its own size where that is above 1; backends' own tolerance."""


@dataclass(frozen=True, eq=False)
class Program:
    """A minimisation over n variables under m rows.

    Args:
        name: For messages.
        cost: [n].
        constant: Added to the objective.
        lower, upper: [n], infinite where there is no bound.
        integral: [n] variables that must be whole.
        implied: [n] variables that are whole in some optimum once `integral` ones are. Solvers over linear relaxations
            do without that, solvers over integers need it.
        row_start, column, coefficient: A in compressed sparse rows, [m + 1], [nonzeros], [nonzeros].
        row_lower, row_upper: [m].
    """

    name: str
    cost: FloatArray
    constant: float
    lower: FloatArray
    upper: FloatArray
    integral: BoolArray
    implied: BoolArray
    row_start: IntArray
    column: IntArray
    coefficient: FloatArray
    row_lower: FloatArray
    row_upper: FloatArray

    @property
    def variables(self) -> int:
        return len(self.cost)

    @property
    def rows(self) -> int:
        return len(self.row_lower)

    @cached_property
    def matrix(self) -> csr_array[np.float64]:
        """A as scipy holds it, [m, n]."""
        from scipy.sparse import csr_array

        return csr_array((self.coefficient, self.column, self.row_start), shape=(self.rows, self.variables))

    def value(self, values: FloatArray) -> float:
        """The objective of [n] values."""
        return float(self.cost @ values) + self.constant

    def violation(self, values: FloatArray) -> float:
        """The most by which [n] values miss a row, a bound or a whole number, relative to bounds above 1."""
        activity = np.asarray(self.matrix @ values)
        whole = values[self.integral]
        missed = (
            _missed(activity, self.row_lower, self.row_upper),
            _missed(values, self.lower, self.upper),
            float(np.abs(whole - np.rint(whole)).max(initial=0.0)),
        )
        return max(missed) if np.isfinite(values).all() else math.inf

    def fixed(self, values: FloatArray) -> Program:
        """The linear program that is left when the integral variables stay at the whole numbers nearest to `values`."""
        at = np.rint(values)
        return self._replaced(
            lower=np.where(self.integral, at, self.lower),
            upper=np.where(self.integral, at, self.upper),
            integral=np.zeros(self.variables, dtype=bool),
        )

    def relaxed(self) -> Program:
        """The same without any whole number."""
        return self._replaced(integral=np.zeros(self.variables, dtype=bool))

    def dual_bound(self, prices: FloatArray) -> float:
        """A lower bound of the linear relaxation from row prices [m], whatever they are (weak duality).

        Prices of the sign that a row's missing side forbids are taken as 0.
        """
        prices = np.where(np.isneginf(self.row_lower), np.minimum(prices, 0.0), prices)
        prices = np.where(np.isposinf(self.row_upper), np.maximum(prices, 0.0), prices)
        reduced = self.cost - np.asarray(self.matrix.T @ prices)
        at_rows = np.where(prices > 0, self.row_lower, self.row_upper)
        at_bounds = np.where(reduced > 0, self.lower, self.upper)
        rows = float((prices[prices != 0] * at_rows[prices != 0]).sum())
        # Free of rounding, no variable without a bound would have a reduced cost that asks for one.
        noise = 1e-9 * max(1.0, float(np.abs(self.cost).max(initial=0.0)))
        counted = (reduced != 0) & ~(np.isinf(at_bounds) & (np.abs(reduced) < noise))
        return rows + float((reduced[counted] * at_bounds[counted]).sum()) + self.constant

    def _replaced(self, **changes: FloatArray | BoolArray) -> Program:
        from dataclasses import replace

        return replace(self, **changes)  # type: ignore[arg-type]


def _missed(values: FloatArray, lower: FloatArray, upper: FloatArray) -> float:
    """The most by which values are outside, relative to bounds above 1."""
    below = (lower - values) / np.maximum(1.0, np.where(np.isfinite(lower), np.abs(lower), 1.0))
    above = (values - upper) / np.maximum(1.0, np.where(np.isfinite(upper), np.abs(upper), 1.0))
    return float(max(below.max(initial=0.0), above.max(initial=0.0)))


class ProgramBuilder:
    """Collects variables and rows in blocks, as arrays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.constant = 0.0
        self._variables: list[tuple[npt.NDArray[np.generic], ...]] = []
        self._rows: list[tuple[IntArray, IntArray, FloatArray, FloatArray, FloatArray]] = []
        self._count = 0

    def add_variables(
        self,
        shape: tuple[int, ...],
        *,
        lower: npt.ArrayLike = 0.0,
        upper: npt.ArrayLike = 1.0,
        cost: npt.ArrayLike = 0.0,
        integral: bool = False,
        implied: bool = False,
    ) -> IntArray:
        """Adds a block of variables; lower, upper and cost are broadcast to `shape`.

        Returns:
            Their numbers, in `shape`.
        """
        size = math.prod(shape)
        block = [np.broadcast_to(np.asarray(of, np.float64), shape).ravel() for of in (cost, lower, upper)]
        self._variables.append((*block, np.full(size, integral), np.full(size, implied)))
        numbers = np.arange(self._count, self._count + size, dtype=np.int64).reshape(shape)
        self._count += size
        return numbers

    def add_rows(
        self,
        columns: IntArray,
        coefficients: npt.ArrayLike,
        lower: npt.ArrayLike = -np.inf,
        upper: npt.ArrayLike = np.inf,
    ) -> None:
        """Adds rows of equally many terms: columns [rows, terms], coefficients broadcast to them, lower and upper to
        [rows]."""
        rows, terms = columns.shape
        of = np.repeat(np.arange(rows, dtype=np.int64), terms)
        values = np.broadcast_to(np.asarray(coefficients, np.float64), columns.shape).ravel()
        self.add_sparse_rows(rows, of, columns.ravel(), values, lower, upper)

    def add_sparse_rows(
        self,
        rows: int,
        row: IntArray,
        column: IntArray,
        coefficient: npt.ArrayLike,
        lower: npt.ArrayLike = -np.inf,
        upper: npt.ArrayLike = np.inf,
    ) -> None:
        """Adds `rows` rows from terms: row (counted from 0 in this block), column and coefficient, [terms] each."""
        values = np.broadcast_to(np.asarray(coefficient, np.float64), row.shape)
        if len(row) and (np.diff(row) < 0).any():
            order = np.argsort(row, kind="stable")
            row, column, values = row[order], column[order], values[order]
        sides = [np.broadcast_to(np.asarray(side, np.float64), (rows,)) for side in (lower, upper)]
        self._rows.append((np.bincount(row, minlength=rows), column, values, sides[0], sides[1]))

    def build(self) -> Program:
        """The program of all blocks so far.

        Raises:
            InputError: there is no variable, or a variable's or row's bounds cross or are not numbers.
        """
        if not self._count:
            raise InputError(f"program {self.name!r} has no variables")
        cost, lower, upper, integral, implied = (np.concatenate(parts) for parts in zip(*self._variables, strict=True))
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0), np.zeros(0))
        counts, column, coefficient, row_lower, row_upper = (
            np.concatenate(parts) for parts in zip(*(self._rows or [empty]), strict=True)
        )
        if not (lower <= upper).all() or not (row_lower <= row_upper).all():
            raise InputError(
                f"program {self.name!r} has a variable or row whose lower bound is not below its upper one"
            )
        return Program(
            self.name,
            cost,
            self.constant,
            lower,
            upper,
            integral,
            implied,
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            column,
            coefficient,
            row_lower,
            row_upper,
        )


class Feature(Enum):
    """What a backend can do."""

    INTEGERS = "integer variables"
    CONTINUOUS = "programs without integer variables"
    STARTS = "beginning from a given solution"
    BOUNDS = "a proven bound when stopped early"
    NEWS = "reports of better solutions on the way"


@dataclass(frozen=True, eq=False)
class Request:
    """What a backend is told.

    Args:
        seconds: Wall clock from `asked` on, None for no limit.
        work: A limit that does not depend on the machine, in the backend's own deterministic unit; None for none.
        seed: Of every random choice.
        relative_gap, absolute_gap: At or below which it may stop.
        start: [n] values to begin from; hints where they are not feasible.
        report: Called with (value, bound) of solutions found, by backends with NEWS.
    """

    seconds: float | None = None
    work: float | None = None
    seed: int = 0
    relative_gap: float = 0.0
    absolute_gap: float = 0.0
    start: FloatArray | None = None
    report: Callable[[float, float | None], None] = lambda value, bound: None
    asked: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        """Seconds since it was asked."""
        return time.perf_counter() - self.asked

    def seconds_left(self) -> float | None:
        """What is left to search in, when handing the program over took until now and reading the answer takes as
        long."""
        return None if self.seconds is None else max(0.01, self.seconds - 2.0 * self.spent)


Stop = Literal["finished", "time limit", "interrupted"]


@dataclass(frozen=True, eq=False)
class Result:
    """What a backend found and proved.

    Args:
        backend: Its name; of a portfolio, the one that found the values.
        stop: "finished" by itself (at optimality, within the gap asked for, or at infeasibility), at the "time limit"
            (of seconds or of work), or "interrupted" by Ctrl-C.
        values: [n] the best solution, None where there is none.
        value: Its objective, infinite where there is none.
        bound: No solution is below it; minus infinity where nothing was proven.
        infeasible: It is proven that there is no solution.
        seconds: Wall clock spent, building and reading included.
        prices: [m] row prices of a linear program: what the optimum rises by where a row's bound does.
    """

    backend: str
    stop: Stop
    values: FloatArray | None
    value: float
    bound: float
    infeasible: bool = False
    seconds: float = 0.0
    prices: FloatArray | None = None

    @property
    def finished(self) -> bool:
        return self.stop == "finished"

    @property
    def status(self) -> Literal["optimal", "feasible", "infeasible", "unknown"]:
        """Optimal only where the bound meets the value."""
        if self.infeasible:
            return "infeasible"
        if self.values is None:
            return "unknown"
        met = self.value - self.bound <= RELATIVE_TOLERANCE * max(1.0, abs(self.value))
        return "optimal" if met else "feasible"

    def solution(self, program: Program) -> FloatArray:
        """The values.

        Raises:
            KeyboardInterrupt: Ctrl-C came before any were found.
            SolveError: there are none, with what to do.
        """
        if self.values is not None:
            return self.values
        if self.stop == "interrupted":
            raise KeyboardInterrupt
        if self.infeasible:
            raise SolveError(f"the integer program {program.name!r} has no solution ({self.backend})")
        raise SolveError(
            f"{self.backend} found no solution of the integer program {program.name!r} ({program.variables:,} "
            f"variables) within {self.seconds:.1f} s; allow more seconds, or let it start from a given solution"
        )


class Backend(Protocol):
    """A solver of programs, one module each, imported when first used."""

    @property
    def name(self) -> str: ...

    @property
    def features(self) -> frozenset[Feature]: ...

    def solve(self, program: Program, request: Request) -> Result:
        """Minimises; stops soon after the request's limit and on Ctrl-C, which it does not pass on.

        Raises:
            UnsupportedError: the library is not installed, or cannot take this program.
            SolveError: it failed.
        """
        ...


# Names that can be exchanged.


def renaming(names: IntArray, kinds: Sequence[Hashable]) -> IntArray:
    """[G] new name of each name, given the [n] names items take in order and the kind of each of the G names."""
    new = np.arange(len(kinds))
    for alike in _alike(kinds):
        used = [name for name in dict.fromkeys(names.tolist()) if name in alike]
        new[used + [name for name in alike if name not in used]] = alike
    return new


def forbidden_names(items: int, kinds: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """(rank, name) for each name that the item of that rank may not take: the r-th may open at most the r-th name."""
    for alike in _alike(kinds):
        for rank in range(min(items, len(alike))):
            for name in alike[rank + 1 :]:
                yield rank, name


def _alike(kinds: Sequence[Hashable]) -> list[list[int]]:
    return [[name for name, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]


# Ctrl-C and failing listeners while a solver written in C++ runs.

Answer = TypeVar("Answer")

PATIENCE = 0.05
"""Seconds between two looks for Ctrl-C."""


class Listener:
    """Keeps exceptions from travelling through C++: what a listener raises is kept, and the solver asked to stop.

    `interrupted` says that it was Ctrl-C; anything else is raised by `settle` once the solver has returned.
    """

    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.interrupted = False
        self._error: Exception | None = None
        self._stop = stop

    @property
    def stopping(self) -> bool:
        return self.interrupted or self._error is not None

    def tell(self, report: Callable[[], None]) -> None:
        """Calls `report`."""
        if self.stopping:
            return
        try:
            report()
        except KeyboardInterrupt:
            self.interrupt()
        except Exception as error:  # noqa: BLE001 - raised again by settle
            self._error = error
            self._stop()

    def interrupt(self) -> None:
        """Asks the solver to stop."""
        self.interrupted = True
        self._stop()

    def settle(self) -> None:
        """Raises what a listener raised."""
        if self._error is not None:
            raise self._error


def run_beside(call: Callable[[], Answer], listener: Listener) -> Answer:
    """Runs `call` in a thread of its own, so that this one hears Ctrl-C, and returns what it returns."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call)
        while True:
            try:
                return running.result(timeout=PATIENCE)
            except StillRunning:
                if running.done():
                    return running.result()
            except KeyboardInterrupt:
                listener.interrupt()


# Solves a program within a budget by a named backend, or by several that share the time.

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
