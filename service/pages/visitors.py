"""Whose visit a page is."""

from __future__ import annotations

from typing import Annotated

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
