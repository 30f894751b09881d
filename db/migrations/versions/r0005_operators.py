"""What operators need: tokens with a scope and an end, deliveries on one clock, held publication, claimed plans."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

MOMENT = sa.DateTime(timezone=True)
ACTIVE = sa.text("revoked IS NULL")
ADDED: tuple[tuple[str, str, Any], ...] = (
    ("tokens", "deployments", sa.Text()),
    ("tokens", "expires", MOMENT),
    ("tokens", "used", MOMENT),
    ("webhooks", "events", sa.Text()),
    ("webhooks", "old_secret", sa.Text()),
    ("webhooks", "old_until", MOMENT),
    ("deliveries", "due", MOMENT),
    ("deliveries", "attempted", MOMENT),
    ("deployments", "hold", sa.Text()),
    ("deployments", "alarm", sa.Text()),
    ("plans", "claimed_by", sa.String(100)),
    ("audit", "client", sa.String(100)),
)


def upgrade() -> None:
    for table, name, kind in ADDED:
        op.add_column(table, sa.Column(name, kind))
    with op.batch_alter_table("tokens") as tokens:
        tokens.drop_constraint("uq_tokens_name", type_="unique")
    op.create_index(
        "uq_tokens_active_name", "tokens", ["name"], unique=True, sqlite_where=ACTIVE, postgresql_where=ACTIVE
    )


def downgrade() -> None:
    op.drop_index("uq_tokens_active_name", "tokens")
    # Names that were used again: the newest token keeps its own.
    op.execute(
        "UPDATE tokens SET name = substr(name, 1, 80) || ' #' || key WHERE key NOT IN "
        "(SELECT max(key) FROM tokens GROUP BY name)"
    )
    with op.batch_alter_table("tokens") as tokens:
        tokens.create_unique_constraint("uq_tokens_name", ["name"])
    for table, name, _ in ADDED:
        op.drop_column(table, name)
