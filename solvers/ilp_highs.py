"""HiGHS behind PuLP, in process, with what PuLP's interface leaves out: a start, the dual bound, news, Ctrl-C."""

from __future__ import annotations

import math
from typing import Any

import highspy
import pulp

from .ilp import BackendRun, IlpRequest

_CALLBACK = highspy.cb.HighsCallbackType


def run_highs(model: pulp.LpProblem, request: IlpRequest) -> BackendRun:
    """Minimises the model, leaving the best solution in its variables.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; HiGHS has stopped.
    """
    solver = _Highs(request)
    model.solve(solver)
    return solver.run


class SilentHighs(highspy.Highs):
    """highspy prints a banner on stdout from its constructor, before an option can be set; stdout is for data."""

    def enableCallbacks(self) -> None:  # noqa: N802
        self.setOptionValue("output_flag", False)
        super().enableCallbacks()  # type: ignore[no-untyped-call]


class _Highs(pulp.HiGHS):  # type: ignore[misc]
    def __init__(self, request: IlpRequest) -> None:
        super().__init__(msg=False)
        self.request = request
        self.constant = 0.0
        self.interrupted = False
        self.run = BackendRun(False, False, False, None)

    def createAndConfigureSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802
        request = self.request
        lp.solverModel = SilentHighs()  # type: ignore[no-untyped-call]
        options = {
            "output_flag": False,
            "random_seed": request.seed % 2**31,
            "mip_rel_gap": request.relative_gap,
            "mip_abs_gap": request.absolute_gap,
        }
        for name, value in options.items():
            lp.solverModel.setOptionValue(name, value)
        # HiGHS holds the data object by address only: it must outlive the run, as this solver does.
        self.constant = float(lp.objective.constant)
        lp.solverModel.setCallback(self._on_event, self)
        lp.solverModel.startCallback(_CALLBACK.kCallbackMipInterrupt)
        lp.solverModel.startCallback(_CALLBACK.kCallbackMipImprovingSolution)

    def callSolver(self, lp: pulp.LpProblem) -> None:  # noqa: N802
        start = self.request.start
        if start is not None:
            variables = lp.variables()
            indices = [v.index for v in variables]
            lp.solverModel.setSolution(len(indices), indices, [float(start[v.name]) for v in variables])
        seconds = self.request.seconds_left()
        if seconds is not None:
            lp.solverModel.setOptionValue("time_limit", seconds)
        lp.solverModel.run()
        lp.solverModel.setCallback(None, None)
        if self.interrupted:
            raise KeyboardInterrupt

    def findSolutionValues(self, lp: pulp.LpProblem) -> tuple[int, int]:  # noqa: N802
        status, info = lp.solverModel.getModelStatus(), lp.solverModel.getInfo()
        found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
        optimal = status == highspy.HighsModelStatus.kOptimal
        bound = float(info.mip_dual_bound) if lp.isMIP() else (info.objective_function_value if optimal else -math.inf)
        self.run = BackendRun(
            found=found,
            infeasible=status == highspy.HighsModelStatus.kInfeasible,
            finished=optimal,
            bound=bound + self.constant if math.isfinite(bound) else None,
        )
        if found:
            statuses: tuple[int, int] = super().findSolutionValues(lp)
            return statuses
        missing = pulp.LpStatusInfeasible if self.run.infeasible else pulp.LpStatusNotSolved
        return missing, pulp.LpSolutionInfeasible if self.run.infeasible else pulp.LpSolutionNoSolutionFound

    def _on_event(self, kind: Any, message: str, data_out: Any, data_in: Any, data: Any) -> None:
        # An exception may not travel through HiGHS: Ctrl-C, delivered while Python runs, becomes a request to stop.
        try:
            if kind == _CALLBACK.kCallbackMipImprovingSolution:
                bound = float(data_out.mip_dual_bound)
                value = float(data_out.objective_function_value) + self.constant
                self.request.report(value, bound + self.constant if math.isfinite(bound) else None)
            elif data_in is not None:
                data_in.user_interrupt = self.interrupted
        except KeyboardInterrupt:
            self.interrupted = True
