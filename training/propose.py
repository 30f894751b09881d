"""From recorded steps to a plan worth applying, or none; a program of its own too, beside which training goes on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..placement.decide import decide
from ..placement.errors import FileFormatError, MoeplaceError
from ..placement.files import parse_json, read_text, write_text
from ..placement.objective import Objective
from ..placement.plan import Plan
from ..placement.problem import Problem
from ..placement.statistics import RoutingStatistics
from ..placement.trace import RoutingTrace
from ..profiler import read_trace
from ..solvers import solve


@dataclass(frozen=True)
class Terms:
    """What a new plan is solved for and judged by.

    solver: a name of `solver_names()`, None for the one that fits. seconds: for solving. horizon_steps: for how many
    steps a plan is expected to stand; migration has to pay within them. bytes_per_expert: what travels an expert and
    layer. held_out: part of the recorded steps that the plan is judged on. dispatch_dtype, combine_dtype: as
    `Objective` has them.
    """

    solver: str | None
    seconds: float
    horizon_steps: float
    bytes_per_expert: float
    held_out: float = 0.3
    dispatch_dtype: str = "fp32"
    combine_dtype: str = "fp32"
    seed: int = 0
    ranks: tuple[tuple[int, ...], ...] = ()


def propose(trace: str | Path, current: Plan, terms: Terms) -> tuple[Plan | None, str]:
    """A plan for the steps to come, solved for and judged on recorded ones.

    The later steps judge what the earlier ones were solved on. Slots and their devices stay as many as they are.

    Args:
        trace: folder or file of some training steps' routing.
        current: the plan in force.
        terms: what to solve for.

    Returns:
        (a plan to apply, or None to keep `current`; why).

    Raises:
        InputError: the trace cannot be read, is of another model, or too short to part.
    """
    recorded = _by_copy(read_trace(trace), terms.ranks)
    train, held_out = recorded.split(by="time", held_out=terms.held_out)
    problem = Problem(
        model=current.model,
        topology=current.topology,
        statistics=RoutingStatistics.from_trace(train),
        objective=Objective(dispatch_dtype=terms.dispatch_dtype, combine_dtype=terms.combine_dtype),
        device_slots=current.slots_per_device.tolist(),
        current=current,
    )
    candidate = solve(problem, terms.solver, seconds=terms.seconds, seed=terms.seed)
    decision = decide(
        current,
        [candidate],
        held_out.recorded_steps(),
        problem,
        horizon_steps=terms.horizon_steps,
        bytes_per_expert=terms.bytes_per_expert,
        seed=terms.seed,
    )
    return (candidate if decision.action == "apply" else None), decision.reason


def _by_copy(trace: RoutingTrace, ranks: Sequence[Sequence[int]]) -> RoutingTrace:
    """Each copy's part of a step as a step of its own, with its devices as sources: copies exchange no tokens."""
    if len(ranks) < 2 or trace.step is None or trace.source is None:
        return trace
    copy, device = (
        np.zeros(1 + max(map(max, ranks)), dtype=np.int64),
        np.zeros(1 + max(map(max, ranks)), dtype=np.int64),
    )
    for number, row in enumerate(ranks):
        copy[list(row)], device[list(row)] = number, np.arange(len(row))
    return replace(trace, step=trace.step * len(ranks) + copy[trace.source], source=device[trace.source])


def request(folder: Path, current: Plan, terms: Terms) -> list[str]:
    """Writes what the program needs beside the trace; gives the arguments of Python for it.

    With -P it imports nothing from the folder that training runs in.
    """
    current.save(folder / "current.json")
    write_text(folder / "terms.json", json.dumps(asdict(terms)))
    return ["-P", "-m", __name__, str(folder)]


ANSWER_LIMIT = 1 << 20
"""Bytes that an answer may have."""


def answer(folder: Path) -> tuple[Plan | None, str]:
    """(plan to apply or None, why): what the program answered, also where it ended without an answer.

    Raises:
        InputError, FileFormatError: its answer or its plan cannot be read.
    """
    path = folder / "answer.json"
    decision = parse_json(read_text(path, limit_bytes=ANSWER_LIMIT), str(path)) if path.is_file() else {}
    if not isinstance(decision, dict):
        raise FileFormatError(f"{path}: expected a JSON object, found {type(decision).__name__}")
    plan = Plan.load(folder / "plan.json") if decision.get("apply") else None
    return plan, str(decision.get("reason", "the solver ended without an answer"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="holds current.json, terms.json and the folder trace")
    folder = parser.parse_args().folder
    terms = Terms(**json.loads((folder / "terms.json").read_text()))
    try:
        plan, reason = propose(folder / "trace", Plan.load(folder / "current.json"), terms)
    except MoeplaceError as error:
        plan, reason = None, f"{type(error).__name__}: {error}"
    if plan is not None:
        plan.save(folder / "plan.json")
    write_text(folder / "answer.json", json.dumps({"apply": plan is not None, "reason": reason}))


if __name__ == "__main__":
    main()
