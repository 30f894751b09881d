"""Every solver, in the order comparisons print them. A new one is a file and a line here."""

from __future__ import annotations

from .base import Solver
from .baselines import Contiguous, RandomPlacement, RoundRobin
from .chain import Chain
from .eplb import Eplb
from .exflow import Exflow
from .moetuner import MoeTuner
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
