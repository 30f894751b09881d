"""Windows that were joined into others stay known, so that one sent again is not counted again."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

BIG_KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "joined_windows",
        sa.Column(
            "deployment_key",
            sa.Integer,
            sa.ForeignKey("deployments.key", name="fk_joined_windows_deployment_key"),
            nullable=False,
        ),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column(
            "window_key",
            BIG_KEY,
            sa.ForeignKey("windows.key", name="fk_joined_windows_window_key", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.PrimaryKeyConstraint("deployment_key", "digest", name="pk_joined_windows"),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_joined_windows_window_key", "joined_windows", ["window_key"])


def downgrade() -> None:
    op.drop_table("joined_windows")
