"""What is noted of every request: a line in the log, a count and a time for Prometheus; headers every answer
carries."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections import Counter as Counts
from collections import OrderedDict
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..db.records import DeploymentOverview
from ..db.store import Store
from .connections import network_of
from .problems import SAFE_HEADERS, problem

# Figures for Prometheus: of this server's requests, and of what is stored.

AT_ONCE = 500
"""Deployments looked up together."""


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
        self._workers = Gauge("moeplace_workers", "Workers of this server.", registry=self._registry)
        self._registry.register(_Stored(store))

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def windows(self, count: int) -> None:
        """Counts stored windows."""
        self._windows.inc(count)

    def workers(self, count: Callable[[], float]) -> None:
        """Tells how many workers live, when asked."""
        self._workers.set_function(count)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Stored(Collector):
    """Looked up when asked for, so that every server tells the same."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        jobs = GaugeMetricFamily("moeplace_jobs", "Jobs that have not ended.", labels=["state"])
        for state, count in self._store.jobs.waiting().items():
            jobs.add_metric([state], count)
        yield jobs
        gauges = {
            key: GaugeMetricFamily(f"moeplace_{key}", text, labels=["deployment"])
            for key, text in (
                ("plan_version", "Publications so far."),
                ("plan_gap", "Load gap of the plan in force at the last check."),
                ("plan_regret", "Predicted loss of the plan in force against a fresh one, when last known."),
                ("drift_p", "P-value of the last drift check."),
                ("drift_alarm", "1 from an alarm until somebody acts on it."),
                ("publication_held", "1 while a roll-back holds automatic publication."),
                ("deployment_decisions_waiting", "Decisions that wait for approval."),
            )
        }
        alarms = CounterMetricFamily("moeplace_drift_alarms", "Alarms so far.", labels=["deployment"])
        work = GaugeMetricFamily(
            "moeplace_deployment_jobs", "Jobs that have not ended.", labels=["deployment", "state"]
        )
        total = 0
        for entry in self._deployments():
            name, figures = [entry.deployment.name], {} if entry.check is None else entry.check.figures
            known = {
                "plan_version": entry.deployment.version,
                "plan_gap": figures.get("gap"),
                "plan_regret": entry.regret,
                "drift_p": figures.get("p"),
                "drift_alarm": float(entry.deployment.alarm is not None),
                "publication_held": float(entry.deployment.hold is not None),
                "deployment_decisions_waiting": entry.waiting,
            }
            for key, value in known.items():
                if value is not None:
                    gauges[key].add_metric(name, value)
            alarms.add_metric(name, entry.alarms)
            for state in ("queued", "running"):
                work.add_metric([*name, state], entry.jobs.get(state, 0))
            total += entry.waiting
        yield from gauges.values()
        yield alarms
        yield work
        yield GaugeMetricFamily("moeplace_decisions_waiting", "Decisions that wait for approval.", value=total)

    def _deployments(self) -> Iterator[DeploymentOverview]:
        after = ""
        while entries := self._store.deployments.overview(limit=AT_ONCE, after=after):
            yield from entries
            after = entries[-1].deployment.name


# How much and how often a caller may send.


REMEMBERED = 10_000
"""Callers whose rate is known; the one heard of longest ago is forgotten first."""

STREAMS = ("/events", "/live")
"""How the addresses of streams end."""

UNLIMITED = ("/health", "/ready")
QUIET = (*UNLIMITED, "/metrics")
"""Asked again and again: not in the log."""


SMALL_BODY = 1 << 18
"""Bytes of a body that is read in this process: what any content of so many becomes in memory, and the time it takes
while nobody else is answered, are small."""

BODIES_TOGETHER = 1 << 28
"""Bytes of all bodies under way in one server."""

BODIES_OF_CLIENT = BODIES_TOGETHER // 4
"""Of one client's: who sends slowly would keep everybody else's out."""

LARGE = re.compile(r"/v1/(plans|plans/file|topologies|deployments/[^/]+/windows|uploads/[^/]+)")
"""Whose bodies may be large: they are read by a process of bounded memory, or kept as they are."""


