"""Calls to the HTTP server of a running engine."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

from ..placement.errors import EngineError, InputError

ANSWER_LIMIT = 1 << 28
"""Bytes an answer may have."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def check_address(url: str) -> urllib.parse.SplitResult:
    """The parts of an http or https address of which a connection can be tried.

    Raises:
        InputError: another scheme, no host, or a port that cannot be.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")
    except ValueError:
        valid = False
    if not valid:
        raise InputError(f"{url!r} is not the address of a server; expected http://host:port or https://host:port")
    return parts


@dataclass(frozen=True)
class EngineServer:
    """Where an engine answers. key: sent as a bearer token. timeout: seconds to wait for an answer. quote: whether errors
    quote what was answered; not where others than those who named the address read them.

    Redirects are not followed: they would lead the key elsewhere.
    """

    url: str
    key: str | None = None
    timeout: float = 300.0
    quote: bool = True

    def __post_init__(self) -> None:
        parts = check_address(self.url)
        if parts.query or parts.fragment:
            raise InputError(f"{self.url!r} is not the address of a server; expected http://host:port")

    def call(self, method: str, path: str, body: Any = None) -> bytes:
        """The answer to one request.

        Raises:
            EngineError: unreachable, no answer in time, or an answer other than 200; `status` tells which, 0 for none.
        """
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        # The scheme was checked: no file is opened by an address.
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)
        where = f"{method} {self.url.rstrip('/')}{path}"
        try:
            with _OPENER.open(request, timeout=self.timeout) as answer:
                content: bytes = answer.read(ANSWER_LIMIT + 1)
        except urllib.error.HTTPError as error:
            told = f"{where}: answered {error.code}"
            if self.quote:
                body = error.read(300).decode("utf-8", "replace").strip()
                told += f" {error.reason}: {body or 'nothing more'}"
            if error.code in (401, 403):
                told += "; pass the server's key"
            elif 300 <= error.code < 400:
                told += "; redirects are not followed: give the address it leads to"
            raise AnswerError(told, error.code) from None
        except TimeoutError:
            raise AnswerError(
                f"{where}: no answer in {self.timeout:g} s; the server is stuck or busy, or needs a longer timeout"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise AnswerError(f"{where}: no answer in {self.timeout:g} s") from None
            raise AnswerError(f"{where}: {reason}; is the engine running there, and reachable from here?") from None
        if len(content) > ANSWER_LIMIT:
            raise AnswerError(f"{where}: an answer of more than {ANSWER_LIMIT:,} bytes")
        return content

    def json(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The answer, which must be a JSON object.

        Raises:
            EngineError: as `call`, or another answer.
        """
        content = self.call(method, path, body)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise AnswerError(
                f"{method} {self.url.rstrip('/')}{path}: answered no JSON object, so it is no engine's server"
            )
        return answer


class AnswerError(EngineError):
    """A call that failed. status: of the answer, 0 where none came."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status
