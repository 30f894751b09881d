"""Plans as the files that serving engines read, and back."""

from .constraints import Constraint
from .export import check_export, engine_constraints, engine_usage, export_plan, read_exported
from .problems import check_plan_for, problem_for, target_names
from .registry import engine_names

__all__ = [
    "Constraint",
    "check_export",
    "check_plan_for",
    "engine_constraints",
    "engine_names",
    "engine_usage",
    "export_plan",
    "problem_for",
    "read_exported",
    "target_names",
]
