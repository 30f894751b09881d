"""Workers of this server: started, replaced when they die, ended with the server. And a look after those of all
servers."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..db.database import VARIABLE
from ..db.jobs import Lane
from ..db.records import Heartbeat
from ..db.store import Store
from ..placement.errors import MoeplaceError, UnsupportedError
from .requests import job_bytes
from .settings import Settings

log = logging.getLogger("moeplace.service.workers")

GRACE_SECONDS = 20.0
SHORT_LIFE = 5.0
"""A worker that dies sooner than this is not replaced at once: what kills it may kill the next."""


MOST_DEATHS = 3
"""Workers that die so in a row, before the server says that it is not ready."""


class WorkerHandle(Protocol):
    """A worker that was started."""

    @property
    def place(self) -> Mapping[str, object]:
        """Where it runs, for the log."""

    def ended(self) -> str | None:
        """How it ended; None while it runs."""

    def stop(self) -> None:
        """Asks it to give its job back and end, without waiting."""

    def wait(self, seconds: float) -> None:
        """Waits for its end; ends it where that takes longer."""


class WorkerBackend(Protocol):
    """Starts workers. One thread at a time."""

    def size(self) -> int:
        """How many are wanted. Raises MoeplaceError where that cannot be told now; it is asked again later."""

    def start(self, name: str, lane: Lane) -> WorkerHandle:
        """Starts one, that takes jobs of this lane."""

    def close(self) -> None:
        """Lets go of what it runs on, after the last worker ended."""


class LocalBackend:
    """Processes of this machine."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._settings, self._address = settings, address

    def size(self) -> int:
        return self._settings.workers if isinstance(self._settings.workers, int) else 0

    def start(self, name: str, lane: Lane) -> WorkerHandle:
        return LocalWorker(worker_command(name, self._settings, lane), self._address)

    def close(self) -> None:
        pass


def worker_command(name: str, settings: Settings, lane: Lane) -> Sequence[str]:
    """Arguments of Python for a worker process. With -P it imports nothing from the folder it happens to run in."""
    module = __name__.rpartition(".")[0] + ".worker"
    numbers = (settings.lease_seconds, settings.idle_seconds, job_bytes(settings), settings.job_seconds)
    return ["-P", "-m", module, name, *map(str, numbers), lane]


class LocalWorker:
    """A process, ended by the end of its standard input: however this one ends, it does too."""

    def __init__(self, arguments: Sequence[str], address: str) -> None:
        # The address may hold a password: other users see command lines, not environments.
        environment = {**os.environ, VARIABLE: address}
        self._process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.PIPE, env=environment, start_new_session=True
        )

    @property
    def place(self) -> Mapping[str, object]:
        return {"pid": self._process.pid}

    def ended(self) -> str | None:
        code = self._process.poll()
        return None if code is None else str(code)

    def stop(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        try:
            self._process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


# Workers on a Ray cluster: each holds a CPU there, and ends when its server does. An actor starts a worker process
# beside itself, as this machine does, and watches it. So a Ray worker that is lost takes its process along, and what
# that process held is begun again as after any worker's death. Routing, plans and outcomes go through the database,
# which the cluster's nodes must reach; Ray itself carries a command line and the database's address only.


LOCAL = "ray:local"
"""A Ray of this machine alone, that begins and ends with the server."""


class RayError(MoeplaceError):
    """The cluster cannot be reached, or refuses."""


class WorkerActor:
    """The actor. `ended` blocks until the worker process ends; `stop` may be called meanwhile."""

    def __init__(self, arguments: Sequence[str], address: str) -> None:
        self._worker = LocalWorker(arguments, address)

    def place(self) -> dict[str, object]:
        import socket

        return {"node": socket.gethostname(), **self._worker.place}

    def ended(self) -> str | None:
        import time

        while (how := self._worker.ended()) is None:
            time.sleep(0.2)
        return how

    def stop(self) -> None:
        self._worker.stop()


class RayWorker:
    """An actor as the pool sees it."""

    def __init__(self, ray: Any, actor: Any, notify: Callable[[], None]) -> None:
        self._ray, self._actor, self._notify = ray, actor, notify
        self._end = actor.ended.remote()
        self._where = actor.place.remote()

    @property
    def place(self) -> Mapping[str, object]:
        # Where a cluster is full, or grows, an actor waits for its place.
        with contextlib.suppress(Exception):
            return dict(self._ray.get(self._where, timeout=1.0))
        return {"node": "not placed yet"}

    def ended(self) -> str | None:
        try:
            ready, _ = self._ray.wait([self._end], timeout=0)
            return str(self._ray.get(self._end)) if ready else None
        except Exception as error:  # noqa: BLE001 - any way that a cluster fails ends this worker for us
            self._notify()
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self._actor.stop.remote()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(Exception):
            self._ray.wait([self._end], timeout=max(0.1, seconds))
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)


