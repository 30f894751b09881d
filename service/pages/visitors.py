"""Whose visit a page is, and what its forms send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import Depends, HTTPException, Request

from ...db.records import Actor
from ..access import COOKIE, actor_of, check_scope


async def visitor(request: Request) -> Actor:
    """Whose visit it is; without a valid token, the way to the sign-in page."""
    try:
        actor = await actor_of(request, request.cookies.get(COOKIE))
    except HTTPException as error:
        if error.status_code == 401:
            raise HTTPException(303, "sign in", headers={"Location": at(request, "/sign-in")}) from None
        raise
    request.state.visitor = actor
    check_scope(actor, request.path_params.get("name"))
    return actor


def at(request: Request, path: str) -> str:
    """An address of this service, wherever a proxy has put it."""
    return str(request.scope.get("root_path", "")) + path


Visitor = Annotated[Actor, Depends(visitor)]


MOST_BYTES = 20_000


async def form_of(request: Request, most: int = MOST_BYTES) -> dict[str, str]:
    """The fields of a form. Raises HTTPException 413 where it is of more bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "expected a form")
    body = await request.body()
    if len(body) > most:
        raise HTTPException(413, f"a form of {len(body):,} bytes; at most {most:,} are taken")
    text = body.decode(errors="replace")
    try:
        return {key: values[0] for key, values in parse_qs(text, keep_blank_values=True, max_num_fields=20).items()}
    except ValueError:
        raise HTTPException(422, "more fields than any form here has") from None


def whole_number(form: Mapping[str, str], field: str) -> int:
    """Raises HTTPException 422 where the field holds anything else."""
    text = form.get(field, "")
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise HTTPException(422, f"{field}: expected a whole number")
    return int(text)
