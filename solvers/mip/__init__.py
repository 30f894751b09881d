"""Integer and linear programs as arrays, and the backends that solve them."""

from .program import BACKENDS, Feature, Program, ProgramBuilder, Result, check_backend, solve_program

__all__ = ["BACKENDS", "Feature", "Program", "ProgramBuilder", "Result", "check_backend", "solve_program"]
