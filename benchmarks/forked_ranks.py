"""Real Gloo ranks forked from a benchmark, for work that needs no cluster of its own."""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Found = TypeVar("Found")


def on_ranks(work: Callable[..., Found], ranks: int, *given: Any) -> list[Found]:
    """What `work(rank, ranks, *given)` returns on each rank, in no order; ends the program where a rank fails."""
    context = multiprocessing.get_context("fork")
    results: Queue[Any] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/rendezvous"
        processes = [
            context.Process(target=_one_rank, args=(work, rank, ranks, address, results, given))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a rank failed; its error is above")
    return [results.get() for _ in processes]


def _one_rank(
    work: Callable[..., Any], rank: int, ranks: int, address: str, results: Queue[Any], given: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=timedelta(minutes=30))
    found = work(rank, ranks, *given)
    dist.destroy_process_group()
    results.put(found)
