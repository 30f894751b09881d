"""Every solver, in the order comparisons print them. A new one is a file and a line here, or an entry point
elsewhere."""

from __future__ import annotations

from .._plugins import Registry
from .base import Solver
from .baselines import Contiguous, RandomPlacement, RoundRobin
from .chain import Chain
from .eplb import Eplb
from .exflow import Exflow
from .moetuner import MoeTuner
from .search import Search

SOLVERS: Registry[Solver] = Registry(
    "solver",
    "moeplace.solvers",
    ("name", "supports", "needs", "solve"),
    Contiguous(),
    RoundRobin(),
    RandomPlacement(),
    Eplb(),
    Exflow(),
    MoeTuner(),
    Chain(),
    Search(),
)
