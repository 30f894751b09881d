"""Workers on a Ray cluster: each holds a CPU there, and ends when its server does.

An actor starts a worker process beside itself, as this machine does, and watches it. So a Ray worker that is lost takes its
process along, and what that process held is begun again as after any worker's death. Routing, plans and outcomes go through the
database, which the cluster's nodes must reach; Ray itself carries a command line and the database's address only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..placement.errors import MoeplaceError, UnsupportedError
from .crew import Held, LocalWorker, worker_command
from .settings import Settings

log = logging.getLogger("moeplace.service.ray")

LOCAL = "ray:local"
"""A Ray of this machine alone, that begins and ends with the server."""


class RayError(MoeplaceError):
    """The cluster cannot be reached, or refuses."""


class Holder:
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

    def __init__(self, ray: Any, actor: Any, told: Callable[[], None]) -> None:
        self._ray, self._actor, self._told = ray, actor, told
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
            self._told()
            return f"{type(error).__name__}: {error}".splitlines()[0][:300]

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self._actor.stop.remote()

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(Exception):
            self._ray.wait([self._end], timeout=max(0.1, seconds))
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)


class RayCrew:
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

    def start(self, name: str) -> Held:
        ray = self._connected()
        # Not begun again by Ray: the pool does that, which knows what the lost one held.
        actor = ray.remote(Holder).options(num_cpus=1, max_restarts=0, max_concurrency=3, name=name)
        return RayWorker(ray, actor.remote(worker_command(name, self._settings), self._address), self._note_loss)

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
