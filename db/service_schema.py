"""The tables of the service: deployments, what they record, and what is done about it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Double, ForeignKey, Integer, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from .columns import Document, UtcTime
from .schema import Base

BigKey = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only where the key is called INTEGER; there that has 64 bits anyway."""


class DeploymentRow(Base):
    """version counts publications: 0 before the first. checked_key: the last window a drift check has seen.

    reference_key: statistics of the traffic the plan was last judged on, which ended with window `reference_window`.
    """

    __tablename__ = "deployments"

    key: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    model_key: Mapped[int] = mapped_column(ForeignKey("models.key"), index=True)
    topology_key: Mapped[int] = mapped_column(ForeignKey("topologies.key"), index=True)
    policy: Mapped[Any] = mapped_column(Document)
    plan_key: Mapped[int | None] = mapped_column(ForeignKey("plans.key"), index=True)
    reference_key: Mapped[int | None] = mapped_column(ForeignKey("statistics.key"), index=True)
    reference_window: Mapped[int] = mapped_column(BigKey)
    version: Mapped[int]
    checked_key: Mapped[int] = mapped_column(BigKey)


class WindowRow(Base):
    """Expert loads of one span of a deployment's traffic; `merged` of them after compaction.

    The load stands last: SQLite then reads the other columns without touching it.
    """

    __tablename__ = "windows"
    __table_args__ = (UniqueConstraint("deployment_key", "digest", name="uq_windows_digest"),)

    key: Mapped[int] = mapped_column(BigKey, primary_key=True)
    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), index=True)
    digest: Mapped[str] = mapped_column(String(64))
    received: Mapped[datetime] = mapped_column(UtcTime)
    ended: Mapped[datetime] = mapped_column(UtcTime)
    workload: Mapped[str] = mapped_column(String(100))
    pairs: Mapped[int] = mapped_column(BigInteger)
    merged: Mapped[int]
    load: Mapped[bytes] = mapped_column(LargeBinary, deferred=True)


class JoinedRow(Base):
    """A window that was joined into another one, by its digest in binary; forgotten with the window that holds it."""

    __tablename__ = "joined_windows"
    __table_args__ = {"sqlite_with_rowid": False}  # noqa: RUF012

    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), primary_key=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    window_key: Mapped[int] = mapped_column(BigKey, ForeignKey("windows.key", ondelete="CASCADE"), index=True)


class UploadRow(Base):
    """A file on its way in, told by its SHA-256; `received_bytes` of it are here. place: where it is once complete, when not in
    parts here."""

    __tablename__ = "uploads"
    __table_args__ = (UniqueConstraint("kind", "owner", "sha256", name="uq_uploads_content"),)

    key: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    owner: Mapped[str] = mapped_column(String(100))
    sha256: Mapped[str] = mapped_column(String(64))
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    received_bytes: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(20))
    created: Mapped[datetime] = mapped_column(UtcTime)
    about: Mapped[Any] = mapped_column(Document, nullable=True)
    place: Mapped[str | None] = mapped_column(Text)


class UploadPartRow(Base):
    __tablename__ = "upload_parts"

    upload_key: Mapped[int] = mapped_column(ForeignKey("uploads.key", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)


class JobRow(Base):
    """claim: whoever holds it may report and finish. beat: grows while the holder lives."""

    __tablename__ = "jobs"

    key: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    state: Mapped[str] = mapped_column(String(20), index=True)
    deployment_key: Mapped[int | None] = mapped_column(ForeignKey("deployments.key"), index=True)
    idempotency: Mapped[str | None] = mapped_column(String(200), unique=True)
    actor: Mapped[str] = mapped_column(String(100))
    created: Mapped[datetime] = mapped_column(UtcTime)
    started: Mapped[datetime | None] = mapped_column(UtcTime)
    finished: Mapped[datetime | None] = mapped_column(UtcTime)
    attempts: Mapped[int]
    claim: Mapped[str] = mapped_column(String(32))
    worker: Mapped[str] = mapped_column(String(100))
    beat: Mapped[int]
    request: Mapped[Any] = mapped_column(Document)
    progress: Mapped[Any] = mapped_column(Document)
    result: Mapped[Any] = mapped_column(Document, nullable=True)
    error: Mapped[str | None] = mapped_column(Text)


class CheckRow(Base):
    """One look at whether a deployment's traffic has moved."""

    __tablename__ = "checks"

    key: Mapped[int] = mapped_column(primary_key=True)
    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), index=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    last_window: Mapped[int] = mapped_column(BigInteger)
    alarm: Mapped[bool]
    figures: Mapped[Any] = mapped_column(Document)


