"""Secrets that have to be read again (webhooks' and engines'), encrypted under a key that is not in the database."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from ..placement.errors import StoreError, UnsupportedError

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
