"""Functions compiled by numba: once an installation, kept on disk, and never in the way of a solve."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import logging
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from numba import njit
from numba.core import event
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock

from .progress import COMPILE_TIME

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

F = TypeVar("F", bound=Callable[..., object])

_log = logging.getLogger(__name__)


def kernel(function: F) -> F:
    """The function, compiled at its first call with arguments of some types; it runs without Python's lock.

    What was compiled is kept beside the sources, in the user's cache folder where these are read-only, or in
    NUMBA_CACHE_DIR. Of processes that need it at the same time, as ranks do, one compiles and the others wait.
    """
    compiled = njit(nogil=True, no_cfunc_wrapper=True)(function)  # type: ignore[call-overload]  # not in the stubs
    compiled._cache = _Cache(function)
    compiled.compile = _compiled_once(compiled)
    return cast(F, compiled)


PATIENCE = 300.0
"""Seconds that a process waits in all for others that compile, before it does so itself."""
LOOK = 0.05
"""Seconds between two looks whether another has ended."""
_waited = 0.0


def _compiled_once(compiled: Any) -> Callable[[Any], object]:
    """Its method `compile`, by one process at a time for each signature: the others find what that one has kept.

    The system lets go of the lock of a process that dies. Kernels call each other in no circle, so that no two
    processes wait for each other.
    """
    compile_: Callable[[Any], object] = compiled.compile
    path = Path(compiled._cache.cache_path) / f"{compiled._cache._impl.filename_base}.lock"

    def once(signature: Any) -> object:
        if fcntl is None or signature in compiled.overloads:
            return compile_(signature)
        with global_compiler_lock, contextlib.ExitStack() as locks:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = locks.enter_context(path.open("ab"))
                _wait_for(file.fileno(), zlib.crc32(str(signature).encode()))
            except OSError as error:
                _log.info("compiled without a lock at %s: %s", path, error)
            return compile_(signature)

    return once


def _wait_for(file: int, byte: int) -> None:
    """Locks a byte of a file, or gives up after what is left of patience. No time limit of a solve includes it."""
    global _waited
    COMPILE_TIME.begin()
    try:
        while True:
            with contextlib.suppress(BlockingIOError, PermissionError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                return
            if _waited >= PATIENCE:
                return
            time.sleep(LOOK)
            _waited += LOOK
    finally:
        COMPILE_TIME.end()


@functools.cache
def _digest(path: Path) -> str:
    """Of a file that defines kernels and all such files here: any may be compiled into a kernel of another."""
    digest = hashlib.sha256(path.read_bytes())
    folders = Path(__file__).parent, Path(__file__).parents[1] / "solvers"
    for other in sorted(source for folder in folders for source in folder.rglob("*.py")):
        text = other.read_bytes()
        if b"jit import kernel\n" in text:
            digest.update(text)
    return digest.hexdigest()


class _Cache(FunctionCache):
    """Compiled code on disk. What another version left there counts as absent, whether it can be read or not."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file._source_stamp = _digest(Path(inspect.getfile(function)))

    def load_overload(self, sig: object, target_context: object) -> object:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 (unpickling runs whatever the file says)
            self._discard(error)
            return None

    def save_overload(self, sig: object, data: object) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except Exception as error:  # noqa: BLE001 (as above: saving reads the index first)
            self._discard(error)

    def _discard(self, error: Exception) -> None:
        _log.info("compiled code at %s cannot be used and is made anew: %r", self.cache_path, error)
        try:
            self.flush()  # type: ignore[no-untyped-call]
        except OSError as why:
            _log.info("it stays there: %s", why)


class _Watch(event.Listener):
    def on_start(self, event: object) -> None:
        COMPILE_TIME.begin()

    def on_end(self, event: object) -> None:
        COMPILE_TIME.end()


event.register("numba:compile", _Watch())  # type: ignore[no-untyped-call]
