"""Compiles search ahead of the first solve, as an image's build does: `python -m moeplace.solvers.warm_up`.

Compiled code is for the kind of processor that compiled it; another compiles anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from ..placement.model import ModelSpec
from ..placement.objective import Objective
from ..placement.problem import Problem
from ..placement.progress import COMPILE_TIME
from ..placement.statistics import RoutingStatistics
from ..placement.topology import Topology
from ..placement.trace import RoutingTrace
from .solve import solve


def tiny_problems() -> Iterator[Problem]:
    """One of each kind that search has code of its own for: tokens, nearest replicas, context-coherent, counts
    alone."""
    model = ModelSpec(layers=2, experts=4, top_k=2, hidden_size=64, ffn_size=64)
    topology = Topology.preset("h100-hgx", nodes=2, devices_per_node=2)
    draws = np.random.default_rng(0).random((64, 2, 4))
    trace = RoutingTrace.from_arrays(np.argsort(draws, axis=2)[..., :2], num_experts=4, sequence=np.arange(64) // 8)
    recorded = RoutingStatistics.from_trace(trace)
    yield Problem(model, topology, recorded)
    yield Problem(model, topology, recorded, slots=8, objective=Objective(replica_choice="nearest"))
    yield Problem(model, topology, recorded, objective=Objective(execution="context_coherent"))
    yield Problem(model, topology, RoutingStatistics.from_counts(recorded.total_load))


def main() -> None:
    for problem in tiny_problems():
        solve(problem, "search", proposals=12)
    sys.stdout.write(f"compiled in {COMPILE_TIME.seconds:.1f} s\n")


if __name__ == "__main__":
    main()
