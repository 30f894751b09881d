"""Seconds that all ranks take for the same work at the same time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .ranks import Ranks

ROUNDS = 5
ROUND_SECONDS = 0.1
MOST_REPEATS = 1000


class Clock:
    """Times work that all ranks start together.

    On a GPU device events time it, so that a host that runs ahead does not count.
    """

    def __init__(self, ranks: Ranks, round_seconds: float = ROUND_SECONDS) -> None:
        self._ranks, self._round_seconds = ranks, round_seconds
        self._nothing = torch.zeros(1, device=ranks.device)

    def seconds(self, work: Callable[[], object], alone: int | None = None, apart: bool = False) -> float:
        """[s] of one call on this rank, the median of some rounds. Every rank calls this. alone: only that rank works.

        apart: ranks wait for each other before each call, untimed, so that it finds links at rest as a step does; else
        calls follow each other.
        """
        works = alone in (None, self._ranks.rank)
        once = max(self._ranks.gather(self._round(work, 1, apart) if works else 0.0))
        once = min(once, max(self._ranks.gather(self._round(work, 1, apart) if works else 0.0)))
        repeats = max(1, min(MOST_REPEATS, round(self._round_seconds / max(once, 1e-9))))
        rounds = []
        for _ in range(ROUNDS):
            dist.barrier()
            rounds.append(self._round(work, repeats, apart) / repeats if works else 0.0)
        dist.barrier()
        return statistics.median(rounds)

    def slowest(self, work: Callable[[], object]) -> float:
        """[s] from a start together to the end on the last rank, which is another one from call to call: the median."""
        once = max(self._ranks.gather(min(self._round(work, 1, True), self._round(work, 1, True))))
        calls = max(ROUNDS, min(MOST_REPEATS, round(ROUNDS * self._round_seconds / max(once, 1e-9))))
        every: list[list[float]] = [[]] * self._ranks.size
        dist.all_gather_object(every, self._spans(work, calls, True))
        return float(statistics.median(max(one) for one in zip(*every, strict=True)))

    def _round(self, work: Callable[[], object], repeats: int, apart: bool) -> float:
        return sum(self._spans(work, repeats, apart))

    def _spans(self, work: Callable[[], object], repeats: int, apart: bool) -> list[float]:
        spans = []
        for calls in [1] * repeats if apart else [repeats]:
            if apart:
                # On a GPU this waits in the stream, where a barrier would stop the host.
                dist.all_reduce(self._nothing)
            began = self._mark()
            for _ in range(calls):
                work()
            spans.append((began, self._mark()))
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        return [_between(began, ended) for began, ended in spans]

    def _mark(self) -> Any:
        """This moment, of the host or of the device's stream."""
        if self._ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _between(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return float(ended - began)
    return float(began.elapsed_time(ended)) / 1e3
