"""What workers do: one file a kind of job, each a function from the job's request to its outcome."""

from __future__ import annotations

from ...placement.errors import InputError, nearest
from .base import Report, Task
from .decide import DecideTask
from .solve import SolveTask
from .studies import ParetoTask, WhatIfTask
from .watch import WatchTask

__all__ = ["TASKS", "Report", "Task", "task_of"]

TASKS: tuple[Task, ...] = (SolveTask(), DecideTask(), WatchTask(), WhatIfTask(), ParetoTask())


def task_of(kind: str) -> Task:
    """The task of that kind.

    Raises:
        InputError: a kind this release does not know.
    """
    for task in TASKS:
        if task.kind == kind:
            return task
    raise InputError(f"job kind {kind!r} is unknown; {nearest(kind, [task.kind for task in TASKS])}")
