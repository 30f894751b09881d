"""`moeplace decide`: keep the plan in force, or apply a candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import completion
from ..command_line import GIVEN, refuse_idle
from ..options import (
    JUDGING,
    MAX_SEED,
    SOLVING,
    STORE,
    AsJson,
    BatchOptions,
    Engine,
    HeldOutOptions,
    ObjectiveOptions,
    PlanFileOptions,
    RestartSeconds,
    ServerOptions,
    StoreOptions,
)
from ..output import Column, Table, emit, figure, milliseconds, percent, quantity, seconds, working
from ..parse import check_restart, one_pool, read_batches, read_objective, solved_batches, split_list
from ..remote import PLAN_FILE_OPTIONS, check_plan_options, is_engines_own, is_file, plan_context, read_plan, service
from ..routing_split import holds_counts_only, open_recording, solving_statistics, split_counts, split_routing
from ..run_comparison import BASELINE, plan_name

if TYPE_CHECKING:
    from ...placement.decide import Decision
    from ...placement.plan import Plan
    from ...placement.statistics import RoutingStatistics
    from ...placement.trace import RoutingTrace
    from ...profiler.read import Recording

COUNTS_ASSUME = (
    "Counts tell neither which experts a token chose together nor where tokens lie: choices are taken to be "
    "independent and tokens spread evenly over devices. Intervals are from blocks of neighbouring windows drawn again."
)
COLUMNS = (
    Column("candidate", "candidate", plan_name, right=False),
    Column("current_seconds", "in force\nms", milliseconds),
    Column("candidate_seconds", "candidate\nms", milliseconds),
    Column("current_ideal_share", "in force of\nthe ideal", percent),
    Column("ideal_share", "of the\nideal", percent),
    Column("relative", "gain", percent),
    Column("relative_low", "low", percent),
    Column("relative_high", "high", percent),
    Column("moves", "experts\nmoved"),
    Column("bytes_moved", "moved", quantity("B")),
    Column("stall_seconds", "stall s", seconds),
    Column("payback_steps", "payback\nsteps", figure),
    Column("payback_steps_high", "at most", figure),
)


def decide_command(
    objective: ObjectiveOptions,
    held_out: HeldOutOptions,
    storage: StoreOptions,
    remote: ServerOptions,
    files: PlanFileOptions,
    batch: BatchOptions,
    candidates: Annotated[
        str,
        typer.Option(
            "--candidates",
            metavar="PLAN,...",
            autocompletion=completion.plans,
            help="Plan files or stored plans that might be applied.",
        ),
    ],
    routing: Annotated[
        Path | None,
        typer.Argument(
            metavar="ROUTING",
            help="Recorded routing, as for `moeplace solve`; none with --deployment.",
            show_default=False,
        ),
    ] = None,
    deployment: Annotated[
        str | None,
        typer.Option(
            "--deployment",
            metavar="NAME",
            help="Have the service of --server judge one candidate against this deployment's plan in force, on its "
            "newest routing.",
            show_default=False,
            rich_help_panel=STORE,
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option(
            "--record",
            help="With --deployment: keep the decision, to be approved or published as its policy says.",
            rich_help_panel=STORE,
        ),
    ] = False,
    current: Annotated[
        str,
        typer.Option(
            "--current",
            metavar="PLAN",
            autocompletion=completion.plans,
            help="The plan in force; contiguous is what engines do without a plan.",
        ),
    ] = BASELINE,
    engine: Engine = None,
    horizon: Annotated[
        float,
        typer.Option(
            "--horizon", min=1, metavar="STEPS", help="Steps the choice is expected to stand.", rich_help_panel=JUDGING
        ),
    ] = 100_000,
    confidence: Annotated[
        float,
        typer.Option("--confidence", min=0.5, max=0.999, help="Of the intervals.", rich_help_panel=JUDGING),
    ] = 0.95,
    resamples: Annotated[
        int,
        typer.Option(
            "--resamples",
            min=20,
            max=100_000,
            metavar="N",
            help="Draws of the held-out sequences or windows.",
            rich_help_panel=JUDGING,
        ),
    ] = 200,
    restart_seconds: RestartSeconds = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            max=MAX_SEED,
            help="Decides the held-out part and every draw.",
            rich_help_panel=SOLVING,
        ),
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Say whether a candidate is worth applying: its gain on held-out sequences, with an interval, against its
    migration.

    Held-out sequences are drawn again and again; the plan in force and the candidates replay the same draws. Keeping is
    the answer unless a gain is proven and pays the migration back within the horizon. Of counts alone windows are held
    out, steps are priced by their loads, and blocks of windows are drawn again.

    Example:

      moeplace decide trace --candidates plan.json,other.json --current now.json --horizon 50000
      moeplace decide --server http://plans:8311 --deployment chat --candidates 3f2a91c0 --record
    """
    from ...placement.cost import prediction_basis
    from ...placement.decide import decide
    from ...placement.problem import Problem
    from ...placement.step_mix import step_mix
    from ...solvers import solve

    if (routing is None) == (deployment is None):
        raise typer.BadParameter("give ROUTING to judge on, or --deployment of a service, one of them")
    names = split_list(candidates)
    if not names:
        raise typer.BadParameter("--candidates names no plan; give files or stored plans with commas between")
    references = [*names, *([] if current == BASELINE else [current])]
    if routing is None:
        refuse_idle("with --deployment: the service judges by its policy", *(GIVEN.keys() - JUDGED_BY_SERVICE))
        plans = [read_plan(name, storage.db, remote.server, **plan_context(files)) for name in names]
        _asked_of_service(remote.server, str(deployment), plans, names, record, as_json)
        return
    refuse_idle("without --deployment", "record")
    check_plan_options(references, remote.server)
    if all(map(is_file, references)):
        refuse_idle("without --deployment, and with plans' files", "server")
    with working("reading the routing") as update:
        opened = cache(lambda: open_recording(routing))
        read = _plans(references, storage.db, remote.server, files, opened)
        plans, in_force = read[: len(names)], read[len(names)] if len(read) > len(names) else None
        recording = opened()
        judged: RoutingTrace | RoutingStatistics
        if holds_counts_only(recording):
            counts = split_counts(recording, held_out, seed)
            statistics, judged, described = counts.train, counts.judged, f"{counts.description}. {COUNTS_ASSUME}"
        else:
            split = split_routing(recording, held_out, seed)
            statistics, judged, described = solving_statistics(recording, split), split.judged, f"{split.description}."
        problem = one_pool(
            Problem(
                model=plans[0].model,
                topology=plans[0].topology,
                statistics=statistics,
                objective=read_objective(objective),
                engine=engine or plans[0].provenance.engine or None,
                batches=read_batches(batch) or solved_batches(plans[0]),
            ),
            batch,
        )
        check_restart(problem.engine)
        in_force = solve(problem, BASELINE) if in_force is None else in_force
        decision = decide(
            in_force,
            plans,
            judged,
            problem,
            resamples=resamples,
            confidence=confidence,
            horizon_steps=horizon,
            restart_seconds=restart_seconds,
            seed=seed,
            progress=lambda news: update("replaying draws of the held-out sequences", news.fraction),
        )
    basis = prediction_basis(problem.model, problem.topology, problem.objective).text
    data = _data(decision, names) | {"prediction": basis, "held_out": described}
    table = _table(decision, names, f"{described} Step times: {basis}.")
    emit(
        data,
        table,
        as_json=as_json,
        mix=step_mix(replace(problem, current=in_force)),
        closing=lambda: [_verdict(decision, names)],
    )


