"""The contract between workers and what they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from ...db.records import ClaimedJob, JobOutcome
from ...db.store import Store
from ...solvers.base import Progress

Report = Callable[[Progress], None]


def steps_of(report: Report) -> Callable[[int, int, str], None]:
    """A listener for work in parts, that reports which of them is under way."""
    began = time.perf_counter()

    def tell(done: int, total: int, name: str) -> None:
        report(Progress(time.perf_counter() - began, None, None, f"{name} ({done + 1} of {total})"))

    return tell


class Task(Protocol):
    """Instances are stateless. `run` reads from the store and writes nothing: the outcome is stored when the job ends,
    so that a job that is begun twice leaves one trace. It raises MoeplaceError for what cannot be done."""

    @property
    def kind(self) -> str: ...

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome: ...
