"""Several plans solved for and judged on the same held-out steps: what `compare`, `evaluate` and `report` do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..placement.errors import InputError, MoeplaceError, SolveError, UnsupportedError
from ..placement.steps import USUAL_BATCHES, Batch
from .options import ComparisonOptions
from .output import Update, interrupted, note, solve_listener, working
from .parse import (
    SolverChoice,
    asked_slots,
    check_restart,
    pool_problems,
    read_batches,
    read_device_slots,
    read_model,
    read_objective,
    read_topology,
    split_list,
)
from .remote import PLAN_FILES, read_plan
from .routing_split import (
    CountSplit,
    RoutingSplit,
    TrainingRouting,
    count_row,
    holds_counts_only,
    judged_steps,
    open_recording,
    solving_statistics,
    split_counts,
    split_routing,
)

if TYPE_CHECKING:
    from ..placement.decide import Saving
    from ..placement.evaluate import Evaluation
    from ..placement.plan import Plan
    from ..placement.problem import Problem
    from ..placement.steps import Steps

BASELINE = "contiguous"
OTHER_BATCHES = (*USUAL_BATCHES, Batch("decode", tokens_per_device=512))
"""Looked at beside a single batch that was asked for."""
ELSEWHERE_TOKENS = 8_192
"""Of the steps of each of these."""
NO_BALANCER = ("permute", "moeplace")
"""What --for takes that balances nothing by itself."""
PEER = "eplb"
"""What engines do by themselves, by its solver's name."""


@dataclass(frozen=True)
class Entry:
    """A plan and what it costs on the steps; or, without a plan, why there is none."""

    name: str
    plan: Plan | None
    evaluation: Evaluation | None = None
    reason: str = ""
    was_given: bool = False

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        """What it costs on the steps of each batch, by its name."""
        return {} if self.evaluation is None else self.evaluation.by_batch()


@dataclass(frozen=True)
class Comparison:
    """Entries in the order asked for, all judged on the same steps. Others are measured against the first.

    steps: of all batches of the problem. pool: that the problem is of, where one was named. subject: name of the plan
    that verdicts are on; the best where none is named.
    """

    problem: Problem
    steps: Steps
    split: RoutingSplit | CountSplit | TrainingRouting
    entries: tuple[Entry, ...]
    seed: int
    pool: str = ""
    subject: str = ""

    @property
    def baseline(self) -> Entry:
        return self.entries[0]

    @cached_property
    def kinds(self) -> dict[str, Steps]:
        """The steps of each batch, by its name."""
        return self.steps.by_batch()

    def risk(self, entry: Entry, kind: str | None = None) -> float:
        """The objective's figure in seconds, on all steps or of a kind; regret is measured against the best of these
        plans on each workload."""
        judged = {
            other.name: other.evaluation if kind is None else other.evaluations[kind]
            for other in self.entries
            if other.evaluation is not None
        }
        evaluation = judged[entry.name]
        assert evaluation is not None
        if self.problem.objective.risk != "regret":
            return evaluation.risk()
        from ..placement.objective import best_by_workload

        every = [other.step_seconds for other in judged.values() if other is not None]
        best = best_by_workload(every, evaluation.step_workload, len(evaluation.workloads), evaluation.weight)
        return evaluation.risk(best)

    @cached_property
    def best(self) -> Entry:
        """The plan that verdicts are on: the subject, else the one of least risk."""
        for entry in self.entries:
            if self.subject and entry.name == self.subject:
                return entry
        return min((entry for entry in self.entries if entry.evaluation is not None), key=self.risk)

    @cached_property
    def reference(self) -> Entry:
        """What the best is measured against: the first plan given, else the engines' own policy, else the first; of
        the others where that is the best itself."""
        others = [entry for entry in self.entries if entry.evaluation is not None and entry is not self.best]
        own = [entry for entry in others if entry.was_given]
        peers = [entry for entry in others if entry.name == PEER]
        return next(iter(own or peers or others), self.best)

    @property
    def sides(self) -> list[str]:
        """Names of the two plans that figures set against each other, the best first; of one where there is one."""
        return list(dict.fromkeys((self.best.name, self.reference.name)))

    @cached_property
    def saved(self) -> Saving | None:
        """What the best saves against the reference; None of a plan alone."""
        from ..placement.bounds import with_room
        from ..placement.decide import saving

        best, reference = self.best.evaluation, self.reference.evaluation
        if self.best is self.reference or best is None or reference is None:
            return None
        plans = [entry.plan for entry in self.entries if entry.plan is not None]
        return saving(best, reference, self.steps, with_room(self.problem, plans))

    @cached_property
    def windows(self) -> list[dict[str, Any]] | None:
        """Of counts, each plan's balance on windows, or why there is no plan."""
        split = self.split
        if not isinstance(split, CountSplit):
            return None
        return [
            {"plan": entry.name, "reason": entry.reason}
            if entry.plan is None
            else count_row(entry.name, entry.plan, split, self.problem.objective, self.seed)
            for entry in self.entries
        ]

    @property
    def where(self) -> str:
        """The steps judged on, in words."""
        return "held-out steps" if self.split.is_held_out else "the steps solved on"

    def verdict(self, other_ms: Mapping[str, float] | None = None, restart_seconds: float | None = None) -> list[str]:
        """Sentences on the best plan; other_ms: time of all else of a step, by phase. Without it that is estimated,
        where the model is known. restart_seconds: of an engine that restarts to take a plan."""
        data = self.verdict_data(other_ms, restart_seconds)
        if data is None or self.saved is None:
            return []
        prefix = "" if self.saved.nothing_pays else f"{self.best.name}: "
        further = [data[name] for name in ("whole_step", "applied") if data[name] is not None]
        return [prefix + data["text"], *further, *self.elsewhere]

    def verdict_data(
        self, other_ms: Mapping[str, float] | None = None, restart_seconds: float | None = None
    ) -> dict[str, Any] | None:
        """What the best plan saves, as JSON has it; None of a plan alone. The arguments are those of `verdict`."""
        from ..placement.decide import applied_text, whole_step_text
        from ..placement.serving import other_work
        from ..placement.step_mix import step_mix

        if self.saved is None:
            return None
        problem, source = self.problem, "the other work of a step"
        if other_ms is None:
            estimated = other_work(problem.model, problem.topology, step_mix(problem).batches)
            other_ms, source = ({}, source) if estimated is None else (estimated.ms, estimated.text)
        whole_step = None
        if any(name.partition(" ")[0] in other_ms for name in self.saved.times):
            assert self.best.evaluation is not None
            whole_step = whole_step_text(self.saved, other_ms, self.best.evaluation.basis.error, source)
        profile = self.problem.profile
        applied = None if profile is None else applied_text(self.saved, profile, restart_seconds)
        saved = self.saved.to_dict(self.called(self.reference), self.where)
        return {**saved, "whole_step": whole_step, "applied": applied}

    @cached_property
    def elsewhere(self) -> list[str]:
        """Where steps of one size were asked for: what the plan does at others, against the reference."""
        from ..placement.evaluate import evaluate
        from ..placement.step_mix import problem_steps

        best, reference, asked = self.best, self.reference, self.problem.batches
        if len(asked) != 1 or best is reference or best.plan is None or reference.plan is None:
            return []
        devices, said = self.problem.num_devices, []
        for batch in OTHER_BATCHES:
            # Within a factor of two it is the same size.
            if batch.phase == asked[0].phase and 0.5 < batch.step_tokens(devices) / asked[0].step_tokens(devices) < 2:
                continue
            problem = replace(self.problem, batches=(batch,))
            steps = problem_steps(self.split.judged, problem, most_tokens=ELSEWHERE_TOKENS, seed=self.seed)
            ours, theirs = (evaluate(plan, steps, problem).mean_seconds for plan in (best.plan, reference.plan))
            change = ours / theirs - 1.0
            said.append(f"{batch.name(devices)} {abs(change) * 100:.1f} % {'slower' if change > 0 else 'faster'}")
        return [f"At other steps, of so many tokens, against {self.called(reference)}: {', '.join(said)}."]

    def called(self, entry: Entry) -> str:
        """What a plan is called in a sentence."""
        engine = self.problem.engine
        return f"{engine}'s EPLB" if entry.name == PEER and engine not in (None, *NO_BALANCER) else entry.name


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


