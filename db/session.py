"""One transaction: committed whole or not at all, errors told as StoreError."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..placement.errors import StoreError
from .database import WRITES, connect, explain, shown, use_write_ahead_log
from .schema import REVISION, REVISION_TABLE, Base

if TYPE_CHECKING:
    from alembic.config import Config

# Brings a database's tables up to this release, once, whoever opens it first.


MIGRATIONS = Path(__file__).parent / "migrations"


def migrate(engine: Engine, lock_seconds: float) -> None:
    """Creates or upgrades the tables in one transaction under the writers' lock; an up-to-date database is only read.

    Processes that open a new database together wait for the one that got the lock first. A process killed half way
    leaves the tables as they were.

    Raises:
        StoreError: the database was migrated by a newer release, or holds another program's tables.
        SQLAlchemyError: the database refused.
    """
    with engine.connect() as connection:
        found = _usable_revision(connection, engine)
    if found == REVISION:
        return
    if found is None:
        use_write_ahead_log(engine, lock_seconds)
    with engine.execution_options(**{WRITES: True}).begin() as connection:
        if _usable_revision(connection, engine) != REVISION:
            _upgrade(connection)


def revision(connection: Connection) -> str | None:
    """The migration the tables are at, None for a database without them."""
    if not inspect(connection).has_table(REVISION_TABLE):
        return None
    return connection.execute(text(f"SELECT version_num FROM {REVISION_TABLE}")).scalar_one_or_none()


def _usable_revision(connection: Connection, engine: Engine) -> str | None:
    found = revision(connection)
    if found is None:
        _refuse_strangers(connection, engine)
    elif found != REVISION and found not in _known_revisions():
        raise StoreError(
            f"database {shown(engine.url)}: migrated by a newer release of moeplace (its tables are at revision "
            f"{found}, this release knows up to {REVISION}); upgrade moeplace, or use another database"
        )
    return found


def _refuse_strangers(connection: Connection, engine: Engine) -> None:
    """A file belongs to one program; a server's schema may be shared, as long as no table has the same name."""
    tables = set(inspect(connection).get_table_names())
    strangers = sorted(tables if engine.dialect.name == "sqlite" else tables & set(Base.metadata.tables))
    if strangers:
        raise StoreError(
            f"database {shown(engine.url)}: holds tables of another program ({', '.join(strangers[:5])}); "
            "use another file, database or schema"
        )


def _known_revisions() -> set[str]:
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}


def _upgrade(connection: Connection) -> None:
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    # The path is read through ConfigParser, where a percent sign starts an interpolation.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


class Sessions:
    """Opens transactions on one database, from any thread, and from processes forked after it was opened."""

    def __init__(self, url: URL, lock_seconds: float) -> None:
        self.url = url
        self._engine = connect(url, lock_seconds)
        self._process = os.getpid()
        with self._converting():
            try:
                migrate(self._engine, lock_seconds)
            except BaseException:
                self._engine.dispose()
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads; never waits for writers."""
        with self._converting(), Session(self._own_engine(), expire_on_commit=False) as session, session.begin():
            yield session

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction with the writers' lock: no other one writes until it ends. Commits unless the block raises."""
        engine = self._own_engine().execution_options(**{WRITES: True})
        with self._converting(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Closes idle connections."""
        self._own_engine().dispose()

    def _own_engine(self) -> Engine:
        if os.getpid() != self._process:
            # Pooled connections belong to the process this one was forked from: let go of them without closing them.
            self._engine.dispose(close=False)
            self._process = os.getpid()
        return self._engine

    @contextlib.contextmanager
    def _converting(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise StoreError(explain(error, self.url)) from error
