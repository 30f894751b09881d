"""Who waits for a plan or a job to change: one question to the database for all of a server, however many they are,
when PostgreSQL tells of a change, or else again and again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool

from ..db.database import Listener
from ..db.store import Store
from ..placement.errors import MoeplaceError
from .crowds import TURN

log = logging.getLogger("moeplace.service.changes")

LOOK_SECONDS = 0.3
"""Between questions to a database that does not tell of changes."""
TOLD_SECONDS = 5.0
"""Between questions to one that does, where it told nothing."""
TOGETHER_SECONDS = 0.05
"""After a change: those that follow at once are asked for with it."""
MOST_BY_CALLER = 1000
MOST = 4000
Kind = Literal["deployment", "job", "page"]
"""A deployment's plan; a job; all that the page of a deployment shows, or of name "", those of all."""


@dataclass
class Topic:
    """A deployment, job or page that somebody waits for. sign: what its rows said last. version: grows with it."""

    sign: Hashable = None
    version: int = 0
    watchers: int = 0
    _waiting: set[asyncio.Future[None]] = field(default_factory=set)

    async def wait(self, seconds: float | None, seen: int, gone: asyncio.Future[None] | None = None) -> bool:
        """Until it is of another version than the one seen, so long, or until whoever waits is gone; whether it is."""
        if self.version != seen:
            return True
        turn = TURN.get()
        if turn is not None:
            turn.leave()
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        self._waiting.add(woken)
        timer = None if seconds is None else loop.call_later(seconds, _settle, woken)

        def wake(_: asyncio.Future[None]) -> None:
            _settle(woken)

        if gone is not None:
            gone.add_done_callback(wake)
        try:
            await woken
        finally:
            self._waiting.discard(woken)
            if gone is not None:
                gone.remove_done_callback(wake)
            if timer is not None:
                timer.cancel()
        if turn is not None:
            await turn.take()
        return self.version != seen

    def wake(self) -> None:
        """Lets all go on who wait."""
        for woken in tuple(self._waiting):
            _settle(woken)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@asynccontextmanager
async def leaving(request: Request) -> AsyncIterator[asyncio.Future[None]]:
    """Is done once the client has closed its connection."""

    async def listen() -> None:
        # A body that is too large is nothing to wait for either.
        with contextlib.suppress(HTTPException):
            while (await request.receive())["type"] != "http.disconnect":
                pass

    task = asyncio.create_task(listen())
    try:
        yield task
    finally:
        task.cancel()


class Changes:
    """Belongs to the event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._topics: dict[tuple[Kind, str | int], Topic] = {}
        self._callers: Counter[str] = Counter()
        self._task: asyncio.Task[None] | None = None
        self._told = asyncio.Event()
        self._listener: Listener | None = None
        self.stopping = False

    def listen(self, notify: Callable[[], None]) -> None:
        """Hears of changes from here on, where the database tells of them. notify: called then, too, from a thread."""
        loop = asyncio.get_running_loop()

        def tell() -> None:
            notify()
            # The loop may have ended before the listener did.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._told.set)

        self._listener = self._store.listen(tell)

    def close(self) -> None:
        """Hears of nothing any longer."""
        if self._listener is not None:
            self._listener.close()

    @asynccontextmanager
    async def watch(self, kind: Kind, key: str | int, caller: str) -> AsyncIterator[Topic]:
        """A topic, to be waited for again and again. What changes after this began is not missed.

        Raises:
            HTTPException: 429 where the caller waits too often already, 503 where too many do.
        """
        if self._callers[caller] >= MOST_BY_CALLER:
            raise HTTPException(429, f"{caller!r} waits {MOST_BY_CALLER} times already", headers={"Retry-After": "10"})
        if self._callers.total() >= MOST:
            raise HTTPException(503, "too many wait already", headers={"Retry-After": "10"})
        self._callers[caller] += 1
        topic = self._topics.setdefault((kind, key), Topic())
        topic.watchers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        try:
            yield topic
        finally:
            topic.watchers -= 1
            self._callers[caller] -= 1
            if not self._callers[caller]:
                del self._callers[caller]
            if not topic.watchers:
                self._topics.pop((kind, key), None)

    def stop(self) -> None:
        """Nobody waits any longer."""
        self.stopping = True
        self._told.set()
        for topic in self._topics.values():
            topic.wake()

    async def _look(self) -> None:
        # What was told before anybody waited is in the first answer.
        self._told.set()
        while self._topics and not self.stopping:
            await self._pause()
            names = [str(key) for kind, key in self._topics if kind == "deployment"]
            jobs = [int(key) for kind, key in self._topics if kind == "job"]
            pages = [str(key) for kind, key in self._topics if kind == "page"]
            try:
                signs = await run_in_threadpool(self._store.signs, names, jobs, pages)
            except MoeplaceError as error:
                log.warning("will be tried again", extra={"error": str(error)})
                continue
            for identity, topic in self._topics.items():
                sign = signs.get(identity, "removed")
                if sign != topic.sign:
                    topic.sign = sign
                    topic.version += 1
                    topic.wake()

    async def _pause(self) -> None:
        """Until there is reason to look."""
        if self._listener is None or not self._listener.hears:
            await asyncio.sleep(LOOK_SECONDS)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), TOLD_SECONDS)
        await asyncio.sleep(TOGETHER_SECONDS)
        # Before the question: what changes while it is answered is asked for again.
        self._told.clear()
