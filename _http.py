"""HTTP to servers that others run: engines, webhooks' receivers, the service. Below every package, as `_types`.

No redirect is followed, no proxy asked, and no more of a body read than a caller takes. A time-out is of the whole
call, from connecting to the answer's last byte: with a socket's own, a server that sends a byte now and then would keep
its caller for ever.
"""

from __future__ import annotations

import http.client
import io
import json
import socket
import time
from collections.abc import Iterator, Mapping
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

    retries: when a call that may be repeated is made again; None for never.
    """

    def __init__(self, retries: urllib3.Retry | None = None) -> None:
        self._retries = retries
        self._timed = urllib3.PoolManager(maxsize=256)
        self._timed.pool_classes_by_scheme = {"http": _TimedPool, "https": _TimedTlsPool}
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
                told = {name.lower(): value for name, value in response.headers.items()}
                answer = Answer(response.status, response.reason or "", told, bytes(content))
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


class _TimedTlsConnection(HTTPSConnection):
    response_class = _TimedResponse


class _TimedPool(HTTPConnectionPool):
    ConnectionCls = _TimedConnection


class _TimedTlsPool(HTTPSConnectionPool):
    ConnectionCls = _TimedTlsConnection


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
