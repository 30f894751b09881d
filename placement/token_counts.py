"""Sums over the tokens of steps: who is reached, how often each expert is chosen, which transitions stay.

Shapes: S steps, T tokens of a block of steps (bounds: [S+1] where each begins), L layers, k experts a token, E experts,
G devices or nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

FloatArray = npt.NDArray[np.float64]
ChanceArray = npt.NDArray[np.float32]
Bounds = npt.NDArray[np.int64]
IdArray = npt.NDArray[np.unsignedinteger[Any]]


def chosen_share(ids: IdArray, share: npt.NDArray[np.floating[Any]]) -> ChanceArray:
    """[L, T, G] shares of a token's experts served there, summed over its experts. ids: [L, T, k]; share: [L, E, G]."""
    layers, tokens, k = ids.shape
    result = np.empty((layers, tokens, share.shape[2]), dtype=np.float32)
    ones, ends = np.ones(tokens * k, dtype=np.float32), np.arange(0, tokens * k + 1, k, dtype=np.int32)
    for layer in range(layers):
        # A row of one-hot sums a token: gathering rows of shares one expert after the other takes five times as long.
        chosen = csr_array((ones, ids[layer].ravel().astype(np.int32), ends), shape=(tokens, share.shape[1]))
        result[layer] = chosen @ share[layer].astype(np.float32, copy=False)
    return result


def reach_chance(ids: IdArray, share: npt.NDArray[np.floating[Any]], chosen: ChanceArray | None = None) -> ChanceArray:
    """[L, T, G] chance that any of a token's experts is served there. ids: [L, T, k]; share: [L, E, G].

    chosen: what `chosen_share` says of the same, where it is known already.
    """
    share = share.astype(np.float32, copy=False)
    if ((share == 0) | (share == 1)).all():
        return np.minimum(chosen_share(ids, share) if chosen is None else chosen, np.float32(1.0))
    result = np.empty((*ids.shape[:2], share.shape[2]), dtype=np.float32)
    for layer, missed in enumerate(1.0 - share):
        all_missed = missed[ids[layer, :, 0]]
        for rank in range(1, ids.shape[2]):
            all_missed *= missed.take(ids[layer, :, rank], axis=0)
        np.subtract(np.float32(1.0), all_missed, out=result[layer])
    return result


def expert_counts(ids: IdArray, bounds: Bounds, experts: int) -> FloatArray:
    """[S, L, E] tokens that chose each expert, from ids [L, T, k]."""
    layers = ids.shape[0]
    counts = np.empty((len(bounds) - 1, layers, experts))
    base = np.arange(layers)[:, None, None] * experts
    for s in range(len(bounds) - 1):
        flat = (ids[:, bounds[s] : bounds[s + 1]] + base).ravel()
        counts[s] = np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
    return counts


def transitions_kept(chosen: ChanceArray, top_k: int, bounds: Bounds) -> FloatArray:
    """[S, L-1] sum over tokens of the share of their k x k transitions that stay where they are, from `chosen_share`."""
    kept = np.einsum("ltg,ltg->lt", chosen[:-1], chosen[1:]) / top_k**2
    return sum_steps(kept, bounds)


def sum_steps(values: npt.NDArray[np.floating[Any]], bounds: Bounds) -> FloatArray:
    """[S, L, ...] sums over each step's tokens from [L, T, ...]; a step may be empty."""
    result = np.zeros((len(bounds) - 1, values.shape[0], *values.shape[2:]))
    filled = bounds[:-1] < bounds[1:]
    if filled.any() and values.shape[0]:
        summed = np.add.reduceat(values, bounds[:-1][filled], axis=1, dtype=np.float64)
        result[filled] = np.moveaxis(summed, 1, 0)
    return result
