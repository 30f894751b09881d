"""What routes share: the store behind the application, and what their answers may look like."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, Path, Request
from pydantic import BaseModel

from ...db.store import Store


class FieldProblem(BaseModel):
    field: str
    message: str


class Problem(BaseModel):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] = []


def _described(text: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
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
