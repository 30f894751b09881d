"""Access tokens: told once when made, kept as a hash."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Hashable, Sequence
from datetime import UTC, datetime, timedelta
from typing import get_args

from sqlalchemy import func, select, update

from ..placement.errors import ConflictError, InputError, NotFoundError, nearest
from . import audit
from .database import Sessions, moment
from .records import Actor, Role, TokenRecord
from .references import check_name
from .schema import DeploymentRow, TokenRow

PREFIX = "mp_"
"""So that secret scanners and people recognise one."""
USED_EVERY = timedelta(minutes=1)
"""When a token was used last is kept to the minute: more would be a write a request."""


class Tokens:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def add(
        self,
        name: str,
        role: Role,
        by: Actor,
        *,
        deployments: Sequence[str] | None = None,
        lifetime: timedelta | None = None,
    ) -> str:
        """A new token, 256 random bits. This is the only time it is shown.

        Args:
            name: whose it is. One of a token that was revoked, or is over, may be used again.
            role: what it may do.
            by: who makes it.
            deployments: names of those that it is for; None for all, and for what belongs to none.
            lifetime: after which it is over; None for never.

        Raises:
            InputError: an unknown role, a name that cannot be one, no deployment, or a lifetime that is none.
            NotFoundError: no such deployment. ConflictError: the name is taken.
        """
        check_name(name)
        if role not in get_args(Role):
            raise InputError(f"role {role!r} is unknown; {nearest(str(role), get_args(Role))}")
        if deployments is not None and not deployments:
            raise InputError("deployments: name one at least, or leave them out for all")
        if lifetime is not None and not timedelta() < lifetime < timedelta(days=36_500):
            raise InputError(f"lifetime ({lifetime}) must be more than nothing and less than a hundred years")
        token = PREFIX + secrets.token_urlsafe(32)
        with self._sessions.writing() as session:
            now = moment(session)
            known = set(session.scalars(select(DeploymentRow.name))) if deployments is not None else set()
            for deployment in deployments or ():
                if deployment not in known:
                    raise NotFoundError(f"no deployment {deployment!r}; {nearest(deployment, known)}")
            active = session.scalar(select(TokenRow).where(TokenRow.name == name, TokenRow.revoked.is_(None)))
            if active is not None:
                if active.expires is None or active.expires > now:
                    raise ConflictError(f"a token {name!r} exists; revoke it first, or choose another name")
                active.revoked = active.expires
                session.flush()
            row = TokenRow(
                name=name,
                role=role,
                digest=_digest(token),
                created=now,
                deployments=None if deployments is None else sorted(set(deployments)),
                expires=None if lifetime is None else now + lifetime,
            )
            session.add(row)
            ends = None if row.expires is None else row.expires.isoformat()
            audit.note(session, by, "token.add", name, {"role": role, "deployments": row.deployments, "expires": ends})
        return token

    def revoke(self, name: str, by: Actor) -> None:
        """Ends a token; it stays listed.

        Raises:
            NotFoundError: there is none of that name.
        """
        with self._sessions.writing() as session:
            rows = session.scalars(select(TokenRow).where(TokenRow.name == name)).all()
            if not rows:
                raise NotFoundError(f"no token {name!r}; `moeplace tokens list` shows all")
            for row in rows:
                if row.revoked is None:
                    row.revoked = datetime.now(UTC)
                    audit.note(session, by, "token.revoke", name)

    def actor(self, token: str) -> Actor | None:
        """Whom a token stands for; None when it is unknown, revoked or over."""
        known = self.valid(token)
        return None if known is None else known[0]

    def valid(self, token: str) -> tuple[Actor, float] | None:
        """The same, and for how many seconds."""
        with self._sessions.reading() as session:
            now = moment(session)
            # Looked up by hash: how long that takes tells nothing about the token.
            row = session.scalar(select(TokenRow).where(TokenRow.digest == _digest(token), TokenRow.revoked.is_(None)))
            if row is None or (row.expires is not None and row.expires <= now):
                return None
            scope = None if row.deployments is None else tuple(row.deployments)
            actor, key, used = Actor(row.name, _role(row.role), scope), row.key, row.used
            left = math.inf if row.expires is None else (row.expires - now).total_seconds()
        if used is None or now - used >= USED_EVERY:
            with self._sessions.writing() as session:
                session.execute(update(TokenRow).where(TokenRow.key == key).values(used=now))
        return actor, left

    def all(self) -> list[TokenRecord]:
        """Every token made, oldest first."""
        with self._sessions.reading() as session:
            rows = session.scalars(select(TokenRow).order_by(TokenRow.key))
            return [TokenRecord.model_validate(row) for row in rows]

    def sign(self) -> Hashable:
        """What changes when a token is made or revoked."""
        with self._sessions.reading() as session:
            return tuple(session.execute(select(func.max(TokenRow.key), func.count(TokenRow.revoked))).one())

    def none_made(self) -> bool:
        """Whether there never was a token."""
        with self._sessions.reading() as session:
            return not session.scalar(select(func.count()).select_from(TokenRow))


def _role(text: str) -> Role:
    return next(role for role in get_args(Role) if role == text)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
