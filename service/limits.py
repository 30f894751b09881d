"""How much and how often a caller may send."""

from __future__ import annotations

import math
import time
from collections import OrderedDict

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import problem

REMEMBERED = 10_000
"""Callers whose rate is known; the one heard of longest ago is forgotten first."""

UNLIMITED = ("/health", "/ready", "/metrics")


class BodyLimit:
    """Refuses bodies of more than `most` bytes, announced or not, before they are in memory."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if not announced.isdigit() or int(announced) > self._most:
            refusal = problem(413, f"a body of more than {self._most:,} bytes; send several requests")
            await refusal(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise HTTPException(413, f"a body of more than {self._most:,} bytes; send several requests")
            return message

        await self._app(scope, counted, send)


class RateLimit:
    """A bucket an address, filled with `rate` requests a second up to `burst`. Each server process counts for itself."""

    def __init__(self, app: ASGIApp, rate: float, burst: int) -> None:
        self._app, self._rate, self._burst = app, rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._rate <= 0 or scope["path"] in UNLIMITED:
            await self._app(scope, receive, send)
            return
        wait = self._take(scope["client"][0] if scope.get("client") else "")
        if wait > 0:
            retry = {"Retry-After": str(math.ceil(wait))}
            refusal = problem(429, f"more than {self._rate:g} requests a second", headers=retry)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _take(self, caller: str) -> float:
        """Seconds to wait, 0 when the request may go on."""
        now = time.monotonic()
        left, seen = self._buckets.pop(caller, (float(self._burst), now))
        left = min(float(self._burst), left + (now - seen) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._buckets[caller] = (left - 1.0 if wait == 0 else left, now)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        return wait
