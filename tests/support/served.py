"""`moeplace serve` in a forked process, whose workers are forked too: they find imported what they would import."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import BinaryIO

from forks import Forked, Forks, forks_of_this

from moeplace.cli.app import main
from moeplace.service import workers


class Worker(Forked):
    """A worker process as its server holds it: ended by the end of its standard input."""

    def __init__(self, source: Forks, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        reading, writing = os.pipe()
        _, *module = arguments  # without -P, which is of Python
        started = source.start(module, stdin=reading, stdout=1, stderr=2, env=env)
        super().__init__(source, started.pid)
        os.close(reading)
        self.stdin: BinaryIO = os.fdopen(writing, "wb")


if __name__ == "__main__":
    _source = forks_of_this()

    def _start(command: Sequence[str], *, env: Mapping[str, str], **_: object) -> Worker:
        return Worker(_source, command[1:], env)

    workers.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=_start, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )
    main()
