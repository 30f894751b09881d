"""HiGHS in process, handed arrays: Huangfu and Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp.
10, 2018."""

from __future__ import annotations

import math
from typing import Any

import highspy
import numpy as np

from ...placement.errors import SolveError
from .program import Feature, Listener, Program, Request, Result, Stop, run_beside

_CALLBACK = highspy.cb.HighsCallbackType
_STATUS = highspy.HighsModelStatus


class QuietHighs(highspy.Highs):  # type: ignore[misc]
    """highspy prints a banner on stdout from its constructor, before an option can be set; stdout is for data."""

    def enableCallbacks(self) -> None:  # noqa: N802
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()


class Highs:
    """Linear programs by simplex, integer ones by branch and cut. Its bounds are the best of the backends here."""

    name = "highs"
    features = frozenset(Feature)

    def solve(self, program: Program, request: Request) -> Result:
        """Minimises; see `Backend`.

        Raises:
            SolveError: HiGHS refused the program.
        """
        solver = QuietHighs()
        options: dict[str, Any] = {
            "random_seed": request.seed % 2**31,
            "mip_rel_gap": request.relative_gap,
            "mip_abs_gap": request.absolute_gap,
        }
        for name, value in options.items():
            solver.setOptionValue(name, value)
        hand_over(solver, program)
        listener = _Listener(request)
        # HiGHS holds the data object by address only: it must outlive the run, as this listener does.
        solver.setCallback(listener.on_event, listener)
        whole = bool(program.integral.any())
        events = (
            (_CALLBACK.kCallbackMipInterrupt, _CALLBACK.kCallbackMipImprovingSolution)
            if whole
            else (_CALLBACK.kCallbackSimplexInterrupt, _CALLBACK.kCallbackIpmInterrupt)
        )
        for event in events:
            solver.startCallback(event)
        if request.start is not None and whole:
            numbers = np.arange(program.variables, dtype=np.int32)
            solver.setSolution(program.variables, numbers, request.start)
        seconds = request.seconds_left()
        if seconds is not None:
            solver.setOptionValue("time_limit", seconds)
        run_beside(solver.run, listener)
        solver.setCallback(None, None)
        listener.settle()
        return _read(solver, program, request, whole, listener.interrupted)


def _read(solver: Any, program: Program, request: Request, whole: bool, interrupted: bool) -> Result:
    status, info, solution = solver.getModelStatus(), solver.getInfo(), solver.getSolution()
    optimal, infeasible = status == _STATUS.kOptimal, status == _STATUS.kInfeasible
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = np.asarray(solution.col_value, dtype=np.float64) if feasible else None
    prices = np.asarray(solution.row_dual, dtype=np.float64) if not whole and optimal else None
    bound = -math.inf
    if whole and math.isfinite(info.mip_dual_bound):
        bound = float(info.mip_dual_bound)
    elif prices is not None:
        bound = program.dual_bound(prices)
    stop: Stop = "interrupted" if interrupted else "finished" if optimal or infeasible else "time limit"
    value = math.inf if values is None else program.value(values)
    return Result(Highs.name, stop, values, value, bound, infeasible, request.spent, prices)


def hand_over(solver: QuietHighs, program: Program) -> None:
    """Gives a program's arrays to HiGHS.

    Raises:
        SolveError: HiGHS refused them.
    """
    status = solver.passModel(
        program.variables,
        program.rows,
        len(program.column),
        int(highspy.MatrixFormat.kRowwise),
        int(highspy.ObjSense.kMinimize),
        program.constant,
        program.cost,
        program.lower,
        program.upper,
        program.row_lower,
        program.row_upper,
        program.row_start.astype(np.int32),
        program.column.astype(np.int32),
        program.coefficient,
        program.integral.astype(np.int32),
    )
    if status == highspy.HighsStatus.kError:
        raise SolveError(f"HiGHS refuses the program {program.name!r}")


class _Listener(Listener):
    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request

    def on_event(self, kind: Any, message: str, data_out: Any, data_in: Any, data: Any) -> None:
        """Called by HiGHS in the thread that it runs in, where no Ctrl-C is delivered."""
        if kind == _CALLBACK.kCallbackMipImprovingSolution:
            bound, value = float(data_out.mip_dual_bound), float(data_out.objective_function_value)
            self.tell(lambda: self.request.report(value, bound if math.isfinite(bound) else None))
        elif data_in is not None:
            data_in.user_interrupt = self.stopping
