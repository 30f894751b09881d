"""Plans as the files that serving engines read, and back."""

from ...placement.engines import Constraint
from .export import (
    check_export,
    engine_constraints,
    engine_names,
    engine_usage,
    export_bytes,
    export_plan,
    read_exported,
    read_plan_file,
)

__all__ = [
    "Constraint",
    "check_export",
    "engine_constraints",
    "engine_names",
    "engine_usage",
    "export_bytes",
    "export_plan",
    "read_exported",
    "read_plan_file",
]
