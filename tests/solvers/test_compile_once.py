"""Of processes that need a kernel at the same time one compiles it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KERNELS = """
from moeplace.placement.jit import kernel

@kernel
def total(first, second):
    return first + second
"""
PROCESS = """
import sys, time
from pathlib import Path
from kernels import total
from moeplace.placement import jit

ready, jit.PATIENCE = Path(sys.argv[1]), float(sys.argv[2])
written = ready.with_suffix(".new")
written.write_text(f"{total._cache.cache_path}/{total._cache._impl.filename_base}.lock")
written.rename(ready)
while not Path("begin").exists():
    time.sleep(0.001)
total(1, 2.5)
print(sum(total.stats.cache_misses.values()))
"""


def compiled(folder: Path, processes: int, patience: float, begin: Callable[[Path], None]) -> list[int]:
    """How often each of some processes compiled a kernel that they called at once. begin: is told its lock."""
    (folder / "kernels.py").write_text(KERNELS, encoding="utf-8")
    (folder / "process.py").write_text(PROCESS, encoding="utf-8")
    ready = [folder / f"ready_{number}" for number in range(processes)]
    started = [
        subprocess.Popen(
            [sys.executable, "process.py", str(path), str(patience)],
            cwd=folder,
            env={**os.environ, "NUMBA_CACHE_DIR": str(folder / "compiled")},
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in ready
    ]
    while not all(path.exists() for path in ready):
        assert all(process.poll() is None for process in started)
        time.sleep(0.01)
    begin(Path(ready[0].read_text(encoding="utf-8")))
    (folder / "begin").touch()
    return sorted(int(process.communicate(timeout=250)[0]) for process in started)


def test_processes_that_need_a_kernel_at_once_compile_it_once(tmp_path: Path) -> None:
    assert compiled(tmp_path, 3, 200.0, lambda lock: None) == [0, 0, 1]


def test_a_process_waits_only_so_long_for_one_that_does_not_end(tmp_path: Path) -> None:
    held = []

    def stuck(lock: Path) -> None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.append(lock.open("wb"))
        fcntl.lockf(held[0], fcntl.LOCK_EX)

    assert compiled(tmp_path, 1, 0.3, stuck) == [1]
    held[0].close()
