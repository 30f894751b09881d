"""Keep or apply, judged on count windows: what `decide` is for tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .decide import Decision, check_levels, conclude
from .errors import InputError
from .load_windows import window_weights, with_tokens
from .migration import migration
from .plan import Plan
from .problem import Problem
from .risk import risk_value, weighted_mean
from .window_cost import window_seconds

FloatArray = npt.NDArray[np.float64]
LEAST_BLOCKS = 4


def decide_on_counts(
    current: Plan,
    candidates: Sequence[Plan],
    load: FloatArray,
    problem: Problem,
    *,
    step_tokens: int,
    block: int = 4,
    resamples: int = 400,
    confidence: float = 0.95,
    horizon_steps: float = 100_000.0,
    seed: int = 0,
) -> Decision:
    """Judges candidates on held-out windows [S, L, E] in time order, priced by `window_seconds`.

    Windows count by the tokens they hold, those without any not at all (see `window_weights`). Draws are of blocks of
    neighbouring windows with replacement, since neighbours are alike (Kuensch 1989). The other arguments are those of
    `decide`.

    Raises:
        InputError: fewer than 4 blocks of windows with tokens, a level out of range, plans of another model or cluster.
    """
    check_levels(len(candidates), resamples, confidence, horizon_steps)
    load = load[with_tokens(load)]
    count = len(load) // block
    if count < LEAST_BLOCKS:
        raise InputError(
            f"{len(load)} held-out windows with tokens make {count} blocks of {block}; at least {LEAST_BLOCKS} are needed to judge on"
        )
    moves = [migration(current, plan) for plan in candidates]
    held = load[len(load) - count * block :]
    seconds = np.stack([window_seconds(plan, held, problem, step_tokens) for plan in (current, *candidates)])
    workload = np.zeros(len(held), np.int64)
    weight = window_weights(held).sum(axis=1)
    best = np.array([min(weighted_mean(row, weight) for row in seconds)])
    rng = np.random.default_rng(seed)
    draws = (rng.integers(count, size=(resamples, count))[:, :, None] * block + np.arange(block)).reshape(resamples, -1)
    figures = np.array(
        [
            [
                risk_value(row[chosen], workload, problem.objective, best, weight[chosen])
                for chosen in (np.arange(len(held)), *draws)
            ]
            for row in seconds
        ]
    )
    return conclude(figures, moves, confidence, horizon_steps)
