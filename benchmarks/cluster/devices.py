"""Emulated devices: experts that take longer by a factor than the CPU time that they use, on each rank by itself.

Ranks that share a machine's cores finish sooner when others are idle; devices of a cluster do not. Here a rank computes for
real, and then sleeps until the factor times its own CPU time has passed since it began. With a factor well above ranks per core,
cores are mostly free, and a rank's time depends on its own work alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function

from moeplace.placement.model import ModelSpec
from moeplace.runtime.moe.expert_kinds import SwiGLU


class Stopwatch:
    """From `start` to `fill`, on one thread."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._began = (0.0, 0.0)

    def start(self) -> None:
        self._began = (time.perf_counter(), time.thread_time())

    def fill(self) -> None:
        """Sleeps for what is missing of the factor times the CPU time used."""
        wall, used = time.perf_counter() - self._began[0], time.thread_time() - self._began[1]
        time.sleep(max(0.0, self._factor * used - wall))


@dataclass(frozen=True)
class Slowed:
    """SwiGLU experts of an emulated device, forward and backward."""

    factor: float

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return SwiGLU().shapes(spec)

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        backward = Stopwatch(self.factor)
        row_ND = _Last.apply(row_ND, backward)  # type: ignore[no-untyped-call]
        watch = Stopwatch(self.factor)
        watch.start()
        y_ND = SwiGLU().forward(row_ND, count_S, weights)
        watch.fill()
        result: Tensor = _First.apply(y_ND, backward)  # type: ignore[no-untyped-call]
        return result


class _First(Function):
    """Behind the experts: the first of them in backward."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, watch: Stopwatch) -> Tensor:
        ctx.watch = watch
        return y_ND.view_as(y_ND)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.watch.start()
        return gradient, None


class _Last(Function):
    """Before the experts: the last of them in backward."""

    @staticmethod
    def forward(ctx: Any, row_ND: Tensor, watch: Stopwatch) -> Tensor:
        ctx.watch = watch
        return row_ND.view_as(row_ND)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.watch.fill()
        return gradient, None
