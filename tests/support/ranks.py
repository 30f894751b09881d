"""Real processes of one process group, for tests: imports are paid for once, then the ranks are forked."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from forks import forks

HERE = Path(__file__).resolve().parent
TIMEOUT = timedelta(seconds=120)
"""Of collectives, unless a check needs a shorter one."""
IMPORTED = (
    "pandas", "torch._dynamo", "torch._inductor.cudagraph_trees", "torch.distributed.checkpoint",
    "torch.distributed.device_mesh", "torch.distributed.fsdp", "torch.distributed.optim",
    "torch.distributed.tensor.experimental", "transformers.models.olmoe.modeling_olmoe", "moeplace.runtime.moe.decoder",
    "moeplace.runtime.moe.parallelize", "moeplace.runtime.moe.weights",
)  # fmt: skip
"""What most ranks use."""


def launch(target: str, world: int, folder: Path, *, seconds: int = 240, dies: Sequence[int] = ()) -> list[Any]:
    """Runs `module:function` of tests/ on `world` ranks and gives what it returned on each (None for those in `dies`).

    The function is called with (rank, world, folder). A rank that fails, or ranks that do not end, fail the test.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "stderr").open("w+") as said:
        source = forks(*IMPORTED, OMP_NUM_THREADS="1")
        process = source.start(
            ["-m", "ranks", target, str(world), str(folder)],
            stdout=said.fileno(), stderr=said.fileno(), env=environment, folder=HERE,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(seconds)
        said.seek(0)
        output = said.read()
    missing = [r for r in range(world) if r not in dies and not (folder / f"rank{r}.json").is_file()]
    if missing:
        # A rank that others wait for fails first; theirs are the messages that name it.
        said = [path.read_text() for path in sorted(folder.glob("rank*.error"))]
        first = [text for text in said if "RankError" not in text] or said or [output]
        raise AssertionError(f"ranks {missing} gave no result:\n{first[0][-6000:]}")
    return [
        json.loads(path.read_text()) if (path := folder / f"rank{r}.json").is_file() else None for r in range(world)
    ]


def join_group(rank: int, world: int, folder: Path, timeout: timedelta = TIMEOUT, name: str = "rendezvous") -> None:
    """The default process group, on Gloo, of the ranks of this launch."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}", rank=rank, world_size=world, timeout=timeout)


def _rank(target: str, rank: int, world: int, folder: Path) -> None:
    module, _, function = target.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(rank, world, folder)
    except BaseException:
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
        raise
    unfinished = folder / f"rank{rank}.json.tmp"
    unfinished.write_text(json.dumps(result))
    unfinished.rename(folder / f"rank{rank}.json")


def _main(target: str, world: int, folder: Path) -> None:
    importlib.import_module(target.partition(":")[0])
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(target, rank, world, folder)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))


def wait_for(path: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)