class RayBackend:
    """Connects when first asked, and again when the cluster was lost."""

    def __init__(self, settings: Settings, address: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UnsupportedError("Ray is not installed; pip install 'moeplace[ray]', or give --workers a number")
        self._settings, self._address = settings, address
        self._ray: Any = None
        self._lost = False

    def size(self) -> int:
        ray = self._connected()
        if self._settings.ray_workers is not None:
            return self._settings.ray_workers
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def start(self, name: str, lane: Lane) -> WorkerHandle:
        ray = self._connected()
        # Not begun again by Ray: the pool does that, which knows what the lost one held.
        actor = ray.remote(WorkerActor).options(num_cpus=1, max_restarts=0, max_concurrency=3, name=name)
        return RayWorker(ray, actor.remote(worker_command(name, self._settings, lane), self._address), self._note_loss)

    def close(self) -> None:
        if self._ray is not None:
            with contextlib.suppress(Exception):
                self._ray.shutdown()

    def _note_loss(self) -> None:
        with contextlib.suppress(Exception):
            self._ray.nodes()
            return
        self._lost = True

    def _connected(self) -> Any:
        if self._ray is not None and not self._lost and self._ray.is_initialized():
            return self._ray
        # Read when Ray starts: it is to tell nobody how it is used, and to leave this process its own way of stopping.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
        import ray

        with contextlib.suppress(Exception):
            ray.shutdown()
        try:
            ray.init(**_where(str(self._settings.workers), self._settings.ray_workers))
        except Exception as error:  # noqa: BLE001 - said as what it means here
            raise RayError(f"Ray at {self._settings.workers!r} cannot be reached ({error})"[:1000]) from None
        self._ray, self._lost = ray, False
        log.info("connected", extra={"ray": self._settings.workers, "cpus": ray.cluster_resources().get("CPU")})
        return ray


def _where(workers: str, count: int | None) -> dict[str, Any]:
    """What `ray.init` is told."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "moeplace"}
    if workers == LOCAL:
        # Nothing of it is for others: no dashboard, no reports.
        local: dict[str, Any] = {"address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        return {**quiet, **local, **({} if count is None else {"num_cpus": count})}
    return {**quiet, "address": "auto" if workers == "ray" else workers}


@dataclass
class _Worker:
    name: str
    handle: WorkerHandle
    started: float
    lane: Lane


def backend_for(settings: Settings, address: str) -> WorkerBackend:
    """Where the settings want workers.

    Raises:
        UnsupportedError: on Ray, which is not installed.
    """
    if isinstance(settings.workers, int):
        return LocalBackend(settings, address)
    return RayBackend(settings, address)


class Pool:
    """As many workers as the backend wants. `tend` is to be called again and again."""

    def __init__(self, store: Store, settings: Settings, backend: WorkerBackend) -> None:
        self._store, self._settings, self._backend = store, settings, backend
        self._workers: list[_Worker] = []
        self._rest_until = 0.0
        self._deaths = 0
        self._closed = False
        self._lock = threading.Lock()

    def tend(self) -> None:
        """Replaces the dead; what they were doing is queued again at once, for a process that ended cannot come
        back."""
        with self._lock:
            for worker in list(self._workers):
                how = worker.handle.ended()
                if how is None:
                    continue
                self._workers.remove(worker)
                log.warning("worker died", extra={"worker": worker.name, "code": how})
                if time.monotonic() - worker.started < SHORT_LIFE:
                    self._deaths += 1
                    self._rest_until = time.monotonic() + SHORT_LIFE
                for heartbeat in self._store.jobs.heartbeats():
                    if heartbeat.worker == worker.name:
                        self._store.jobs.lost(heartbeat, self._settings.attempts)
            if any(time.monotonic() - worker.started >= SHORT_LIFE for worker in self._workers):
                self._deaths = 0
            if self._closed or time.monotonic() < self._rest_until:
                return
            size = self._backend.size()
            # Besides those that take any job, one that no solve keeps from looking for drift.
            lanes: tuple[tuple[Lane, int], ...] = (("watch", min(size, 1)), ("any", size))
            for lane, number in lanes:
                for _ in range(number - sum(worker.lane == lane for worker in self._workers)):
                    self._workers.append(self._start(lane))

    @property
    def size(self) -> int:
        """How many live."""
        return len(self._workers)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the workers, None where nothing is: they die as soon as they start."""
        if self._deaths < MOST_DEATHS:
            return None
        return f"{self._deaths} workers in a row died within {SHORT_LIFE:g} s of their start; the log says how"

    def close(self) -> None:
        """Ends all workers; the jobs they hold are given back."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.handle.stop()
            deadline = time.monotonic() + GRACE_SECONDS
            for worker in self._workers:
                worker.handle.wait(deadline - time.monotonic())
            self._workers = []
            self._backend.close()

    def _start(self, lane: Lane) -> _Worker:
        name = f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(4)}"
        handle = self._backend.start(name, lane)
        log.info("worker starts", extra={"worker": name, "lane": lane, **handle.place})
        return _Worker(name, handle, time.monotonic(), lane)


class Reaper:
    """Finds jobs whose workers show no life, whoever's they were. Compares with what it saw before, by a clock that
    only runs forward."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._seen: dict[Heartbeat, float] = {}

    def look(self) -> None:
        """Takes jobs from workers that have shown no life for `lease_seconds`."""
        now = time.monotonic()
        self._seen = {heartbeat: self._seen.get(heartbeat, now) for heartbeat in self._store.jobs.heartbeats()}
        for heartbeat, since in self._seen.items():
            if now - since > self._settings.lease_seconds and self._store.jobs.lost(heartbeat, self._settings.attempts):
                log.warning("job taken from a silent worker", extra={"job": heartbeat.key, "worker": heartbeat.worker})
