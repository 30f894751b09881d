"""Several plans solved for and judged on the same held-out steps: what `compare`, `evaluate` and `report` do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError, MoeplaceError, SolveError, UnsupportedError
from .options import ComparisonOptions
from .output import Update, solve_listener, working
from .parse import (
    SolverChoice,
    read_device_slots,
    read_model,
    read_objective,
    read_slots,
    read_topology,
    split_list,
)
from .remote import PLAN_FILES, read_plan
from .routing_split import (
    CountSplit,
    RoutingSplit,
    count_row,
    holds_counts_only,
    make_steps,
    open_recording,
    solving_statistics,
    split_counts,
    split_routing,
)

if TYPE_CHECKING:
    from ..placement.evaluate import Evaluation
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..placement.steps import Steps

BASELINE = "contiguous"


@dataclass(frozen=True)
class Entry:
    """A plan and what it costs on each kind of steps; or, without a plan, why there is none."""

    name: str
    plan: Plan | None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    reason: str = ""
    was_given: bool = False


@dataclass(frozen=True)
class Comparison:
    """Entries in the order asked for, all judged on the same steps. Others are measured against the first."""

    problem: Problem
    steps: dict[str, Steps]
    split: RoutingSplit
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
    split: RoutingSplit,
    steps: dict[str, Steps],
    choices: Sequence[SolverChoice],
    plans: Sequence[tuple[str, Plan]],
    seconds: float,
    seed: int,
    update: Update,
) -> Comparison:
    """Solves with each choice, takes plans that are given, and judges all on the same steps.

    The contiguous plan always stands first: every ratio is to it.
    """
    entries = _solved(problem, choices, plans, seconds, seed, update)
    judged = tuple(judge(entry, problem, steps, update) for entry in entries)
    return Comparison(problem, steps, split, judged, seed)


def _solved(
    problem: Problem,
    choices: Sequence[SolverChoice],
    plans: Sequence[tuple[str, Plan]],
    seconds: float,
    seed: int,
    update: Update,
) -> list[Entry]:
    """The contiguous plan, those that are given, and those of the choices, in this order and called differently."""
    others = [choice for choice in choices if choice.label != BASELINE]
    entries = [solve_entry(SolverChoice.parse(BASELINE), problem, seconds, seed, update)]
    entries += [Entry(name, plan, was_given=True) for name, plan in plans]
    entries += [solve_entry(choice, problem, seconds, seed, update) for choice in others]
    return _with_different_names(entries)


def _with_different_names(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with different names: a plan file may be called as a solver is, or as another file."""
    seen: Counter[str] = Counter()
    result = []
    for entry in entries:
        seen[entry.name] += 1
        repeated = seen[entry.name] > 1
        result.append(replace(entry, name=f"{entry.name} ({seen[entry.name]})") if repeated else entry)
    return result


@dataclass(frozen=True)
class CountComparison:
    """Plans and their balance on count windows, where a record tells no tokens."""

    problem: Problem
    split: CountSplit
    entries: tuple[Entry, ...]
    rows: list[dict[str, Any]]


def compare_counts(
    problem: Problem,
    split: CountSplit,
    choices: Sequence[SolverChoice],
    plans: Sequence[tuple[str, Plan]],
    seconds: float,
    seed: int,
    update: Update,
) -> CountComparison:
    """As `compare`, on count windows."""
    entries = _solved(problem, choices, plans, seconds, seed, update)
    rows = [
        {"plan": entry.name, "reason": entry.reason}
        if entry.plan is None
        else count_row(entry.name, entry.plan, split, seed)
        for entry in entries
    ]
    return CountComparison(problem, split, tuple(entries), rows)


def run_comparison(routing: Path, options: ComparisonOptions) -> Comparison | CountComparison:
    """Reads, checks everything that can be wrong, then solves and judges: from options to a finished comparison."""
    from ..placement.problem import Problem
    from ..solvers import solver_names

    cluster, goal, seed = read_topology(options), read_objective(options, options.engine), options.seed
    names = split_list(options.solvers) if options.solvers is not None else list(solver_names())
    choices = [SolverChoice.parse(name).for_steps(options) for name in names]
    with working("reading the routing") as update:
        recording = open_recording(routing, options.model)
        spec = read_model(options, recording)
        judged_too = [
            (plan_name(name), read_plan(name, options.db, model=spec, topology=cluster))
            for name in split_list(options.plans)
        ]
        split: RoutingSplit | CountSplit
        if holds_counts_only(recording):
            split = split_counts(recording, options, seed)
        else:
            split = split_routing(recording, options, seed)
        update("counting", None)
        problem = Problem(
            model=spec,
            topology=cluster,
            statistics=split.train if isinstance(split, CountSplit) else solving_statistics(recording, split),
            objective=goal,
            slots=read_slots(options.slots),
            device_slots=read_device_slots(options.device_slots),
            engine=options.engine,
        )
        if isinstance(split, CountSplit):
            return compare_counts(problem, split, choices, judged_too, options.seconds, seed, update)
        replayed = make_steps(split.judged, options, seed)
        return compare(problem, split, replayed, choices, judged_too, options.seconds, seed, update)


def plan_name(reference: str) -> str:
    """What a plan is called in tables: its file's name without the ending, or its own."""
    return Path(reference).stem if reference.endswith(PLAN_FILES) else reference
