"""HTTP to servers that others run: engines, webhooks' receivers, the service. Below every package, as `_types`.

No redirect is followed, no proxy asked, and no more of a body read than a caller takes. A time-out is of the whole
call, from connecting to the answer's last byte: with a socket's own, a server that sends a byte now and then would keep
its caller for ever.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from .placement.errors import InputError

PIECE = 1 << 20
"""Bytes of a body read at once."""


def check_address(url: str) -> SplitResult:
    """The parts of an http or https address of which a connection can be tried.

    Raises:
        InputError: another scheme, no host, or a port that cannot be.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"{url!r} is not the address of a server; expected http://host:port or https://host:port")
    return parts


METADATA = tuple(
    map(
        ipaddress.ip_network,
        (
            "169.254.0.0/16",
            "fe80::/10",
            "fd00:ec2::/32",
            "fd20:ce::254/128",
            "100.100.100.200/32",
            "168.63.129.16/32",
            "192.0.0.192/32",
        ),
    )
)
"""Link-local addresses, and others at which clouds tell a machine its credentials."""
EMBEDDED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96")))
"""IPv6 addresses that carry an IPv4 one in their last 32 bits (RFC 6052, 8215, 4291, 7915)."""
NOWHERE = tuple(map(ipaddress.ip_network, ("0.0.0.0/8", "255.255.255.255/32")))
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Peers:
    """Which servers may be called. allowed: networks and names; None for all but those that no peer has: link-local and
    metadata addresses, multicast, and none at all. A name is resolved once, and what was checked is what is called."""

    allowed: tuple[Network | str, ...] | None = None

    @classmethod
    def of(cls, entries: Sequence[str]) -> Peers:
        """From texts such as 10.0.0.0/8, 10.1.2.3 and engine.internal; none of them is the default.

        Raises:
            InputError: one is neither an address nor a name.
        """
        allowed: list[Network | str] = []
        for entry in entries:
            try:
                allowed.append(ipaddress.ip_network(entry))
            except ValueError:
                if not re.fullmatch(r"[A-Za-z0-9_.-]+", entry) or entry.replace(".", "").isdigit():
                    raise InputError(
                        f"peer {entry!r} is neither a network (10.0.0.0/8), an address nor a name"
                    ) from None
                allowed.append(entry.lower())
        return cls(tuple(allowed) or None)

    def check(self, url: str) -> None:
        """Raises InputError where a peer of this address is refused, as far as that is told without resolving it."""
        parts = check_address(url)
        if parts.username is not None or parts.password is not None:
            raise InputError("the address holds a user's name or password; whoever may read it would read them, too")
        host = parts.hostname or ""
        address = _literal(host)
        if address is None:
            if not self._is_named(host) and self.allowed is not None and all(isinstance(a, str) for a in self.allowed):
                raise InputError(f"{host!r} is none of the servers that may be called here") from None
            return
        if not self._may(host, address):
            raise InputError(f"{address} is no address that may be called from here")

    def resolve(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """Where a host is, as `socket.getaddrinfo` has it: those that may be called.

        Raises:
            OSError: it has no address, or only such that may not be called.
        """
        known = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        allowed = [
            entry for entry in known if self._may(host, ipaddress.ip_address(str(entry[4][0]).partition("%")[0]))
        ]
        if not allowed:
            raise PermissionError(f"{host} is at no address that may be called from here")
        return allowed

    def _is_named(self, host: str) -> bool:
        return self.allowed is not None and host.lower().rstrip(".") in self.allowed

    def _may(self, host: str, address: Address) -> bool:
        inner = _carried(address)
        if inner is not None and not self._may("", inner):
            return False
        if self._is_named(host):
            return True
        if self.allowed is not None:
            networks = [entry for entry in self.allowed if not isinstance(entry, str)]
            return any(address in network or (inner is not None and inner in network) for network in networks)
        if address.is_multicast or address.is_unspecified:
            return False
        return not any(address in network for network in (*METADATA, *NOWHERE))


def _literal(host: str) -> Address | None:
    """The address that a host is written as, also in the forms that resolvers take beside the usual one: 2852039166,
    0xa9fea9fe, 0251.0376.43518. None for a name."""
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except (OSError, ValueError):
        return None


def _carried(address: Address) -> Address | None:
    """The IPv4 address that an IPv6 one stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if any(address in network for network in EMBEDDED) and not (address.is_loopback or address.is_unspecified):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (None if teredo is None else teredo[1])


@dataclass(frozen=True)
class Answer:
    """headers: names in lower case. body: at most as many bytes as were asked for."""

    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class UnansweredError(OSError):
    """No answer, or not all of it. timed_out: in time."""

    def __init__(self, message: str, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class Connections:
    """Connections kept open between calls. Threads: any number.

    retries: when a call that may be repeated is made again; None for never. peers: which servers may be called; None
    for any, where whoever names them is this machine's own user.
    """

    def __init__(self, retries: urllib3.Retry | None = None, peers: Peers | None = None) -> None:
        self._retries = retries
        self._timed = urllib3.PoolManager(maxsize=256)
        self._timed.pool_classes_by_scheme = _pools(peers)
        self._streams = urllib3.PoolManager()

    def request(
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout: float,
        most: int = 1 << 30,
        again: bool = False,
    ) -> Answer:
        """One call, whatever is answered.

        Args:
            timeout: seconds it may take; of each attempt, where there are several.
            most: bytes of the answer's body to read.
            again: it may be made several times.

        Raises:
            UnansweredError: no server there, no answer in time, or none that is HTTP.
        """
        # A header that cannot be sent is a ValueError.
        with _as_unanswered(ValueError):
            response = self._timed.request(
                method,
                url,
                body=body,
                headers=dict(headers or {}),
                timeout=urllib3.Timeout(total=timeout),
                retries=self._retries if again and self._retries is not None else False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                content = bytearray()
                # Only a read that finds the end tells whether the whole body came.
                while len(content) < most and (piece := response.read(min(PIECE, most - len(content)))):
                    content += piece
                answer_headers = {name.lower(): value for name, value in response.headers.items()}
                answer = Answer(response.status, response.reason or "", answer_headers, bytes(content))
                if len(content) < most:
                    response.release_conn()
            finally:
                # Nothing where the connection was given back.
                response.close()
            return answer

    @contextmanager
    def stream(self, url: str, headers: Mapping[str, str], *, idle: float) -> Iterator[urllib3.BaseHTTPResponse]:
        """A GET whose answer is read line by line while it comes. idle: seconds without a byte after which it has
        failed.

        Raises:
            UnansweredError: as `request`, also from reading.
        """
        with _as_unanswered():
            response = self._streams.request(
                "GET", url, headers=dict(headers), timeout=idle, retries=False, redirect=False, preload_content=False
            )
            try:
                yield response
            finally:
                response.close()

    def close(self) -> None:
        """Closes connections that no call is using."""
        self._timed.clear()
        self._streams.clear()


class _UntilDeadline(io.RawIOBase):
    """A socket, read until a moment of the monotonic clock."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connection, deadline
        self._raw = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """Ends, headers and body, as long after it began as its socket would wait for one byte."""

    def __init__(self, sock: socket.socket, *arguments: Any, **named: Any) -> None:
        super().__init__(sock, *arguments, **named)
        seconds = sock.gettimeout()
        if seconds is not None:
            self.fp.close()
            self.fp = io.BufferedReader(_UntilDeadline(sock, time.monotonic() + seconds))


class _TimedConnection(HTTPConnection):
    response_class = _TimedResponse
    peers: Peers | None = None

    def _new_conn(self) -> socket.socket:
        return super()._new_conn() if self.peers is None else _connected(self, self.peers)


class _TimedTlsConnection(_TimedConnection, HTTPSConnection):
    pass


def _connected(connection: HTTPConnection, peers: Peers) -> socket.socket:
    """A socket to the first address of its host that may be called and answers."""
    failure: OSError | None = None
    seconds = connection.timeout if isinstance(connection.timeout, int | float) else None
    try:
        for family, kind, protocol, _, address in peers.resolve(connection._dns_host, connection.port):
            opened = socket.socket(family, kind, protocol)
            try:
                opened.settimeout(seconds)
                opened.connect(address)
            except OSError as error:
                opened.close()
                failure = error
            else:
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return opened
    except OSError as error:
        failure = error
    raise urllib3.exceptions.NewConnectionError(connection, str(failure)) from failure


def _pools(peers: Peers | None) -> dict[str, type[HTTPConnectionPool]]:
    plain = type("Connection", (_TimedConnection,), {"peers": peers})
    secure = type("TlsConnection", (_TimedTlsConnection,), {"peers": peers})
    return {
        "http": type("Pool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("TlsPool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }


@contextmanager
def _as_unanswered(*more: type[Exception]) -> Iterator[None]:
    """Every way in which a call fails, as one error that says what the system said."""
    expected: tuple[type[Exception], ...] = (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, *more)
    try:
        yield
    except expected as error:
        cause: BaseException = error
        timed_out = False
        while True:
            timed_out |= isinstance(cause, TimeoutError | urllib3.exceptions.ReadTimeoutError)
            inner = getattr(cause, "reason", None) or cause.__cause__ or _context(cause)
            if not isinstance(inner, BaseException):
                break
            cause = inner
        raise UnansweredError(f"{type(cause).__name__}: {cause}", timed_out) from None


def _context(error: BaseException) -> BaseException | None:
    return None if error.__suppress_context__ else error.__context__
