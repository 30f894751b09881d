"""Calls of the client: objects out and in, lists page by page, files piece by piece, jobs asked for once."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any, Self, TypeVar
from urllib.parse import urlencode

from pydantic import BaseModel, TypeAdapter

from ..db.service_records import JobRecord, UploadRecord
from ..db.uploads import PIECE_LIMIT
from ..placement.errors import InputError, MoeplaceError
from .transport import Transport

T = TypeVar("T")
ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


class Calls:
    """What every method of the client is made of."""

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 60.0) -> None:
        self._transport = Transport(url, token, timeout)
        self._timeout = timeout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection of this thread."""
        self._transport.close()

    def _submit(self, path: str, body: Mapping[str, Any]) -> JobRecord:
        # A key of its own makes sending it again safe.
        headers = {"Idempotency-Key": secrets.token_hex(16), "Content-Type": "application/json"}
        given = {key: value for key, value in body.items() if value is not None}
        content = json.dumps(given, default=_plain).encode()
        answer = self._transport.call("POST", path, content, headers, again=True)
        record: JobRecord = adapter(JobRecord).validate_json(answer.body)
        return record

    def _upload(self, announced: Mapping[str, Any], content: bytes) -> UploadRecord:
        body = {**announced, "sha256": hashlib.sha256(content).hexdigest(), "total_bytes": len(content)}
        record = self._ask(UploadRecord, "POST", "/v1/uploads", body, again=True)
        while record.state == "open" and record.received_bytes < len(content):
            start = record.received_bytes
            headers = {"Content-Type": "application/octet-stream", "Upload-Offset": str(start)}
            piece = content[start : start + PIECE_LIMIT]
            try:
                self._transport.call("PATCH", f"/v1/uploads/{record.key}", piece, headers)
            except InputError:
                raise
            except MoeplaceError:
                # Perhaps it arrived, perhaps the service is away: ask how far it is.
                time.sleep(0.5)
            record = self._ask(UploadRecord, "GET", f"/v1/uploads/{record.key}")
        return self._ask(UploadRecord, "POST", f"/v1/uploads/{record.key}/finish", again=True)

    def _pages(
        self,
        kind: type[T],
        path: str,
        filters: Mapping[str, Any] | None = None,
        cursor: str = "before",
        limit: int = 200,
    ) -> Iterator[T]:
        query = {key: value for key, value in (filters or {}).items() if value is not None}
        while True:
            page = self._json("GET", f"{path}?{urlencode({**query, 'limit': limit})}")
            for item in page["items"]:
                yield adapter(kind).validate_python(item)
            if page["next"] is None:
                return
            query[cursor] = page["next"]

    def _ask(self, kind: type[T], method: str, path: str, body: Any = None, *, again: bool = False) -> T:
        found: T = adapter(kind).validate_python(self._json(method, path, body, again=again))
        return found

    def _json(self, method: str, path: str, body: Any = None, *, again: bool = False) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        return self._transport.call(method, path, content, headers, again=again or method == "GET").json()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise InputError(f"{value!r} cannot be sent; plain data is wanted")


def adapter(kind: Any) -> TypeAdapter[Any]:
    """Reads a kind of record from plain data."""
    if kind not in ADAPTERS:
        ADAPTERS[kind] = TypeAdapter(kind)
    return ADAPTERS[kind]
