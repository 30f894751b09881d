"""Processes whose imports are paid for once: one that has imported what they need forks itself for each.

    forks("torch").start(["-m", "module", "argument"], stdout=..., stderr=..., env=...)

runs what `python -m module argument` runs, in a process and session of its own that begins and ends as any other, but
finds the modules imported that it would import anyway. What is tested of start-up itself starts a new Python. A process
that was forked so can fork others of its kind, before it has threads: `forks_of_this`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAUSE = 0.01
"""Seconds between two looks at whether a process has ended."""
LONGEST = 1 << 17
"""Bytes of a question, an environment included."""


class Forked:
    """A process, as `subprocess.Popen` shows one."""

    def __init__(self, source: Forks, pid: int) -> None:
        self._source, self._lock = source, threading.Lock()
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with self._lock:
            if self.returncode is None:
                self.returncode = self._source.ask({"ended": self.pid})
            return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > began + timeout:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(PAUSE)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that forks itself, at the other end of a socket. It ends with the one that made it."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._lock = connection, threading.Lock()

    def start(
        self,
        command: Sequence[str],
        *,
        stdin: int | None = None,
        stdout: int,
        stderr: int,
        env: Mapping[str, str],
        folder: Path | None = None,
    ) -> Forked:
        """Starts `-m MODULE ARGUMENT...` with these file descriptors and this environment, in `folder` or here."""
        dash_m, module, *arguments = command
        if dash_m != "-m":
            raise ValueError(f"{list(command)} does not run a module")
        job = {"module": module, "arguments": arguments, "env": dict(env), "folder": str(folder or Path.cwd())}
        if stdin is not None:
            return Forked(self, self.ask(job, stdout, stderr, stdin))
        with open(os.devnull, "rb") as nothing:
            return Forked(self, self.ask(job, stdout, stderr, nothing.fileno()))

    def ask(self, question: dict[str, Any], *descriptors: int) -> Any:
        """What the forking process answers."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(question).encode()], descriptors)
            answer = self._socket.recv(LONGEST)
        if not answer:
            raise RuntimeError("the process that forks has ended")
        return json.loads(answer)


@functools.cache
def forks(*modules: str, **variables: str) -> Forks:
    """The one of this process that has imported these modules, with `variables` in its environment."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(other.fileno()), *modules],
            stdin=subprocess.DEVNULL,
            pass_fds=[other.fileno()],
            env={**os.environ, **variables},
            start_new_session=True,
        )
    return Forks(mine)


def forks_of_this() -> Forks:
    """A copy of this process, which has no threads yet, that forks itself in turn."""
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        other.close()
        return Forks(mine)
    mine.close()
    job = _next_job(other)
    if job is not None:
        _run(job)
    sys.exit()


def _next_job(connection: socket.socket) -> dict[str, Any] | None:
    """Answers until the other side ends: then None. In each process that is forked, what it is to run."""
    while True:
        text, descriptors, _, _ = socket.recv_fds(connection, LONGEST, 3)
        if not text:
            return None
        question: dict[str, Any] = json.loads(text)
        if "ended" in question:
            pid, status = os.waitpid(question["ended"], os.WNOHANG)
            connection.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
        elif pid := os.fork():
            connection.send(json.dumps(pid).encode())
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            connection.close()
            os.setsid()
            for number, descriptor in zip((1, 2, 0), descriptors, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)
            return question


def _run(job: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["folder"])
    sys.argv = [job["module"], *job["arguments"]]
    runpy.run_module(job["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for _name in sys.argv[2:]:
        # What is not installed is missed by those that need it.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(_name)
    # What is never written to again stays shared.
    gc.freeze()
    if _job := _next_job(socket.socket(fileno=int(sys.argv[1]))):
        _run(_job)
