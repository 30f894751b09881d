"""Connections to either kind of database, and when a transaction takes the writers' lock."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sqlite3
import time
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event

from ..placement.errors import StoreError
from .address import shown

WRITES = "moeplace_writes"
CONNECT_SECONDS = 10


def connect(url: URL, lock_seconds: float) -> Engine:
    """An engine whose transactions, under the execution option WRITES, begin by waiting for all other writers.

    Writers of one database (of one PostgreSQL schema) run one at a time, so that looking for a row and adding it where
    it is missing is one step. Readers never wait.

    Raises:
        StoreError: PostgreSQL is asked for and its driver is not installed.
    """
    if url.get_backend_name() == "sqlite":
        return _sqlite(url, lock_seconds)
    return _postgres(url, lock_seconds)


def _sqlite(url: URL, lock_seconds: float) -> Engine:
    # No pool: opening the file is cheap, and a connection carried over a fork would corrupt the file.
    engine = create_engine(
        url,
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"timeout": lock_seconds, "isolation_level": None},
    )

    @event.listens_for(engine, "do_connect")
    def keep_private(_dialect: Any, _record: Any, _arguments: Any, _options: Any) -> None:
        # It holds secrets. SQLite would make it readable to all, and gives the files beside it the rights of this one.
        # Where it cannot be made, SQLite says why.
        with contextlib.suppress(OSError):
            os.close(os.open(str(url.database), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # Taking the lock at once: a transaction that reads first and writes later would fail when another wrote between.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")

    return engine


def _postgres(url: URL, lock_seconds: float) -> Engine:
    if importlib.util.find_spec("psycopg") is None:
        raise StoreError(f"{shown(url)}: the PostgreSQL driver is not installed; pip install 'moeplace[postgres]'")
    timeout = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_SECONDS}
    # READ COMMITTED, whatever the server's default: what the last writer stored is seen once its lock is ours.
    engine = create_engine(
        url, pool_pre_ping=True, hide_parameters=True, connect_args=timeout, isolation_level="READ COMMITTED"
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if _writes(connection):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {max(1, round(lock_seconds * 1000))}")
            connection.exec_driver_sql(
                "SELECT pg_advisory_xact_lock(hashtext('moeplace'), hashtext(coalesce(current_schema(), '')))"
            )

    return engine


def _writes(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get(WRITES))


def use_write_ahead_log(engine: Engine, lock_seconds: float) -> None:
    """Lets an SQLite file be read while it is written. Stays with the file; elsewhere does nothing.

    A file system that cannot do it (some network ones) keeps the rollback journal, which is as safe and slower.
    """
    if engine.dialect.name != "sqlite":
        return
    deadline = time.monotonic() + lock_seconds
    connection = engine.raw_connection()
    try:
        while True:
            try:
                connection.cursor().execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.Error as error:
                # SQLite does not wait for other connections here, whatever the timeout. Any other error comes again,
                # and is reported, at the first transaction.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    return
            time.sleep(0.02)
    finally:
        connection.close()
