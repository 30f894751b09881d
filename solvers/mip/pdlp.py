"""PDLP for very large linear programs, handed arrays through OR-tools' MathOpt.

Applegate and others, "Practical large-scale linear programming using primal-dual hybrid gradient", NeurIPS 2021. First-order: its
values are near the optimum only, and its bound is taken from its prices by weak duality.
"""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt
from ortools.util.python.solve_interrupter import SolveInterrupter

from ...placement.errors import SolveError
from .interrupts import Listener, run_beside
from .program import Feature, Program, Request, Result, Stop


class Pdlp:
    """First-order linear programming, for programs past some hundred thousand rows."""

    name = "pdlp"
    features = frozenset({Feature.CONTINUOUS, Feature.BOUNDS, Feature.PRICES})

    def solve(self, program: Program, request: Request) -> Result:
        """Minimises; see `Backend`.

        Raises:
            SolveError: PDLP failed.
        """
        model = mathopt.Model.from_model_proto(_proto(program))
        interrupter = SolveInterrupter()
        listener = Listener(interrupter.interrupt)
        seconds = request.seconds_left()
        settings = mathopt.SolveParameters(time_limit=None if seconds is None else datetime.timedelta(seconds=seconds))
        try:
            answer = run_beside(
                lambda: mathopt.solve(model, mathopt.SolverType.PDLP, params=settings, interrupter=interrupter),
                listener,
            )
        except (RuntimeError, ValueError) as error:
            raise SolveError(f"PDLP failed on the program {program.name!r}: {error}") from error
        values, prices = None, None
        if answer.has_primal_feasible_solution():
            found = np.array(answer.variable_values(list(model.variables())), dtype=np.float64)
            values = np.clip(found, program.lower, program.upper)
        if answer.has_dual_feasible_solution():
            prices = np.array(answer.dual_values(list(model.linear_constraints())), dtype=np.float64)
        reasons, reason = mathopt.TerminationReason, answer.termination.reason
        infeasible = reason == reasons.INFEASIBLE
        stop: Stop = "finished" if infeasible or reason == reasons.OPTIMAL else "time limit"
        return Result(
            self.name,
            "interrupted" if listener.interrupted else stop,
            values,
            math.inf if values is None else program.value(values),
            -math.inf if prices is None else program.dual_bound(prices),
            infeasible,
            request.spent,
            prices,
        )


def _proto(program: Program) -> Any:
    """The program as MathOpt's own message."""
    proto = model_pb2.ModelProto()
    proto.variables.ids.extend(range(program.variables))
    proto.variables.lower_bounds.extend(program.lower.tolist())
    proto.variables.upper_bounds.extend(program.upper.tolist())
    proto.variables.integers.extend([False] * program.variables)
    counted = np.flatnonzero(program.cost)
    proto.objective.offset = program.constant
    proto.objective.linear_coefficients.ids.extend(counted.tolist())
    proto.objective.linear_coefficients.values.extend(program.cost[counted].tolist())
    proto.linear_constraints.ids.extend(range(program.rows))
    proto.linear_constraints.lower_bounds.extend(program.row_lower.tolist())
    proto.linear_constraints.upper_bounds.extend(program.row_upper.tolist())
    # Rows in order, and in each its columns in order.
    matrix = program.matrix.copy()
    matrix.sort_indices()
    proto.linear_constraint_matrix.row_ids.extend(np.repeat(np.arange(program.rows), np.diff(matrix.indptr)).tolist())
    proto.linear_constraint_matrix.column_ids.extend(matrix.indices.tolist())
    proto.linear_constraint_matrix.coefficients.extend(matrix.data.tolist())
    return proto