def judge(entry: Entry, problem: Problem, steps: Steps, update: Update) -> Entry:
    """The entry with its evaluation."""
    from ..placement.evaluate import evaluate

    if entry.plan is None:
        return entry
    update(f"judging {entry.name}", None)
    try:
        return replace(entry, evaluation=evaluate(entry.plan, steps, problem))
    except MoeplaceError as error:
        raise InputError(f"plan {entry.name!r}: {error}") from None


def compare(
    problem: Problem,
    split: RoutingSplit | CountSplit,
    steps: Steps,
    choices: Sequence[SolverChoice],
    plans: Sequence[tuple[str, Plan]],
    seconds: float,
    seed: int,
    update: Update,
    pool: str = "",
) -> Comparison:
    """Solves with each choice, takes plans that are given, and judges all on the same steps.

    The contiguous plan always stands first: every ratio is to it.
    """
    entries = _solved(problem, choices, plans, seconds, seed, update)
    judged = tuple(judge(entry, problem, steps, update) for entry in entries)
    return Comparison(problem, steps, split, judged, seed, pool)


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
    done = 0
    try:
        for choice in others:
            entry = solve_entry(choice, problem, seconds, seed, update)
            entries.append(entry)
            done += 1
            if entry.plan is not None and entry.plan.provenance.stop == "interrupted":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        left = ", ".join(choice.label for choice in others[done:]) or "none"
        interrupted(f"interrupted: what was solved by then is judged and shown; not solved: {left}")
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


def run_comparison(routing: Path, options: ComparisonOptions) -> list[Comparison]:
    """Reads, checks everything that can be wrong, then solves and judges: from options to finished comparisons, one
    for each pool that is named."""
    from ..placement.problem import Problem
    from ..solvers import solver_names

    cluster, goal, seed = read_topology(options), read_objective(options, options.engine), options.seed
    named = ",".join(solver_names()) if options.solvers is None else options.solvers
    choices, batches = SolverChoice.parse_list("--solvers", named), read_batches(options)
    check_restart(options.engine)
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
            slots=asked_slots(options.slots, options.redundant, spec.experts),
            device_slots=read_device_slots(options.device_slots),
            engine=options.engine,
            batches=batches,
        )
        warn_of_idle_devices(problem)
        return [
            compare(
                asked,
                split,
                judged_steps(split, asked, options.steps, seed),
                choices,
                judged_too,
                options.seconds,
                seed,
                update,
                pool,
            )
            for pool, asked in pool_problems(problem, options).items()
        ]


def warn_of_idle_devices(problem: Problem) -> None:
    """Says so where there are fewer slots than devices."""
    idle = int((problem.layer_slots.sum(axis=0) == 0).sum())
    if idle:
        note(
            f"warning: {idle} of {problem.num_devices} devices hold no expert in {problem.num_slots} slots a layer; "
            f"give at least {problem.num_devices} slots (--slots), or fewer devices (--nodes, --devices-per-node)"
        )


def plan_name(reference: str) -> str:
    """What a plan is called in tables: its file's name without the ending, or its own."""
    return Path(reference).stem if reference.endswith(PLAN_FILES) else reference
