"""Every solver, in the order comparisons print them. A new one is a file and a line here."""

from __future__ import annotations

from .base import Solver
from .contiguous import Contiguous

SOLVERS: tuple[Solver, ...] = (Contiguous(),)
