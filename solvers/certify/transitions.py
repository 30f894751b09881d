"""How many transitions between neighbouring layers any placement can keep on one device: spectral and semidefinite bounds.

With X the Gram matrix of both layers' experts, the kept weight is the sum of the transition matrix times X's cross block. Without
any multipliers the bound is spectral: for equal slots C on G devices, total / G + C times the sum of the G - 1 largest singular
values of the doubly centred matrix. The walk adds what is known of X's entries (Zhao, Karisch, Rendl and Wolkowicz, J. Comb.
Optim. 2, 1998, for partitioning) and of triangles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..._types import FloatArray, IntArray
from .certify import CHUNK, CLOSED, MOST, THREADS
from .pieces import TRIANGLE_ITEMS, entry_limits, row_sums
from .sdp import GramSpace, Linear, Saddle, Term, Triangles


def spectral_kept(weights: FloatArray, slots: IntArray) -> float:
    """Upper bound of the weight [E, E] kept between two layers, by one decomposition. slots: [G]."""
    return -GramSpace.of(np.tile(slots, (2, 1)), len(weights)).least(_cost(weights))


def kept_at_most(
    transitions: FloatArray,
    slots: IntArray,
    seconds: float,
    iterations: int = MOST,
    tell: Callable[[float], None] = lambda kept: None,
) -> float:
    """Upper bound of the weight of transitions [L-1, E, E] that any placement on devices of `slots` [G] keeps on a device.

    Pairs of layers are bounded apart. Ends when the seconds are spent (each pair is bounded spectrally even so), after so many
    iterations of each, or when nothing is left to gain; tells the bound as it falls.
    """
    end = time.perf_counter() + seconds
    spectral = np.array([min(spectral_kept(weights, slots), float(weights.sum())) for weights in transitions])
    if time.perf_counter() >= end:
        return float(spectral.sum())
    walks = [_saddle(weights, slots) for weights in transitions]

    def walk(saddle: Saddle) -> None:
        if time.perf_counter() < end:
            saddle.run(CHUNK)

    best = spectral
    with ThreadPoolExecutor(THREADS) as pool:
        while open_ := [saddle for saddle in walks if not _closed(saddle, iterations)]:
            if time.perf_counter() >= end:
                break
            list(pool.map(walk, open_))
            best = np.minimum(best, [-saddle.bound for saddle in walks])
            tell(float(best.sum()))
    return float(best.sum())


def _saddle(weights: FloatArray, slots: IntArray) -> Saddle:
    both = np.tile(slots, (2, 1))
    space = GramSpace.of(both, len(weights))
    terms: list[Term] = [Linear(_cost(weights)), entry_limits(space, both)]
    if not space.even:
        terms.append(row_sums(space, both))
    if space.items <= TRIANGLE_ITEMS:
        terms.append(Triangles(space.items, space.holders))
    return Saddle(space, terms)


def _cost(weights: FloatArray) -> FloatArray:
    """[2E, 2E] symmetric, so that <cost, X> is what is kept, negative."""
    nothing = np.zeros_like(weights)
    return -0.5 * np.block([[nothing, weights], [weights.T, nothing]])


def _closed(saddle: Saddle, iterations: int) -> bool:
    if saddle.iterations >= iterations:
        return True
    cost = saddle.relaxed_cost
    return saddle.iterations > 0 and saddle.bound >= cost - CLOSED * abs(cost)
