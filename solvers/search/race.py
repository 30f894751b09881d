"""Several starts, one race: a short cold walk from each tells, layer by layer, which basin is the deepest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..base import Budget
from .engine import Engine
from .layout import Aim
from .pace import Pace

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Start = tuple[list[IntArray], list[FloatArray]]

EFFORT = 20
"""A walk gets one part in so many of all effort."""
WARM, COLD = 3e-2, 1e-3
"""Temperatures of the walks, in typical changes: cold enough to stay in the basin a start lies in."""


def race(engine: Engine, starts: Sequence[Start], aims: Sequence[Aim], budget: Budget, proposals: int) -> Start:
    """(slot tables, shares) of the best layers after a walk from each start. Layers must not depend on each other."""
    if len(starts) == 1:
        return starts[0]
    runners = []
    for start in starts:
        brief = Budget(None if budget.left is None else budget.left / EFFORT, budget.seed)
        engine.start(*start, aims)
        pace = Pace(brief, max(1, proposals // EFFORT), rounds=2)
        for turn in range(2):
            with pace.timing():
                engine.run(aims, pace.proposals(turn), WARM, COLD)
        runners.append(engine.states)
    best = [min(layers, key=lambda state: state.value).best for layers in zip(*runners, strict=True)]
    return [layer.slot_expert for layer in best], [layer.share for layer in best]
