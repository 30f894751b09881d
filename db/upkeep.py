"""Deleting, and telling how large the store is."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete as delete_from
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from ..placement.errors import InputError, nearest
from .records import StoreDescription
from .references import ROWS, Kind, find
from .schema import Base, DecisionRow, DeploymentRow, EvaluationRow, ExportRow, PlanRow, PublicationRow
from .session import revision


def table(kind: Kind) -> Any:
    """The rows of a kind.

    Raises:
        InputError: unknown kind; the nearest is named.
    """
    if kind not in ROWS:
        raise InputError(f"kind {kind!r} is unknown; {nearest(str(kind), ROWS)}")
    return ROWS[kind]


def delete(session: Session, kind: Kind, ref: str, dependants: bool) -> None:
    """See `Store.delete`."""
    row = find(session, table(kind), ref)
    owner = {"model": PlanRow.model_key, "topology": PlanRow.topology_key, "statistics": PlanRow.statistics_key}
    plans = select(PlanRow.key).where(owner.get(kind, PlanRow.key) == row.key)
    children = (EvaluationRow, ExportRow)
    held = {
        child.__tablename__: _count(session, select(child.key).where(child.plan_key.in_(plans))) for child in children
    }
    if kind != "plan":
        held = {"plans": _count(session, plans), **held}
    if any(held.values()) and not dependants:
        listed = ", ".join(f"{count} {name}" for name, count in held.items() if count)
        raise InputError(
            f"{kind} {ref!r} has {listed} that would lose it; delete those first, or all of it with dependants=True"
        )
    _refuse_used(session, kind, ref, row, plans)
    for child in children:
        session.execute(delete_from(child).where(child.plan_key.in_(plans)))
    if kind != "plan":
        session.execute(delete_from(PlanRow).where(PlanRow.key.in_(plans)))
    session.delete(row)


def _refuse_used(session: Session, kind: Kind, ref: str, row: Any, plans: Any) -> None:
    """What a deployment runs on, or ran on, stays: its history tells of it."""
    uses = {
        "model": [DeploymentRow.model_key == row.key],
        "topology": [DeploymentRow.topology_key == row.key],
        "statistics": [DeploymentRow.reference_key == row.key],
        "plan": [],
    }
    for use in [
        *uses[kind],
        DeploymentRow.plan_key.in_(plans),
        DeploymentRow.key.in_(select(PublicationRow.deployment_key).where(PublicationRow.plan_key.in_(plans))),
        DeploymentRow.key.in_(select(DecisionRow.deployment_key).where(DecisionRow.candidate_key.in_(plans))),
    ]:
        name = session.scalar(select(DeploymentRow.name).where(use).limit(1))
        if name is not None:
            raise InputError(f"{kind} {ref!r} belongs to the history of deployment {name!r}, which is kept")


def describe(session: Session, url: str) -> StoreDescription:
    """See `Store.describe`."""
    tables = list(Base.metadata.tables)
    counted = [name for name in tables if not name.endswith("_parts")]
    counts = select(
        *(
            select(func.count()).select_from(Base.metadata.tables[name]).scalar_subquery().label(name)
            for name in counted
        )
    )
    connection = session.connection()
    backend = connection.dialect.name
    if backend == "sqlite":
        size = text("SELECT page_count * page_size FROM pragma_page_count(), pragma_page_size()")
    else:
        sizes = " + ".join(f"pg_total_relation_size('{name}')" for name in tables)
        size = text(f"SELECT {sizes}")
    return StoreDescription(
        url=url,
        backend=backend,
        revision=revision(connection) or "",
        counts=dict(session.execute(counts).one()._mapping),
        size_bytes=int(session.execute(size).scalar_one()),
    )


def _count(session: Session, query: Any) -> int:
    return int(session.execute(select(func.count()).select_from(query.subquery())).scalar_one())
