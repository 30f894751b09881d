"""Workers of this server: started, replaced when they die, ended with the server. And a look after those of all servers."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass

from ..db.service_records import Pulse
from ..db.store import Store
from .crew import Crew, Held, LocalCrew
from .settings import Settings

log = logging.getLogger("moeplace.service.pool")

GRACE_SECONDS = 20.0
SHORT_LIFE = 5.0
"""A worker that dies sooner than this is not replaced at once: what kills it may kill the next."""


@dataclass
class _Worker:
    name: str
    held: Held
    started: float


def crew_for(settings: Settings, address: str) -> Crew:
    """Where the settings want workers.

    Raises:
        UnsupportedError: on Ray, which is not installed.
    """
    if isinstance(settings.workers, int):
        return LocalCrew(settings, address)
    from .crew_ray import RayCrew

    return RayCrew(settings, address)


class Pool:
    """As many workers as the crew wants. `tend` is to be called again and again."""

    def __init__(self, store: Store, settings: Settings, crew: Crew) -> None:
        self._store, self._settings, self._crew = store, settings, crew
        self._workers: list[_Worker] = []
        self._rest_until = 0.0
        self._closed = False
        self._lock = threading.Lock()

    def tend(self) -> None:
        """Replaces the dead; what they held is queued again at once, for a process that ended cannot come back."""
        with self._lock:
            for worker in list(self._workers):
                how = worker.held.ended()
                if how is None:
                    continue
                self._workers.remove(worker)
                log.warning("worker died", extra={"worker": worker.name, "code": how})
                if time.monotonic() - worker.started < SHORT_LIFE:
                    self._rest_until = time.monotonic() + SHORT_LIFE
                for pulse in self._store.jobs.pulses():
                    if pulse.worker == worker.name:
                        self._store.jobs.lost(pulse, self._settings.attempts)
            if self._closed or time.monotonic() < self._rest_until:
                return
            for _ in range(self._crew.size() - len(self._workers)):
                self._workers.append(self._start())

    def close(self) -> None:
        """Ends all workers; the jobs they hold are given back."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.held.stop()
            deadline = time.monotonic() + GRACE_SECONDS
            for worker in self._workers:
                worker.held.wait(deadline - time.monotonic())
            self._workers = []
            self._crew.close()

    def _start(self) -> _Worker:
        name = f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(4)}"
        held = self._crew.start(name)
        log.info("worker starts", extra={"worker": name, **held.place})
        return _Worker(name, held, time.monotonic())


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
