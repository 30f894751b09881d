"""Worker processes on this machine: started, replaced when they die, ended with the server."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

from ..db.address import VARIABLE
from ..db.service_records import Pulse
from ..db.store import Store
from .settings import Settings

log = logging.getLogger("moeplace.service.pool")

GRACE_SECONDS = 20.0
SHORT_LIFE = 5.0
"""A worker that dies sooner than this is not replaced at once: what kills it may kill the next."""


@dataclass
class _Worker:
    name: str
    process: subprocess.Popen[bytes]
    started: float


class Pool:
    """`settings.workers` processes. `tend` is to be called again and again."""

    def __init__(self, store: Store, settings: Settings, address: str) -> None:
        self._store, self._settings, self._address = store, settings, address
        self._workers: list[_Worker] = []
        self._rest_until = 0.0
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        return self._settings.workers if isinstance(self._settings.workers, int) else 0

    def tend(self) -> None:
        """Replaces the dead; what they held is queued again at once, for a process that ended cannot come back."""
        with self._lock:
            for worker in [worker for worker in self._workers if worker.process.poll() is not None]:
                self._workers.remove(worker)
                log.warning("worker died", extra={"worker": worker.name, "code": worker.process.returncode})
                if time.monotonic() - worker.started < SHORT_LIFE:
                    self._rest_until = time.monotonic() + SHORT_LIFE
                for pulse in self._store.jobs.pulses():
                    if pulse.worker == worker.name:
                        self._store.jobs.lost(pulse, self._settings.attempts)
            while len(self._workers) < self.size and time.monotonic() >= self._rest_until:
                self._workers.append(self._start())

    def alive(self) -> int:
        """Workers running."""
        return sum(worker.process.poll() is None for worker in self._workers)

    def close(self) -> None:
        """Ends all workers; the jobs they hold are given back."""
        with self._lock:
            for worker in self._workers:
                if worker.process.stdin is not None:
                    worker.process.stdin.close()
            deadline = time.monotonic() + GRACE_SECONDS
            for worker in self._workers:
                try:
                    worker.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    os.killpg(worker.process.pid, signal.SIGKILL)
                    worker.process.wait()
            self._workers = []

    def _start(self) -> _Worker:
        name = f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(4)}"
        module = __name__.rpartition(".")[0] + ".worker"
        command = [sys.executable, "-m", module, name]
        command += [str(self._settings.lease_seconds), str(self._settings.idle_seconds)]
        # The address may hold a password: other users see command lines, not environments.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env={**os.environ, VARIABLE: self._address}, start_new_session=True
        )
        log.info("worker starts", extra={"worker": name, "pid": process.pid})
        return _Worker(name, process, time.monotonic())


class Reaper:
    """Finds jobs whose workers show no life, whoever's they were. Compares with what it saw before, by a clock that only
    runs forward."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._seen: dict[Pulse, float] = {}

    def look(self) -> None:
        """Takes jobs from workers that have shown no life for `lease_seconds`."""
        now = time.monotonic()
        self._seen = {pulse: self._seen.get(pulse, now) for pulse in self._store.jobs.pulses()}
        for pulse, since in self._seen.items():
            if now - since > self._settings.lease_seconds and self._store.jobs.lost(pulse, self._settings.attempts):
                log.warning("job taken from a silent worker", extra={"job": pulse.key, "worker": pulse.worker})
