"""Emulated devices: expert work that takes the time of a device of set rates, on each rank by itself.

Ranks that share a machine's cores finish sooner when others are idle, and later when they are not; devices of a cluster
do neither. Here a rank computes for real, and then sleeps until a device with these rates would have finished. The
rates leave cores free about half of the time, so that a rank's time depends on its own work alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd import Function

from moeplace.placement.model import ModelSpec
from moeplace.runtime.moe.expert_mlps import DelayedGradients, SwiGLU


@dataclass(frozen=True)
class Slowed:
    """SwiGLU experts of an emulated device, forward and backward.

    pair: seconds of a token in an expert, forward. expert: seconds of an expert that has any token. Backward takes
    twice as long: as long for the gradients of rows as for those of weights, which may be delayed.
    """

    pair: float = 25e-6
    expert: float = 300e-6

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        return SwiGLU().shapes(spec)

    def forward(self, row_ND: Tensor, count_S: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        seconds = self.pair * len(row_ND) + self.expert * int((count_S > 0).sum())
        delayed = DelayedGradients.under_way()
        backward = Stopwatch(seconds if delayed is not None else 2 * seconds)
        if delayed is not None:
            delayed.gradients = _Taking(seconds, delayed.gradients)  # type: ignore[method-assign]
        row_ND = _OnTheWayBack.apply(row_ND, backward.fill)  # type: ignore[no-untyped-call]
        watch = Stopwatch(seconds)
        watch.start()
        y_ND = SwiGLU().forward(row_ND, count_S, weights)
        watch.fill()
        result: Tensor = _OnTheWayBack.apply(y_ND, backward.start)  # type: ignore[no-untyped-call]
        return result


@dataclass(frozen=True)
class _Taking:
    """A function that takes so many seconds."""

    seconds: float
    function: Callable[[], Any]

    def __call__(self) -> Any:
        watch = Stopwatch(self.seconds)
        watch.start()
        result = self.function()
        watch.fill()
        return result


class Stopwatch:
    """From `start` to `fill`, which sleeps for what is missing of the seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._began = seconds, 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def fill(self) -> None:
        time.sleep(max(0.0, self._seconds - (time.perf_counter() - self._began)))


class _OnTheWayBack(Function):
    """The identity; in backward calls something when it is reached."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reached: Callable[[], None]) -> Tensor:
        ctx.reached = reached
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.reached()
        return gradient, None
