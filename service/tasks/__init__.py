"""What workers do: one file a kind of job, each a function from the job's request to its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from ...db.records import ClaimedJob, JobOutcome
from ...db.store import Store
from ...solvers.base import Progress

Report = Callable[[Progress], None]


def steps_of(report: Report) -> Report:
    """A listener for work in parts, that reports which of them is under way."""
    return lambda news: report(replace(news, message=f"{news.message} ({news.done + 1} of {news.total})"))


class Task(Protocol):
    """Instances are stateless. `run` reads from the store and writes nothing: the outcome is stored when the job ends,
    so that a job that is begun twice leaves one trace. It raises MoeplaceError for what cannot be done."""

    @property
    def kind(self) -> str: ...

    def run(self, job: ClaimedJob, store: Store, report: Report) -> JobOutcome: ...
