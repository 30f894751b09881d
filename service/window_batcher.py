"""Count windows of many requests stored in one transaction: a commit costs the same for one and for hundreds."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..db.database import RefusedDataError
from ..db.records import CountWindow
from ..db.store import Store
from ..placement.errors import StoreError

MOST_WAITING = 4096
"""Requests in the queue: beyond, the database does not keep up, and callers are told to come again."""

MOST_TOGETHER = 512
"""Windows in one transaction, about."""

GATHER_SECONDS = 0.03
"""A transaction waits so long for more, where the last one held several requests. A sender that is alone never
waits."""


@dataclass(frozen=True)
class _Submission:
    deployment: str
    windows: Sequence[CountWindow]
    done: Future[int] = field(default_factory=Future)


class WindowBatcher:
    """Takes windows from any thread. What was answered is stored; what was not may be sent again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: queue.Queue[_Submission | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="window batcher", daemon=True)
        self._thread.start()

    def put(self, deployment: str, windows: Sequence[CountWindow]) -> Future[int]:
        """How many of them were new, once they are stored.

        Raises:
            StoreError: too many wait already.
        """
        submission = _Submission(deployment, windows)
        try:
            self._queue.put_nowait(submission)
        except queue.Full:
            raise StoreError("the database does not keep up with the windows sent; send them again later") from None
        return submission.done

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    def close(self) -> None:
        """Stores what is waiting, then stops."""
        self._queue.put(None)
        self._thread.join(timeout=60)

    def _run(self) -> None:
        going, busy = True, False
        while going:
            submissions = [self._queue.get()]
            if busy:
                # Others are about to send too, and fewer transactions leave more of the machine to them.
                time.sleep(GATHER_SECONDS)
            size = 0
            while submissions[-1] is not None and size < MOST_TOGETHER:
                size += len(submissions[-1].windows)
                try:
                    submissions.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            going, busy = submissions[-1] is not None, len(submissions) > 1
            # Whose sender was given up on meanwhile is not stored: it had no answer.
            accepted = [
                submission
                for submission in submissions
                if submission is not None and submission.done.set_running_or_notify_cancel()
            ]
            if accepted:
                self._store_all(accepted)

    def _store_all(self, submissions: list[_Submission]) -> None:
        try:
            new = self._store.windows.add_each(
                [(submission.deployment, submission.windows) for submission in submissions]
            )
        except Exception as error:  # noqa: BLE001 - handed to whoever sent it
            if len(submissions) > 1 and not _is_down(error):
                # One of them is refused, or cannot be stored for a reason of its own, and with it all: find out which.
                for submission in submissions:
                    self._store_all([submission])
                return
            for submission in submissions:
                submission.done.set_exception(error)
        else:
            for submission, count in zip(submissions, new, strict=True):
                submission.done.set_result(count)


def _is_down(error: Exception) -> bool:
    """Whether the database itself is away or full, so that no other transaction would do better."""
    return isinstance(error, StoreError) and not isinstance(error, RefusedDataError)
