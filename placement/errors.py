"""Errors of the library. Each message says what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class MoeplaceError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(MoeplaceError, ValueError):
    """A value, file or record given by the user is not valid."""


class ArgumentTypeError(InputError, TypeError):
    """An argument is of a type that the function does not take."""


class NotFoundError(InputError):
    """Nothing is stored under the name or id given."""


class ConflictError(MoeplaceError):
    """The request is valid, but what it is about has changed meanwhile, or is in a state that does not allow it."""


class FileFormatError(InputError):
    """A file is truncated, malformed, or of a version this release does not read."""


class UnsupportedError(MoeplaceError):
    """A valid request that this solver, mode or engine cannot serve; the message names who can."""


class SolveError(MoeplaceError):
    """A solver ended without any plan (infeasible, or no incumbent within its budget)."""


class RankError(MoeplaceError):
    """A rank of a process group died, hangs, or failed in the middle of work that needs all of them."""


class StoreError(MoeplaceError):
    """The database is locked, unreachable, or was migrated by a newer release."""


class EngineError(MoeplaceError):
    """An engine's server is unreachable, refuses, or is not set up for what is asked of it."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence naming the valid choices and the one closest to `name`, for error messages."""
    from difflib import get_close_matches

    known = sorted(choices)
    close = get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"
