"""A thread that hears from PostgreSQL that something has changed, over a connection of its own."""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import URL

log = logging.getLogger("moeplace.db.listening")

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
