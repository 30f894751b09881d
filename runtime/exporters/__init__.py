"""Plans as the files that serving engines read, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...placement.engines import Constraint

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    # All engines' formats: a plug-in in an engine's processes starts without them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import export

    return getattr(export, name)
