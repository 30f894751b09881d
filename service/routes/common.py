"""What routes share: the store behind the application, and what their answers may look like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Path, Query, Request, Response
from pydantic import BaseModel

from ...db.store import Store

T = TypeVar("T")
R = TypeVar("R")

Limit = Annotated[int, Query(ge=1, le=200, description="At most so many.")]
Before = Annotated[int | None, Query(ge=1, le=(1 << 31) - 1, description="`next` of the page before.")]


class Page(BaseModel, Generic[T]):
    """next: give it to get the page that follows; null on the last."""

    items: list[T]
    next: str | None


def page_of(records: Sequence[R], limit: int, show: Callable[[R], T], cursor: Callable[[R], object]) -> Page[T]:
    """A page of the first `limit` records; `records` holds one more where another page follows."""
    shown = records[:limit]
    more = len(records) > limit
    return Page(items=[show(record) for record in shown], next=str(cursor(shown[-1])) if more else None)


def etag_of(*parts: object) -> str:
    """A strong entity tag for content that these parts determine."""
    return '"' + hashlib.sha256(repr(parts).encode(errors="backslashreplace")).hexdigest()[:24] + '"'


def unchanged(request: Request, response: Response, etag: str, *, forever: bool = False) -> Response | None:
    """Sets the tag; a 304 where the caller has this very content already."""
    headers = {
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable" if forever else "private, no-cache",
    }
    response.headers.update(headers)
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return None


def matches(header: str | None, etag: str) -> bool:
    """Whether an If-Match or If-None-Match header names this tag."""
    if header is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in header.split(",")]
    return "*" in tags or etag in tags


class FieldProblem(BaseModel):
    field: str
    message: str


class ProblemDetails(BaseModel):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []


def _described(text: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}},
    }


ERRORS: dict[int | str, dict[str, Any]] = {
    400: _described("The request cannot be read."),
    401: _described("No valid token."),
    403: _described("The token's role does not allow it."),
    404: _described("Nothing is stored under this name or id."),
    409: _described("It is in a state that does not allow this."),
    412: _described("It changed meanwhile."),
    413: _described("The body is too large."),
    415: _described("The body is of a type that is not read."),
    422: _described("A value is not valid; it is named."),
    429: _described("Too many requests; Retry-After says when to come again."),
    503: _described("The database cannot be reached or does not keep up; try again."),
}


async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


Stored = Annotated[Store, Depends(_store)]
RefPath = Annotated[str, Path(min_length=1, max_length=200)]
NamePath = Annotated[str, Path(min_length=1, max_length=100)]
KeyPath = Annotated[int, Path(ge=1, le=(1 << 31) - 1)]

OCTETS = "application/octet-stream"


def json_body(model: str) -> dict[str, Any]:
    """For the description of a route whose JSON body a reading process reads. model: its schema's name."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def made(content: bytes) -> Response:
    """What a reading process answered, as the answer of a request that adds something."""
    return Response(content, 201, media_type="application/json")


OCTET_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {OCTETS: {"schema": {"type": "string", "format": "binary"}}}}
}
"""For the description of a route that reads its body itself."""
