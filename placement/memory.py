"""How much memory is free, asked before much of it is taken, and a bound for what a process takes."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import InputError

CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, or of its container where that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = Path("/proc/meminfo")
    if known.is_file():
        for line in known.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def check_memory(needed: float, what: str, fits: str) -> None:
    """Refuses what does not fit into memory.

    Args:
        needed: bytes.
        what: takes them.
        fits: what to ask for instead.

    Raises:
        InputError: less is free.
    """
    free = free_memory()
    if needed > free:
        raise InputError(f"{what} would take {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free; {fits}")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def bound_memory(most: int) -> None:
    """What this process allocates beyond fails at once, should whoever watches it come too late."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
