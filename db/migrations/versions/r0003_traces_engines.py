"""Where uploads are kept outside the database; engines that are asked for their routing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("uploads", sa.Column("place", sa.Text))
    op.create_table(
        "engines",
        sa.Column("key", sa.Integer, nullable=False),
        sa.Column(
            "deployment_key",
            sa.Integer,
            sa.ForeignKey("deployments.key", name="fk_engines_deployment_key"),
            nullable=False,
        ),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("recorder", sa.String(100), nullable=False),
        sa.Column("every", sa.Double, nullable=False),
        sa.Column("span", sa.Double, nullable=False),
        sa.Column("secret", sa.Text),
        sa.Column("created", sa.DateTime(timezone=True), nullable=False),
        sa.Column("holder", sa.String(100), nullable=False),
        sa.Column("beat", sa.Integer, nullable=False),
        sa.Column("polled", sa.DateTime(timezone=True)),
        sa.Column("windows", sa.BigInteger, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("failed", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text),
        sa.PrimaryKeyConstraint("key", name="pk_engines"),
        sa.UniqueConstraint("deployment_key", name="uq_engines_deployment_key"),
    )


def downgrade() -> None:
    op.drop_table("engines")
    op.drop_column("uploads", "place")
