"""Expert placement for mixture-of-experts models: record routing, solve, judge on held-out steps, export."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

from .placement.version import __version__

if TYPE_CHECKING:
    from .placement.decide import Decision, Verdict, decide
    from .placement.errors import (
        EngineError,
        FileFormatError,
        InputError,
        MoeplaceError,
        RankError,
        SolveError,
        StoreError,
        UnsupportedError,
    )
    from .placement.evaluate import Evaluation, bottleneck_terms, evaluate
    from .placement.failures import Failure, single_failures, survives
    from .placement.model import ModelSpec
    from .placement.objective import Objective
    from .placement.plan import Certificate, Plan, Provenance
    from .placement.problem import Problem
    from .placement.statistics import RoutingStatistics
    from .placement.steps import Steps
    from .placement.topology import Device, Node, Topology
    from .placement.trace import RoutingTrace
    from .profiler import aggregate, profile, read_any, read_statistics, read_trace, write_statistics, write_trace
    from .runtime import ExpertParallelMoE, apply, parallelize
    from .runtime.exporters import export_plan
    from .service.client import Client
    from .solvers import solve, solver_names
    from .solvers.pareto import Front, pareto
    from .solvers.shares import optimal_shares
    from .solvers.what_if import Change, WhatIf, what_if

__all__ = [
    "Certificate",
    "Change",
    "Client",
    "Decision",
    "Device",
    "EngineError",
    "Evaluation",
    "ExpertParallelMoE",
    "Failure",
    "FileFormatError",
    "Front",
    "InputError",
    "ModelSpec",
    "MoeplaceError",
    "Node",
    "Objective",
    "Plan",
    "Problem",
    "Provenance",
    "RankError",
    "RoutingStatistics",
    "RoutingTrace",
    "SolveError",
    "Steps",
    "StoreError",
    "Topology",
    "UnsupportedError",
    "Verdict",
    "WhatIf",
    "__version__",
    "aggregate",
    "apply",
    "bottleneck_terms",
    "decide",
    "evaluate",
    "export_plan",
    "optimal_shares",
    "parallelize",
    "pareto",
    "profile",
    "read_any",
    "read_statistics",
    "read_trace",
    "single_failures",
    "solve",
    "solver_names",
    "survives",
    "what_if",
    "write_statistics",
    "write_trace",
]

_HOME = {
    ".placement.evaluate": ("Evaluation", "bottleneck_terms", "evaluate"),
    ".solvers.shares": ("optimal_shares",),
    ".placement.decide": ("Decision", "Verdict", "decide"),
    ".placement.errors": (
        "EngineError",
        "FileFormatError",
        "InputError",
        "MoeplaceError",
        "RankError",
        "SolveError",
        "StoreError",
        "UnsupportedError",
    ),
    ".placement.failures": ("Failure", "single_failures", "survives"),
    ".placement.model": ("ModelSpec",),
    ".placement.objective": ("Objective",),
    ".placement.plan": ("Certificate", "Plan", "Provenance"),
    ".placement.problem": ("Problem",),
    ".placement.statistics": ("RoutingStatistics",),
    ".placement.steps": ("Steps",),
    ".placement.topology": ("Device", "Node", "Topology"),
    ".placement.trace": ("RoutingTrace",),
    ".profiler": (
        "aggregate",
        "profile",
        "read_any",
        "read_statistics",
        "read_trace",
        "write_statistics",
        "write_trace",
    ),
    ".runtime": ("ExpertParallelMoE", "apply", "parallelize"),
    ".runtime.exporters": ("export_plan",),
    ".service.client": ("Client",),
    ".solvers": ("solve", "solver_names"),
    ".solvers.pareto": ("Front", "pareto"),
    ".solvers.what_if": ("Change", "WhatIf", "what_if"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
_RENAMED = {"binding_terms": "bottleneck_terms"}
"""Old names, kept for one release."""


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warn(f"moeplace.{name} is now moeplace.{new}; the old name goes with the next release", DeprecationWarning, 2)
        return getattr(import_module(__name__), new)
    # Loading every package takes longer than most commands run; each name brings its own when first used.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
