"""Who may do what: bearer tokens with roles; without tokens, only from this very machine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from ..db.records import ROLES, Actor, Role
from ..db.store import Store
from .settings import Settings

COOKIE = "moeplace_token"
REMEMBERED_SECONDS = 5.0
"""A revoked token may work for so long on: looking each up every time would double the load on the database."""

_bearer = HTTPBearer(auto_error=False, description="A token of `moeplace tokens add`.")
_cookie = APIKeyCookie(name=COOKIE, auto_error=False, description="The same token, set by the dashboard's sign-in.")

LOCAL = Actor("local", "approve")
"""Who acts where no tokens are asked for."""

PROXIED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")
"""Headers that a proxy adds: whoever sent such a request may be anywhere, whatever address it came from."""

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
HOW_TO_ASK = "make a token (moeplace tokens add NAME --role approve) and start the server with --auth"


class Gate:
    """Tells whose request it is. Safe to use from many threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._known: dict[str, tuple[float, Actor]] = {}

    def actor(self, request: Request, token: str | None) -> Actor:
        """Raises HTTPException 401 without a valid token, 403 for a request another site had a browser make."""
        known = self.remembered(request, token)
        if known is not None:
            return known
        if token:
            actor = self._store.tokens.actor(token)
            if actor is not None:
                if len(self._known) > 10_000:
                    self._known.clear()
                self._known[token] = (time.monotonic() + REMEMBERED_SECONDS, actor)
                return actor
        raise HTTPException(401, "send a token: Authorization: Bearer mp_...", headers={"WWW-Authenticate": "Bearer"})

    def remembered(self, request: Request, token: str | None) -> Actor | None:
        """The same without asking the database; None where that must be asked. Raises HTTPException 403 as `actor`."""
        self._refuse_other_sites(request)
        self._refuse_other_machines(request)
        if not self._settings.asks_for_tokens:
            return LOCAL
        until, actor = self._known.get(token or "", (0.0, LOCAL))
        return actor if until > time.monotonic() else None

    def _refuse_other_sites(self, request: Request) -> None:
        origin, host = request.headers.get("origin"), request.headers.get("host", "")
        if origin and request.method not in ("GET", "HEAD") and origin.partition("://")[2] != host:
            raise HTTPException(403, "this request was made by a page of another site")

    def _refuse_other_machines(self, request: Request) -> None:
        if self._settings.asks_for_tokens:
            return
        passed_on = [name for name in PROXIED if name in request.headers]
        if passed_on:
            raise HTTPException(
                403,
                f"without tokens no request from a proxy is served, and this has {', '.join(passed_on)}; {HOW_TO_ASK}",
            )
        # A name that was made to point here would let a page of that site read everything.
        host = request.headers.get("host", "")
        if _name_of(host) not in (*LOOPBACK_NAMES, self._settings.host):
            raise HTTPException(
                403, f"without tokens only this machine's own names are served, not {host!r}; {HOW_TO_ASK}"
            )


def _name_of(host: str) -> str | None:
    """The name in a Host header, without its port; None where that is no address."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def caller(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    cookie: Annotated[str | None, Depends(_cookie)],
) -> Actor:
    """Whose request it is."""
    gate: Gate = request.app.state.gate
    token = bearer.credentials if bearer else cookie
    known = gate.remembered(request, token)
    if known is not None:
        return known
    # A thread for each request is what a busy server would spend most of its time on.
    return await run_in_threadpool(gate.actor, request, token)


def at_least(role: Role) -> Callable[[Actor], Awaitable[Actor]]:
    """A dependency that lets only callers of this role or a higher one through."""

    async def allowed(actor: Annotated[Actor, Depends(caller)]) -> Actor:
        if ROLES.index(actor.role) < ROLES.index(role):
            raise HTTPException(403, f"token {actor.name!r} has role {actor.role!r}; this needs {role!r}")
        return actor

    return allowed


Reader = Annotated[Actor, Depends(at_least("read"))]
Submitter = Annotated[Actor, Depends(at_least("submit"))]
Approver = Annotated[Actor, Depends(at_least("approve"))]
