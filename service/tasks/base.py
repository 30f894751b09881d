"""The contract between workers and what they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ...db.records import ClaimedJob, Outcome, WindowRecord
from ...db.store import Store
from ...placement.errors import InputError
from ...placement.statistics import RoutingStatistics
from ...placement.trace import RoutingTrace
from ...solvers.base import Progress
from ..policy import Policy
from ..routing import trace_of, trace_statistics
from ..shards import content_of

# Which of a deployment's routing is solved on and which is held out: always the newest is, so that a plan is judged
# on what came after all it was made from.


def held_windows(count: int, policy: Policy) -> int:
    """How many of the newest of `count` windows are held out."""
    return min(policy.recent // 2, count // 4)


def solving_windows(store: Store, deployment: str, policy: Policy, most: int) -> Sequence[WindowRecord]:
    """The newest windows that may be solved on, at most so many."""
    windows = store.windows.page(deployment, limit=most + policy.recent // 2)
    return windows[: len(windows) - held_windows(len(windows), policy)][-most:]


def judging_windows(store: Store, deployment: str, policy: Policy) -> Sequence[WindowRecord]:
    """The newest windows, held out of every solve."""
    windows = store.windows.page(deployment, limit=2 * policy.recent)
    return windows[len(windows) - held_windows(len(windows), policy) :]


def solving_traces(store: Store, deployment: str, policy: Policy) -> RoutingStatistics:
    """Statistics of all uploaded traces but the newest.

    Raises:
        InputError: fewer than two were uploaded.
    """
    uploads = store.uploads.complete("trace", deployment, limit=policy.keep_traces)
    if len(uploads) < 2:
        raise InputError(f"{len(uploads)} traces are uploaded; solving on tokens takes two, the newest is held out")
    return trace_statistics([content_of(store, upload) for upload in reversed(uploads[1:])])


def judging_trace(store: Store, deployment: str) -> RoutingTrace:
    """The newest uploaded trace, held out of every solve.

    Raises:
        InputError: none was uploaded.
    """
    uploads = store.uploads.complete("trace", deployment, limit=1)
    if not uploads:
        raise InputError("no trace is uploaded to judge on; upload one, or judge on counts")
    return trace_of(content_of(store, uploads[0]))


Report = Callable[[Progress], None]


def steps_of(report: Report) -> Report:
    """A listener for work in parts, that reports which of them is under way."""
    return lambda news: report(replace(news, message=f"{news.message} ({news.done + 1} of {news.total})"))


class Task(Protocol):
    """Instances are stateless. `run` reads from the store and writes nothing: the outcome is stored when the job ends,
    so that a job that is begun twice leaves one trace. It raises MoeplaceError for what cannot be done."""

    @property
    def kind(self) -> str: ...

    def run(self, job: ClaimedJob, store: Store, report: Report) -> Outcome: ...
