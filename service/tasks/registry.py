"""Every kind of job. A new one is a file and a line here."""

from __future__ import annotations

from ...placement.errors import InputError, nearest
from .base import Task
from .judge import Judge
from .solve import Solve
from .studies import AskWhatIf, SweepFront
from .watch import Watch

TASKS: tuple[Task, ...] = (Solve(), Judge(), Watch(), AskWhatIf(), SweepFront())


def task_of(kind: str) -> Task:
    """The task of that kind.

    Raises:
        InputError: a kind this release does not know.
    """
    for task in TASKS:
        if task.kind == kind:
            return task
    raise InputError(f"job kind {kind!r} is unknown; {nearest(kind, [task.kind for task in TASKS])}")
