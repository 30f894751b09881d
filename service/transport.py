"""HTTP for the client: one connection kept open a thread, and what failed tried again where that cannot do it twice."""

from __future__ import annotations

import http.client
import json
import random
import selectors
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..placement.errors import ConflictError, InputError, MoeplaceError, NotFoundError, StoreError

ATTEMPTS = 5
MOST_WAIT = 20.0
ERRORS: Mapping[int, type[MoeplaceError]] = {404: NotFoundError, 409: ConflictError, 422: InputError, 503: StoreError}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Transport:
    """Threads: any number; each has its own connection."""

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is not the address of a service; expected http://host:port or https://host")
        if parts.scheme == "http" and token and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            # Said once, here: a token sent in the clear is anybody's.
            import warnings

            warnings.warn(f"the token goes to {parts.hostname} unencrypted; use https", stacklevel=3)
        self._parts, self._token, self._timeout = parts, token, timeout
        self._local = threading.local()

    def call(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        again: bool = False,
        timeout: float | None = None,
    ) -> Answer:
        """One request. again: it may be sent several times, when the service is away or busy.

        Raises:
            NotFoundError, ConflictError, InputError, StoreError: as the service says. MoeplaceError: any other refusal, or
                the service cannot be reached.
        """
        for attempt in range(1, ATTEMPTS + 1):
            last = attempt == ATTEMPTS or not again
            wait = min(MOST_WAIT, 0.2 * 2**attempt) * (0.5 + random.random())
            try:
                answer = self._once(method, path, body, headers or {}, timeout or self._timeout)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                if last:
                    raise MoeplaceError(
                        f"the service at {self._parts.netloc} cannot be reached ({type(error).__name__}: {error})"
                    ) from None
            else:
                if answer.status < 400:
                    return answer
                if last or answer.status not in (429, 503):
                    raise _error(answer)
                retry = answer.headers.get("retry-after", "")
                wait = max(wait, float(retry)) if retry.isdigit() else wait
            time.sleep(min(wait, MOST_WAIT))
        raise AssertionError("unreachable")

    def stream(self, path: str) -> http.client.HTTPResponse:
        """A response to be read line by line, on a connection of its own."""
        connection = self._connect(self._timeout)
        connection.request("GET", self._parts.path.rstrip("/") + path, headers=self._headers({}))
        response = connection.getresponse()
        if response.status >= 400:
            raise _error(Answer(response.status, {}, response.read()))
        return response

    def close(self) -> None:
        """Closes this thread's connection."""
        self._drop()

    def _once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout: float) -> Answer:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is not None and _closed_meanwhile(connection):
            self._drop()
            connection = None
        if connection is None:
            connection = self._local.connection = self._connect(timeout)
        connection.timeout = timeout
        if connection.sock is not None:
            connection.sock.settimeout(timeout)
        connection.request(method, self._parts.path.rstrip("/") + path, body, self._headers(headers))
        response = connection.getresponse()
        content = response.read()
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, content)

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=timeout, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=timeout)

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        own = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return {"Accept": "application/json", **own, **headers}

    def _drop(self) -> None:
        connection = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None


def _closed_meanwhile(connection: http.client.HTTPConnection) -> bool:
    """Whether the service ended a connection that was idle: then, and only then, there is something to read."""
    if connection.sock is None:
        return False
    with selectors.DefaultSelector() as ready:
        ready.register(connection.sock, selectors.EVENT_READ)
        return bool(ready.select(0))


def _error(answer: Answer) -> MoeplaceError:
    try:
        detail = str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = f"the service answered {answer.status}"
    kind = ERRORS.get(answer.status, MoeplaceError)
    return kind(detail)
