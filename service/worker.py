"""A worker process: takes jobs one after the other, shows that it lives, and leaves nothing behind when it does not.

    python -m moeplace.service.worker NAME LEASE_SECONDS IDLE_SECONDS JOB_BYTES JOB_SECONDS LANE

The database is named by MOEPLACE_DB. It ends when its standard input does: then its server is gone, however that ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..db.jobs import Lane
from ..db.records import ClaimedJob, JobOutcome
from ..db.store import Store
from ..placement.errors import InputError, MoeplaceError, StoreError, nearest
from ..placement.memory import bound_memory
from ..placement.progress import Progress
from .settings import configure
from .tasks import DecideTask, ParetoTask, SolveTask, Task, WatchTask, WhatIfTask

log = logging.getLogger("moeplace.service.worker")

HISTORY = 200
STORE_PATIENCE = 600.0
"""Seconds a finished job waits for a database that is down."""
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


class Pulse:
    """Beats for a job from a thread of its own, passing on its progress. Calls `gone` when the job is not ours any
    more."""

    def __init__(self, job: ClaimedJob, store: Store, limits: Limits, gone: Callable[[], None]) -> None:
        self._job, self._store, self._gone, self._limits = job, store, gone, limits
        self._every = limits.lease_seconds / 6
        self._deadline = time.monotonic() + limits.job_seconds
        self._news: dict[str, Any] | None = None
        self._history: list[list[float | None]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def report(self, progress: Progress) -> None:
        """Takes a solver's news."""
        entry = [round(progress.seconds, 3), progress.value, progress.bound]
        if progress.value is not None and (not self._history or self._history[-1][1:] != entry[1:]):
            self._history = [*self._history[-HISTORY + 1 :], entry]
        self._news = {
            "seconds": entry[0],
            "value": progress.value,
            "bound": progress.bound,
            "message": progress.message,
            "history": self._history,
        }

    def flush(self) -> None:
        """Passes on the last news before the job ends."""
        news, self._news = self._news, None
        if news is not None:
            with contextlib.suppress(StoreError):
                self._store.jobs.beat(self._job, news)

    def _fail(self, excess: str) -> None:
        """Ends the job, and this process with all that it started."""
        log.warning("job ended", extra={"job": self._job.key, "excess": excess})
        with contextlib.suppress(MoeplaceError):
            self._store.jobs.fail(self._job, excess)
        self._gone()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(min(0.5, self._every)):
            excess = self._limits.excess(self._deadline)
            if excess is not None:
                self._fail(excess)
            news, self._news = self._news, None
            if news is None and time.monotonic() - last < self._every:
                continue
            last = time.monotonic()
            try:
                mine = self._store.jobs.beat(self._job, news)
            except StoreError as error:
                # The database may come back; whether the job is still ours then, the next beat tells.
                log.warning("no beat", extra={"job": self._job.key, "error": str(error)})
                continue
            if not mine and not self._stop.is_set():
                self._gone()


@dataclass(frozen=True)
class Limits:
    """Of one job, all its processes together. lease_seconds: without a sign of life."""

    lease_seconds: float
    job_bytes: int
    job_seconds: float

    def excess(self, deadline: float) -> str | None:
        """What a job takes too much of, in words."""
        if time.monotonic() > deadline:
            return f"it runs for more than {self.job_seconds:g} s; ask for less"
        if group_bytes() > self.job_bytes:
            return self.too_large
        return None

    @property
    def too_large(self) -> str:
        """What a job is told that takes too much memory."""
        return f"it takes more than {self.job_bytes / 1e9:.3g} GB of memory; ask for fewer or smaller steps"


def group_bytes() -> int:
    """Memory of this process and those that it started, as far as that can be told."""
    group, page, total = os.getpgid(0), os.sysconf("SC_PAGE_SIZE"), 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Behind the name, which may hold anything: state, parent, group, ..., resident pages.
            fields = status.read_text().rpartition(")")[2].split()
            total += int(fields[21]) * page if int(fields[2]) == group else 0
        except (OSError, ValueError, IndexError):
            continue
    return total


