"""What long work tells on its way, one form for solving, sweeping and judging; and what compiling took of its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far work is.

    seconds: since it began. value, bound: the best value so far and the bound proven so far, both of a solver's own
    objective; None where there is none. message: what is done now. done, total: parts finished and parts in all, where
    work has parts (changes, points of a front, draws); total None where their number is not known.
    """

    seconds: float
    value: float | None = None
    bound: float | None = None
    message: str = ""
    done: int = 0
    total: int | None = None

    @property
    def fraction(self) -> float | None:
        """Of the parts, those done; None where their number is not known."""
        return self.done / self.total if self.total else None


Listener = Callable[[Progress], None]


class CompileTime:
    """Wall time spent compiling kernels, which is once an installation: no time limit of a solve includes it.

    Between `begin` and `end`; stretches that overlap or lie in each other count once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open, self._since, self._total = 0, 0.0, 0.0

    @property
    def seconds(self) -> float:
        """Of all stretches so far, one that has not ended included."""
        with self._lock:
            return self._total + (time.perf_counter() - self._since if self._open else 0.0)

    @property
    def is_running(self) -> bool:
        with self._lock:
            return self._open > 0

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
"""Of this process, kept by `jit.kernel`."""
