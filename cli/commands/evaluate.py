"""`moeplace evaluate`: what a plan costs on held-out routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..command_line import refuse_idle
from ..options import (
    AsJson,
    Engine,
    HeldOutOptions,
    KeepOptions,
    ObjectiveOptions,
    OtherMs,
    PlanFileOptions,
    PlanReference,
    PlanSeed,
    Plot,
    PlotFile,
    RestartSeconds,
    RoutingPath,
    ServerOptions,
    StepOptions,
)
from ..output import emit, note, working
from ..parse import SolverChoice, check_restart, one_pool, read_batches, read_objective, solved_batches
from ..plots import comparison_drawings, show
from ..remote import check_plan_options, is_engines_own, is_file, plan_context, read_plan
from ..routing_split import (
    CountSplit,
    RoutingSplit,
    holds_counts_only,
    judged_steps,
    open_recording,
    solving_statistics,
    split_counts,
    split_routing,
)
from ..run_comparison import PEER, Comparison, compare, plan_name
from ..save import attempted, check_store, end_unkept, keep_evaluations
from ..tables import binding_rows, binding_table, comparison_rows, comparison_tables
from .compare import comparison_data

if TYPE_CHECKING:
    from ...placement.plan import Plan
    from ...profiler.read import Recording


def evaluate_command(
    plan: PlanReference,
    routing: RoutingPath,
    objective: ObjectiveOptions,
    held_out: HeldOutOptions,
    steps: StepOptions,
    storage: KeepOptions,
    remote: ServerOptions,
    files: PlanFileOptions,
    engine: Engine = None,
    other_ms: OtherMs = None,
    restart_seconds: RestartSeconds = None,
    seed: PlanSeed = None,
    plot: Plot = False,
    plot_file: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Replay held-out routing through a plan, beside the contiguous placement, and say what its layers wait for.

    With the plan's own seed and --held-out, the part judged on is the one its solver did not see.
    It is judged as the engine runs it that --for names, or that it was solved for. With --server the plan may be one
    of a service's; it is judged here.

    Example:

      moeplace evaluate plan.json trace --decode 128 --prefill 4096
      moeplace evaluate init_expert_location.json trace --plan-topology h100-hgx:2x8
    """
    from ...placement.decide import read_other_ms
    from ...placement.step_mix import step_mix

    other = None if other_ms is None else read_other_ms(other_ms)
    stores = storage.store and remote.server is None
    check_plan_options([plan], remote.server)
    if is_file(plan):
        refuse_idle("with a plan's file, which is judged here", "server")
    if stores:
        check_store(storage.db)
    judged = judge_plans([plan], routing, objective, held_out, steps, storage.db, files, engine, seed, remote.server)
    comparison, problem = judged.comparison, judged.comparison.problem
    [entry] = [entry for entry in comparison.entries if entry.was_given]
    judged_plan, name = judged.plans[0], entry.name
    comparison = replace(comparison, subject=name)
    warn_when_seen(judged_plan, judged.recording, judged.split, problem.statistics.fingerprint)
    rows = comparison_rows(comparison)
    failure = None
    if stores:
        _, failure = attempted(lambda: keep_evaluations(judged_plan, entry.evaluations, comparison.kinds, storage.db))
    waits = {kind: binding_rows(each, judged_plan.moe_layers) for kind, each in entry.evaluations.items()}
    tables = [binding_table(entries, f"{kind}: what layers of {name} wait for") for kind, entries in waits.items()]
    emit(
        {**comparison_data(comparison, rows, other, restart_seconds), "binding": waits},
        *comparison_tables(comparison, rows),
        *tables,
        as_json=as_json,
        mix=step_mix(problem),
        closing=partial(comparison.verdict, other, restart_seconds),
    )
    if plot or plot_file:
        show(comparison_drawings(comparison, [name, comparison.baseline.name]), plot_file, plot and not as_json)
    end_unkept(failure, None)


@dataclass(frozen=True)
class JudgedPlans:
    """Plans beside the contiguous one and, for an engine, its own policy."""

    plans: list[Plan]
    recording: Recording
    split: RoutingSplit | CountSplit
    comparison: Comparison


def judge_plans(
    references: Sequence[str],
    routing: Path,
    objective: ObjectiveOptions,
    held_out: HeldOutOptions,
    steps: StepOptions,
    db: str | None,
    files: PlanFileOptions,
    engine: str | None,
    seed: int | None,
    server: str | None = None,
) -> JudgedPlans:
    """Judges plans on held-out routing, under the first one's cluster, engine, seed and steps where none are named."""
    from ...placement.problem import Problem

    with working("reading the routing") as update:
        opened = cache(lambda: open_recording(routing))
        plans = [
            read_plan(each, db, server, **(plan_context(files, opened) if is_engines_own(each) else {}))
            for each in references
        ]
        first = plans[0]
        check_restart(engine or first.provenance.engine or None)
        used_seed = first.provenance.seed if seed is None else seed
        recording = opened()
        counts = holds_counts_only(recording)
        split: RoutingSplit | CountSplit = (split_counts if counts else split_routing)(recording, held_out, used_seed)
        problem = one_pool(
            Problem(
                model=first.model,
                topology=first.topology,
                statistics=split.train if isinstance(split, CountSplit) else solving_statistics(recording, split),
                objective=read_objective(objective),
                device_slots=first.slots_per_device.tolist(),
                engine=engine or first.provenance.engine or None,
                batches=read_batches(steps) or solved_batches(first),
            ),
            steps,
        )
        replayed = judged_steps(split, problem, steps.steps, used_seed)
        choices = [SolverChoice.parse(PEER)] if problem.engine is not None else []
        named = [(plan_name(name), each) for name, each in zip(references, plans, strict=True)]
        comparison = compare(problem, split, replayed, choices, named, 30.0, used_seed, update)
        return JudgedPlans(plans, recording, split, comparison)


def warn_when_seen(plan: Plan, recording: Recording, split: RoutingSplit | CountSplit, train_fingerprint: str) -> None:
    """Says so when the plan was solved on what it is judged on."""
    from ...placement.statistics import RoutingStatistics

    solved_on = plan.provenance.trace_fingerprint
    if not solved_on:
        return
    if solved_on == train_fingerprint:
        seen = not split.is_held_out
    else:
        whole = RoutingStatistics.from_trace(recording.trace) if recording.is_trace else recording.statistics()
        seen = solved_on == whole.fingerprint
    if seen:
        note("warning: the plan was solved on all of this routing, so these figures flatter it")
