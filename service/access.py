"""Who may do what: bearer tokens with roles; without tokens, only from this very machine."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import replace
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from ..db.records import Actor, Role
from ..db.store import Store
from .connections import network_of
from .crowds import Reads
from .settings import Settings

log = logging.getLogger("moeplace.service.access")

COOKIE = "moeplace_token"
REMEMBERED_SECONDS = 5.0
"""A token is looked up again after so long, or at once when the database tells of a change (PostgreSQL) or was written
to (SQLite): looking each up every time would double the load on it. So a revoked one ends at once; where PostgreSQL
cannot be heard, after so long."""

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
    """Tells whose request it is. Belongs to the event loop, but `told` and `look`."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._known: dict[str, tuple[float, int, Actor]] = {}
        self._told = threading.Event()
        self._sign: Hashable = None
        self._changes = 0
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        # Many who wait are woken together: one question for all who send the same token.
        self._lookup = Reads(store.tokens.valid)

    async def actor(self, request: Request, token: str | None) -> Actor:
        """Raises HTTPException 401 without a valid token, 403 for a request another site had a browser make."""
        known = self.remembered(request, token)
        if known is not None:
            return known
        if token:
            client = client_of(request)
            # Before the question: what is revoked while it is answered is asked for again.
            state = self._state()
            # A right token is never refused: others may share its address.
            valid = await self._lookup(token)
            if valid is not None:
                actor, left = valid
                if len(self._known) > 10_000:
                    self._known.clear()
                self._known[token] = (time.monotonic() + min(left, REMEMBERED_SECONDS), state, actor)
                return replace(actor, client=client)
            self._refuse_guessers(client)
            await self._note_failure(client, request)
        raise HTTPException(401, "send a token: Authorization: Bearer mp_...", headers={"WWW-Authenticate": "Bearer"})

    def _refuse_guessers(self, client: str) -> None:
        """429 for an address whose tokens were wrong too often within a minute."""
        count, until = self._failures.get(network_of(client), (0, 0.0))
        left = until - time.monotonic()
        if count >= MOST_FAILURES and left > 0:
            retry = {"Retry-After": str(math.ceil(left))}
            raise HTTPException(429, f"{count} wrong tokens from here; try again later", headers=retry)

    async def _note_failure(self, client: str, request: Request) -> None:
        now, network = time.monotonic(), network_of(client)
        count, until = self._failures.pop(network, (0, 0.0))
        # Each further failure is waited out for longer, up to an hour; who stops failing is forgotten after that.
        count = count + 1 if until > now - FORGOTTEN_SECONDS else 1
        wait = min(3600.0, FAILURE_SECONDS * 2.0 ** max(0, count - MOST_FAILURES))
        self._failures[network] = (count, now + wait)
        if len(self._failures) > 10_000:
            self._failures.popitem(last=False)
        log.warning("wrong token", extra={"client": client, "path": request.url.path, "failures": count})
        who = Actor("unknown", "read", client=client)
        await run_in_threadpool(self._store.audit.add, who, "token.refused", request.url.path[:200])

    def remembered(self, request: Request, token: str | None) -> Actor | None:
        """The same without asking the database; None where that must be asked. Raises HTTPException 403 as `actor`."""
        self._refuse_other_sites(request)
        self._refuse_other_machines(request)
        client = client_of(request)
        if not self._settings.asks_for_tokens:
            return replace(LOCAL, client=client)
        until, state, actor = self._known.get(token or "", (0.0, 0, LOCAL))
        fresh = until > time.monotonic() and state == self._state()
        return replace(actor, client=client) if fresh else None

    def _state(self) -> int:
        """Of the tokens, as far as it is known here: what was looked up in another one may be so no more."""
        version = self._store.version()
        return self._changes if version is None else version

    def told(self) -> None:
        """Something in the database has changed."""
        self._told.set()

    def look(self) -> None:
        """Whether that was a token; waits a second to be told. To be called again and again."""
        if self._told.wait(1.0):
            self._told.clear()
            sign = self._store.tokens.sign()
            if sign != self._sign:
                self._sign, self._changes = sign, self._changes + 1

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
    request.state.token = token
    gate: Gate = request.app.state.gate
    known = gate.remembered(request, token)
    if known is None:
        # A thread for each request is what a busy server would spend most of its time on.
        known = await gate.actor(request, token)
    request.state.actor = known.name
    return known


async def still_may(request: Request) -> bool:
    """Whether the token of a request that waits is valid still."""
    try:
        await actor_of(request, request.state.token)
    except HTTPException:
        return False
    return True


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
