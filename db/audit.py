"""The log of who did what, written in the transaction that does it; nothing here changes or removes an entry."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from .database import Sessions
from .records import Actor, AuditRecord
from .schema import AuditRow


def note(session: Session, by: Actor, action: str, subject: str, detail: Mapping[str, Any] | None = None) -> None:
    """Adds an entry to the transaction at hand."""
    row = AuditRow(
        created=datetime.now(UTC),
        actor=by.name,
        role=by.role,
        action=action,
        subject=subject,
        detail=dict(detail or {}),
        client=by.client,
    )
    session.add(row)


class Audit:
    """Reads the log."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def entries(
        self, *, limit: int, before: int | None = None, action: str | None = None, subject: str | None = None
    ) -> list[AuditRecord]:
        """Newest first, those older than entry `before`."""
        query = select(AuditRow).order_by(AuditRow.key.desc()).limit(limit)
        if before is not None:
            query = query.where(AuditRow.key < before)
        if action is not None:
            query = query.where(AuditRow.action == action)
        if subject is not None:
            query = query.where(AuditRow.subject == subject)
        with self._sessions.reading() as session:
            return [AuditRecord.model_validate(row) for row in session.scalars(query)]

    def add(self, by: Actor, action: str, subject: str, detail: Mapping[str, Any] | None = None) -> None:
        """An entry of its own, for what changes nothing here (a refused sign-in)."""
        with self._sessions.writing() as session:
            note(session, by, action, subject, detail)
