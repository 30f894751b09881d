"""Expert placement for mixture-of-experts models: record routing, solve, judge on held-out steps, export."""

from .placement.decide import Decision, Verdict, decide
from .placement.errors import FileFormatError, InputError, MoeplaceError, SolveError, StoreError, UnsupportedError
from .placement.evaluate import Evaluation, evaluate
from .placement.model import ModelSpec
from .placement.objective import Objective
from .placement.plan import Certificate, Plan, Provenance
from .placement.problem import Problem
from .placement.statistics import RoutingStatistics
from .placement.steps import Steps
from .placement.topology import Device, Node, Topology
from .placement.trace import RoutingTrace
from .placement.version import __version__
from .profiler import aggregate, profile, read_any, read_statistics, read_trace, write_statistics, write_trace
from .runtime.exporters import export_plan
from .solvers import solve, solver_names

__all__ = [
    "Certificate",
    "Decision",
    "Device",
    "Evaluation",
    "FileFormatError",
    "InputError",
    "ModelSpec",
    "MoeplaceError",
    "Node",
    "Objective",
    "Plan",
    "Problem",
    "Provenance",
    "RoutingStatistics",
    "RoutingTrace",
    "SolveError",
    "Steps",
    "StoreError",
    "Topology",
    "UnsupportedError",
    "Verdict",
    "__version__",
    "aggregate",
    "decide",
    "evaluate",
    "export_plan",
    "profile",
    "read_any",
    "read_statistics",
    "read_trace",
    "solve",
    "solver_names",
    "write_statistics",
    "write_trace",
]
