"""Alembic's environment and, in `versions/`, one file a change of the tables. `db/database.py` runs them."""
