"""`moeplace plans`: the plans kept in the database."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import completion
from ..command_line import Command, refuse_idle
from ..options import AsJson, ServerOptions, StoreOptions, grouped
from ..output import Column, Table, emit, figure, milliseconds, note, number, percent, to_the_second
from ..remote import service
from .solve import plan_summary, summary_table

if TYPE_CHECKING:
    from ...db.records import EvaluationRecord, PlanSummary
    from ...service.schemas import PlanView

plans_app = typer.Typer(help="List, show, rename and delete stored plans.\n\nExample:\n\n  moeplace plans list")

Reference = Annotated[
    str,
    typer.Argument(
        metavar="PLAN",
        autocompletion=completion.plans,
        help="A stored plan's name, or the first digits of its id.",
        show_default=False,
    ),
]

MOST_PLANS = 1_000_000
LIST_COLUMNS = (
    Column("id", "id", right=False),
    Column("name", "name", right=False),
    Column("created", "stored (UTC)", to_the_second, right=False),
    Column("solver", "solver", right=False),
    Column("model", "model", right=False),
    Column("topology", "topology", right=False),
    Column("devices", "devices"),
    Column("slots", "slots"),
    Column("gap", "gap", percent),
)
VALUE_COLUMNS = (
    Column("id", "id", right=False),
    Column("name", "name", right=False),
    Column("solver", "solver", right=False),
    Column("value", "value", figure),
    Column("bound", "bound", figure),
)
EVALUATION_COLUMNS = (
    Column("created", "judged (UTC)", to_the_second, right=False),
    Column("steps", "steps", right=False),
    Column("execution", "execution", right=False),
    Column("load_max_mean", "load\nmax/mean", number(3)),
    Column("step_seconds_mean", "step ms\nmean", milliseconds),
    Column("step_seconds_p99", "step ms\np99", milliseconds),
    Column("ideal_share", "of the\nideal", percent),
)


@plans_app.command("list", cls=Command)
@grouped
def list_command(
    storage: StoreOptions,
    remote: ServerOptions,
    model: Annotated[
        str | None,
        typer.Option(
            "--model-name", metavar="NAME", help="Only plans of this model: its name or id.", show_default=False
        ),
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            autocompletion=completion.solvers,
            help="Only plans this solver made.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, max=MOST_PLANS, help="At most so many, newest first.")
    ] = 50,
    as_json: AsJson = False,
) -> None:
    """List stored plans, newest first.

    Example:

      moeplace plans list --solver search
    """
    if remote.server is not None:
        refuse_idle(f"with the service {remote.server}, which has its own", "db")
        with service(remote.server) as client:
            views = itertools.islice(client.plans(model=model, solver=solver), limit)
            rows = [_remote_row(view) for view in views]
    else:
        from ...db import Store

        with Store.open(storage.db) as store:
            rows = [_row(record) for record in store.plans(model=model, solver=solver, limit=limit)]
    tables = (
        [Table(LIST_COLUMNS, rows), *_values(rows)] if rows else [Table((), (), footnotes=["No plans are stored."])]
    )
    emit(rows, *tables, as_json=as_json)


@plans_app.command("show", cls=Command, no_args_is_help=True)
@grouped
def show_command(plan: Reference, storage: StoreOptions, as_json: AsJson = False) -> None:
    """Show how a plan was made, how it was judged, and where it was exported.

    Example:

      moeplace plans show 3f2a91c0
    """
    from ...db import Store

    with Store.open(storage.db) as store:
        record = store.plan(plan)
        evaluations, exports = store.evaluations(record.id), store.exports(record.id)
    summary = {**plan_summary(record.plan), "stored_as": record.id}
    data = {
        "id": record.id,
        "name": record.name,
        "created": record.created,
        **summary,
        "evaluations": [_evaluation(entry) for entry in evaluations],
        "exports": [
            {"format": entry.format, "path": entry.path, "created": entry.created, "sha256": entry.sha256}
            for entry in exports
        ],
    }
    tables = [summary_table(summary)]
    if evaluations:
        tables.append(Table(EVALUATION_COLUMNS, data["evaluations"]))
    if exports:
        columns = [
            Column("created", "created (UTC)", to_the_second, right=False),
            *(Column(key, key, right=False) for key in ("format", "path")),
        ]
        tables.append(Table(columns, data["exports"]))
    emit(data, *tables, as_json=as_json)


@plans_app.command("rename", cls=Command, no_args_is_help=True)
@grouped
def rename_command(
    plan: Reference,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new name.", show_default=False)],
    storage: StoreOptions,
) -> None:
    """Give a stored plan a name.

    Example:

      moeplace plans rename 3f2a91c0 production
    """
    from ...db import Store

    with Store.open(storage.db) as store:
        store.rename("plan", plan, name)
    note(f"renamed {plan} to {name}")


@plans_app.command("delete", cls=Command, no_args_is_help=True)
@grouped
def delete_command(plan: Reference, storage: StoreOptions) -> None:
    """Delete a stored plan, with its evaluations and its list of exports.

    Example:

      moeplace plans delete 3f2a91c0
    """
    from ...db import Store

    with Store.open(storage.db) as store:
        record = store.plan(plan)
        store.delete("plan", record.id, dependants=True)
    note(f"deleted plan {record.id}")


def _values(rows: list[dict[str, Any]]) -> list[Table]:
    """A table an objective, whose name says the unit: values of different ones do not compare."""
    mine: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["value"] is not None:
            mine.setdefault(row["objective"], []).append(row)
    return [Table(VALUE_COLUMNS, of, f"Value: {objective}") for objective, of in mine.items()]


def _row(record: PlanSummary) -> dict[str, Any]:
    certificate = record.certificate
    return {
        "id": record.id,
        "name": record.name,
        "created": record.created,
        "solver": record.solver,
        "model": record.model,
        "topology": record.topology,
        "devices": record.devices,
        "slots": record.slots,
        "objective": None if certificate is None else certificate.objective,
        "value": None if certificate is None else certificate.value,
        "bound": None if certificate is None else certificate.bound,
        "gap": None if certificate is None else certificate.gap,
    }


def _remote_row(view: PlanView) -> dict[str, Any]:
    fields = ("id", "name", "solver", "devices", "slots", "objective", "value", "bound", "gap")
    row = {field: getattr(view, field) for field in fields}
    return row | {"created": view.created, "model": view.model_id, "topology": view.topology_id}


def _evaluation(record: EvaluationRecord) -> dict[str, Any]:
    return {
        "created": record.created,
        "steps": record.steps,
        "steps_fingerprint": record.steps_fingerprint,
        "execution": None if record.objective is None else record.objective.execution,
        **record.summary,
    }
