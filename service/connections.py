"""Connections of clients: requests that do not come, answers that are not read, and how many there may be, so that no
client takes those of others."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

log = logging.getLogger("moeplace.service.connections")

LOOK_SECONDS = 1.0
LOOK_TOGETHER = 256
ROUNDS = 2
"""Of looks at all connections, before one counts as silent: between two of them all that came was read, however far
behind this server is."""
HEADER_SECONDS = 10.0
"""From connecting, or a request's first byte, to the end of its headers."""
HEADER_BYTES = 1 << 17
"""Of a request's line and headers, or of what follows a body in chunks."""
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/problem+json\r\nContent-Length: 79\r\n"
    b"Connection: close\r\n\r\n"
    b'{"type":"about:blank","title":"headers are too large","status":431,"detail":""}'
)
BODIES = {b"content-length", b"transfer-encoding"}
"""Headers of requests that have one."""
PROGRESS_SECONDS, PROGRESS_BYTES = 15.0, 1 << 14
"""A body that is sent, and an answer that is read, go on by so many bytes in so long, or to their end."""
IDLE_SECONDS = 75
"""A connection may be asked again for so long. Proxies and pools of clients keep theirs for 60 seconds: they end first,
and no request is on its way to a connection that ends here."""
HALF_OPEN = 128
"""Connections of one client whose request has not come in full."""
RESERVED_FILES = 256
"""Open files for all but connections: the database, workers, files that are sent."""
MOST_CONNECTIONS = 16_384


