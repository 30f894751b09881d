"""Problem in, plan with bound out."""

from .solve import solve, solver_named, solver_names

__all__ = ["solve", "solver_named", "solver_names"]
