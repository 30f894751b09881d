"""Alembic's environment and, in `versions/`, one file a change of the tables. `db/session.py` runs them."""
