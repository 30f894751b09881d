"""OR-tools' CP-SAT, handed the program in whole numbers: Perron and Furnon, OR-tools; Perron, Didier and Gay, "The
CP-SAT-LP solver", CP 2023.

CP-SAT knows integers only, so coefficients are scaled and rounded here, in a way that keeps its bound a bound. Every
row is widened by the most that rounding can change in it, and what rounding can add to the objective is taken off the
bound. So each solution of the true program has one in whole numbers beside it that costs no more than what is taken
off; the other way round, a solution is only returned after it was completed and checked with the true coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.errors import SolveError, UnsupportedError
from .program import FEASIBLE, Feature, Listener, Program, Request, Result, Stop, run_beside

WORKERS = 8
"""Fixed, so that the same strategies run whatever cores there are. Taking turns in a fixed order (`interleave_search`)
instead of one worker needed 40 s where eight took a tenth of one."""

ROW_BITS, OBJECTIVE_BITS, STEP_BITS = 50, 50, 24
"""What a row's terms and the objective's may sum up to, and how many values a variable that is not whole may take."""


@dataclass(frozen=True, eq=False)
class WholeProgram:
    """A program in whole numbers that relaxes another. Variable j stands for round(steps[j] x[j]).

    Args:
        row_start, column: Where terms are, as in the program.
        lower, upper, coefficient, row_lower, row_upper, cost: Whole numbers. Row sides without a bound are at +-2^62.
        steps: [n] how many make one unit of the variable.
        unit: The objective in whole numbers counts this much.
        slack: The objective of a true solution's neighbour in whole numbers exceeds the true one by this at most.
    """

    lower: IntArray
    upper: IntArray
    row_start: IntArray
    column: IntArray
    coefficient: IntArray
    row_lower: IntArray
    row_upper: IntArray
    cost: IntArray
    steps: FloatArray
    unit: float
    slack: float

    def bound(self, whole: float, constant: float) -> float:
        """A lower bound of the true program from one of this."""
        return (math.floor(whole + 0.5) - self.slack) * self.unit + constant


UNBOUNDED = 2**62


def whole_program(
    program: Program, row_bits: int = ROW_BITS, objective_bits: int = OBJECTIVE_BITS, step_bits: int = STEP_BITS
) -> WholeProgram:
    """Scales a program to whole numbers, exactly where its coefficients are whole already.

    Raises:
        UnsupportedError: a variable has no bound, or too wide ones.
    """
    whole = program.integral | program.implied
    if not (np.isfinite(program.lower) & np.isfinite(program.upper)).all():
        raise UnsupportedError(
            f"CP-SAT needs bounds of every variable, and the program {program.name!r} has one without"
        )
    reach = np.maximum(np.abs(program.lower), np.abs(program.upper))
    if reach.max() > 2.0**50:
        raise UnsupportedError(f"CP-SAT cannot count to {reach.max():g}, a bound in the program {program.name!r}")
    steps = np.where(whole, 1.0, _power(2.0**step_bits / np.maximum(reach, 1e-30)))
    lower, upper = np.rint(program.lower * steps), np.rint(program.upper * steps)
    lower[whole], upper[whole] = np.ceil(program.lower[whole] - FEASIBLE), np.floor(program.upper[whole] + FEASIBLE)
    ends = np.maximum(np.abs(lower), np.abs(upper))
    # How far a variable in whole numbers may be from its true value.
    off = np.where(whole, 0.0, 0.5)

    column, sizes = program.column, np.diff(program.row_start)
    row = np.repeat(np.arange(program.rows), sizes)
    terms = program.coefficient / steps[column]
    scale, exact = _scales(row, program.rows, terms, ends[column], row_bits)
    scaled = terms * scale[row]
    coefficient = np.rint(scaled)
    # For each true solution, |sum of rounded terms - scale times the row| is at most this.
    wrong = np.abs(coefficient - scaled) * ends[column] + np.abs(scaled) * off[column]
    slack = np.bincount(row, weights=wrong, minlength=program.rows)
    # One more for what true solutions miss by rounding of their own.
    slack += ~exact
    sides = np.where(np.isfinite(program.row_lower), program.row_lower * scale - slack, -UNBOUNDED)
    tops = np.where(np.isfinite(program.row_upper), program.row_upper * scale + slack, UNBOUNDED)
    # A whole number just missed by the side's own rounding stays allowed.
    row_lower = np.ceil(sides - 1e-9 * np.maximum(1.0, np.abs(sides)) * (np.abs(sides) < UNBOUNDED))
    row_upper = np.floor(tops + 1e-9 * np.maximum(1.0, np.abs(tops)) * (np.abs(tops) < UNBOUNDED))

    costs = program.cost / steps
    all_in_one = np.zeros(program.variables, dtype=np.int64)
    factor = float(_scales(all_in_one, 1, costs, ends, objective_bits)[0][0])
    scaled = costs * factor
    cost = np.rint(scaled)
    above = (cost - scaled) * np.where(cost > scaled, upper, lower) + np.abs(scaled) * off
    divisor = max(1, int(np.gcd.reduce(cost.astype(np.int64))))
    return WholeProgram(
        lower.astype(np.int64),
        upper.astype(np.int64),
        program.row_start,
        column,
        coefficient.astype(np.int64),
        np.clip(row_lower, -UNBOUNDED, UNBOUNDED).astype(np.int64),
        np.clip(row_upper, -UNBOUNDED, UNBOUNDED).astype(np.int64),
        cost.astype(np.int64) // divisor,
        steps,
        divisor / factor,
        float(above.sum()) / divisor,
    )


def _power(values: FloatArray) -> FloatArray:
    """The power of two at or below each value."""
    return np.asarray(np.exp2(np.floor(np.log2(values))))


def _scales(row: IntArray, rows: int, terms: FloatArray, ends: FloatArray, bits: int) -> tuple[FloatArray, BoolArray]:
    """[rows] what to multiply each row's terms by: 1 where they are whole and add up to no more than `bits` hold, else
    the power of two that uses `bits`."""
    mixed = np.bincount(row, weights=terms != np.rint(terms), minlength=rows) > 0
    most = np.bincount(row, weights=np.abs(terms) * ends, minlength=rows)
    exact = ~mixed & (most < 2.0**bits)
    return np.where(exact, 1.0, _power(2.0**bits / np.maximum(most, 1e-30))), exact


class CpSat:
    """Clause learning over linear programs with large-neighbourhood search: the best plans up to some 64 experts.

    Always give it a start: without one it finds no clusters of 256 experts in ten seconds. Without a limit of
    seconds one worker alone searches, so that the same seed gives the same solution.
    """

    name = "cpsat"
    features = frozenset({Feature.INTEGERS, Feature.STARTS, Feature.BOUNDS, Feature.NEWS})

    def solve(self, program: Program, request: Request) -> Result:
        """Minimises; see `Backend`.

        Raises:
            UnsupportedError: a variable without bounds. SolveError: CP-SAT refused the program.
        """
        whole = whole_program(program)
        model = cp_model.CpModel()
        _fill(model.Proto(), whole, request.start)
        solver = cp_model.CpSolver()
        settings = solver.parameters
        settings.random_seed = request.seed % 2**31
        settings.catch_sigint_signal = False
        settings.relative_gap_limit = request.relative_gap
        settings.absolute_gap_limit = request.absolute_gap / whole.unit
        # Without it 9.15 adds up rows of booleans in 32 bits, takes rows that depend on others for unconditional, and
        # calls worse solutions optimal: https://github.com/google/or-tools/issues/5293
        settings.presolve_inclusion_work_limit = 0
        seconds = request.seconds_left()
        settings.num_workers = 1 if seconds is None else WORKERS
        if seconds is not None:
            settings.max_time_in_seconds = seconds
        if request.work is not None:
            settings.max_deterministic_time = request.work
        listener = Listener(solver.StopSearch)
        callback = _Told(program, whole, request, listener)
        status = run_beside(lambda: solver.Solve(model, callback), listener)
        listener.settle()
        if status == cp_model.MODEL_INVALID:
            raise SolveError(f"CP-SAT refuses the program {program.name!r}: {model.validate()}")
        values = None
        known = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        if known:
            response = np.asarray(solver.ResponseProto().solution, dtype=np.float64)
            values = completed(program, response / whole.steps)
        value = math.inf if values is None else program.value(values)
        infeasible = status == cp_model.INFEASIBLE
        stop: Stop = "finished" if infeasible or status == cp_model.OPTIMAL else "time limit"
        # Stopped before its first solution it gives 0 for a bound, which may be none.
        bound = whole.bound(solver.BestObjectiveBound(), program.constant) if known else -math.inf
        # A bound met by the value is the value: what is between them is floating point's.
        return Result(
            self.name,
            "interrupted" if listener.interrupted else stop,
            values,
            value,
            min(bound, value),
            infeasible,
            request.spent,
        )


def completed(program: Program, values: FloatArray) -> FloatArray | None:
    """Values with whole numbers rounded and the others the best that go with them; None where none do."""
    values = np.clip(
        np.where(program.integral | program.implied, np.rint(values), values), program.lower, program.upper
    )
    if (program.integral | program.implied).all():
        return values if program.violation(values) <= FEASIBLE else None
    from .highs import Highs

    rest = Highs().solve(program.fixed(values), Request(seconds=30.0))
    return rest.values if rest.values is not None and program.violation(rest.values) <= FEASIBLE else None


def _fill(proto: Any, whole: WholeProgram, start: FloatArray | None) -> None:
    """Writes a program into CP-SAT's own object."""
    for bounds in np.stack([whole.lower, whole.upper], axis=1).tolist():
        proto.variables.add().domain.extend(bounds)
    columns, coefficients = whole.column.tolist(), whole.coefficient.tolist()
    starts = whole.row_start.tolist()
    sides = np.stack([whole.row_lower, whole.row_upper], axis=1).tolist()
    for first, last, side in zip(starts, starts[1:], sides, strict=False):
        linear = proto.constraints.add().linear
        linear.vars.extend(columns[first:last])
        linear.coeffs.extend(coefficients[first:last])
        linear.domain.extend(side)
    counted = np.flatnonzero(whole.cost)
    proto.objective.vars.extend(counted.tolist())
    proto.objective.coeffs.extend(whole.cost[counted].tolist())
    if start is not None:
        hint = np.clip(np.rint(start * whole.steps).astype(np.int64), whole.lower, whole.upper)
        proto.solution_hint.vars.extend(range(len(hint)))
        proto.solution_hint.values.extend(hint.tolist())


class _Told(cp_model.CpSolverSolutionCallback):
    """Reports solutions in whole variables, whose true objective is known at once."""

    def __init__(self, program: Program, whole: WholeProgram, request: Request, listener: Listener) -> None:
        super().__init__()
        self.program, self.whole, self.request, self.listener = program, whole, request, listener
        self.plain = bool((program.integral | program.implied).all()) and whole.slack == 0

    def on_solution_callback(self) -> None:
        """Called by CP-SAT, in one of its threads."""
        if self.plain:
            self.listener.tell(self._report)

    def _report(self) -> None:
        constant = self.program.constant
        value = self.ObjectiveValue() * self.whole.unit + constant
        self.request.report(value, self.whole.bound(self.BestObjectiveBound(), constant))