class Stop:
    """Whether this process is to end. Told so in the middle of a job, it gives the job back and ends with all
    children."""

    def __init__(self, store: Store) -> None:
        self._store, self._told = store, threading.Event()
        self._job: ClaimedJob | None = None

    def wait(self, seconds: float = 0.0) -> bool:
        """Whether it was told, within so many seconds."""
        return self._told.wait(seconds)

    def take(self, job: ClaimedJob | None) -> bool:
        """Notes the job at hand, None between jobs; False where it was told meanwhile, and the job is given back."""
        self._job = job
        # Whoever tells sets the event before looking for a job, so that one of both sees the other.
        if job is None or not self._told.is_set():
            return True
        self._release(job)
        return False

    def tell(self) -> None:
        """From another thread."""
        self._told.set()
        job = self._job
        if job is not None and self._release(job):
            _die()

    def _release(self, job: ClaimedJob) -> bool:
        """False when the job was not ours any more. A database that is away has it begun again once it is silent."""
        try:
            return self._store.jobs.release(job)
        except MoeplaceError:
            return True


def work(store: Store, name: str, lane: Lane, limits: Limits, idle_seconds: float, stop: Stop) -> None:
    """Takes jobs until told to stop."""
    while not stop.wait():
        try:
            job = store.jobs.claim(name, lane)
        except StoreError as error:
            log.warning("no job", extra={"error": str(error)})
            stop.wait(5.0)
            continue
        if job is None:
            stop.wait(idle_seconds)
        elif stop.take(job):
            run(job, store, limits)
            stop.take(None)


def run(job: ClaimedJob, store: Store, limits: Limits) -> None:
    """Does one job and stores what comes of it."""
    log.info("job begins", extra={"job": job.key, "kind": job.kind, "attempt": job.attempts})
    ended: Callable[[], bool]
    with Pulse(job, store, limits, _die) as pulse:
        try:
            outcome: JobOutcome = task_of(job.kind).run(job, store, pulse.report)
        except StoreError as error:
            log.warning("job given back", extra={"job": job.key, "error": str(error)})
            ended = lambda: store.jobs.release(job)  # noqa: E731
        except MoeplaceError as error:
            message = str(error)
            ended = lambda: store.jobs.fail(job, message)  # noqa: E731
        except MemoryError:
            ended = lambda: store.jobs.fail(job, limits.too_large)  # noqa: E731
        except Exception as error:
            log.exception("job failed", extra={"job": job.key})
            kind = type(error).__name__
            ended = lambda: store.jobs.fail(job, f"internal error ({kind}); the worker's log says more")  # noqa: E731
        else:
            ended = lambda: store.jobs.finish(job, outcome)  # noqa: E731
        pulse.flush()
        # The pulse beats on while the database is away, so that nobody takes the job meanwhile.
        stored = _persist(ended, job, store)
    log.info("job ends", extra={"job": job.key, "told": stored})


def _persist(end: Callable[[], bool], job: ClaimedJob, store: Store) -> bool:
    deadline = time.monotonic() + STORE_PATIENCE
    while True:
        try:
            return end()
        except StoreError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("cannot store the outcome yet", extra={"job": job.key, "error": str(error)})
            time.sleep(2.0)
        except MoeplaceError as error:
            # The outcome itself is refused, and would be again.
            return store.jobs.fail(job, str(error))


def _die() -> None:
    """Ends this process and every process a solver started."""
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _die_first() -> None:
    """Where memory runs out, a worker is to go before the server: its job is begun again."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _watch_input(stop: Stop) -> None:
    while sys.stdin.buffer.read(1):
        pass
    stop.tell()


def main() -> None:
    """Runs until standard input ends."""
    name, idle_seconds = sys.argv[1], float(sys.argv[3])
    limits = Limits(float(sys.argv[2]), int(sys.argv[4]), float(sys.argv[5]))
    configure()
    # Of one process; the pulse watches all of a job together.
    bound_memory(2 * limits.job_bytes)
    _die_first()
    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    # Ctrl-C at the terminal is for the server, which then ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with Store.open() as store:
        stop = Stop(store)
        threading.Thread(target=_watch_input, args=(stop,), daemon=True).start()
        work(store, name, "watch" if sys.argv[6] == "watch" else "any", limits, idle_seconds, stop)


if __name__ == "__main__":
    main()
