"""Several plans judged on the same held-out steps: the analysis behind `compare`, `evaluate` and `report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..placement.errors import InputError, MoeplaceError, SolveError, UnsupportedError
from .options import (
    DECODE_STEPS,
    PREFILL_STEPS,
    HeldOutBy,
    HeldOutOptions,
    ModelOptions,
    ObjectiveOptions,
    SolveOptions,
    StepOptions,
    StoreOptions,
    TopologyOptions,
)
from .output import Update, solve_listener, working
from .parse import (
    Routing,
    SolverChoice,
    read_model,
    read_objective,
    read_plan,
    read_routing,
    read_slots,
    read_topology,
    split_list,
)

if TYPE_CHECKING:
    from ..placement.evaluate import Evaluation
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..placement.statistics import RoutingStatistics
    from ..placement.steps import Steps
    from ..placement.trace import RoutingTrace

BASELINE = "contiguous"


@dataclass(frozen=True)
class Parted:
    """Routing in the part that solvers see and the part that plans are judged on (the same when nothing is held out)."""

    train: RoutingTrace
    judged: RoutingTrace
    description: str

    @property
    def is_held_out(self) -> bool:
        return self.train is not self.judged


@dataclass(frozen=True)
class Entry:
    """A plan and what it costs on each kind of steps; or, without a plan, why there is none."""

    name: str
    plan: Plan | None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    reason: str = ""
    given: bool = False


@dataclass(frozen=True)
class Comparison:
    """Entries in the order asked for, all judged on the same steps. The first is the one others are measured against."""

    problem: Problem
    steps: dict[str, Steps]
    parted: Parted
    entries: tuple[Entry, ...]
    seed: int

    @property
    def baseline(self) -> Entry:
        return self.entries[0]

    def risk(self, entry: Entry, kind: str) -> float:
        """The objective's figure in seconds; regret is measured against the best of these plans on each workload."""
        evaluation = entry.evaluations[kind]
        if self.problem.objective.risk != "regret":
            return evaluation.risk()
        from ..placement.risk import best_by_workload

        every = [other.evaluations[kind].step_seconds for other in self.entries if kind in other.evaluations]
        return evaluation.risk(best_by_workload(every, evaluation.step_workload, len(evaluation.workloads)))


def part(routing: Routing, options: HeldOutOptions, seed: int) -> Parted:
    """Parts token-level routing as asked.

    Raises:
        InputError: counts only, or too little to part.
    """
    trace = routing.tokens
    if options.held_out == 0.0:
        return Parted(trace, trace, "Nothing held out: judged on the routing that was solved on")
    by = options.held_out_by
    try:
        train, judged = trace.split(by.value, options.held_out, seed)
    except InputError as error:
        raise InputError(f"{routing.path}: {error}; or give --held-out-by, or --held-out 0") from None
    units = "of the tokens, the last" if by is HeldOutBy.time else f"of the {by.value}s"
    return Parted(train, judged, f"Held out: {options.held_out:.0%} {units}, seed {seed}")


def solving_statistics(routing: Routing, parted: Parted) -> RoutingStatistics:
    """Statistics of the training part; whole statistics are used as they are when nothing is held out."""
    from ..placement.statistics import RoutingStatistics

    if not parted.is_held_out and routing.statistics is not None:
        return routing.statistics
    return RoutingStatistics.from_trace(parted.train)


def make_steps(trace: RoutingTrace, options: StepOptions, seed: int) -> dict[str, Steps]:
    """The steps asked for, by name, decode first."""
    steps: dict[str, Steps] = {}
    for kind, tokens in options.kinds.items():
        if kind == "decode":
            steps[f"decode {tokens}"] = trace.decode_steps(tokens, options.steps or DECODE_STEPS, seed)
        else:
            steps[f"prefill {tokens}"] = trace.prefill_steps(tokens, options.steps or PREFILL_STEPS, seed)
    return steps


def solve_entry(choice: SolverChoice, problem: Problem, seconds: float, seed: int, update: Update) -> Entry:
    """A solver's plan, or why it has none."""
    from ..solvers import solve

    update(choice.label, None)
    try:
        plan = solve(
            problem,
            choice.solver,
            seconds=seconds,
            seed=seed,
            progress=solve_listener(update, choice.label, seconds),
            **choice.options,
        )
    except (UnsupportedError, SolveError) as error:
        return Entry(choice.label, None, reason=str(error))
    return Entry(choice.label, plan)


def judge(entry: Entry, problem: Problem, steps: dict[str, Steps], update: Update) -> Entry:
    """The entry with its evaluations."""
    from ..placement.evaluate import evaluate

    if entry.plan is None:
        return entry
    evaluations = {}
    for kind, replayed in steps.items():
        update(f"{entry.name}: {kind}", None)
        try:
            evaluations[kind] = evaluate(entry.plan, replayed, problem)
        except MoeplaceError as error:
            raise InputError(f"plan {entry.name!r}: {error}") from None
    return replace(entry, evaluations=evaluations)


def compare(
    problem: Problem,
    parted: Parted,
    steps: dict[str, Steps],
    choices: Sequence[SolverChoice],
    given: Sequence[tuple[str, Plan]],
    seconds: float,
    seed: int,
    update: Update,
) -> Comparison:
    """Solves with each choice, takes plans that are given, and judges all on the same steps.

    The contiguous plan always stands first: every ratio is to it.
    """
    wanted = [SolverChoice.parse(BASELINE), *(choice for choice in choices if choice.label != BASELINE)]
    entries = [solve_entry(wanted[0], problem, seconds, seed, update)]
    entries += [Entry(name, plan, given=True) for name, plan in given]
    entries += [solve_entry(choice, problem, seconds, seed, update) for choice in wanted[1:]]
    judged = tuple(judge(entry, problem, steps, update) for entry in _told_apart(entries))
    return Comparison(problem, steps, parted, judged, seed)


def _told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with different names: a plan file may be called as a solver is, or as another file."""
    seen: Counter[str] = Counter()
    result = []
    for entry in entries:
        seen[entry.name] += 1
        repeated = seen[entry.name] > 1
        result.append(replace(entry, name=f"{entry.name} ({seen[entry.name]})") if repeated else entry)
    return result


# From options to a finished comparison: what `compare` and `report` both do.


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
