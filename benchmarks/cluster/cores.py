"""A limit on the CPU time of each rank, so that ranks on one machine compute like devices of their own.

Without it, ranks that share cores finish sooner as soon as others are idle, which no cluster's devices do. A rank is put
into a control group with a quota (cgroup version 1's `cpu` controller, 5 ms periods): it then has so much of a core, however
busy the others are. Groups of runs that were killed are removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

CONTROLLER = Path("/sys/fs/cgroup/cpu")
PREFIX = "moeplace-cluster-"
PERIOD = 5_000
"""Microseconds: a rank that has used its part waits at most so long."""

_ENTER = 'echo 0 > "$0-$LOCAL_RANK/tasks" && exec "$@"'
_serial = iter(range(1 << 30))


class CoresUnavailableError(RuntimeError):
    """CPU time cannot be limited here; the message says why."""


@contextlib.contextmanager
def limited_cores(cores: float, hosts: int, ranks: int) -> Iterator[Path]:
    """Control groups `host{h}-{local rank}` of `cores` each in the folder that is yielded.

    Raises:
        CoresUnavailableError: no such controller, or no leave to write it.
    """
    if not (CONTROLLER / "cpu.cfs_quota_us").exists():
        raise CoresUnavailableError(
            f"{CONTROLLER} is no cgroup (version 1) CPU controller: leave out the limit of cores"
        )
    _sweep()
    folder = CONTROLLER / f"{PREFIX}{os.getpid()}-{next(_serial)}"
    try:
        folder.mkdir()
        # Within a control group niceness counts among its members alone: the group takes its place.
        weight = 1024 * 1.25 ** -os.getpriority(os.PRIO_PROCESS, 0) * hosts * ranks
        (folder / "cpu.shares").write_text(str(min(int(weight), 1 << 18)))
        for host in range(hosts):
            for rank in range(ranks):
                group = folder / f"host{host}-{rank}"
                group.mkdir()
                (group / "cpu.cfs_period_us").write_text(str(PERIOD))
                (group / "cpu.cfs_quota_us").write_text(str(max(1000, round(cores * PERIOD))))
        yield folder
    except PermissionError as error:
        raise CoresUnavailableError(f"control groups cannot be made here: {error}") from None
    finally:
        _remove(folder, seconds=10)


def inside(folder: Path, host: int, command: Sequence[str]) -> list[str]:
    """The command, to be started by torchrun as one of the host's ranks."""
    return ["sh", "-c", _ENTER, str(folder / f"host{host}"), *command]


def _sweep() -> None:
    for folder in CONTROLLER.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", owner).exists():
            _remove(folder, seconds=0)


def _remove(folder: Path, seconds: float) -> None:
    """Removes a folder of groups, once the kernel has taken the last process out."""
    ends = time.monotonic() + seconds
    while folder.exists():
        with contextlib.suppress(OSError):
            for group in folder.glob("host*"):
                group.rmdir()
            folder.rmdir()
        if time.monotonic() >= ends:
            return
        time.sleep(0.02)
