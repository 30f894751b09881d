"""Who may do what: bearer tokens with roles; without tokens, only from this very machine."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from ..db.records import Actor, Role
from ..db.store import Store
from .settings import Settings

log = logging.getLogger("moeplace.service.access")

COOKIE = "moeplace_token"
REMEMBERED_SECONDS = 5.0
"""A revoked token may work for so long on: looking each up every time would double the load on the database."""

_bearer = HTTPBearer(auto_error=False, description="A token of `moeplace tokens add`.")
_cookie = APIKeyCookie(name=COOKIE, auto_error=False, description="The same token, set by the dashboard's sign-in.")

LOCAL = Actor("local", "approve")
"""Who acts where no tokens are asked for."""

PROXIED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")
"""Headers that a proxy adds: whoever sent such a request may be anywhere, whatever address it came from."""

MOST_FAILURES, FAILURE_SECONDS, FORGOTTEN_SECONDS = 10, 15.0, 600.0
"""Wrong tokens that an address may send before it has to wait, how long at first, and when they are forgotten."""

LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
HOW_TO_ASK = "make a token (moeplace tokens add NAME --role approve) and start the server without --no-auth"


class Gate:
    """Tells whose request it is. Safe to use from many threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._known: dict[str, tuple[float, Actor]] = {}
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def actor(self, request: Request, token: str | None) -> Actor:
        """Raises HTTPException 401 without a valid token, 403 for a request another site had a browser make."""
        known = self.remembered(request, token)
        if known is not None:
            return known
        if token:
            client = client_of(request)
            # A right token is never refused: others may share its address.
            actor = self._store.tokens.actor(token)
            if actor is not None:
                if len(self._known) > 10_000:
                    self._known.clear()
                self._known[token] = (time.monotonic() + REMEMBERED_SECONDS, actor)
                return replace(actor, client=client)
            self._refuse_guessers(client)
            self._note_failure(client, request)
        raise HTTPException(401, "send a token: Authorization: Bearer mp_...", headers={"WWW-Authenticate": "Bearer"})

    def _refuse_guessers(self, client: str) -> None:
        """429 for an address whose tokens were wrong too often within a minute."""
        count, until = self._failures.get(client, (0, 0.0))
        left = until - time.monotonic()
        if count >= MOST_FAILURES and left > 0:
            retry = {"Retry-After": str(math.ceil(left))}
            raise HTTPException(429, f"{count} wrong tokens from here; try again later", headers=retry)

    def _note_failure(self, client: str, request: Request) -> None:
        with self._lock:
            now = time.monotonic()
            count, until = self._failures.pop(client, (0, 0.0))
            # Each further failure is waited out for longer, up to an hour; who stops failing is forgotten after that.
            count = count + 1 if until > now - FORGOTTEN_SECONDS else 1
            wait = min(3600.0, FAILURE_SECONDS * 2.0 ** max(0, count - MOST_FAILURES))
            self._failures[client] = (count, now + wait)
            if len(self._failures) > 10_000:
                self._failures.popitem(last=False)
        log.warning("wrong token", extra={"client": client, "path": request.url.path, "failures": count})
        self._store.audit.add(Actor("unknown", "read", client=client), "token.refused", request.url.path[:200])

    def remembered(self, request: Request, token: str | None) -> Actor | None:
        """The same without asking the database; None where that must be asked. Raises HTTPException 403 as `actor`."""
        self._refuse_other_sites(request)
        self._refuse_other_machines(request)
        client = client_of(request)
        if not self._settings.asks_for_tokens:
            return replace(LOCAL, client=client)
        until, actor = self._known.get(token or "", (0.0, LOCAL))
        return replace(actor, client=client) if until > time.monotonic() else None

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
        for host in request.headers.getlist("host") or [""]:
            if _name_of(host) not in (*LOOPBACK_NAMES, self._settings.host):
                raise HTTPException(
                    403, f"without tokens only this machine's own names are served, not {host!r}; {HOW_TO_ASK}"
                )


def client_of(request: Request) -> str:
    """The address that a request came from."""
    return request.client.host[:100] if request.client else ""


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
    """Whose request it is. Raises HTTPException 403 where the request names a deployment that the token is not for."""
    known = await actor_of(request, bearer.credentials if bearer else cookie)
    check_scope(known, request.path_params.get("name"))
    return known


async def actor_of(request: Request, token: str | None) -> Actor:
    """Whose token it is, noted for the log. Raises HTTPException as `Gate.actor`."""
    gate: Gate = request.app.state.gate
    known = gate.remembered(request, token)
    if known is None:
        # A thread for each request is what a busy server would spend most of its time on.
        known = await run_in_threadpool(gate.actor, request, token)
    request.state.actor = known.name
    return known


def check_scope(actor: Actor, *deployments: str | None) -> None:
    """Raises HTTPException 403 where a token is not for one of these; None is for what belongs to no deployment."""
    for name in deployments:
        if not actor.sees(name):
            raise HTTPException(403, f"token {actor.name!r} is not for deployment {name!r}")


def check_role(actor: Actor, role: Role) -> None:
    """Raises HTTPException 403 where a token has a lower role."""
    if not actor.may(role):
        raise HTTPException(403, f"token {actor.name!r} has role {actor.role!r}; this needs {role!r}")


def check_unscoped(actor: Actor) -> None:
    """Raises HTTPException 403 where a token is for some deployments only."""
    if actor.deployments is not None:
        raise HTTPException(403, f"token {actor.name!r} is for {', '.join(actor.deployments)} only; this is for all")


def at_least(role: Role, whole: bool = False) -> Callable[[Actor], Awaitable[Actor]]:
    """A dependency that lets only callers of this role or a higher one through. whole: and only with tokens that are
    for all deployments."""

    async def allowed(actor: Annotated[Actor, Depends(caller)]) -> Actor:
        check_role(actor, role)
        if whole:
            check_unscoped(actor)
        return actor

    return allowed


Reader = Annotated[Actor, Depends(at_least("read"))]
Submitter = Annotated[Actor, Depends(at_least("submit"))]
Approver = Annotated[Actor, Depends(at_least("approve"))]
Overseer = Annotated[Actor, Depends(at_least("read", whole=True))]
Operator = Annotated[Actor, Depends(at_least("approve", whole=True))]
"""The same with a token for all deployments: for what is of none, or of all."""