def route_path(scope: Scope) -> str:
    """The path of a request, without what a proxy has before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def client_address(scope: Scope) -> str:
    """The address that a request came from."""
    return str(scope["client"][0]) if scope.get("client") else ""


class BodyLimit:
    """Refuses bodies that are too large, announced or not, before they are in memory; `most` bytes where large ones
    are taken. And bodies that are too large all together, or compressed."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._under_way: Counts[str] = Counts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = _coded(headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        most = self._most if LARGE.fullmatch(route_path(scope)) else min(SMALL_BODY, self._most)
        announced = headers.get("content-length", "0")
        # More digits than any length has would be a number that no one can read.
        if not announced.isascii() or not announced.isdigit() or len(announced) > 18 or int(announced) > most:
            await _too_large(most)(scope, receive, send)
            return
        received, client = 0, network_of(client_address(scope))

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._under_way[client] += size
            if received > most:
                raise HTTPException(413, TOO_LARGE.format(most))
            if self._under_way[client] > BODIES_OF_CLIENT or self._under_way.total() > BODIES_TOGETHER:
                whose = " of one client" if self._under_way[client] > BODIES_OF_CLIENT else ""
                raise HTTPException(
                    503,
                    f"too many large bodies{whose} are under way; send it again later",
                    headers={"Retry-After": "2"},
                )
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._under_way[client] -= received
            if not self._under_way[client]:
                del self._under_way[client]


def _coded(headers: Headers) -> ASGIApp | None:
    """Refuses a body that would have to be decoded before it is what its type says: little of it may become much."""
    codings = [name.strip() for line in headers.getlist("content-encoding") for name in line.lower().split(",")]
    unknown = [name for name in codings if name not in ("", "identity")]
    if unknown:
        detail = f"Content-Encoding {', '.join(unknown)[:100]!r}; bodies are taken as they are: send it without"
        return problem(415, detail, headers={"Accept-Encoding": "identity"})
    transfer = ",".join(headers.getlist("transfer-encoding")).lower().strip()
    if transfer not in ("", "chunked"):
        return problem(501, f"Transfer-Encoding {transfer[:100]!r}; chunked alone is taken")
    return None


TOO_LARGE = "a body of more than {:,} bytes; send several requests"


def _too_large(most: int) -> ASGIApp:
    return problem(413, TOO_LARGE.format(most))


class RateLimit:
    """A bucket an address, filled with `rate` requests a second up to `burst`. Each server process counts for
    itself."""

    def __init__(self, app: ASGIApp, rate: float, burst: int) -> None:
        self._app, self._rate, self._burst = app, rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._rate <= 0 or route_path(scope) in UNLIMITED:
            await self._app(scope, receive, send)
            return
        wait = self._take(network_of(client_address(scope)))
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


class PagesCompressed(GZipMiddleware):
    """Pages and figures; what the API answers may be large, and nobody else is answered while it is compressed."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner = self.app if scope["type"] != "http" or route_path(scope).startswith("/v1/") else super().__call__
        await inner(scope, receive, send)


class Unchanged:
    """Pages that a browser has already are answered 304: their tag is of their content."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or route_path(scope).startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        known = Headers(scope=scope).get("if-none-match", "")
        start: Message | None = None

        async def tagged(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                if message["status"] == 200 and kind.startswith("text/html"):
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                # Pages come in one piece.
                begin, start = start, None
                tag = '"' + hashlib.sha256(message["body"]).hexdigest()[:24] + '"'
                headers = MutableHeaders(scope=begin)
                headers["etag"], headers["cache-control"] = tag, "private, no-cache"
                if tag in known:
                    del headers["content-length"]
                    begin["status"], message["body"] = 304, b""
                await send(begin)
            await send(message)

        await self._app(scope, receive, tagged)


log = logging.getLogger("moeplace.service")


class Observe:
    """Streams are timed until their end. HEAD is answered as GET would be, without the body (which the server leaves
    out); streams have nothing to tell of themselves."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500
        method = scope["method"]
        if method == "HEAD" and not scope["path"].endswith(STREAMS):
            # The server itself goes by the scope that it made.
            scope = {**scope, "method": "GET"}

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
            self._metrics.request(method, route, status, taken)
            if route_path(scope) not in QUIET:
                about = {"method": method, "path": scope["path"], "status": status, "client": client_address(scope)}
                about["actor"] = scope.get("state", {}).get("actor")
                log.info("request", extra={**about, "ms": round(1000 * taken, 2)})
