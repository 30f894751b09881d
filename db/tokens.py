"""Access tokens: told once when made, kept as a hash."""

from __future__ import annotations

import hashlib
import secrets
from datetime import UTC, datetime
from typing import get_args

from sqlalchemy import select

from ..placement.errors import ConflictError, InputError, NotFoundError, nearest
from . import audit
from .database import Sessions
from .records import Actor, Role, TokenRecord
from .references import check_name
from .schema import TokenRow

PREFIX = "mp_"
"""So that secret scanners and people recognise one."""


class Tokens:
    """Threads and processes: as `Store`."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def add(self, name: str, role: Role, by: Actor) -> str:
        """A new token, 256 random bits. This is the only time it is shown.

        Raises:
            InputError: an unknown role, or a name that cannot be one. ConflictError: the name is taken.
        """
        check_name(name)
        if role not in get_args(Role):
            raise InputError(f"role {role!r} is unknown; {nearest(str(role), get_args(Role))}")
        token = PREFIX + secrets.token_urlsafe(32)
        with self._sessions.writing() as session:
            if session.scalar(select(TokenRow.key).where(TokenRow.name == name)) is not None:
                raise ConflictError(f"a token {name!r} exists, or did: names of tokens are not used again")
            session.add(TokenRow(name=name, role=role, digest=_digest(token), created=datetime.now(UTC)))
            audit.note(session, by, "token.add", name, {"role": role})
        return token

    def revoke(self, name: str, by: Actor) -> None:
        """Ends a token; it stays listed.

        Raises:
            NotFoundError: there is none of that name.
        """
        with self._sessions.writing() as session:
            row = session.scalar(select(TokenRow).where(TokenRow.name == name))
            if row is None:
                raise NotFoundError(f"no token {name!r}; `moeplace tokens list` shows all")
            if row.revoked is None:
                row.revoked = datetime.now(UTC)
                audit.note(session, by, "token.revoke", name)

    def actor(self, token: str) -> Actor | None:
        """Whom a token stands for; None when it is unknown or revoked."""
        with self._sessions.reading() as session:
            # Looked up by hash: how long that takes tells nothing about the token.
            row = session.scalar(select(TokenRow).where(TokenRow.digest == _digest(token), TokenRow.revoked.is_(None)))
            return None if row is None else Actor(row.name, _role(row.role))

    def all(self) -> list[TokenRecord]:
        """Every token made, oldest first."""
        with self._sessions.reading() as session:
            rows = session.scalars(select(TokenRow).order_by(TokenRow.key))
            return [TokenRecord.model_validate(row) for row in rows]


def _role(text: str) -> Role:
    return next(role for role in get_args(Role) if role == text)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
