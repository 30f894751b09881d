"""Engines asked for their routing: SGLang's recorder started, stopped and dumped on an interval, what it counted a
window each time.

Of several servers one asks an engine; when it shows no life, another takes over. What fails is noted where the
deployment is shown, and tried again after twice as long each time, up to an hour.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from .._http import Connections
from ..db.records import CountWindow, EngineHold
from ..db.secrets import unseal
from ..db.store import Store
from ..placement.errors import FileFormatError, InputError, MoeplaceError
from ..placement.model import ModelSpec
from ..placement.statistics import RoutingStatistics
from ..profiler.engine_servers import EngineServer, record_sglang
from .settings import Settings

log = logging.getLogger("moeplace.service.polling")

MOST_WAIT = 3600.0
AT_ONCE = 64
ANSWER_SECONDS = 30.0
ANSWER_BYTES = 1 << 20
"""Of one answer: settings of an engine are some kilobytes."""
FILE_SECONDS = 30.0
END_SECONDS = 2.0
"""On stopping, engines have so long to be told to stop recording."""


class Poller:
    """Asks the engines whose recorder folders this server knows. `look` is to be called again and again."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._name = f"{socket.gethostname()[:60]}:{os.getpid()}:{secrets.token_hex(4)}"
        self._connections = Connections(peers=settings.peers)
        self._lock = threading.Lock()
        self._asking: set[int] = set()
        self._due: dict[int, tuple[object, float]] = {}
        self._seen: dict[int, tuple[tuple[str, int], float]] = {}
        self._stop = threading.Event()

    def look(self) -> None:
        """Shows life for the engines this server asks, takes over those of silent servers, and asks where it is
        time."""
        if not self._settings.recorders or self._stop.is_set():
            return
        now = time.monotonic()
        engines = [entry for entry in self._store.engines.all() if entry.engine.recorder in self._settings.recorders]
        self._seen = {entry.key: self._since(entry, now) for entry in engines}
        for entry in engines:
            mine = entry.holder == self._name
            silent = now - self._seen[entry.key][1] > self._settings.lease_seconds
            if not (mine or not entry.holder or silent):
                continue
            hold = self._store.engines.take(entry, self._name)
            if hold is None:
                continue
            what, due = self._due.get(hold.key, (None, 0.0))
            if what != hold.engine.created:
                # New, changed, or taken over.
                due = 0.0
            with self._lock:
                if hold.key in self._asking or now < due or len(self._asking) >= AT_ONCE:
                    continue
                self._asking.add(hold.key)
            self._due[hold.key] = (hold.engine.created, now + _wait(hold, 0))
            threading.Thread(target=self._ask, args=(hold,), name="engine", daemon=True).start()

    def close(self) -> None:
        """Has recordings under way stopped; does not wait for engines that do not answer."""
        self._stop.set()
        deadline = time.monotonic() + END_SECONDS
        while self._asking and time.monotonic() < deadline:
            time.sleep(0.02)

    def _since(self, entry: EngineHold, now: float) -> tuple[tuple[str, int], float]:
        sign = (entry.holder, entry.beat)
        before = self._seen.get(entry.key)
        return before if before is not None and before[0] == sign else (sign, now)

    def _ask(self, hold: EngineHold) -> None:
        engine, error, new, idle = hold.engine, None, 0, False
        try:
            folder = self._settings.recorders[engine.recorder]
            window = ask(hold, self._model(engine.deployment), folder, self._stop, self._connections)
            new = self._store.windows.add({engine.deployment: [window]})[engine.deployment]
            log.info("engine asked", extra={"deployment": engine.deployment})
        except FileFormatError as nothing:
            # As when nothing was served meanwhile: told, but no reason to come later.
            error, idle = str(nothing), True
        except MoeplaceError as refused:
            error = str(refused)
        except Exception as unexpected:
            log.exception("unexpected error", extra={"deployment": engine.deployment})
            error = f"internal error ({type(unexpected).__name__}); the server's log says more"
        finally:
            failures = 0 if error is None or idle else engine.failures + 1
            if error is not None:
                log.warning("engine not read", extra={"deployment": engine.deployment, "error": error})
            if not self._stop.is_set():
                with contextlib.suppress(MoeplaceError):
                    self._store.engines.told(hold, new, error)
            self._due[hold.key] = (engine.created, time.monotonic() + _wait(hold, failures))
            with self._lock:
                self._asking.discard(hold.key)

    def _model(self, deployment: str) -> ModelSpec:
        return self._store.model(self._store.deployments.get(deployment).model_id).spec


def ask(
    hold: EngineHold, model: ModelSpec, folder: Path, stop: threading.Event, connections: Connections
) -> CountWindow:
    """One recording, as a count window. The files that the engine wrote for it are removed.

    Raises:
        MoeplaceError: as `record_sglang`, or the engine serves another model.
    """
    engine = hold.engine
    key = None if hold.secret is None else unseal(hold.secret)
    server = EngineServer(engine.url, key, ANSWER_SECONDS, quote=False, most=ANSWER_BYTES, connections=connections)

    def watch(_: float) -> None:
        if stop.is_set():
            raise InputError("the server is stopping")

    done = record_sglang(server, engine.span, folder, expected="counts", patience=FILE_SECONDS, progress=watch)
    assert isinstance(done.record, RoutingStatistics)
    window = window_of(done.record, model, f"engine:{engine.url}"[:100])
    for file in done.files:
        with contextlib.suppress(OSError):
            file.unlink()
    return window


def window_of(counted: RoutingStatistics, model: ModelSpec, source: str) -> CountWindow:
    """All that an engine counted, layers in the model's order; those it counted nothing in are zero.

    Raises:
        InputError: layers or experts that the model does not have.
    """
    unknown = sorted(set(counted.moe_layers) - set(model.moe_layers))
    if counted.experts != model.experts or unknown:
        raise InputError(
            f"the engine counts {counted.experts} experts in layers {list(counted.moe_layers)}; the deployment's model "
            f"has {model.experts} in {list(model.moe_layers)}"
        )
    load = np.zeros((model.layers, model.experts), dtype=np.int64)
    load[[model.moe_layers.index(layer) for layer in counted.moe_layers]] = np.rint(counted.total_load)
    return CountWindow(datetime.now(UTC), load, source=source)


def _wait(hold: EngineHold, failures: int) -> float:
    """Seconds from the end of a recording to the next."""
    pause = max(0.0, hold.engine.every - hold.engine.span)
    return pause if not failures else max(pause, min(MOST_WAIT, hold.engine.every * 2.0 ** min(failures, 20)))


def recorder_folders(paths: Mapping[str, str]) -> dict[str, Path]:
    """Folders by name, as the operator gives them.

    Raises:
        InputError: one is no folder.
    """
    folders = {name: Path(path).absolute() for name, path in paths.items()}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise InputError(f"--recorder {name}: {folder} is no folder")
    return folders
