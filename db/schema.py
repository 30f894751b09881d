"""The tables. Rows stay inside this package; `migrations/` makes and changes the tables."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

# Column types that mean the same on SQLite and on PostgreSQL.


class UtcTime(TypeDecorator[datetime]):
    """A moment. SQLite forgets the zone, so UTC goes in and UTC comes out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Document(TypeDecorator[Any]):
    """Plain data as JSON text, escaped to ASCII: numbers come back exactly, and no character set can refuse it."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, allow_nan=False, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


REVISION = "0006"
"""The newest migration, kept here so that opening an up-to-date database need not load Alembic."""

REVISION_TABLE = "moeplace_revision"
"""Not Alembic's default name: on a shared server another application may own that."""


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Named:
    """What can be looked up by name or by the first digits of its fingerprint."""

    key: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str | None] = mapped_column(String(100), unique=True)
    created: Mapped[datetime] = mapped_column(UtcTime)


class ModelRow(Named, Base):
    __tablename__ = "models"

    label: Mapped[str] = mapped_column(Text)
    layers: Mapped[int]
    experts: Mapped[int]
    spec: Mapped[Any] = mapped_column(Document)


class TopologyRow(Named, Base):
    __tablename__ = "topologies"

    label: Mapped[str] = mapped_column(Text)
    devices: Mapped[int]
    topology: Mapped[Any] = mapped_column(Document)


class StatisticsRow(Named, Base):
    __tablename__ = "statistics"

    trace_fingerprint: Mapped[str] = mapped_column(String(64), index=True)
    about: Mapped[Any] = mapped_column(Document)
    content_bytes: Mapped[int]
    content_sha256: Mapped[str] = mapped_column(String(64))


class StatisticsPartRow(Base):
    """A piece of a statistics file: neither driver nor server then holds hundreds of megabytes several times over."""

    __tablename__ = "statistics_parts"

    statistics_key: Mapped[int] = mapped_column(ForeignKey("statistics.key", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)


class PlanRow(Named, Base):
    """claimed_by: who says what its certificate says, where that was not proven here."""

    __tablename__ = "plans"

    model_key: Mapped[int] = mapped_column(ForeignKey("models.key"), index=True)
    topology_key: Mapped[int] = mapped_column(ForeignKey("topologies.key"), index=True)
    statistics_key: Mapped[int | None] = mapped_column(ForeignKey("statistics.key"), index=True)
    solver: Mapped[str] = mapped_column(String(100), index=True)
    slots: Mapped[int]
    claimed_by: Mapped[str | None] = mapped_column(String(100))
    certificate: Mapped[Any] = mapped_column(Document, nullable=True)
    provenance: Mapped[Any] = mapped_column(Document)
    document: Mapped[Any] = mapped_column(Document, deferred=True)


class EvaluationRow(Base):
    __tablename__ = "evaluations"

    key: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), unique=True)
    plan_key: Mapped[int] = mapped_column(ForeignKey("plans.key"), index=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    steps: Mapped[str] = mapped_column(Text)
    steps_fingerprint: Mapped[str] = mapped_column(String(64))
    objective: Mapped[Any] = mapped_column(Document, nullable=True)
    summary: Mapped[Any] = mapped_column(Document)


class ExportRow(Base):
    __tablename__ = "exports"

    key: Mapped[int] = mapped_column(primary_key=True)
    plan_key: Mapped[int] = mapped_column(ForeignKey("plans.key"), index=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    format: Mapped[str] = mapped_column(String(100))
    path: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))


# The tables of the service: deployments, what they record, and what is done about it.


BigKey = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows by itself only where the key is called INTEGER; there that has 64 bits anyway."""


class DeploymentRow(Base):
    """version counts publications: 0 before the first. checked_key: the last window a drift check has seen.

    reference_key: statistics of the traffic the plan was last judged on, which ended with window `reference_window`.
    hold: why nothing is published automatically, as `Hold`. alarm: the check whose alarm nobody has acted on.
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
    hold: Mapped[Any] = mapped_column(Document, nullable=True)
    alarm: Mapped[Any] = mapped_column(Document, nullable=True)


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
    """A file on its way in, told by its SHA-256; `received_bytes` of it are here. place: where it is once complete,
    when not in parts here."""

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
    """client: the address that the request came from; None for what no request asked for."""

    __tablename__ = "audit"

    key: Mapped[int] = mapped_column(primary_key=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    actor: Mapped[str] = mapped_column(String(100))
    role: Mapped[str] = mapped_column(String(20))
    action: Mapped[str] = mapped_column(String(40), index=True)
    subject: Mapped[str] = mapped_column(String(200), index=True)
    detail: Mapped[Any] = mapped_column(Document)
    client: Mapped[str | None] = mapped_column(String(100))


class TokenRow(Base):
    """digest: SHA-256 of a token of 256 random bits, which needs no slow hash: there is nothing to guess from.

    deployments: names of those that it is for; None for all. One name is one token at a time.
    """

    __tablename__ = "tokens"
    __table_args__ = (
        Index(
            "uq_tokens_active_name",
            "name",
            unique=True,
            sqlite_where=text("revoked IS NULL"),
            postgresql_where=text("revoked IS NULL"),
        ),
    )

    key: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    role: Mapped[str] = mapped_column(String(20))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    revoked: Mapped[datetime | None] = mapped_column(UtcTime)
    deployments: Mapped[Any] = mapped_column(Document, nullable=True)
    expires: Mapped[datetime | None] = mapped_column(UtcTime)
    used: Mapped[datetime | None] = mapped_column(UtcTime)


class WebhookRow(Base):
    """events: kinds that are sent; None for all. old_secret: signs beside the new one until `old_until`."""

    __tablename__ = "webhooks"

    key: Mapped[int] = mapped_column(primary_key=True)
    deployment_key: Mapped[int] = mapped_column(ForeignKey("deployments.key"), index=True)
    url: Mapped[str] = mapped_column(Text)
    secret: Mapped[str] = mapped_column(Text)
    created: Mapped[datetime] = mapped_column(UtcTime)
    events: Mapped[Any] = mapped_column(Document, nullable=True)
    old_secret: Mapped[str | None] = mapped_column(Text)
    old_until: Mapped[datetime | None] = mapped_column(UtcTime)


class DeliveryRow(Base):
    """An event for one webhook, written with what it tells of, sent afterwards.

    due: not before this moment of the database's clock, None for at once; a server that takes it to send puts it off,
    so that no other one sends it too.
    """

    __tablename__ = "deliveries"

    key: Mapped[int] = mapped_column(primary_key=True)
    webhook_key: Mapped[int] = mapped_column(ForeignKey("webhooks.key", ondelete="CASCADE"), index=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    event: Mapped[Any] = mapped_column(Document)
    state: Mapped[str] = mapped_column(String(20), index=True)
    attempts: Mapped[int]
    outcome: Mapped[str] = mapped_column(Text)
    due: Mapped[datetime | None] = mapped_column(UtcTime)
    attempted: Mapped[datetime | None] = mapped_column(UtcTime)


class EngineRow(Base):
    """The engine of a deployment, asked for its routing. holder: the server that asks it, which lives while `beat`
    grows.

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
