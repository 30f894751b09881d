"""The tables. Rows stay inside this room; `migrations/` makes and changes the tables."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, LargeBinary, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from .columns import Document, UtcTime

REVISION = "0004"
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
    __tablename__ = "plans"

    model_key: Mapped[int] = mapped_column(ForeignKey("models.key"), index=True)
    topology_key: Mapped[int] = mapped_column(ForeignKey("topologies.key"), index=True)
    statistics_key: Mapped[int | None] = mapped_column(ForeignKey("statistics.key"), index=True)
    solver: Mapped[str] = mapped_column(String(100), index=True)
    slots: Mapped[int]
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
