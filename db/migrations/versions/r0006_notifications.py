"""PostgreSQL tells who listens that a deployment, job, check, decision or entry of the audit log has changed."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"

TOLD = {
    "deployments": "INSERT OR DELETE OR UPDATE OF version, plan_key, hold, alarm",
    "jobs": "INSERT OR DELETE OR UPDATE OF state, attempts, beat",
    "checks": "INSERT",
    "decisions": "INSERT OR UPDATE OF state",
    "audit": "INSERT",
}


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    # The same told twice in a transaction arrives once.
    op.execute(
        "CREATE FUNCTION moeplace_changed() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_notify('moeplace', TG_TABLE_SCHEMA); RETURN NULL; END $$"
    )
    for table, events in TOLD.items():
        op.execute(
            f"CREATE TRIGGER moeplace_changed AFTER {events} ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION moeplace_changed()"
        )


def downgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    for table in TOLD:
        op.execute(f"DROP TRIGGER moeplace_changed ON {table}")
    op.execute("DROP FUNCTION moeplace_changed()")
