"""`moeplace decide`: keep the plan in force, or apply a candidate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..comparison import BASELINE, part, solving_statistics
from ..inputs import read_objective, read_plan, read_routing
from ..options import JUDGING, AsJson, HeldOutOptions, ObjectiveOptions, RoutingPath, StoreOptions
from ..output import Column, Table, emit, figure, milliseconds, percent, quantity, seconds
from ..progress import working

if TYPE_CHECKING:
    from ...placement.decide import Decision

COLUMNS = (
    Column("candidate", "candidate", right=False),
    Column("current_seconds", "in force\nms", milliseconds),
    Column("candidate_seconds", "candidate\nms", milliseconds),
    Column("relative", "gain", percent),
    Column("relative_low", "low", percent),
    Column("relative_high", "high", percent),
    Column("moves", "experts\nmoved"),
    Column("bytes_moved", "moved", quantity("B")),
    Column("migration_seconds", "stall s", seconds),
    Column("payback_steps", "payback\nsteps", figure),
    Column("payback_steps_high", "at most", figure),
)


def decide_command(
    routing: RoutingPath,
    objective: ObjectiveOptions,
    held_out: HeldOutOptions,
    storage: StoreOptions,
    candidates: Annotated[
        str,
        typer.Option("--candidates", metavar="PLAN,...", help="Plan files or stored plans that might be applied."),
    ],
    current: Annotated[
        str,
        typer.Option(
            "--current", metavar="PLAN", help="The plan in force; contiguous is what engines do without a plan."
        ),
    ] = BASELINE,
    decode: Annotated[
        int, typer.Option("--decode", min=1, metavar="N", help="Sequences a decode step.", rich_help_panel=JUDGING)
    ] = 128,
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
            "--resamples", min=20, metavar="N", help="Draws of the held-out sequences.", rich_help_panel=JUDGING
        ),
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Decides the held-out part and every draw.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Say whether a candidate is worth applying: its gain on held-out sequences, with an interval, against its migration.

    Held-out sequences are drawn again and again; the plan in force and the candidates replay the same draws. Keeping is
    the answer unless a gain is proven and pays the migration back within the horizon.

    Example:

      moeplace decide trace --candidates plan.json,other.json --current now.json --horizon 50000
    """
    from ...placement.decide import decide
    from ...placement.problem import Problem
    from ...solvers import solve

    names = [name.strip() for name in candidates.split(",") if name.strip()]
    plans = [read_plan(name, storage.db) for name in names]
    with working("reading the routing") as update:
        record = read_routing(routing)
        parted = part(record, held_out, seed)
        problem = Problem(
            model=plans[0].model,
            topology=plans[0].topology,
            statistics=solving_statistics(record, parted),
            objective=read_objective(objective),
        )
        in_force = solve(problem, BASELINE) if current == BASELINE else read_plan(current, storage.db)
        decision = decide(
            in_force,
            plans,
            parted.judged,
            problem,
            concurrency=decode,
            resamples=resamples,
            confidence=confidence,
            horizon_steps=horizon,
            seed=seed,
            progress=lambda done: update("replaying draws of the held-out sequences", done / resamples),
        )
    emit(_data(decision, names), _table(decision, names, parted.description), as_json=as_json)


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
            "payback_steps": verdict.payback_steps,
            "payback_steps_high": verdict.payback_steps_high,
        }
        for name, verdict in zip(names, decision.verdicts, strict=True)
    ]


def _data(decision: Decision, names: list[str]) -> dict[str, Any]:
    return {
        "action": decision.action,
        "chosen": None if decision.chosen is None else names[decision.chosen],
        "reason": decision.reason,
        "confidence": decision.confidence,
        "horizon_steps": decision.horizon_steps,
        "candidates": _rows(decision, names),
    }


def _table(decision: Decision, names: list[str], held_out: str) -> Table:
    answer = "KEEP the plan in force" if decision.chosen is None else f"APPLY {names[decision.chosen]}"
    return Table(COLUMNS, _rows(decision, names), footnotes=(f"{answer}: {decision.reason}", held_out))
