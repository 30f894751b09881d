"""Alembic's environment and, in `versions/`, one file a change of the tables. `db/migrate.py` runs them."""