class DecisionRow(Base):
    """A candidate judged against the plan in force, and what came of it."""

    __tablename__ = "decisions"

    key: Mapped[int] = mapped_column(primary_key=True)
    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), index=True)
    job_key: Mapped[int] = mapped_column(ForeignKey("jobs.key"), unique=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    current_key: Mapped[int | None] = mapped_column(ForeignKey("plans.key"), index=True)
    candidate_key: Mapped[int] = mapped_column(ForeignKey("plans.key"), index=True)
    action: Mapped[str] = mapped_column(String(20))
    state: Mapped[str] = mapped_column(String(20), index=True)
    reason: Mapped[str] = mapped_column(Text)
    figures: Mapped[Any] = mapped_column(Document)
    closed: Mapped[datetime | None] = mapped_column(UtcTime)
    closed_by: Mapped[str | None] = mapped_column(String(100))
    comment: Mapped[str] = mapped_column(Text)


class PublicationRow(Base):
    """A plan put in force; the newest of a deployment is its plan."""

    __tablename__ = "publications"
    __table_args__ = (UniqueConstraint("deployment_key", "version", name="uq_publications_version"),)

    key: Mapped[int] = mapped_column(primary_key=True)
    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), index=True)
    version: Mapped[int]
    plan_key: Mapped[int] = mapped_column(ForeignKey("plans.key"), index=True)
    decision_key: Mapped[int | None] = mapped_column(ForeignKey("decisions.key"), index=True)
    cause: Mapped[str] = mapped_column(String(20))
    actor: Mapped[str] = mapped_column(String(100))
    comment: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(UtcTime)


class AuditRow(Base):
    __tablename__ = "audit"

    key: Mapped[int] = mapped_column(primary_key=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    actor: Mapped[str] = mapped_column(String(100))
    role: Mapped[str] = mapped_column(String(20))
    action: Mapped[str] = mapped_column(String(40), index=True)
    subject: Mapped[str] = mapped_column(String(200), index=True)
    detail: Mapped[Any] = mapped_column(Document)


class TokenRow(Base):
    """digest: SHA-256 of a token of 256 random bits, which needs no slow hash: there is nothing to guess from."""

    __tablename__ = "tokens"

    key: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    role: Mapped[str] = mapped_column(String(20))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    revoked: Mapped[datetime | None] = mapped_column(UtcTime)


class WebhookRow(Base):
    __tablename__ = "webhooks"

    key: Mapped[int] = mapped_column(primary_key=True)
    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), index=True)
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(UtcTime)


class DeliveryRow(Base):
    """An event for one webhook, written with what it tells of, sent afterwards."""

    __tablename__ = "deliveries"

    key: Mapped[int] = mapped_column(primary_key=True)
    webhook_key: Mapped[int] = mapped_column(ForeignKey("webhooks.key", ondelete="CASCADE"), index=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    event: Mapped[Any] = mapped_column(Document)
    state: Mapped[str] = mapped_column(String(20), index=True)
    attempts: Mapped[int]
    outcome: Mapped[str] = mapped_column(Text)


class EngineRow(Base):
    """The engine of a deployment, asked for its routing. holder: the server that asks it, which lives while `beat` grows.

    failures: in a row, the last at `failed`, of `error`.
    """

    __tablename__ = "engines"

    key: Mapped[int] = mapped_column(primary_key=True)
    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), unique=True)
    url: Mapped[str] = mapped_column(Text)
    recorder: Mapped[str] = mapped_column(String(100))
    every: Mapped[float] = mapped_column(Double)
    span: Mapped[float] = mapped_column(Double)
    secret: Mapped[str | None] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(UtcTime)
    holder: Mapped[str] = mapped_column(String(100))
    beat: Mapped[int]
    polled: Mapped[datetime | None] = mapped_column(UtcTime)
    windows: Mapped[int] = mapped_column(BigInteger)
    failures: Mapped[int]
    failed: Mapped[datetime | None] = mapped_column(UtcTime)
    error: Mapped[str | None] = mapped_column(Text)
