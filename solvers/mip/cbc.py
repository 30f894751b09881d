"""CBC behind PuLP: PuLP writes the program and reads the solution; CBC's process is kept to the time limit here.

CBC looks at its clock between linear programs only, and may stay for minutes in the first one, so past the limit it is
asked, then made, to stop. Its bound is in its log alone. PuLP calls a time-limited incumbent `Optimal`: `sol_status` is
read instead.
"""

from __future__ import annotations

import math
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pulp

from ..._types import FloatArray
from ...placement.errors import SolveError, UnsupportedError
from .program import Feature, Program, Request, Result, Stop

GRACE_SECONDS = 2.0
"""Time past the limit to end by itself, and then again to write its solution once asked to."""

NOTHING = 1e49
"""CBC prints a number beyond this where it has no bound."""

_LOWER_BOUND = re.compile(r"^Lower bound:\s+(-?\d+(?:\.\d+)?)\s*$", re.MULTILINE)


class Cbc:
    """Branch and cut of COIN-OR (Forrest and Lougee-Heimer), the program that PuLP brings."""

    name = "cbc"
    features = frozenset({Feature.INTEGERS, Feature.CONTINUOUS, Feature.STARTS, Feature.BOUNDS})

    def solve(self, program: Program, request: Request) -> Result:
        """Minimises; see `Backend`.

        Raises:
            UnsupportedError: neither PuLP's CBC nor one on the PATH can be run.
            SolveError: CBC failed; its last words are in the message.
        """
        solver = _Cbc(request)
        if not solver.available():
            raise UnsupportedError(
                "no CBC program runs here: this PuLP brings none for this platform and none is on the PATH; use "
                "backend='highs'"
            )
        model, variables = _pulp(program)
        try:
            model.solve(solver)
        except KeyboardInterrupt:
            return Result(self.name, "interrupted", None, math.inf, -math.inf, seconds=request.spent)
        feasible = solver.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
        infeasible = solver.sol_status == pulp.LpSolutionInfeasible
        values = np.array([float(v.varValue or 0.0) for v in variables]) if feasible else None
        value = math.inf if values is None else program.value(values)
        # "Optimal" may mean within the gap asked for: then, and only then, the log has a bound beside the value.
        optimal = solver.sol_status == pulp.LpSolutionOptimal
        bound = lower_bound(solver.log, value - program.constant if optimal else None)
        stop: Stop = "finished" if optimal or infeasible else "time limit"
        proven = -math.inf if bound is None else bound + program.constant
        return Result(self.name, stop, values, value, proven, infeasible, request.spent)


def _pulp(program: Program) -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
    model = pulp.LpProblem(re.sub(r"\W", "_", program.name), pulp.LpMinimize)
    kinds = (pulp.LpContinuous, pulp.LpInteger)
    sides = zip(_sides(program.lower), _sides(program.upper), program.integral.astype(int).tolist(), strict=True)
    variables = [model.add_variable(f"x{i}", low, high, kinds[whole]) for i, (low, high, whole) in enumerate(sides)]
    counted = np.flatnonzero(program.cost).tolist()
    model.setObjective(pulp.LpAffineExpression([(variables[i], float(program.cost[i])) for i in counted]))
    columns, values, starts = program.column.tolist(), program.coefficient.tolist(), program.row_start.tolist()
    rows = zip(starts, starts[1:], _sides(program.row_lower), _sides(program.row_upper), strict=False)
    for first, last, low, high in rows:
        terms = [(variables[j], a) for j, a in zip(columns[first:last], values[first:last], strict=True)]
        if low is not None and low == high:
            model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintEQ, rhs=low))
            continue
        if low is not None:
            model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintGE, rhs=low))
        if high is not None:
            model.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), pulp.LpConstraintLE, rhs=high))
    return model, variables


def _sides(bounds: FloatArray) -> list[float | None]:
    return [bound if math.isfinite(bound) else None for bound in bounds.tolist()]


class _Cbc(pulp.COIN_CMD):  # type: ignore[misc]
    def __init__(self, request: Request) -> None:
        bundled = pulp.PULP_CBC_CMD.pulp_cbc_path
        super().__init__(msg=False, path=bundled if self.executable(bundled) else None)
        self.request = request
        self.log = ""
        self.sol_status = pulp.LpSolutionNoSolutionFound

    def actualSolve(self, lp: pulp.LpProblem) -> int:  # noqa: N802
        with tempfile.TemporaryDirectory(prefix="moeplace-cbc-") as folder:
            program, start, answer, log = (Path(folder, name) for name in ("model.mps", "start", "answer", "log"))
            variables, columns, rows, _ = lp.writeMPS(str(program), rename=1)
            if self.request.start is not None:
                for variable in variables:
                    variable.varValue = float(self.request.start[int(variable.name[1:])])
                self.writesol(str(start), lp, variables, columns, rows)
            seconds = self.request.seconds_left()
            code = run_limited(self._command(program, start, answer, seconds), log, seconds)
            self.log = log.read_text(errors="replace")
            if answer.exists() and code == 0:
                status, values, _, _, _, self.sol_status = self.readsol_MPS(str(answer), lp, variables, columns, rows)
                lp.assignVarsVals(values)
            elif code is None:
                status = pulp.LpStatusNotSolved
            else:
                raise SolveError(f"CBC failed on the program {lp.name!r} (exit code {code}): {self.log[-500:].strip()}")
        lp.assignStatus(status, self.sol_status)
        return int(status)

    def _command(self, program: Path, start: Path, answer: Path, seconds: float | None) -> list[str]:
        request = self.request
        seed = str(request.seed % 2**31)
        command = [self.path, str(program), "-randomSeed", seed, "-randomCbcSeed", seed, "-timeMode", "elapsed"]
        command += ["-ratio", repr(request.relative_gap), "-allow", repr(request.absolute_gap)]
        # With its integer preprocessing CBC 2.10 proves wrong optima: 5 of 7,412 small mappings, none of 7,688 without.
        command += ["-preprocess", "off"]
        if request.start is not None:
            command += ["-mips", str(start)]
        if seconds is not None:
            command += ["-sec", f"{seconds:.3f}"]
        return [*command, "-solve", "-solution", str(answer)]


def lower_bound(log: str, proven: float | None) -> float | None:
    """The bound in CBC's log, less what its rounding may have added; `proven` where the log has none."""
    bounds = _LOWER_BOUND.findall(log)
    if not bounds or float(bounds[-1]) < -NOTHING:
        return proven
    decimals = len(bounds[-1].partition(".")[2])
    return float(bounds[-1]) - 0.5 * 10.0**-decimals


def run_limited(command: list[str], log: Path, seconds: float | None) -> int | None:
    """The exit code, or None when the process was still there past the limit and did not end well on request."""
    with log.open("w") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            try:
                return child.wait(None if seconds is None else seconds + GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
            try:
                return 0 if child.wait(GRACE_SECONDS) == 0 else None
            except subprocess.TimeoutExpired:
                return None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
