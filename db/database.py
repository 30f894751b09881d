"""A database of either kind: its address, transactions on it, connections, tables brought up to this release, and its
errors in plain words."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import selectors
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import platformdirs
from sqlalchemy import (
    URL,
    Connection,
    Delete,
    Engine,
    NullPool,
    Update,
    create_engine,
    event,
    exc,
    func,
    inspect,
    make_url,
    select,
    text,
)
from sqlalchemy.orm import Session

from ..placement.errors import MoeplaceError, StoreError
from .schema import REVISION, REVISION_TABLE, Base

if TYPE_CHECKING:
    from alembic.config import Config


log = logging.getLogger("moeplace.db.database")

CHANNEL = "moeplace"
LOOK_SECONDS = 1.0
AGAIN_SECONDS = (1.0, 30.0)
"""Until the connection is tried again: at first, and at most."""


class Listener:
    """Calls `changed`, from its thread, whenever the database tells of a change, and when it falls silent.

    hears: whether what the database tells arrives: not before the connection stands, nor through a pool that hands each
    transaction another connection. Who relies on it looks for himself while it does not.
    """

    def __init__(self, url: URL, changed: Callable[[], None]) -> None:
        self._url, self._changed = url, changed
        self._stop = threading.Event()
        self.hears = False
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and its connection."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        wait = AGAIN_SECONDS[0]
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                with self._connection() as connection:
                    self._listen(connection)
            except Exception as error:  # noqa: BLE001  # whatever ends a connection: who waits looks for himself
                log.warning("does not hear of changes; will try again", extra={"error": str(error).strip()})
            if self.hears:
                self.hears = False
                self._changed()
            wait = AGAIN_SECONDS[0] if time.monotonic() - began > 60 else min(2 * wait, AGAIN_SECONDS[1])
            self._stop.wait(wait)

    def _connection(self) -> Any:
        import psycopg
        from sqlalchemy.dialects.postgresql.psycopg import dialect

        driver: Any = dialect
        arguments, named = driver().create_connect_args(self._url)
        return psycopg.connect(*arguments, **{"connect_timeout": 10, **named}, autocommit=True)

    def _listen(self, connection: Any) -> None:
        channels: list[str] = []
        # What comes with an answer is not in the queue.
        connection.add_notify_handler(lambda notice: channels.append(notice.payload))
        connection.execute(f"LISTEN {CHANNEL}")
        schema = connection.execute("SELECT current_schema()").fetchone()[0]
        # It is told something itself, to see whether that arrives.
        greeting = secrets.token_hex(8)
        connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, greeting))
        with contextlib.closing(selectors.DefaultSelector()) as selector:
            selector.register(connection.fileno(), selectors.EVENT_READ)
            while not self._stop.is_set():
                if greeting in channels:
                    self.hears = True
                if {greeting, schema} & set(channels):
                    self._changed()
                channels.clear()
                if selector.select(LOOK_SECONDS):
                    connection.pgconn.consume_input()
                while (notice := connection.pgconn.notifies()) is not None:
                    channels.append(notice.extra.decode())


MIGRATIONS = Path(__file__).parent / "migrations"
VARIABLE = "MOEPLACE_DB"
DEFAULT_FILE = "moeplace.db"
POSTGRES = ("postgres", "postgresql", "postgresql+psycopg")


def resolve(location: str | os.PathLike[str] | None) -> URL:
    """The address of the database: `given`, else the environment's MOEPLACE_DB, else a file in the user's data folder.

    A file path, `sqlite:///file`, or `postgresql://user@host/database`. The data folder is created, others are not.

    Raises:
        StoreError: not an address, a kind of database that is not supported, or a folder that is not there.
    """
    address = os.fspath(location) if location is not None else os.environ.get(VARIABLE, "")
    if location is not None and not address:
        raise StoreError(
            f"the database address is empty; give a file, a URL, or leave it out for the {VARIABLE} variable"
        )
    if not address:
        return _file(_data_folder() / DEFAULT_FILE)
    if "://" not in address:
        return _file(Path(address))
    try:
        url = make_url(address)
    except (exc.ArgumentError, ValueError):
        # It is not shown: what cannot be parsed may hold a password anywhere.
        raise StoreError("the database URL cannot be read; expected " + _FORMS) from None
    if url.drivername in POSTGRES:
        if not url.database:
            raise StoreError(f"{shown(url)} names no database; expected {_FORMS}")
        return url.set(drivername="postgresql+psycopg")
    if url.drivername in ("sqlite", "sqlite+pysqlite"):
        if url.query or url.host:
            raise StoreError(f"{shown(url)}: an SQLite URL is sqlite:///file (four slashes for /file), without options")
        return _file(Path(url.database or ""))
    raise StoreError(f"{url.drivername!r} databases are not supported; expected {_FORMS}")


_FORMS = "a file path, sqlite:///file, or postgresql://user@host:5432/database"


def shown(url: URL) -> str:
    """The address for messages, without passwords."""
    secrets = [key for key in url.query if "password" in key.lower()]
    return url.difference_update_query(secrets).render_as_string(hide_password=True)


def _data_folder() -> Path:
    folder = platformdirs.user_data_path("moeplace", appauthor=False)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{folder}: the data folder cannot be created ({error.strerror}); name another database in {VARIABLE}"
        ) from None
    return folder


def _file(path: Path) -> URL:
    if str(path) in ("", ".", ":memory:"):
        raise StoreError("a database in memory is gone with its process; give a file")
    try:
        path = path.expanduser().absolute()
        if path.is_dir():
            raise StoreError(f"{path}: a folder; give a file in it, such as {path / DEFAULT_FILE}")
        if not path.parent.is_dir():
            raise StoreError(
                f"{path.parent}: no such folder for the database {path.name}; create it, or name another file"
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"{str(path)!r} cannot be used as a database file ({error}); name another file") from None
    return URL.create("sqlite", database=str(path))


class ForbiddenError(MoeplaceError):
    """Whoever asks may not do that."""


class RefusedDataError(StoreError):
    """The database refuses what is stored, as it would again; it runs."""


class Sessions:
    """Opens transactions on one database, from any thread, and from processes forked after it was opened."""

    def __init__(self, url: URL, lock_seconds: float) -> None:
        self.url = url
        self._engine = connect(url, lock_seconds)
        self._process = os.getpid()
        self._looking = threading.Lock()
        self._looker: tuple[int, sqlite3.Connection] | None = None
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

    def listen(self, changed: Callable[[], None]) -> Listener | None:
        """Has `changed` called, from a thread, whenever something that somebody may wait for has changed; None where
        the database cannot tell (SQLite)."""
        return Listener(self.url, changed) if self.url.get_backend_name() == "postgresql" else None

    def version(self) -> int | None:
        """What changes with every commit of others to an SQLite file, told without a question to its tables; None where
        that cannot be told: elsewhere, or now."""
        if self.url.get_backend_name() != "sqlite":
            return None
        with self._looking:
            try:
                if self._looker is None or self._looker[0] != os.getpid():
                    known = sqlite3.connect(str(self.url.database), timeout=0.0, check_same_thread=False)
                    self._looker = (os.getpid(), known)
                return int(self._looker[1].execute("PRAGMA data_version").fetchone()[0])
            except sqlite3.Error:
                return None

    def close(self) -> None:
        """Closes idle connections."""
        self._own_engine().dispose()
        with self._looking:
            if self._looker is not None and self._looker[0] == os.getpid():
                self._looker[1].close()
            self._looker = None

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
        except exc.SQLAlchemyError as error:
            kind = RefusedDataError if isinstance(error, exc.DataError | exc.IntegrityError) else StoreError
            raise kind(explain(error, self.url)) from error


def moment(session: Session) -> datetime:
    """Now, by the clock that all servers on this database share: the database's own, or this machine's for a file."""
    if session.get_bind().dialect.name == "sqlite":
        return datetime.now(UTC)
    now: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def changed_rows(session: Session, statement: Update | Delete) -> int:
    """Carries out a statement; returns how many rows it changed or removed."""
    return int(cast(Any, session.execute(statement)).rowcount)


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
        # Taking the lock at once: a transaction that reads first and writes later would fail when another wrote
        # between.
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


def migrate(engine: Engine, lock_seconds: float) -> None:
    """Creates or upgrades the tables in one transaction under the writers' lock; an up-to-date database is only read.

    Processes that open a new database together wait for the one that got the lock first. A process killed half way
    leaves the tables as they were.

    Raises:
        StoreError: the database was migrated by a newer release, or holds another program's tables.
        SQLAlchemyError: the database refused.
    """
    with engine.connect() as connection:
        present = _usable_revision(connection, engine)
    if present == REVISION:
        return
    if present is None:
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
    present = revision(connection)
    if present is None:
        _refuse_strangers(connection, engine)
    elif present != REVISION and present not in _known_revisions():
        raise StoreError(
            f"database {shown(engine.url)}: migrated by a newer release of moeplace (its tables are at revision "
            f"{present}, this release knows up to {REVISION}); upgrade moeplace, or use another database"
        )
    return present


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


# What went wrong in the database, said to the person who has to do something about it.

_DONE = "nothing of this change was stored"

# By SQLite's primary result code, https://www.sqlite.org/rescode.html
_SQLITE = {
    sqlite3.SQLITE_BUSY: "locked: another process has been writing for too long; wait for it or end it, then repeat; "
    + _DONE,
    sqlite3.SQLITE_FULL: "the disk is full; free some space, then repeat; " + _DONE,
    sqlite3.SQLITE_IOERR: "reading or writing failed (disk or quota full, file size limit, or a failing disk); "
    "make room, then repeat; " + _DONE,
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that the folder exists and that you may read and write in it",
    sqlite3.SQLITE_READONLY: "may not be written; check the permissions of the file and of its folder "
    "(SQLite writes beside it), or name another file",
    sqlite3.SQLITE_PERM: "may not be opened; check the permissions of the file and of its folder",
    sqlite3.SQLITE_NOTADB: "not an SQLite database; name another file, or move this one away",
    sqlite3.SQLITE_CORRUPT: "damaged; restore a copy, or save what is left with `sqlite3 FILE .recover`",
    sqlite3.SQLITE_TOOBIG: "this is larger than SQLite stores in one piece; keep a smaller token sample",
}

# By SQLSTATE or its class (first two characters), https://www.postgresql.org/docs/current/errcodes-appendix.html
_POSTGRES = {
    "55P03": "locked: another process has been writing for too long; wait for it or end it, then repeat; " + _DONE,
    "57014": "the server cancelled the statement (its statement_timeout, or an administrator); " + _DONE,
    "53100": "the server's disk is full; free some space there, then repeat; " + _DONE,
    "3F000": "no schema to create tables in; create the one the search_path names",
    "42501": "this role may not do that; grant it the rights on the database and its schema",
    "40": "the server aborted this change in favour of another; repeat; " + _DONE,
    "57": "the server is shutting down or starting up; try again later",
    "08": "the connection was lost; repeat: what was stored already is found again, not doubled",
}


def explain(error: exc.SQLAlchemyError, url: URL) -> str:
    """One line: which database, what happened, what to do, and what the database itself said."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else None
    said = " ".join(str(cause or error).split())
    return f"database {shown(url)}: {_meaning(error, cause)} ({said})"


def _meaning(error: exc.SQLAlchemyError, cause: BaseException | None) -> str:
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        return _SQLITE.get(code, "the database refused")
    if isinstance(error, exc.TimeoutError):
        return "every connection of this process is in use; use fewer threads"
    state = getattr(cause, "sqlstate", None) or ""
    if state:
        return _POSTGRES.get(state) or _POSTGRES.get(state[:2]) or "the server refused"
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return _POSTGRES["08"]
    if isinstance(error, exc.DBAPIError) and type(cause).__name__ in ("OperationalError", "ConnectionTimeout"):
        return (
            "cannot be reached; check that the server runs, its address, the names of database and user, and the "
            "password"
        )
    return "the database refused"
