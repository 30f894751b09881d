"""Webhooks, and the events to send them: written with what they tell of, so that none is lost and none invented."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from ..placement.errors import NotFoundError
from . import audit
from .database import Sessions
from .records import Actor, DeliveryRecord, WebhookRecord
from .references import deployment_row
from .schema import DeliveryRow, DeploymentRow, WebhookRow


def announce(session: Session, deployment: DeploymentRow, kind: str, detail: Mapping[str, Any]) -> None:
    """Adds an event for every webhook of the deployment to the transaction at hand."""
    hooks = session.scalars(select(WebhookRow.key).where(WebhookRow.deployment_key == deployment.key)).all()
    now = datetime.now(UTC)
    event = {"event": kind, "deployment": deployment.name, "at": now.isoformat(), **detail}
    for hook in hooks:
        session.add(DeliveryRow(webhook_key=hook, created=now, event=event, state="due", attempts=0, outcome=""))


class Webhooks:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def add(self, deployment: str, url: str, by: Actor) -> tuple[WebhookRecord, str]:
        """A webhook and the secret its events are signed with, as Standard Webhooks writes it; it is not shown
        again."""
        secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
        with self._sessions.writing() as session:
            row = WebhookRow(
                deployment_key=deployment_row(session, deployment).key,
                url=url,
                secret=secret,
                created=datetime.now(UTC),
            )
            session.add(row)
            session.flush()
            audit.note(session, by, "webhook.add", deployment, {"webhook": row.key, "url": url})
            return WebhookRecord.model_validate(row), secret

    def all(self, deployment: str) -> list[WebhookRecord]:
        """Oldest first."""
        with self._sessions.reading() as session:
            query = select(WebhookRow).where(WebhookRow.deployment_key == deployment_row(session, deployment).key)
            return [WebhookRecord.model_validate(row) for row in session.scalars(query.order_by(WebhookRow.key))]

    def remove(self, deployment: str, key: int, by: Actor) -> None:
        """Raises NotFoundError when the deployment has no such webhook."""
        with self._sessions.writing() as session:
            row = session.get(WebhookRow, key)
            if row is None or row.deployment_key != deployment_row(session, deployment).key:
                raise NotFoundError(f"{deployment!r} has no webhook {key}")
            session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_key == key))
            session.delete(row)
            audit.note(session, by, "webhook.remove", deployment, {"webhook": key})

    def due(self, limit: int) -> list[DeliveryRecord]:
        """Events to send, oldest first. Two senders may both get one: receivers tell repeats by its id."""
        query = (
            select(DeliveryRow, WebhookRow)
            .join(WebhookRow, DeliveryRow.webhook_key == WebhookRow.key)
            .where(DeliveryRow.state == "due")
            .order_by(DeliveryRow.attempts, DeliveryRow.key)
            .limit(limit)
        )
        with self._sessions.reading() as session:
            return [
                DeliveryRecord(row.key, hook.url, hook.secret, row.event, row.attempts)
                for row, hook in session.execute(query)
            ]

    def sent(self, delivery: int, outcome: str, *, state: str) -> None:
        """Notes what came of an attempt. state: "sent", "due" to try again, or "given up"."""
        with self._sessions.writing() as session:
            session.execute(
                update(DeliveryRow)
                .where(DeliveryRow.key == delivery, DeliveryRow.state == "due")
                .values(state=state, outcome=outcome[:500], attempts=DeliveryRow.attempts + 1)
            )
