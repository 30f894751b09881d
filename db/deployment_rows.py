"""Finding deployments, and telling of them by the ids of what they refer to."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..placement.errors import NotFoundError, nearest
from .content import ID_DIGITS
from .records import DeploymentRecord
from .schema import DeploymentRow, ModelRow, PlanRow, StatisticsRow, TopologyRow


def deployment_row(session: Session, name: str) -> DeploymentRow:
    """The deployment of that name.

    Raises:
        NotFoundError: there is none; the nearest is named.
    """
    row = session.scalar(select(DeploymentRow).where(DeploymentRow.name == name)) if name.isprintable() else None
    if row is None:
        names = session.scalars(select(DeploymentRow.name).limit(200)).all()
        raise NotFoundError(f"no deployment {name!r}; {nearest(name, names)}")
    return row


def record(session: Session, row: DeploymentRow) -> DeploymentRecord:
    return DeploymentRecord(
        key=row.key,
        name=row.name,
        created=row.created,
        model_id=_digits(session, ModelRow, row.model_key),
        topology_id=_digits(session, TopologyRow, row.topology_key),
        policy=row.policy,
        plan_id=plan_id(session, row.plan_key),
        reference_id=None if row.reference_key is None else _digits(session, StatisticsRow, row.reference_key),
        reference_window=row.reference_window,
        version=row.version,
        checked=row.checked_key,
    )


def plan_id(session: Session, key: int | None) -> str | None:
    return None if key is None else _digits(session, PlanRow, key)


def _digits(session: Session, table: Any, key: int) -> str:
    return str(session.scalar(select(table.fingerprint).where(table.key == key)))[:ID_DIGITS]
