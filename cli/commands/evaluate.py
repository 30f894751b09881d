"""`moeplace evaluate`: what a plan costs on held-out routing."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Annotated

import typer

from ..options import (
    JUDGING,
    AsJson,
    Engine,
    HeldOutOptions,
    KeepOptions,
    ObjectiveOptions,
    PlanFileOptions,
    PlanReference,
    RoutingPath,
    ServerOptions,
    StepOptions,
)
from ..output import emit, note, working
from ..parse import read_objective
from ..remote import is_engines_own, plan_context, read_plan
from ..routing_split import (
    RoutingSplit,
    count_row,
    count_table,
    holds_counts_only,
    make_steps,
    open_recording,
    solving_statistics,
    split_counts,
    split_routing,
)
from ..run_comparison import compare, plan_name
from ..save import keep_evaluations
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
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Decides the held-out part and the steps. Default: the seed the plan was solved with.",
            show_default=False,
            rich_help_panel=JUDGING,
        ),
    ] = None,
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
    from ...placement.problem import Problem

    with working("reading the routing") as update:
        opened = cache(lambda: open_recording(routing))
        context = plan_context(files, opened) if is_engines_own(plan) else {}
        judged_plan = read_plan(plan, storage.db, remote.server, **context)
        used_seed = judged_plan.provenance.seed if seed is None else seed
        recording = opened()
        if holds_counts_only(recording):
            counts = split_counts(recording, held_out, used_seed)
            rows = [count_row(plan_name(plan), judged_plan, counts, used_seed)]
            emit(
                {"routing": {"held_out": counts.description}, "rows": rows}, count_table(rows, counts), as_json=as_json
            )
            return
        split = split_routing(recording, held_out, used_seed)
        replayed = make_steps(split.judged, steps, used_seed)
        problem = Problem(
            model=judged_plan.model,
            topology=judged_plan.topology,
            statistics=solving_statistics(recording, split),
            objective=read_objective(objective),
            device_slots=judged_plan.slots_per_device.tolist(),
            engine=engine or judged_plan.provenance.engine or None,
        )
        name = plan_name(plan)
        comparison = compare(problem, split, replayed, (), [(name, judged_plan)], 30.0, used_seed, update)
    warn_when_seen(judged_plan, recording, split, problem.statistics.fingerprint)
    rows = comparison_rows(comparison)
    if storage.store and remote.server is None:
        keep_evaluations(judged_plan, comparison.entries[-1].evaluations, replayed, storage.db)
    judged = comparison.entries[-1].evaluations
    waits = {kind: binding_rows(evaluation, judged_plan.moe_layers) for kind, evaluation in judged.items()}
    tables = [binding_table(entries, f"{kind}: what layers of {name} wait for") for kind, entries in waits.items()]
    data = {**comparison_data(comparison, rows), "binding": waits}
    emit(data, *comparison_tables(comparison, rows), *tables, as_json=as_json)


def warn_when_seen(plan: Plan, recording: Recording, split: RoutingSplit, train_fingerprint: str) -> None:
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