JUDGED_BY_SERVICE = {"candidates", "deployment", "record", "server", "db", "as_json", *PLAN_FILE_OPTIONS}
"""Options that are of use with --deployment."""


def _plans(
    references: list[str], db: str | None, server: str | None, files: PlanFileOptions, opened: Callable[[], Recording]
) -> list[Plan]:
    """The plans named. What an engine's own file does not say, the options or a plan beside it do."""
    read = {name: read_plan(name, db, server) for name in references if not is_engines_own(name)}
    if len(read) < len(set(references)):
        known = plan_context(files, opened)
        for beside in read.values():
            known = {"model": known["model"] or beside.model, "topology": known["topology"] or beside.topology}
        read |= {name: read_plan(name, db, server, **known) for name in references if name not in read}
    return [read[name] for name in references]


def _asked_of_service(
    server: str | None, deployment: str, plans: list[Plan], names: list[str], record: bool, as_json: bool
) -> None:
    if server is None or len(plans) != 1:
        raise typer.BadParameter("--deployment goes with --server, and with one candidate")
    with service(server) as client, working(f"asking {server}"):
        result = client.wait(client.decide(deployment, client.add_plan(plans[0]).id, record=record)).result or {}
    rows = [{"candidate": names[0], **decision_row(result["figures"])}]
    answer = "KEEP the plan in force" if result["action"] == "keep" else f"APPLY {names[0]}"
    footnotes = [f"{answer}: {result['reason']}", f"Judged on the newest routing of {deployment!r}."]
    if record:
        footnotes.append(f"Decision {result['decision']}: {result['decision_state']}.")
    emit({**result, "candidates": rows}, Table(COLUMNS, rows, footnotes=footnotes), as_json=as_json)


