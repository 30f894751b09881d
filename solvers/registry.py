"""Every solver, in the order comparisons print them. A new one is a file and a line here."""

from __future__ import annotations

from .base import Solver
from .chain import Chain
from .contiguous import Contiguous
from .eplb import Eplb
from .exflow import Exflow
from .moetuner import MoeTuner
from .random_placement import RandomPlacement
from .round_robin import RoundRobin
from .search import Search

SOLVERS: tuple[Solver, ...] = (
    Contiguous(),
    RoundRobin(),
    RandomPlacement(),
    Eplb(),
    Exflow(),
    MoeTuner(),
    Chain(),
    Search(),
)
