"""Webhooks, and the events to send them: written with what they tell of, so that none is lost and none invented."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from ..placement.errors import ConflictError, NotFoundError
from . import audit
from .database import Sessions, changed_rows, moment
from .records import Actor, DeliveryRecord, DueDelivery, WebhookRecord
from .references import deployment_row
from .schema import DeliveryRow, DeploymentRow, WebhookRow
from .secrets import is_sealed, seal

OLD_SECRET = timedelta(hours=24)
"""Receivers that check with the former secret have so long to take the new one."""
TAKEN = timedelta(seconds=60)
"""Who takes an event to send has so long: then another server may."""
AT_ONCE = 2
"""Events of one webhook under way: one that answers slowly keeps others from theirs no longer."""
OF_DEPLOYMENT = 8
"""Events of one deployment's webhooks taken at a time: however many wait, those of others are sent meanwhile."""
MOST_WAITING = 100
"""Events of one webhook that are not sent yet, up to which it is tested."""
MOST_WEBHOOKS = 32
"""Of a deployment: each event is sent to all of them."""


def announce(session: Session, deployment: DeploymentRow, kind: str, detail: Mapping[str, Any]) -> None:
    """Adds an event for every webhook of the deployment that wants its kind to the transaction at hand."""
    hooks = session.scalars(select(WebhookRow).where(WebhookRow.deployment_key == deployment.key)).all()
    for hook in hooks:
        if hook.events is None or kind in hook.events:
            _add(session, hook, deployment.name, kind, detail)


def _add(session: Session, hook: WebhookRow, deployment: str, kind: str, detail: Mapping[str, Any]) -> DeliveryRow:
    now = moment(session)
    event = {"event": kind, "deployment": deployment, "at": now.isoformat(), **detail}
    row = DeliveryRow(webhook_key=hook.key, created=now, event=event, state="due", attempts=0, outcome="")
    session.add(row)
    return row


