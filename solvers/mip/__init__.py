"""Integer and linear programs as arrays, and the backends that solve them."""

from .program import Feature, Program, ProgramBuilder, Result
from .solve import BACKENDS, check_backend, solve_program

__all__ = ["BACKENDS", "Feature", "Program", "ProgramBuilder", "Result", "check_backend", "solve_program"]
