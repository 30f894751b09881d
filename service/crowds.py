"""What keeps a crowd cheap: many who wait for the same thing come at once, and are woken at once. They are served a few
at a time, so that nobody else stands behind all of them, and what they all ask is read once."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .middleware import STREAMS

K = TypeVar("K")
T = TypeVar("T")

TOGETHER = 8
"""Requests of those that wait, which are being worked on at a time."""
KEPT_BYTES = 16 << 20
"""Of plans' files kept in memory."""


class Turn:
    """The place of a request that waits, among those that are worked on. It is left while there is nothing to do."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places, self._held = places, False

    async def take(self) -> None:
        if not self._held:
            await self._places.acquire()
            self._held = True

    def leave(self) -> None:
        if self._held:
            self._held = False
            self._places.release()


TURN: ContextVar[Turn | None] = ContextVar("turn", default=None)
"""Of the request under way; None for one that does not wait."""


class Turns:
    """Has requests that wait for a change (`?wait=`, streams of events) worked on a few at a time: when they come, and
    whenever they go on. Who does not read what is sent keeps no place."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._places = app, asyncio.Semaphore(TOGETHER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _waits(scope):
            await self._app(scope, receive, send)
            return
        turn = Turn(self._places)
        before = TURN.set(turn)

        async def leaving(message: Message) -> None:
            turn.leave()
            await send(message)

        try:
            await turn.take()
            await self._app(scope, receive, leaving)
        finally:
            turn.leave()
            TURN.reset(before)


def _waits(scope: Scope) -> bool:
    return b"wait=" in scope["query_string"] or scope["path"].endswith(STREAMS)


class Reads(Generic[K, T]):
    """One question for all who ask it at about the same time: each gets what was read after it asked. Belongs to the
    event loop; `load` is called in a thread."""

    def __init__(self, load: Callable[[K], T]) -> None:
        self._load = load
        self._under_way: dict[K, asyncio.Task[T]] = {}
        self._next: dict[K, asyncio.Task[T]] = {}

    async def __call__(self, key: K) -> T:
        """Raises whatever `load` raises."""
        return await _joined(self._next, key, self._read)

    async def _read(self, key: K) -> T:
        before = self._under_way.get(key)
        if before is not None:
            await asyncio.wait({before})
        task = self._under_way[key] = self._next.pop(key)
        try:
            return await run_in_threadpool(self._load, key)
        finally:
            if self._under_way.get(key) is task:
                del self._under_way[key]


class Kept(Generic[K]):
    """Content that never changes, made once for all who ask, and kept while there is room. Belongs to the event loop;
    `make` is called in a thread."""

    def __init__(self, make: Callable[[K], bytes], most_bytes: int = KEPT_BYTES) -> None:
        self._make, self._most = make, most_bytes
        self._kept: OrderedDict[K, bytes] = OrderedDict()
        self._under_way: dict[K, asyncio.Task[bytes]] = {}
        self._bytes = 0

    async def __call__(self, key: K) -> bytes:
        """Raises whatever `make` raises."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return await _joined(self._under_way, key, self._made)

    async def _made(self, key: K) -> bytes:
        try:
            content = await run_in_threadpool(self._make, key)
        finally:
            del self._under_way[key]
        self._kept[key] = content
        self._bytes += len(content)
        while self._bytes > self._most:
            self._bytes -= len(self._kept.popitem(last=False)[1])
        return content


async def _joined(tasks: dict[K, asyncio.Task[T]], key: K, work: Callable[[K], Coroutine[Any, Any, T]]) -> T:
    """What the task of this key gives, which is begun where there is none, and goes on when one who waits does not."""
    task = tasks.get(key)
    if task is None:
        task = tasks[key] = asyncio.create_task(work(key))
        task.add_done_callback(_seen)
    return await asyncio.shield(task)


def _seen(task: asyncio.Task[T]) -> None:
    # Where all who asked are gone, nobody else would look at what it raised.
    if not task.cancelled():
        task.exception()
