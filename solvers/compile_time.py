"""How long this process has spent compiling kernels: once an installation, so no time limit of a solve includes it."""

from __future__ import annotations

import threading
import time


class CompileTime:
    """Wall time between `begin` and `end`; stretches that overlap or lie in each other count once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open, self._since, self._total = 0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Of all stretches so far, one that has not ended included."""
        with self._lock:
            return self._total + (time.perf_counter() - self._since if self._open else 0.0)

    def begin(self) -> None:
        with self._lock:
            if not self._open:
                self._since = time.perf_counter()
            self._open += 1

    def end(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                self._total += time.perf_counter() - self._since


COMPILE_TIME = CompileTime()
"""Of this process, kept by `compiled.kernel`."""


def working_seconds() -> float:
    """A clock that stands still while kernels are compiled: differences are seconds."""
    return time.perf_counter() - COMPILE_TIME.seconds
