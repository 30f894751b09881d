"""Run by Alembic, not imported: applies migrations on the connection, and in the transaction, `db/database.py` hands
over."""

from alembic import context

from moeplace.db.schema import REVISION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=REVISION_TABLE)
with context.begin_transaction():
    context.run_migrations()
