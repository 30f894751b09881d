"""Where worker processes run: on this machine, unless asked otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol

from ..db.address import VARIABLE
from .settings import Settings


class Held(Protocol):
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


class Crew(Protocol):
    """Starts workers. One thread at a time."""

    def size(self) -> int:
        """How many are wanted. Raises MoeplaceError where that cannot be told now; it is asked again later."""

    def start(self, name: str) -> Held:
        """Starts one."""

    def close(self) -> None:
        """Lets go of what it runs on, after the last worker ended."""


class LocalCrew:
    """Processes of this machine."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._settings, self._address = settings, address

    def size(self) -> int:
        return self._settings.workers if isinstance(self._settings.workers, int) else 0

    def start(self, name: str) -> Held:
        return LocalWorker(worker_command(name, self._settings), self._address)

    def close(self) -> None:
        pass


def worker_command(name: str, settings: Settings) -> Sequence[str]:
    """Arguments of Python for a worker process. With -P it imports nothing from the folder it happens to run in."""
    module = __name__.rpartition(".")[0] + ".worker"
    return ["-P", "-m", module, name, str(settings.lease_seconds), str(settings.idle_seconds)]


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
