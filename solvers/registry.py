"""Every solver, in the order comparisons print them. A new one is a file and a line here."""

from __future__ import annotations

from .base import Solver
from .chain import Chain
from .contiguous import Contiguous
from .eplb import Eplb
from .random_placement import RandomPlacement
from .round_robin import RoundRobin
from .search import Search

SOLVERS: tuple[Solver, ...] = (Contiguous(), RoundRobin(), RandomPlacement(), Eplb(), Chain(), Search())
