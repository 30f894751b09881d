"""Ctrl-C and failing listeners while a solver written in C++ runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import TypeVar

Answer = TypeVar("Answer")

PATIENCE = 0.05
"""Seconds between two looks for Ctrl-C."""


class Listener:
    """Keeps exceptions from travelling through C++: what a listener raises is kept, and the solver asked to stop.

    `interrupted` says that it was Ctrl-C; anything else is raised by `settle` once the solver has returned.
    """

    def __init__(self, stop: Callable[[], None] = lambda: None) -> None:
        self.interrupted = False
        self._error: Exception | None = None
        self._stop = stop

    @property
    def stopping(self) -> bool:
        return self.interrupted or self._error is not None

    def tell(self, report: Callable[[], None]) -> None:
        """Calls `report`."""
        if self.stopping:
            return
        try:
            report()
        except KeyboardInterrupt:
            self.interrupt()
        except Exception as error:  # noqa: BLE001 - raised again by settle
            self._error = error
            self._stop()

    def interrupt(self) -> None:
        """Asks the solver to stop."""
        self.interrupted = True
        self._stop()

    def settle(self) -> None:
        """Raises what a listener raised."""
        if self._error is not None:
            raise self._error


def run_beside(call: Callable[[], Answer], listener: Listener) -> Answer:
    """Runs `call` in a thread of its own, so that this one hears Ctrl-C, and returns what it returns."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call)
        while True:
            try:
                return running.result(timeout=PATIENCE)
            except StillRunning:
                if running.done():
                    return running.result()
            except KeyboardInterrupt:
                listener.interrupt()