def decision_row(figures: dict[str, Any]) -> dict[str, Any]:
    """A verdict's figures, as the service tells them, in the columns shown."""
    current = figures["current"]
    return {
        "current_seconds": current,
        "candidate_seconds": figures["candidate"],
        "gain_seconds": figures["gain"],
        "relative": figures["gain"] / current,
        "relative_low": figures["gain_low"] / current,
        "relative_high": figures["gain_high"] / current,
        **{
            name: figures[name]
            for name in ("moves", "bytes_moved", "migration_seconds", "payback_steps", "payback_steps_high")
        },
        # Decisions that were made before these were known.
        **{
            name: figures.get(name)
            for name in ("current_ideal_share", "ideal_share", "gain_grouped", "restart", "stall_seconds")
        },
    }


def _rows(decision: Decision, names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "candidate": name,
            "current_seconds": verdict.current,
            "candidate_seconds": verdict.candidate,
            "gain_seconds": verdict.gain,
            "relative": verdict.gain / verdict.current,
            "relative_low": verdict.gain_low / verdict.current,
            "relative_high": verdict.gain_high / verdict.current,
            "moves": verdict.migration.moves,
            "bytes_moved": verdict.migration.bytes_moved,
            "migration_seconds": verdict.migration.seconds,
            "restart": verdict.migration.restart or None,
            "stall_seconds": verdict.migration.stall,
            "gain_grouped": verdict.gain_grouped,
            "payback_steps": verdict.payback_steps,
            "payback_steps_high": verdict.payback_steps_high,
            "current_ideal_share": verdict.current_ideal_share,
            "ideal_share": verdict.ideal_share,
        }
        for name, verdict in zip(names, decision.verdicts, strict=True)
    ]


def _data(decision: Decision, names: list[str]) -> dict[str, Any]:
    return {
        "action": decision.action,
        "chosen": None if decision.chosen is None else names[decision.chosen],
        "reason": decision.reason,
        "text": _verdict(decision, names),
        "most": decision.most,
        "confidence": decision.confidence,
        "horizon_steps": decision.horizon_steps,
        "candidates": _rows(decision, names),
    }


def _table(decision: Decision, names: list[str], held_out: str) -> Table:
    return Table(COLUMNS, _rows(decision, names), footnotes=(held_out,))


def _verdict(decision: Decision, names: list[str]) -> str:
    answer = "KEEP the plan in force" if decision.chosen is None else f"APPLY {names[decision.chosen]}"
    return f"{answer}: {decision.reason}."
