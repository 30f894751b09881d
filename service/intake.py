"""Count windows of many requests stored in one transaction: a commit costs the same for one and for hundreds."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..db.records import CountWindow
from ..db.store import Store
from ..placement.errors import StoreError

MOST_WAITING = 4096
"""Requests in the queue: beyond, the database does not keep up, and callers are told to come again."""

MOST_TOGETHER = 512
"""Windows in one transaction, about."""

GATHER_SECONDS = 0.03
"""A transaction waits so long for more, where the last one held several requests. A sender that is alone never waits."""


@dataclass(frozen=True)
class _Parcel:
    deployment: str
    windows: Sequence[CountWindow]
    done: Future[int] = field(default_factory=Future)


class Intake:
    """Takes windows from any thread. What was answered is stored; what was not may be sent again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: queue.Queue[_Parcel | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
        self._thread.start()

    def put(self, deployment: str, windows: Sequence[CountWindow]) -> Future[int]:
        """How many of them were new, once they are stored.

        Raises:
            StoreError: too many wait already.
        """
        parcel = _Parcel(deployment, windows)
        try:
            self._queue.put_nowait(parcel)
        except queue.Full:
            raise StoreError("the database does not keep up with the windows sent; send them again later") from None
        return parcel.done

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
            parcels = [self._queue.get()]
            if busy:
                # Others are about to send too, and fewer transactions leave more of the machine to them.
                time.sleep(GATHER_SECONDS)
            size = 0
            while parcels[-1] is not None and size < MOST_TOGETHER:
                size += len(parcels[-1].windows)
                try:
                    parcels.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            going, busy = parcels[-1] is not None, len(parcels) > 1
            # Whose sender was given up on meanwhile is not stored: it had no answer.
            kept = [parcel for parcel in parcels if parcel is not None and parcel.done.set_running_or_notify_cancel()]
            if kept:
                self._keep(kept)

    def _keep(self, parcels: list[_Parcel]) -> None:
        try:
            new = self._store.windows.add_each([(parcel.deployment, parcel.windows) for parcel in parcels])
        except Exception as error:  # noqa: BLE001 - handed to whoever sent it
            if not isinstance(error, StoreError) and len(parcels) > 1:
                # One of them is refused, or cannot be stored for a reason of its own, and with it all: find out which.
                for parcel in parcels:
                    self._keep([parcel])
                return
            for parcel in parcels:
                parcel.done.set_exception(error)
        else:
            for parcel, count in zip(parcels, new, strict=True):
                parcel.done.set_result(count)
