"""Count windows of many requests stored in one transaction: a commit costs the same for one and for hundreds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..db.service_records import CountWindow
from ..db.store import Store
from ..placement.errors import MoeplaceError, StoreError

MOST_WAITING = 4096
"""Requests in the queue: beyond, the database does not keep up, and callers are told to come again."""

MOST_TOGETHER = 512
"""Windows in one transaction, about."""


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
        going = True
        while going:
            parcels = [self._queue.get()]
            size = 0
            while parcels[-1] is not None and size < MOST_TOGETHER:
                size += len(parcels[-1].windows)
                try:
                    parcels.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            going = parcels[-1] is not None
            self._keep([parcel for parcel in parcels if parcel is not None])

    def _keep(self, parcels: list[_Parcel]) -> None:
        if len({parcel.deployment for parcel in parcels}) == len(parcels):
            try:
                new = self._store.windows.add({parcel.deployment: parcel.windows for parcel in parcels})
            except MoeplaceError:
                # One of them is refused, and with it all: find out which.
                pass
            else:
                for parcel in parcels:
                    parcel.done.set_result(new[parcel.deployment])
                return
        for parcel in parcels:
            try:
                parcel.done.set_result(self._store.windows.add({parcel.deployment: parcel.windows})[parcel.deployment])
            except Exception as error:  # noqa: BLE001 - handed to whoever sent it
                parcel.done.set_exception(error)
