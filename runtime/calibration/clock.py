"""Seconds that all ranks take for the same work at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from .ranks import Ranks

ROUNDS = 5
ROUND_SECONDS = 0.1
MOST_REPEATS = 1000


class Clock:
    """Times work that all ranks start together and repeat without waiting for each other in between.

    On a GPU device events time it, so that a host that runs ahead does not count.
    """

    def __init__(self, ranks: Ranks, round_seconds: float = ROUND_SECONDS) -> None:
        self._ranks, self._round_seconds = ranks, round_seconds

    def seconds(self, work: Callable[[], object], alone: int | None = None) -> float:
        """[s] of one call on this rank, the median of some rounds. Every rank calls this. alone: only that rank works."""
        works = alone in (None, self._ranks.rank)
        once = max(self._ranks.gather(self._round(work, 1) if works else 0.0))
        once = min(once, max(self._ranks.gather(self._round(work, 1) if works else 0.0)))
        repeats = max(1, min(MOST_REPEATS, round(self._round_seconds / max(once, 1e-9))))
        rounds = []
        for _ in range(ROUNDS):
            dist.barrier()
            rounds.append(self._round(work, repeats) / repeats if works else 0.0)
        dist.barrier()
        return statistics.median(rounds)

    def _round(self, work: Callable[[], object], repeats: int) -> float:
        if self._ranks.device.type != "cuda":
            began = time.perf_counter()
            for _ in range(repeats):
                work()
            return time.perf_counter() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._ranks.device)
        first.record()
        for _ in range(repeats):
            work()
        last.record()
        torch.cuda.synchronize(self._ranks.device)
        return float(first.elapsed_time(last)) / 1e3
