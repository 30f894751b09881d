"""Decisions, and what people make of those that wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..placement.errors import ConflictError, NotFoundError
from . import audit
from .content import storable
from .database import Sessions
from .deployments import publish
from .records import Actor, DecisionRecord
from .references import deployment_row, id_of
from .schema import DecisionRow, DeploymentRow, PlanRow
from .webhooks import announce


class Decisions:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def get(self, key: int) -> DecisionRecord:
        """Raises NotFoundError where there is no such decision."""
        with self._sessions.reading() as session:
            return _record(session, _row(session, key))

    def page(
        self,
        deployment: str | None = None,
        *,
        limit: int,
        before: int | None = None,
        state: str | None = None,
        among: Sequence[str] | None = None,
    ) -> list[DecisionRecord]:
        """Newest first, of one deployment or of all; of those of these names only, where they are given."""
        query = select(DecisionRow).order_by(DecisionRow.key.desc()).limit(limit)
        with self._sessions.reading() as session:
            if among is not None:
                named = select(DeploymentRow.key).where(DeploymentRow.name.in_(among))
                query = query.where(DecisionRow.deployment_key.in_(named))
            if deployment is not None:
                query = query.where(DecisionRow.deployment_key == deployment_row(session, deployment).key)
            if before is not None:
                query = query.where(DecisionRow.key < before)
            if state is not None:
                query = query.where(DecisionRow.state == state)
            return [_record(session, row) for row in session.scalars(query)]

    def close(self, key: int, verdict: Literal["approve", "reject"], by: Actor, comment: str = "") -> DecisionRecord:
        """Approves or rejects a waiting decision; approving publishes its plan. The same verdict again changes nothing.

        Raises:
            NotFoundError: no such decision. ConflictError: it does not wait any more.
        """
        storable("comment", comment, 2000)
        outcome = "published" if verdict == "approve" else "rejected"
        with self._sessions.writing() as session:
            row = _row(session, key)
            if row.state == outcome and row.closed_by == by.name:
                return _record(session, row)
            if row.state != "waiting":
                raise ConflictError(f"decision {key} is {row.state}; only a waiting one can be approved or rejected")
            row.state, row.closed, row.closed_by, row.comment = outcome, datetime.now(UTC), by.name, comment
            deployment = session.get_one(DeploymentRow, row.deployment_key)
            detail = {"decision": key, "comment": comment}
            audit.note(session, by, f"decision.{verdict}", deployment.name, detail)
            if verdict == "approve":
                plan = session.get_one(PlanRow, row.candidate_key)
                publish(session, deployment, plan, by, "approved", comment, row)
            else:
                deployment.alarm = None
                announce(session, deployment, "decision.rejected", {"decision": key})
            return _record(session, row)


def _row(session: Session, key: int) -> DecisionRow:
    row = session.get(DecisionRow, key) if 0 <= key < 1 << 31 else None
    if row is None:
        raise NotFoundError(f"no decision {key}")
    return row


def _record(session: Session, row: DecisionRow) -> DecisionRecord:
    names = ("key", "created", "action", "state", "reason", "figures", "closed", "closed_by", "comment")
    return DecisionRecord(
        **{name: getattr(row, name) for name in names},
        deployment=session.get_one(DeploymentRow, row.deployment_key).name,
        job=row.job_key,
        current_id=id_of(session, PlanRow, row.current_key),
        candidate_id=id_of(session, PlanRow, row.candidate_key) or "",
    )
