"""Engines that are asked for their routing: each by one server at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from ..placement.errors import NotFoundError
from . import audit
from .content import storable
from .database import Sessions
from .records import Actor, EngineHold, EngineRecord
from .references import deployment_row
from .schema import DeploymentRow, EngineRow
from .secrets import is_sealed, seal


class Engines:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def set(
        self, deployment: str, by: Actor, *, url: str, recorder: str, every: float, span: float, secret: str | None
    ) -> EngineRecord:
        """The engine of a deployment, in place of any other. secret: its key."""
        settings: Mapping[str, Any] = {
            "url": url,
            "recorder": storable("recorder", recorder, 100),
            "every": every,
            "span": span,
        }
        with self._sessions.writing() as session:
            owner = deployment_row(session, deployment)
            row = session.scalar(select(EngineRow).where(EngineRow.deployment_key == owner.key))
            if row is None:
                row = EngineRow(deployment_key=owner.key, holder="", beat=0, windows=0)
                session.add(row)
            for name, value in settings.items():
                setattr(row, name, value)
            row.secret, row.created = None if secret is None else seal(secret), datetime.now(UTC)
            # Whoever asks the old one learns at its next beat.
            row.holder, row.failures, row.failed, row.error, row.polled = "", 0, None, None, None
            audit.note(session, by, "engine.set", deployment, {**settings, "key": secret is not None})
            session.flush()
            return _record(row, deployment)

    def get(self, deployment: str) -> EngineRecord:
        """Raises NotFoundError where the deployment has none."""
        with self._sessions.reading() as session:
            return _record(_row(session, deployment), deployment)

    def page(self, *, limit: int, after: str = "", among: Sequence[str] | None = None) -> list[EngineRecord]:
        """In order of their deployments' names, those behind `after`; of these names only, where they are given."""
        query = select(EngineRow, DeploymentRow.name).join(DeploymentRow, EngineRow.deployment_key == DeploymentRow.key)
        query = query.where(DeploymentRow.name > after).order_by(DeploymentRow.name).limit(limit)
        if among is not None:
            query = query.where(DeploymentRow.name.in_(among))
        with self._sessions.reading() as session:
            return [_record(row, name) for row, name in session.execute(query)]

    def remove(self, deployment: str, by: Actor) -> None:
        """Raises NotFoundError where the deployment has none."""
        with self._sessions.writing() as session:
            row = _row(session, deployment)
            session.execute(delete(EngineRow).where(EngineRow.key == row.key))
            audit.note(session, by, "engine.remove", deployment, {"url": row.url})

    def all(self) -> list[EngineHold]:
        """Every engine, and who asks it."""
        query = select(EngineRow, DeploymentRow.name).join(DeploymentRow, EngineRow.deployment_key == DeploymentRow.key)
        with self._sessions.reading() as session:
            return [_hold(row, name) for row, name in session.execute(query)]

    def take(self, seen: EngineHold, holder: str) -> EngineHold | None:
        """Makes `holder` the one who asks, or shows that it still does; None when another came first since `seen`."""
        with self._sessions.writing() as session:
            row = session.get(EngineRow, seen.key)
            if row is None or (row.holder, row.beat) != (seen.holder, seen.beat):
                return None
            row.holder, row.beat = holder, row.beat + 1
            return _hold(row, seen.engine.deployment)

    def seal_all(self) -> None:
        """Encrypts keys that were stored before there was a key for them. See `secrets.seal`."""
        with self._sessions.writing() as session:
            for row in session.scalars(select(EngineRow).where(EngineRow.secret.is_not(None))):
                if row.secret is not None and not is_sealed(row.secret):
                    row.secret = seal(row.secret)

    def told(self, hold: EngineHold, windows: int, error: str | None) -> None:
        """Notes what came of asking; nothing when somebody else asks now."""
        with self._sessions.writing() as session:
            row = session.get(EngineRow, hold.key)
            if row is None or row.holder != hold.holder or row.url != hold.engine.url:
                return
            if error is None:
                row.polled, row.windows = datetime.now(UTC), row.windows + windows
                row.failures, row.failed, row.error = 0, None, None
            else:
                row.failures, row.failed, row.error = row.failures + 1, datetime.now(UTC), error[:2000]


def _row(session: Session, deployment: str) -> EngineRow:
    owner = deployment_row(session, deployment)
    row = session.scalar(select(EngineRow).where(EngineRow.deployment_key == owner.key))
    if row is None:
        raise NotFoundError(f"no engine is asked for the routing of {deployment!r}")
    return row


def _record(row: EngineRow, deployment: str) -> EngineRecord:
    columns = {name: getattr(row, name) for name in EngineRecord.model_fields if name != "deployment"}
    return EngineRecord(**columns, deployment=deployment)


def _hold(row: EngineRow, deployment: str) -> EngineHold:
    return EngineHold(_record(row, deployment), row.key, row.holder, row.beat, row.secret)
