"""Models, topologies, statistics, plans, evaluations, exports."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "models",
        *_named("models"),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("layers", sa.Integer, nullable=False),
        sa.Column("experts", sa.Integer, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
    )
    op.create_table(
        "topologies",
        *_named("topologies"),
        sa.Column("label", sa.Text, nullable=False),
        sa.Column("devices", sa.Integer, nullable=False),
        sa.Column("topology", sa.Text, nullable=False),
    )
    op.create_table(
        "statistics",
        *_named("statistics"),
        sa.Column("trace_fingerprint", sa.String(64), nullable=False),
        sa.Column("about", sa.Text, nullable=False),
        sa.Column("content_bytes", sa.Integer, nullable=False),
        sa.Column("content_sha256", sa.String(64), nullable=False),
    )
    op.create_index("ix_statistics_trace_fingerprint", "statistics", ["trace_fingerprint"])
    op.create_table(
        "statistics_parts",
        sa.Column(
            "statistics_key",
            sa.Integer,
            sa.ForeignKey("statistics.key", name="fk_statistics_parts_statistics_key", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("statistics_key", "position", name="pk_statistics_parts"),
    )
    if op.get_context().dialect.name == "postgresql":
        # The files are compressed already; compressing them again costs most of the time and saves nothing.
        op.execute("ALTER TABLE statistics_parts ALTER COLUMN content SET STORAGE EXTERNAL")
    op.create_table(
        "plans",
        *_named("plans"),
        sa.Column("model_key", sa.Integer, _reference("plans", "model_key", "models"), nullable=False),
        sa.Column("topology_key", sa.Integer, _reference("plans", "topology_key", "topologies"), nullable=False),
        sa.Column("statistics_key", sa.Integer, _reference("plans", "statistics_key", "statistics")),
        sa.Column("solver", sa.String(100), nullable=False),
        sa.Column("slots", sa.Integer, nullable=False),
        sa.Column("certificate", sa.Text),
        sa.Column("provenance", sa.Text, nullable=False),
        # Last in its row: SQLite then reads the others without touching it.
        sa.Column("document", sa.Text, nullable=False),
    )
    for column in ("model_key", "topology_key", "statistics_key", "solver"):
        op.create_index(f"ix_plans_{column}", "plans", [column])
    op.create_table(
        "evaluations",
        sa.Column("key", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("plan_key", sa.Integer, _reference("evaluations", "plan_key", "plans"), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("steps", sa.Text, nullable=False),
        sa.Column("steps_fingerprint", sa.String(64), nullable=False),
        sa.Column("objective", sa.Text),
        sa.Column("summary", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_evaluations"),
        sa.UniqueConstraint("fingerprint", name="uq_evaluations_fingerprint"),
    )
    op.create_index("ix_evaluations_plan_key", "evaluations", ["plan_key"])
    op.create_table(
        "exports",
        sa.Column("key", sa.Integer, nullable=False),
        sa.Column("plan_key", sa.Integer, _reference("exports", "plan_key", "plans"), nullable=False),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("format", sa.String(100), nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_exports"),
    )
    op.create_index("ix_exports_plan_key", "exports", ["plan_key"])


def downgrade() -> None:
    for table in ("exports", "evaluations", "plans", "statistics_parts", "statistics", "topologies", "models"):
        op.drop_table(table)


def _named(table: str) -> tuple[sa.Column[object] | sa.Constraint, ...]:
    return (
        sa.Column("key", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("name", sa.String(100)),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=f"pk_{table}"),
        sa.UniqueConstraint("fingerprint", name=f"uq_{table}_fingerprint"),
        sa.UniqueConstraint("name", name=f"uq_{table}_name"),
    )


def _reference(table: str, column: str, target: str) -> sa.ForeignKey:
    return sa.ForeignKey(f"{target}.key", name=f"fk_{table}_{column}")
