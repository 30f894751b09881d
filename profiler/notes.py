"""What a reader did that its caller should hear of: ranks summed, tokens left out, experts set apart."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

_HEARD: ContextVar[list[str] | None] = ContextVar("heard", default=None)


def remark(message: str) -> None:
    """Says it to whoever listens by `remarks`, or as a warning."""
    heard = _HEARD.get()
    if heard is None:
        warnings.warn(message, UserWarning, stacklevel=3)
    elif message not in heard:
        heard.append(message)


@contextlib.contextmanager
def remarks() -> Iterator[list[str]]:
    """The remarks made inside the block."""
    heard: list[str] = []
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)
