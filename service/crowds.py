"""What keeps a crowd cheap: many who wait for the same thing come at once, and are woken at once. They are served a few
at a time, and so is what one client asks at once: nobody else stands behind all of it. What they all ask is read once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..db.jobs import QuotaError
from ..placement.errors import StoreError
from .connections import network_of
from .middleware import STREAMS, UNLIMITED, client_address, route_path
from .problems import problem

K = TypeVar("K")
T = TypeVar("T")

TOGETHER = 8
"""Requests of those that wait, which are being worked on at a time."""
OF_CLIENT, PAGES_OF_CLIENT, MOST_OF_CLIENT = 8, 3, 400
"""Requests of one client to the API that are worked on at a time (a server has 40 threads), pages, which take a hundred
times as much, and requests that wait for it."""
KEPT_BYTES = 16 << 20
"""Of plans' files kept in memory."""


class Places:
    """For so many requests at a time. waiting: those that have none yet."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self.waiting = 0

    async def take(self) -> None:
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1

    def leave(self) -> None:
        self._free.release()


class Turn:
    """The place of a request among those that are worked on. It is left while there is nothing to do."""

    def __init__(self, places: Places) -> None:
        self._places, self._held = places, False

    async def take(self) -> None:
        if not self._held:
            await self._places.take()
            self._held = True

    def leave(self) -> None:
        if self._held:
            self._held = False
            self._places.leave()


TURN: ContextVar[Turn | None] = ContextVar("turn", default=None)
"""Of the request under way; None for one that takes none."""


class Turns:
    """Has requests that wait for a change (`?wait=`, streams of events) worked on a few at a time: when they come, and
    whenever they go on. And of what else a client wants to read, a few at a time. Who does not read what is sent keeps
    no place; what has a body takes none, which whoever sends it slowly would keep."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._waiting = app, Places(TOGETHER)
        self._clients: WeakValueDictionary[tuple[str, int], Places] = WeakValueDictionary()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or route_path(scope) in UNLIMITED:
            await self._app(scope, receive, send)
            return
        if _waits(scope):
            places = self._waiting
        else:
            count = OF_CLIENT if route_path(scope).startswith("/v1/") else PAGES_OF_CLIENT
            client = network_of(client_address(scope)), count
            places = self._clients.get(client) or self._clients.setdefault(client, Places(count))
            if places.waiting >= MOST_OF_CLIENT:
                refusal = problem(429, f"{places.waiting} requests wait already", headers={"Retry-After": "2"})
                await refusal(scope, receive, send)
                return
        turn = Turn(places)
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
    path = scope["path"]
    return path.endswith(STREAMS) or (path.endswith("/plan") and b"wait=" in scope["query_string"])


class Line:
    """One at a time of several callers, in turn: who was served longest ago goes first. Belongs to the event loop.

    most: who may wait, of all; most_of_caller: of one.
    """

    def __init__(self, most: int, most_of_caller: int) -> None:
        self._most, self._most_of_caller = most, most_of_caller
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._busy = False

    @property
    def empty(self) -> bool:
        """Whether nobody is served or waits."""
        return not self._busy

    @asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[None]:
        """Raises QuotaError where too many wait of this caller, StoreError where too many do."""
        own = len(self._waiting.get(caller, ()))
        if own >= self._most_of_caller:
            raise QuotaError(f"{own} of what {caller!r} sent wait to be read; send more later")
        if sum(map(len, self._waiting.values())) >= self._most:
            raise StoreError("too much waits to be read already; send it again later")
        if self._busy:
            called: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(caller, deque()).append(called)
            try:
                await called
            except asyncio.CancelledError:
                if called.done() and not called.cancelled():
                    # It was called and does not come: the next one is.
                    self._call()
                raise
        self._busy = True
        try:
            yield
        finally:
            self._call()

    def _call(self) -> None:
        while self._waiting:
            caller, line = self._waiting.popitem(last=False)
            called = line.popleft()
            if line:
                self._waiting[caller] = line
            if not called.done():
                called.set_result(None)
                return
        self._busy = False


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