class Webhooks:
    """Threads and processes: as `Store`. Methods that name a webhook raise NotFoundError where the deployment has none
    such."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def add(
        self, deployment: str, url: str, by: Actor, *, events: Sequence[str] | None = None
    ) -> tuple[WebhookRecord, str]:
        """A webhook and the secret its events are signed with, as Standard Webhooks writes it; it is not shown
        again. events: kinds to send; None for all. Raises ConflictError where the deployment has too many."""
        secret = _new_secret()
        with self._sessions.writing() as session:
            owner = deployment_row(session, deployment).key
            hooks = select(func.count()).select_from(WebhookRow).where(WebhookRow.deployment_key == owner)
            if (session.scalar(hooks) or 0) >= MOST_WEBHOOKS:
                raise ConflictError(f"{deployment!r} has {MOST_WEBHOOKS} webhooks, as many as it may; remove some")
            row = WebhookRow(
                deployment_key=owner,
                url=url,
                secret=seal(secret),
                events=None if events is None else list(events),
                created=moment(session),
            )
            session.add(row)
            session.flush()
            audit.note(session, by, "webhook.add", deployment, {"webhook": row.key, "url": url, "events": row.events})
            return WebhookRecord.model_validate(row), secret

    def all(self, deployment: str) -> list[WebhookRecord]:
        """Oldest first."""
        with self._sessions.reading() as session:
            query = select(WebhookRow).where(WebhookRow.deployment_key == deployment_row(session, deployment).key)
            return [WebhookRecord.model_validate(row) for row in session.scalars(query.order_by(WebhookRow.key))]

    def page(
        self, *, limit: int, before: int | None = None, among: Sequence[str] | None = None
    ) -> list[tuple[str, WebhookRecord]]:
        """Of all deployments, or those of these names, each with its deployment's name; newest first."""
        query = select(WebhookRow, DeploymentRow.name).join(
            DeploymentRow, WebhookRow.deployment_key == DeploymentRow.key
        )
        query = query.order_by(WebhookRow.key.desc()).limit(limit)
        if before is not None:
            query = query.where(WebhookRow.key < before)
        if among is not None:
            query = query.where(DeploymentRow.name.in_(among))
        with self._sessions.reading() as session:
            return [(name, WebhookRecord.model_validate(row)) for row, name in session.execute(query)]

    def rotate(self, deployment: str, key: int, by: Actor) -> tuple[WebhookRecord, str]:
        """A new secret. For a day events are signed with the former one, too."""
        secret = _new_secret()
        with self._sessions.writing() as session:
            row = _row(session, deployment, key)
            row.old_secret, row.old_until = row.secret, moment(session) + OLD_SECRET
            row.secret = seal(secret)
            audit.note(session, by, "webhook.rotate", deployment, {"webhook": key})
            return WebhookRecord.model_validate(row), secret

    def remove(self, deployment: str, key: int, by: Actor) -> None:
        """Ends a webhook, and what was not sent yet."""
        with self._sessions.writing() as session:
            row = _row(session, deployment, key)
            session.execute(delete(DeliveryRow).where(DeliveryRow.webhook_key == key))
            session.delete(row)
            audit.note(session, by, "webhook.remove", deployment, {"webhook": key})

    def deliveries(self, deployment: str, key: int, *, limit: int, before: int | None = None) -> list[DeliveryRecord]:
        """Events of a webhook, newest first, and what came of sending them."""
        with self._sessions.reading() as session:
            _row(session, deployment, key)
            query = select(DeliveryRow).where(DeliveryRow.webhook_key == key).order_by(DeliveryRow.key.desc())
            if before is not None:
                query = query.where(DeliveryRow.key < before)
            return [DeliveryRecord.model_validate(row) for row in session.scalars(query.limit(limit))]

    def test(self, deployment: str, key: int, by: Actor) -> DeliveryRecord:
        """Has an event sent that tells of nothing. Raises ConflictError where as many are on their way as may be."""
        with self._sessions.writing() as session:
            hook = _row(session, deployment, key)
            due = (DeliveryRow.webhook_key == key, DeliveryRow.state == "due")
            waiting = session.scalar(select(func.count()).select_from(DeliveryRow).where(*due)) or 0
            if waiting >= MOST_WAITING:
                raise ConflictError(f"{waiting} events are on their way to webhook {key} already; try again later")
            row = _add(session, hook, deployment, "webhook.test", {"by": by.name})
            session.flush()
            audit.note(session, by, "webhook.test", deployment, {"webhook": key})
            return DeliveryRecord.model_validate(row)

    def redeliver(self, deployment: str, key: int, delivery: int, by: Actor) -> DeliveryRecord:
        """Has an event sent again, with the same id, whatever came of it before.

        Raises:
            ConflictError: it is being sent already.
        """
        with self._sessions.writing() as session:
            _row(session, deployment, key)
            row = session.get(DeliveryRow, delivery)
            if row is None or row.webhook_key != key:
                raise NotFoundError(f"webhook {key} has no delivery {delivery}")
            if row.state == "due" and row.attempts == 0:
                raise ConflictError(f"delivery {delivery} is on its way already")
            row.state, row.attempts, row.due = "due", 0, None
            audit.note(session, by, "webhook.redeliver", deployment, {"webhook": key, "delivery": delivery})
            return DeliveryRecord.model_validate(row)

    def drop(self, created_before: datetime) -> int:
        """Removes deliveries that were sent or given up and are older than a moment; returns how many."""
        old = delete(DeliveryRow).where(DeliveryRow.state != "due", DeliveryRow.created < created_before)
        with self._sessions.writing() as session:
            return changed_rows(session, old)

    def take(self, limit: int, busy: Collection[int] = (), busy_deployments: Collection[int] = ()) -> list[DueDelivery]:
        """Events to send now: of each deployment in turn, the least tried first, no more than two of a webhook and
        eight of a deployment; none of those in `busy`. No other server gets them for a minute."""
        with self._sessions.reading() as session:
            if session.scalar(select(DeliveryRow.key).where(*_sendable(moment(session))).limit(1)) is None:
                return []
        with self._sessions.writing() as session:
            now = moment(session)
            turn = func.row_number().over(
                partition_by=DeliveryRow.webhook_key, order_by=(DeliveryRow.attempts, DeliveryRow.key)
            )
            of_hooks = (
                select(DeliveryRow.key, DeliveryRow.attempts, WebhookRow.deployment_key, turn.label("turn"))
                .join(WebhookRow, DeliveryRow.webhook_key == WebhookRow.key)
                .where(
                    *_sendable(now),
                    DeliveryRow.webhook_key.not_in(list(busy)),
                    WebhookRow.deployment_key.not_in(list(busy_deployments)),
                )
                .subquery()
            )
            place = func.row_number().over(
                partition_by=of_hooks.c.deployment_key, order_by=(of_hooks.c.attempts, of_hooks.c.key)
            )
            ranked = select(of_hooks.c.key, place.label("place")).where(of_hooks.c.turn <= AT_ONCE).subquery()
            query = (
                select(DeliveryRow, WebhookRow)
                .join(WebhookRow, DeliveryRow.webhook_key == WebhookRow.key)
                .join(ranked, ranked.c.key == DeliveryRow.key)
                .where(ranked.c.place <= OF_DEPLOYMENT)
                .order_by(ranked.c.place, DeliveryRow.attempts, DeliveryRow.key)
                .limit(limit)
            )
            taken = []
            for row, hook in session.execute(query):
                row.due = now + TAKEN
                signing = [hook.secret]
                if hook.old_secret is not None and hook.old_until is not None and hook.old_until > now:
                    signing.append(hook.old_secret)
                event = DueDelivery(
                    row.key, hook.key, hook.deployment_key, hook.url, tuple(signing), row.event, row.attempts
                )
                taken.append(event)
            return taken

    def sent(self, delivery: int, outcome: str, *, state: str, wait_seconds: float = 0.0) -> None:
        """Notes what came of an attempt. state: "sent", "due" to try again after so many seconds, or "given up"."""
        with self._sessions.writing() as session:
            now = moment(session)
            session.execute(
                update(DeliveryRow)
                .where(DeliveryRow.key == delivery, DeliveryRow.state == "due")
                .values(
                    state=state,
                    outcome=outcome[:500],
                    attempts=DeliveryRow.attempts + 1,
                    attempted=now,
                    due=now + timedelta(seconds=wait_seconds),
                )
            )

    def seal_all(self) -> int:
        """Encrypts secrets that were stored before there was a key; returns how many. See `secrets.seal`."""
        with self._sessions.writing() as session:
            count = 0
            for row in session.scalars(select(WebhookRow)):
                if not is_sealed(row.secret):
                    row.secret, count = seal(row.secret), count + 1
                if row.old_secret is not None and not is_sealed(row.old_secret):
                    row.old_secret = seal(row.old_secret)
            return count


def _sendable(now: datetime) -> tuple[Any, Any]:
    return DeliveryRow.state == "due", or_(DeliveryRow.due.is_(None), DeliveryRow.due <= now)


def _row(session: Session, deployment: str, key: int) -> WebhookRow:
    row = session.get(WebhookRow, key)
    if row is None or row.deployment_key != deployment_row(session, deployment).key:
        raise NotFoundError(f"{deployment!r} has no webhook {key}")
    return row


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
