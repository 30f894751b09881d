"""From options to a finished comparison: what `compare` and `report` both do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .comparison import Comparison, compare, make_steps, part, solving_statistics
from .inputs import (
    SolverChoice,
    read_model,
    read_objective,
    read_plan,
    read_routing,
    read_slots,
    read_topology,
    split_list,
)
from .options import (
    HeldOutOptions,
    ModelOptions,
    ObjectiveOptions,
    SolveOptions,
    StepOptions,
    StoreOptions,
    TopologyOptions,
)
from .progress import working


@dataclass(frozen=True)
class Request:
    """The options of a comparison, as typed."""

    routing: Path
    model: ModelOptions
    topology: TopologyOptions
    objective: ObjectiveOptions
    held_out: HeldOutOptions
    steps: StepOptions
    solving: SolveOptions
    storage: StoreOptions
    solvers: str | None
    plans: str | None
    seed: int


def run_comparison(request: Request) -> Comparison:
    """Reads, checks everything that can be wrong, then solves and judges."""
    from ..placement.problem import Problem
    from ..solvers import solver_names

    topology, objective = read_topology(request.topology), read_objective(request.objective)
    names = split_list(request.solvers) if request.solvers is not None else list(solver_names())
    choices = [SolverChoice.parse(name).for_steps(request.steps) for name in names]
    given = [(_plan_name(name), read_plan(name, request.storage.db)) for name in split_list(request.plans)]
    with working("reading the routing") as update:
        routing = read_routing(request.routing)
        model = read_model(request.model, routing)
        parted = part(routing, request.held_out, request.seed)
        update("counting", None)
        problem = Problem(
            model=model,
            topology=topology,
            statistics=solving_statistics(routing, parted),
            objective=objective,
            slots=read_slots(request.solving.slots),
        )
        steps = make_steps(parted.judged, request.steps, request.seed)
        return compare(problem, parted, steps, choices, given, request.solving.seconds, request.seed, update)


def _plan_name(reference: str) -> str:
    return Path(reference).stem if reference.endswith(".json") else reference
