"""Examples run as users run them: under torchrun, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def torchrun_example(script: str, ranks: int, folder: Path, *arguments: str, seconds: float = 240) -> str:
    """What an example of that name prints, run in `folder`; fails the test where it ends badly or not in time."""
    launcher = [f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, str(EXAMPLES / script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"{script} did not end: {process.communicate()[1][-4000:]}")
    assert process.returncode == 0, said[-4000:]
    return printed