@lru_cache(10_000)
def network_of(address: str) -> str:
    """What counts as one client: an address, or of IPv6 the 64 bits of a network; who has one has all of it."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def most_connections() -> int:
    """What the limit of open files leaves, after raising it as far as this process may."""
    try:
        import resource
    except ImportError:
        return MOST_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MOST_CONNECTIONS + RESERVED_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(64, min(MOST_CONNECTIONS, soft - RESERVED_FILES))


class Limits:
    """Of one server. One client may have half of all connections; proxies that pass on the requests of many, all."""

    def __init__(self, most: int, proxies: Sequence[str] = ()) -> None:
        self._most, self._proxies = most, tuple(map(ipaddress.ip_network, proxies))
        self.open: Counter[str] = Counter()
        self._waiting: dict[str, dict[TimedProtocol, int]] = {}
        self._idle: dict[str, dict[TimedProtocol, int]] = {}
        self.rounds = 0
        self._told: dict[str, float] = {}
        self._watched: dict[TimedProtocol, None] = {}
        self._looking = False

    def refusal(self, client: str) -> str | None:
        """Why one more connection of this client is not taken. Where there are as many as can be, or too many of the
        client itself, the one that has been idle longest, or else has waited longest for its request, makes place."""
        own = self._waiting.get(client, {})
        trusted = self._is_proxy(client)
        if (
            not trusted
            and self.open[client] >= max(1, self._most // 2)
            and not self._make_place(self._idle.get(client))
        ):
            return "too many connections of one client"
        if not trusted and len(own) >= HALF_OPEN:
            oldest, round_ = next(iter(own.items()))
            # Many that come together are given the time to send, and this server the time to read what they sent.
            if self.rounds - round_ >= ROUNDS:
                oldest.end("too many requests of one client that do not come")
        if self.open.total() >= self._most and not self._make_place(max(self._idle.values(), key=len, default=None)):
            crowd = max(self._waiting.values(), key=len, default=None)
            if crowd is None:
                return "too many connections"
            next(iter(crowd)).end("made place for another client")
        return None

    def _make_place(self, idle: dict[TimedProtocol, int] | None) -> bool:
        """Ends the first of them, if there is one."""
        if not idle:
            return False
        next(iter(idle)).end("made place while it was idle")
        return True

    def _is_proxy(self, client: str) -> bool:
        if not self._proxies:
            return False
        try:
            own = ipaddress.ip_network(client)
        except ValueError:
            return False
        return any(own.version == proxy.version and proxy.overlaps(own) for proxy in self._proxies)

    def watch(self, connection: TimedProtocol) -> None:
        """Looks every second whether it goes on, until it is over."""
        self._watched[connection] = None
        if not self._looking:
            self._looking = True
            connection.loop.call_later(LOOK_SECONDS, self._look, connection.loop, ())

    def unwatch(self, connection: TimedProtocol) -> None:
        """It is over."""
        self._watched.pop(connection, None)

    def _look(self, loop: asyncio.AbstractEventLoop, left: Sequence[TimedProtocol]) -> None:
        """At all connections with one timer: with one each they would be most of what a server does that many wait for.
        left: of a round that has begun; others are served between its parts."""
        if not left:
            self.rounds += 1
            left = tuple(self._watched)
        try:
            for connection in left[:LOOK_TOGETHER]:
                if connection in self._watched:
                    connection.look()
        finally:
            if len(left) > LOOK_TOGETHER:
                loop.call_soon(self._look, loop, left[LOOK_TOGETHER:])
            elif self._watched:
                loop.call_later(LOOK_SECONDS, self._look, loop, ())
            else:
                self._looking = False

    def wait_for(self, connection: TimedProtocol, client: str) -> None:
        """Notes that a request is to come."""
        self._waiting.setdefault(client, {})[connection] = self.rounds

    def waits(self, connection: TimedProtocol, client: str) -> bool:
        """Whether one is to come."""
        return connection in self._waiting.get(client, {})

    def came(self, connection: TimedProtocol, client: str) -> None:
        """Notes that it came, or will not."""
        _remove(self._waiting, connection, client)

    def rests(self, connection: TimedProtocol, client: str) -> None:
        """Notes that all that was asked is answered."""
        self._idle.setdefault(client, {})[connection] = self.rounds

    def goes_on(self, connection: TimedProtocol, client: str) -> None:
        """Notes that it is idle no more, or over."""
        _remove(self._idle, connection, client)

    def tell(self, why: str, client: str) -> None:
        """A line in the log, at most one a second of each kind."""
        now = time.monotonic()
        if now - self._told.get(why, -1.0) >= 1.0:
            self._told[why] = now
            log.warning("connection ended", extra={"why": why, "client": client, "connections": self.open.total()})


def _remove(of_clients: dict[str, dict[TimedProtocol, int]], connection: TimedProtocol, client: str) -> None:
    of_client = of_clients.get(client, {})
    of_client.pop(connection, None)
    if not of_client:
        of_clients.pop(client, None)


class TimedProtocol(HttpToolsProtocol):
    """uvicorn's, within limits."""

    limits: Limits

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._host = ""
        self._counted = False
        self._since, self._round = 0.0, 0
        self._head_bytes = 0
        self._raw_bytes = self._body_bytes = 0
        self._mark: tuple[float, int] | None = None
        self._unread: tuple[float, int] | None = None
        self._last: Any = None
        self._idle_round: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._host = network_of(self.client[0]) if self.client else ""
        why = self.limits.refusal(self._host)
        self.limits.open[self._host] += 1
        self._counted = True
        if why is not None:
            self.end(why)
            return
        self._await_request()
        self.limits.watch(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.limits.unwatch(self)
        self.limits.came(self, self._host)
        self.limits.goes_on(self, self._host)
        if self._counted:
            self._counted = False
            self.limits.open[self._host] -= 1
            if not self.limits.open[self._host]:
                del self.limits.open[self._host]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._idle_round = None
        self.limits.goes_on(self, self._host)
        if self.cycle is not None and self.cycle.response_complete and not self.limits.waits(self, self._host):
            self._await_request()
        self._raw_bytes += len(data)
        super().data_received(data)
        # A body in chunks of a byte each is a sixth of what is sent. The parser keeps all that is no body.
        if self._raw_bytes > 6 * self._body_bytes + HEADER_BYTES and not self.transport.is_closing():
            self._refuse_headers()

    def on_headers_complete(self) -> None:
        self._since = 0.0
        self._body_bytes, self._mark = 0, (time.monotonic(), 0)
        super().on_headers_complete()
        if not self.cycle.keep_alive and BODIES & {name for name, _ in self.headers}:
            # Closed while a body still comes, a connection is reset, and what was answered is lost on its way.
            self.cycle.keep_alive, self._last = True, self.cycle

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.limits.came(self, self._host)
        self._raw_bytes = self._body_bytes = 0
        self._mark = None
        super().on_message_complete()
        if self._last is not None and self._last.response_complete:
            self.transport.close()

    def on_response_complete(self) -> None:
        # Also where an answer came before all of the body did.
        self.limits.came(self, self._host)
        self._mark = None
        last = self._last
        if last is not None and last.response_complete:
            if last.more_body:
                # The rest is read to nowhere, within the time for headers.
                self._await_request()
            else:
                self.transport.close()
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self.limits.rests(self, self._host)

    def timeout_keep_alive_handler(self) -> None:
        # Timers come before what was sent meanwhile: a server that is behind would end connections in use.
        self._idle_round = self.limits.rounds

    def end(self, why: str) -> None:
        """Ends the connection, whatever it is waiting for."""
        self.limits.tell(why, self._host)
        self.limits.came(self, self._host)
        self.limits.goes_on(self, self._host)
        self.transport.abort()

    def _refuse_headers(self) -> None:
        self.limits.tell("headers are too large", self._host)
        self.limits.came(self, self._host)
        self.transport.write(TOO_LARGE)
        self.transport.close()

    def _await_request(self) -> None:
        self._since, self._round = time.monotonic(), self.limits.rounds
        self.limits.wait_for(self, self._host)

    def look(self) -> None:
        """Ends it where it does not go on. Also one that is closing: what it still has to send waits for its reader."""
        if self._idle_round is not None and self.limits.rounds - self._idle_round >= ROUNDS:
            self._idle_round = None
            self.transport.close()
        why = self._overdue(time.monotonic())
        if why is not None:
            self.end(why)

    def _overdue(self, now: float) -> str | None:
        read = self.limits.rounds - self._round >= ROUNDS
        if self._since and read and now - self._since > HEADER_SECONDS:
            return "headers did not come in time"
        if self._mark is not None:
            since, size = self._mark
            if self._body_bytes - size >= PROGRESS_BYTES or self.flow.read_paused:
                self._mark = (now, self._body_bytes)
            elif now - since > PROGRESS_SECONDS:
                return "a body did not come in time"
        unsent = self.transport.get_write_buffer_size()
        if not unsent:
            self._unread = None
        elif self._unread is None or self._unread[1] - unsent >= PROGRESS_BYTES:
            self._unread = (now, unsent)
        elif now - self._unread[0] > PROGRESS_SECONDS:
            return "an answer was not read in time"
        return None


def protocol_within(limits: Limits) -> type[TimedProtocol]:
    """The protocol of one server."""
    return type("LimitedProtocol", (TimedProtocol,), {"limits": limits})
