"""Whole-or-nothing file writes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from .errors import FileFormatError, InputError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it over `path` when the block ends without an error.

    A reader never sees a half-written file: a crash, a full disk or a kill leaves the old file, or none.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield scratch
        with scratch.open("rb") as handle:
            os.fsync(handle.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path` whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` to `path` whole or not at all."""
    write_bytes(path, text.encode())


def read_text(path: str | Path, limit_bytes: int = 1 << 30) -> str:
    """Reads a text file after checking that it exists and is not larger than `limit_bytes`.

    Raises:
        InputError: no such file.
        FileFormatError: larger than the limit, or not UTF-8.
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"{source}: no such file")
    size = source.stat().st_size
    if size > limit_bytes:
        raise FileFormatError(f"{source}: {size:,} bytes, more than the {limit_bytes:,} this kind of file may have")
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from None
