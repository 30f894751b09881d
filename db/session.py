"""One transaction: committed whole or not at all, errors told as StoreError."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from sqlalchemy import URL, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from ..placement.errors import StoreError
from .engine import WRITES, connect
from .failures import explain
from .migrate import migrate


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
