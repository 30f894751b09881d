"""Lists in pages, and answers that need not be sent again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Generic, TypeVar

from fastapi import Query, Request, Response
from pydantic import BaseModel

T = TypeVar("T")
R = TypeVar("R")

Limit = Annotated[int, Query(ge=1, le=200, description="At most so many.")]
Before = Annotated[int | None, Query(ge=1, le=(1 << 31) - 1, description="`next` of the page before.")]
LargestKey = (1 << 31) - 1


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
