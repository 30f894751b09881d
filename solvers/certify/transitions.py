"""How many transitions between neighbouring layers a placement can keep on a device: spectral and semidefinite bounds.

With X the Gram matrix of both layers' experts, the kept weight is the sum of the transition matrix times X's cross
block. Without any dual variables the bound is spectral: for equal slots C on G devices, total / G + C times the sum of
the G - 1 largest singular values of the doubly centred matrix. The semidefinite program adds what is known of X's
entries (Zhao, Karisch, Rendl and Wolkowicz, J. Comb. Optim. 2, 1998, for partitioning) and of triangles.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..._types import FloatArray, IntArray
from .sdp import (
    CHUNK,
    MAX_ITERATIONS,
    THREADS,
    TRIANGLE_ITEMS,
    Entries,
    GramSpace,
    Linear,
    PrimalDual,
    RowSums,
    Term,
    Triangles,
)


def spectral_kept(weights: FloatArray, slots: IntArray) -> float:
    """Upper bound of the weight [E, E] kept between two layers, by one decomposition. slots: [G]."""
    return -GramSpace.of(np.tile(slots, (2, 1)), len(weights)).least(_cost(weights))


def kept_at_most(
    transitions: FloatArray,
    slots: IntArray,
    seconds: float,
    iterations: int = MAX_ITERATIONS,
    report: Callable[[float], None] = lambda kept: None,
) -> float:
    """Upper bound of the weight of transitions that any placement keeps on a device.

    Pairs of layers are bounded apart. Ends when the seconds are spent (each pair is bounded spectrally even so), or
    when nothing is left to gain.

    Args:
        transitions: [L-1, E, E] weight of each transition between neighbouring layers.
        slots: [G] of each device.
        seconds: to spend.
        iterations: of each pair, at most.
        report: called with the bound as it falls.
    """
    end = time.perf_counter() + seconds
    spectral = np.array([min(spectral_kept(weights, slots), float(weights.sum())) for weights in transitions])
    if time.perf_counter() >= end:
        return float(spectral.sum())
    pairs = [_relaxation(weights, slots) for weights in transitions]

    def iterate(pair: PrimalDual) -> None:
        if time.perf_counter() < end:
            pair.run(CHUNK)

    best = spectral
    with ThreadPoolExecutor(THREADS) as pool:
        while unsolved := [pair for pair in pairs if not pair.solved(iterations)]:
            if time.perf_counter() >= end:
                break
            list(pool.map(iterate, unsolved))
            best = np.minimum(best, [-pair.bound for pair in pairs])
            report(float(best.sum()))
    return float(best.sum())


def _relaxation(weights: FloatArray, slots: IntArray) -> PrimalDual:
    both = np.tile(slots, (2, 1))
    space = GramSpace.of(both, len(weights))
    terms: list[Term] = [Linear(_cost(weights)), Entries.of(space, both)]
    if not space.even:
        terms.append(RowSums.of(space, both))
    if space.items <= TRIANGLE_ITEMS:
        terms.append(Triangles(space.items, space.holders))
    return PrimalDual(space, terms)


def _cost(weights: FloatArray) -> FloatArray:
    """[2E, 2E] symmetric, so that <cost, X> is what is kept, negative."""
    nothing = np.zeros_like(weights)
    return -0.5 * np.block([[nothing, weights], [weights.T, nothing]])
