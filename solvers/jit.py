"""Functions compiled by numba. Compiled code is kept on disk beside the sources, or in the user's cache folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit
from numba.core import event

from .base import COMPILE_TIME

F = TypeVar("F", bound=Callable[..., object])


def kernel(function: F) -> F:
    """The function, compiled at its first call with arguments of some types; it runs without Python's lock."""
    return cast(F, njit(cache=True, nogil=True)(function))


class _Watch(event.Listener):
    def on_start(self, event: object) -> None:
        COMPILE_TIME.begin()

    def on_end(self, event: object) -> None:
        COMPILE_TIME.end()


event.register("numba:compile", _Watch())  # type: ignore[no-untyped-call]
