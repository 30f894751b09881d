"""What went wrong in the database, said to the person who has to do something about it."""

from __future__ import annotations

import sqlite3

from sqlalchemy import URL, exc

from .address import shown

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
        return "cannot be reached; check that the server runs, its address, the names of database and user, and the password"
    return "the database refused"
