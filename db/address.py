"""Which database a user means, and how to show it without its password."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..placement.errors import StoreError

VARIABLE = "MOEPLACE_DB"
DEFAULT_FILE = "moeplace.db"
POSTGRES = ("postgres", "postgresql", "postgresql+psycopg")


def resolve(given: str | os.PathLike[str] | None) -> URL:
    """The address of the database: `given`, else the environment's MOEPLACE_DB, else a file in the user's data folder.

    A file path, `sqlite:///file`, or `postgresql://user@host/database`. The data folder is created, others are not.

    Raises:
        StoreError: not an address, a kind of database that is not supported, or a folder that is not there.
    """
    text = os.fspath(given) if given is not None else os.environ.get(VARIABLE, "")
    if given is not None and not text:
        raise StoreError(
            f"the database address is empty; give a file, a URL, or leave it out for the {VARIABLE} variable"
        )
    if not text:
        return _file(_data_folder() / DEFAULT_FILE)
    if "://" not in text:
        return _file(Path(text))
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # The text is not shown: what cannot be parsed may hold a password anywhere.
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
