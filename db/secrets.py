"""Secrets: those that have to be read again (of webhooks and engines), encrypted under a key outside the database,
and access tokens, told once when made and kept as a hash.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Hashable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, get_args

from sqlalchemy import func, select, update

from ..placement.errors import ConflictError, InputError, NotFoundError, StoreError, UnsupportedError, nearest
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


KEY, KEY_FILE = "MOEPLACE_SECRET_KEY", "MOEPLACE_SECRET_KEY_FILE"
"""Environment variables: the keys themselves, or a file of them. The first encrypts, all decrypt."""
SEALED = "fernet:"


def seal(secret: str) -> str:
    """A secret as it is stored: encrypted where a key is set.

    Raises:
        StoreError: the key cannot be read, or is none. UnsupportedError: the library for it is not installed.
    """
    box = _box(*_given())
    return secret if box is None else SEALED + box.encrypt(secret.encode()).decode()


def unseal(stored: str) -> str:
    """The secret again.

    Raises:
        StoreError: it was encrypted under a key that is not set.
    """
    if not is_sealed(stored):
        return stored
    box = _box(*_given())
    if box is None:
        raise StoreError(f"secrets in this database are encrypted, and no key is set; set {KEY} or {KEY_FILE}")
    try:
        secret: bytes = box.decrypt(stored.removeprefix(SEALED))
    except _refusal():
        raise StoreError(
            f"a secret in this database is encrypted under another key than those in {KEY} or {KEY_FILE}; add that key"
        ) from None
    return secret.decode()


def is_sealed(stored: str) -> bool:
    """Whether nothing of it is left to encrypt."""
    return stored.startswith(SEALED)


def has_key() -> bool:
    """Whether secrets are encrypted. Raises as `seal`."""
    return _box(*_given()) is not None


def _given() -> tuple[str, str]:
    return os.environ.get(KEY, ""), os.environ.get(KEY_FILE, "")


@cache
def _box(text: str, file: str) -> Any:
    if file and not text:
        try:
            text = Path(file).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise StoreError(f"{KEY_FILE}: {file}: {error}") from None
    keys = text.replace(",", " ").split()
    if not keys:
        return None
    try:
        from cryptography.fernet import Fernet, MultiFernet
    except ImportError:
        raise UnsupportedError(f"{KEY} needs the package cryptography; pip install 'moeplace[service]'") from None
    try:
        return MultiFernet([Fernet(key) for key in keys])
    except ValueError:
        raise StoreError(
            f"{KEY} holds no key; make one: python -c 'from cryptography.fernet import Fernet; "
            "print(Fernet.generate_key().decode())'"
        ) from None


def _refusal() -> type[Exception]:
    from cryptography.fernet import InvalidToken

    refusal: type[Exception] = InvalidToken
    return refusal
