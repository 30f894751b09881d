"""`moeplace plans`: the plans kept in the database."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import AsJson, ServerOptions, StoreOptions, grouped
from ..output import Column, Table, emit, figure, milliseconds, note, number, percent
from ..remote import service
from .solve import plan_summary, summary_table

if TYPE_CHECKING:
    from ...db.records import EvaluationRecord, PlanSummary
    from ...service.schemas import PlanView

plans_app = typer.Typer(help="List, show, rename and delete stored plans.\n\nExample:\n\n  moeplace plans list")

Reference = Annotated[
    str, typer.Argument(metavar="PLAN", help="A stored plan's name, or the first digits of its id.", show_default=False)
]

LIST_COLUMNS = (
    Column("id", "id", right=False),
    Column("name", "name", right=False),
    Column("created", "stored (UTC)", right=False),
    Column("solver", "solver", right=False),
    Column("model", "model", right=False),
    Column("topology", "topology", right=False),
    Column("devices", "devices"),
    Column("slots", "slots"),
    Column("value", "value", figure),
    Column("gap", "gap", percent),
)
EVALUATION_COLUMNS = (
    Column("created", "judged (UTC)", right=False),
    Column("steps", "steps", right=False),
    Column("execution", "execution", right=False),
    Column("load_max_mean", "load\nmax/mean", number(3)),
    Column("step_seconds_mean", "step ms\nmean", milliseconds),
    Column("step_seconds_p99", "step ms\np99", milliseconds),
)


@plans_app.command("list")
@grouped
def list_command(
    storage: StoreOptions,
    remote: ServerOptions,
    model: Annotated[
        str | None, typer.Option("--model", help="Only plans of this model: its name or id.", show_default=False)
    ] = None,
    solver: Annotated[
        str | None, typer.Option("--solver", help="Only plans this solver made.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="At most so many, newest first.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List stored plans, newest first.

    Example:

      moeplace plans list --solver search
    """
    if remote.server is not None:
        with service(remote.server) as client:
            views = itertools.islice(client.plans(model=model, solver=solver), limit)
            rows = [_remote_row(view) for view in views]
    else:
        from ...db import Store

        with Store.open(storage.db) as store:
            rows = [_row(record) for record in store.plans(model=model, solver=solver, limit=limit)]
    table = Table(LIST_COLUMNS, rows) if rows else Table((), (), footnotes=["No plans are stored."])
    emit(rows, table, as_json=as_json)


@plans_app.command("show", no_args_is_help=True)
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
        columns = [Column(key, key, right=False) for key in ("created", "format", "path")]
        tables.append(Table(columns, [{**entry, "created": _time(entry["created"])} for entry in data["exports"]]))
    emit(data, *tables, as_json=as_json)


@plans_app.command("rename", no_args_is_help=True)
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


@plans_app.command("delete", no_args_is_help=True)
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


def _row(record: PlanSummary) -> dict[str, Any]:
    certificate = record.certificate
    return {
        "id": record.id,
        "name": record.name,
        "created": _time(record.created),
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
    return row | {"created": _time(view.created), "model": view.model_id, "topology": view.topology_id}


def _evaluation(record: EvaluationRecord) -> dict[str, Any]:
    return {
        "created": _time(record.created),
        "steps": record.steps,
        "steps_fingerprint": record.steps_fingerprint,
        "execution": None if record.objective is None else record.objective.execution,
        **record.summary,
    }


def _time(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"
