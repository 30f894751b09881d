"""What faults are done to: a server of the service in a process of its own, a PostgreSQL of one's own, and senders that
go on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import moeplace as mp
from moeplace.db.records import CountWindow

T = TypeVar("T")
MODEL = mp.ModelSpec(layers=3, experts=16, top_k=2, hidden_size=1024, ffn_size=512, name="toy")
TOPOLOGY = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2)
PATIENCE = 600.0
"""Seconds after which what has not come counts as lost. Much: a busy machine takes a minute to start a process."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(look: Callable[[], T | None], every: float = 0.1) -> T:
    """What `look` finds, once it does; errors of a service that is away are waited out."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            found = look()
        except mp.MoeplaceError as error:
            found, told = None, error
        else:
            told = None
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE:g} s ({told})")
        time.sleep(every)


class Postgres:
    """A database server with a folder and a port of its own, durable as by default. settings: more of them, NAME=VALUE.
    log_segment: MB that its log of changes grows by."""

    def __init__(self, folder: Path, *settings: str, log_segment: int = 16) -> None:
        self._settings = settings
        self._bin = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self._folder, self._port = folder / "cluster", free_port()
        self._user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self._user:
            os.chmod(folder, 0o755)
            self._folder.mkdir()
            shutil.chown(self._folder, "postgres")
        self._run("initdb", "-D", str(self._folder), "-A", "trust", "-U", "postgres", f"--wal-segsize={log_segment}")
        self.start()
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        settings = ("listen_addresses=127.0.0.1", "unix_socket_directories=", "shared_buffers=32MB", *self._settings)
        options = " ".join([f"-p {self._port}", *(f"-c {setting}" for setting in settings)])
        log = str(self._folder / "log")
        self._run("pg_ctl", "start", "-w", "-t", "300", "-D", str(self._folder), "-l", log, "-o", options)

    def is_up(self) -> bool:
        """Whether its processes are there, recovering ones included."""
        command = [*self._user, str(self._bin / "pg_ctl"), "status", "-D", str(self._folder)]
        return subprocess.run(command, check=False, stdout=subprocess.DEVNULL, cwd="/").returncode == 0

    def stop(self, mode: str) -> None:
        """mode: "immediate" leaves everything as a crash would."""
        self._run("pg_ctl", "stop", "-t", "300", "-m", mode, "-D", str(self._folder))

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._user, str(self._bin / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


class Server:
    """`moeplace serve` on one port for good; killed and started again."""

    def __init__(self, db: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._arguments = ("--rate", "0", "--check-windows", "1000000", "--port", str(self._port), *arguments)
        self._environment = {**os.environ, "MOEPLACE_DB": db, **(environment or {})}
        self.log: list[dict[str, Any]] = []
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "moeplace.cli", "serve", "--no-auth", *self._arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env=self._environment, text=True)
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()
        before = len(self.log)
        ready = "Application startup complete."
        until(lambda: any(entry["message"] == ready for entry in self.log[before:]) or None)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def worker_pid(self) -> int:
        """The newest worker process."""
        return int([entry["pid"] for entry in self.log if entry["message"] == "worker starts"][-1])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE)

    def outcomes_stored(self, job: int) -> int:
        """How often a worker stored what came of a job; giving it back undone stores nothing."""
        stored, undone = 0, False
        for entry in self.log:
            if entry.get("job") == job:
                undone = entry["message"] == "job given back" or (undone and entry["message"] != "job begins")
                stored += entry["message"] == "job ends" and entry["told"] and not undone
        return stored

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            try:
                self.log.append({"message": "", **json.loads(line)})
            except ValueError:
                self.log.append({"message": line})


class Pusher:
    """Sends count windows without a pause, each until it is stored, as an engine would."""

    def __init__(self, url: str, deployment: str, every: float = 0.05) -> None:
        self.windows = self.pairs = 0
        self.last = time.monotonic()
        self.deployment = deployment
        self._url, self._every = url, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> tuple[int, int]:
        """(windows, pairs) that were answered."""
        self._stop.set()
        self._thread.join(PATIENCE)
        return self.windows, self.pairs

    def stored_since(self, moment: float) -> bool | None:
        return True if self.last > moment else None

    def _run(self) -> None:
        client = mp.Client(self._url, timeout=30)
        while not self._stop.wait(self._every):
            window = counts(self.windows)
            while True:
                try:
                    client.push_windows(self.deployment, [window])
                    break
                except mp.MoeplaceError:
                    time.sleep(0.2)
            self.windows, self.pairs, self.last = (
                self.windows + 1,
                self.pairs + int(window.load.sum()),
                time.monotonic(),
            )


def counts(number: int) -> CountWindow:
    """A window of traffic, another one for every number."""
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(MODEL.experts, 0.4), size=MODEL.layers)
    rng = np.random.default_rng(number + 1000)
    load = np.stack([rng.multinomial(4000 * MODEL.top_k, row) for row in chances])
    return CountWindow(datetime.fromtimestamp(1.7e9 + number, UTC), load)


def prepared(client: mp.Client, *names: str, **policy: Any) -> None:
    """Deployments of the toy model, with windows to solve on."""
    wanted = {"solver": "search", "seconds": 2, "block": 1, "recent": 16, "step_tokens": 4096, "min_regret": 0.0}
    until(lambda: client.add_model(MODEL))
    client.add_topology(TOPOLOGY, "box")
    for name in names:
        client.add_deployment(name, "toy", "box", {**wanted, "keep_traces": 100, **policy})


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        yield Path(name)
