"""What long work tells on its way: one form for solving, sweeping and judging."""

from __future__ import annotations

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
