"""What is noted of every request: a line in the log, a count and a time for Prometheus; headers every answer
carries."""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..db.store import Store
from .problems import problem

# Figures for Prometheus: of this server's requests, and of what is stored.


class Metrics:
    """A registry of its own: several applications may run in one process."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("moeplace_requests", "Requests answered.", labels, registry=self._registry)
        self._seconds = Histogram(
            "moeplace_request_seconds", "Time to answer.", ("method", "route"), registry=self._registry
        )
        self._windows = Counter("moeplace_windows", "Count windows stored by this server.", registry=self._registry)
        self._registry.register(_Stored(store))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def windows(self, count: int) -> None:
        """Counts stored windows."""
        self._windows.inc(count)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Stored(Collector):
    """Looked up when asked for, so that every server tells the same."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("moeplace_jobs", "Jobs that have not ended.", labels=["state"])
        for state, count in self._store.jobs.waiting().items():
            jobs.add_metric([state], count)
        yield jobs
        names = ("deployment",)
        version = GaugeMetricFamily("moeplace_plan_version", "Publications so far.", labels=names)
        gap = GaugeMetricFamily("moeplace_plan_gap", "Load gap of the plan in force at the last check.", labels=names)
        p = GaugeMetricFamily("moeplace_drift_p", "P-value of the last drift check.", labels=names)
        alarms = GaugeMetricFamily("moeplace_drift_alarm", "1 when the last check was an alarm.", labels=names)
        for deployment in self._store.deployments.page(limit=1000):
            version.add_metric([deployment.name], deployment.version)
            for check in self._store.deployments.checks(deployment.name, limit=1):
                alarms.add_metric([deployment.name], float(check.alarm))
                for family, key in ((gap, "gap"), (p, "p")):
                    if key in check.figures:
                        family.add_metric([deployment.name], check.figures[key])
        yield from (version, gap, p, alarms)
        waiting = len(self._store.decisions.page(limit=1000, state="waiting"))
        yield GaugeMetricFamily("moeplace_decisions_waiting", "Decisions that wait for approval.", value=waiting)


# How much and how often a caller may send.


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
    """A bucket an address, filled with `rate` requests a second up to `burst`. Each server process counts for
    itself."""

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


log = logging.getLogger("moeplace.service")

SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}


class Observe:
    """Streams are timed until their end."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            taken = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.request(scope["method"], route, status, taken)
            if scope["path"] not in UNLIMITED:
                told = {"method": scope["method"], "path": scope["path"], "status": status}
                log.info("request", extra={**told, "ms": round(1000 * taken, 2)})
