"""Which of a deployment's routing is solved on and which is held out: always the newest is, so that a plan is judged on
what came after all it was made from."""

from __future__ import annotations

from collections.abc import Sequence

from ...db.service_records import WindowRecord
from ...db.store import Store
from ...placement.errors import InputError
from ...placement.statistics import RoutingStatistics
from ...placement.trace import RoutingTrace
from ..policy import Policy
from ..routing import trace_of, trace_statistics
from ..shards import content_of


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
