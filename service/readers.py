"""The server's side of its reading processes: requests in a line each, answers within a time, a process that died
replaced."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from starlette.concurrency import run_in_threadpool

from ..db.database import VARIABLE
from ..db.records import Actor, CountWindow
from ..db.store import Store
from ..placement import errors
from ..placement.errors import InputError, StoreError
from .crowds import Line
from .middleware import SMALL_BODY
from .reader import Frame, Operations, read_frame, write_frame
from .schemas import FieldsError
from .shards import Shards

log = logging.getLogger("moeplace.service.readers")

MOST_WAITING, MOST_OF_CALLER = 64, 16
"""Requests before a process, of all and of one token: who comes then is told to come again."""
SECONDS = 120.0
"""One request may be read for so long."""
IDLE_SECONDS = 120.0
"""A process that was not asked for so long ends: its memory goes back."""
LOOK_SECONDS = 0.02
REQUEST_BYTES, UPLOAD_BYTES = 560 << 20, 1 << 30
"""Memory of the process that reads bodies of requests, and of the one that reads whole uploads."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Reader:
    """One process, started when it is first asked. `ask` belongs to the event loop."""

    def __init__(self, most_bytes: int, address: str, traces: str | None) -> None:
        self._most, self._address, self._traces = most_bytes, address, traces
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._process: subprocess.Popen[bytes] | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._line = Line(MOST_WAITING, MOST_OF_CALLER)
        self._closed = False

    async def ask(self, document: Mapping[str, Any], body: bytes, caller: str) -> Frame:
        """What the process answers. caller: those who ask are served in turn.

        Raises:
            MoeplaceError: as the operation. InputError: it takes too much memory or time. StoreError: too many wait.
            QuotaError: too many of this caller do.
        """
        loop = asyncio.get_running_loop()
        try:
            async with self._line.turn(caller):
                if self._idle is not None:
                    self._idle.cancel()
                # Shielded: it is read to its end, whether or not who sent it is still there, and the next one after it.
                reading = asyncio.ensure_future(loop.run_in_executor(self._thread, self._exchange, document, body))
                try:
                    answer, content = await asyncio.shield(reading)
                except asyncio.CancelledError:
                    await asyncio.wait({reading})
                    raise
        finally:
            if self._line.empty and not self._closed:
                self._idle = loop.call_later(IDLE_SECONDS, self._thread.submit, self._end)
        _raise(answer, self._excess())
        return answer, content

    def close(self) -> None:
        """Ends the process, whatever it is reading."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._end()

    def _exchange(self, document: Mapping[str, Any], body: bytes, last: bool = False) -> Frame:
        process = self._started()
        answered = threading.Event()
        excess: list[str] = []
        guard = threading.Thread(target=self._guard, args=(process, answered, excess), daemon=True)
        guard.start()
        try:
            write_frame(cast(BinaryIO, process.stdin), document, body)
            return read_frame(cast(BinaryIO, process.stdout))
        except (EOFError, OSError):
            code = self._end()
            log.warning("reader died", extra={"operation": document["operation"], "code": code, "excess": excess})
            if self._closed:
                raise StoreError("the server is stopping; send it again") from None
            if not excess and not last:
                # Killed by somebody, before or meanwhile: this request need not be at fault.
                return self._exchange(document, body, last=True)
            raise InputError(self._excess(*excess)) from None
        finally:
            answered.set()
            guard.join()

    def _guard(self, process: subprocess.Popen[bytes], answered: threading.Event, excess: list[str]) -> None:
        """Ends the process where it takes too much. Its own limit is a second one: libraries that find no memory may
        do anything."""
        deadline = time.monotonic() + SECONDS
        while not answered.wait(LOOK_SECONDS):
            if time.monotonic() > deadline:
                excess.append(f"{SECONDS:g} s")
            elif _resident_bytes(process.pid) > self._most:
                excess.append(self._memory)
            if excess:
                process.kill()
                return

    @property
    def _memory(self) -> str:
        return f"{self._most >> 20} MiB of memory"

    def _excess(self, what: str | None = None) -> str:
        return f"body: reading it takes more than {what or self._memory}; send less at once"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            # Allocators that reserve ahead would reach the bound before anything is read; a trace of calls takes memory
            # where there is none.
            environment = {
                **os.environ,
                VARIABLE: self._address,
                "ARROW_DEFAULT_MEMORY_POOL": "system",
                "MALLOC_ARENA_MAX": "2",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
                "RUST_BACKTRACE": "0",
            }
            module = __name__.rpartition(".")[0] + ".reader"
            arguments = ["-P", "-m", module, str(self._most), *([self._traces] if self._traces else [])]
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            read_frame(cast(BinaryIO, self._process.stdout))
            log.info("reader starts", extra={"pid": self._process.pid, "most_bytes": self._most})
        return self._process

    def _end(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                # What was not sent to it any more is of no use.
                with contextlib.suppress(OSError):
                    stream.close()
        return process.wait()


class Readers:
    """requests: reads bodies. uploads: reads files that came in pieces, so that no small request waits for one."""

    def __init__(self, store: Store, address: str, shards: Shards | None) -> None:
        traces = None if shards is None else shards.url
        self._here = Operations(store, shards)
        self.requests = Reader(REQUEST_BYTES, address, traces)
        self.uploads = Reader(UPLOAD_BYTES, address, traces)

    async def document(self, operation: str, body: bytes, by: Actor) -> bytes:
        """What is made of a JSON body, which is read here where any content of its size is little.

        Raises:
            MoeplaceError, ValidationError: as the operation, or `Reader.ask`.
        """
        asked = {"operation": operation, "actor": asdict(by)}
        if len(body) <= SMALL_BODY:
            return (await run_in_threadpool(self._here.answer, asked, body))[1]
        return (await self.requests.ask(asked, body, by.name))[1]

    def close(self) -> None:
        self.requests.close()
        self.uploads.close()


def unpack_windows(document: Mapping[str, Any], body: bytes) -> list[CountWindow]:
    """What `pack_windows` packed."""
    loads = np.frombuffer(body, "<i8").reshape(document["shape"])
    return [
        CountWindow(datetime.fromisoformat(ended), load, workload, source)
        for (ended, workload, source), load in zip(document["windows"], loads, strict=True)
    ]


def _resident_bytes(pid: int) -> int:
    """Memory of a process, 0 where that cannot be told."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _raise(answer: Mapping[str, Any], excess: str) -> None:
    error = answer.get("error")
    if error is None:
        return
    if error == "MemoryError":
        raise InputError(excess)
    if "fields" in answer:
        raise FieldsError(answer["fields"])
    kind: Callable[[str], Exception] = getattr(errors, error, RuntimeError)
    raise kind(answer.get("message", "the reading process failed; its log says how"))
