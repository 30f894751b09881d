"""Deployments, count windows, uploads, jobs, drift checks, decisions, publications, audit, tokens, webhooks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

BIG_KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    _create(
        "deployments",
        sa.Column("name", sa.String(100), nullable=False),
        _time("created"),
        _to("deployments", "model_key", "models"),
        _to("deployments", "topology_key", "topologies"),
        sa.Column("policy", sa.Text, nullable=False),
        _to("deployments", "plan_key", "plans", nullable=True),
        _to("deployments", "reference_key", "statistics", nullable=True),
        sa.Column("reference_window", BIG_KEY, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("checked_key", BIG_KEY, nullable=False),
        sa.UniqueConstraint("name", name="uq_deployments_name"),
        indexed=("model_key", "topology_key", "plan_key", "reference_key"),
    )
    _create(
        "windows",
        _to("windows", "deployment_key", "deployments"),
        sa.Column("digest", sa.String(64), nullable=False),
        _time("received"),
        _time("ended"),
        sa.Column("workload", sa.String(100), nullable=False),
        sa.Column("pairs", sa.BigInteger, nullable=False),
        sa.Column("merged", sa.Integer, nullable=False),
        sa.Column("load", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("deployment_key", "digest", name="uq_windows_digest"),
        indexed=("deployment_key",),
        key=BIG_KEY,
    )
    _create(
        "uploads",
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("owner", sa.String(100), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("total_bytes", sa.BigInteger, nullable=False),
        sa.Column("received_bytes", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        _time("created"),
        sa.Column("about", sa.Text),
        sa.UniqueConstraint("kind", "owner", "sha256", name="uq_uploads_content"),
    )
    op.create_table(
        "upload_parts",
        sa.Column(
            "upload_key",
            sa.Integer,
            sa.ForeignKey("uploads.key", name="fk_upload_parts_upload_key", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("start", sa.BigInteger, nullable=False),
        sa.Column("content", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("upload_key", "start", name="pk_upload_parts"),
    )
    if op.get_context().dialect.name == "postgresql":
        # Compressed already; compressing again costs most of the time and saves nothing.
        op.execute("ALTER TABLE windows ALTER COLUMN load SET STORAGE EXTERNAL")
        op.execute("ALTER TABLE upload_parts ALTER COLUMN content SET STORAGE EXTERNAL")
    _create(
        "jobs",
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        _to("jobs", "deployment_key", "deployments", nullable=True),
        sa.Column("idempotency", sa.String(200)),
        sa.Column("actor", sa.String(100), nullable=False),
        _time("created"),
        _time("started", nullable=True),
        _time("finished", nullable=True),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("claim", sa.String(32), nullable=False),
        sa.Column("worker", sa.String(100), nullable=False),
        sa.Column("beat", sa.Integer, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("progress", sa.Text, nullable=False),
        sa.Column("result", sa.Text),
        sa.Column("error", sa.Text),
        sa.UniqueConstraint("idempotency", name="uq_jobs_idempotency"),
        indexed=("state", "deployment_key"),
    )
    _create(
        "checks",
        _to("checks", "deployment_key", "deployments"),
        _time("created"),
        sa.Column("last_window", sa.BigInteger, nullable=False),
        sa.Column("alarm", sa.Boolean, nullable=False),
        sa.Column("figures", sa.Text, nullable=False),
        indexed=("deployment_key",),
    )
    _create(
        "decisions",
        _to("decisions", "deployment_key", "deployments"),
        _to("decisions", "job_key", "jobs"),
        _time("created"),
        _to("decisions", "current_key", "plans", nullable=True),
        _to("decisions", "candidate_key", "plans"),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("figures", sa.Text, nullable=False),
        _time("closed", nullable=True),
        sa.Column("closed_by", sa.String(100)),
        sa.Column("comment", sa.Text, nullable=False),
        sa.UniqueConstraint("job_key", name="uq_decisions_job_key"),
        indexed=("deployment_key", "current_key", "candidate_key", "state"),
    )
    _create(
        "publications",
        _to("publications", "deployment_key", "deployments"),
        sa.Column("version", sa.Integer, nullable=False),
        _to("publications", "plan_key", "plans"),
        _to("publications", "decision_key", "decisions", nullable=True),
        sa.Column("cause", sa.String(20), nullable=False),
        sa.Column("actor", sa.String(100), nullable=False),
        sa.Column("comment", sa.Text, nullable=False),
        _time("created"),
        sa.UniqueConstraint("deployment_key", "version", name="uq_publications_version"),
        indexed=("deployment_key", "plan_key", "decision_key"),
    )
    _create(
        "audit",
        _time("created"),
        sa.Column("actor", sa.String(100), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        indexed=("action", "subject"),
    )
    _create(
        "tokens",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        _time("created"),
        _time("revoked", nullable=True),
        sa.UniqueConstraint("name", name="uq_tokens_name"),
        sa.UniqueConstraint("digest", name="uq_tokens_digest"),
    )
    _create(
        "webhooks",
        _to("webhooks", "deployment_key", "deployments"),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("secret", sa.Text, nullable=False),
        _time("created"),
        indexed=("deployment_key",),
    )
    _create(
        "deliveries",
        sa.Column(
            "webhook_key",
            sa.Integer,
            sa.ForeignKey("webhooks.key", name="fk_deliveries_webhook_key", ondelete="CASCADE"),
            nullable=False,
        ),
        _time("created"),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        indexed=("webhook_key", "state"),
    )


def downgrade() -> None:
    for table in (
        "deliveries",
        "webhooks",
        "tokens",
        "audit",
        "publications",
        "decisions",
        "checks",
        "jobs",
        "upload_parts",
        "uploads",
        "windows",
        "deployments",
    ):
        op.drop_table(table)


def _create(
    table: str,
    *columns: sa.Column[object] | sa.Constraint,
    indexed: tuple[str, ...] = (),
    key: sa.types.TypeEngine[int] | None = None,
) -> None:
    op.create_table(
        table,
        sa.Column("key", key or sa.Integer(), nullable=False),
        *columns,
        sa.PrimaryKeyConstraint("key", name=f"pk_{table}"),
    )
    for column in indexed:
        op.create_index(f"ix_{table}_{column}", table, [column])


def _time(name: str, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _to(table: str, column: str, target: str, nullable: bool = False) -> sa.Column[object]:
    key = sa.ForeignKey(f"{target}.key", name=f"fk_{table}_{column}")
    return sa.Column(column, sa.Integer, key, nullable=nullable)
