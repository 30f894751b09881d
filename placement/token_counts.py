"""Sums over the tokens of steps: who is reached, how often each expert is chosen, which transitions stay.

Shapes: S steps, T tokens of a block of steps (bounds: [S+1] where each begins), L layers, k experts a token, E experts,
G devices or nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
ChanceArray = npt.NDArray[np.float32]
Bounds = npt.NDArray[np.int64]
IdArray = npt.NDArray[np.unsignedinteger[Any]]


def reach_chance(ids: IdArray, share: npt.NDArray[np.floating[Any]]) -> ChanceArray:
    """[L, T, G] chance that any of a token's experts is served there. ids: [L, T, k]; share: [L, E, G]."""
    layers = np.arange(ids.shape[0])[:, None]
    share = share.astype(np.float32, copy=False)
    if ((share == 0) | (share == 1)).all():
        where = share.argmax(axis=2)[layers[:, :, None], ids]
        result = np.zeros((*ids.shape[:2], share.shape[2]), dtype=np.float32)
        np.put_along_axis(result, where, np.float32(1.0), axis=2)
        return result
    missed = np.ones((*ids.shape[:2], share.shape[2]), dtype=np.float32)
    for rank in range(ids.shape[2]):
        missed *= 1.0 - share[layers, ids[:, :, rank]]
    return np.subtract(np.float32(1.0), missed)


def expert_counts(ids: IdArray, bounds: Bounds, experts: int) -> FloatArray:
    """[S, L, E] tokens that chose each expert, from ids [L, T, k]."""
    layers = ids.shape[0]
    counts = np.empty((len(bounds) - 1, layers, experts))
    base = np.arange(layers)[:, None, None] * experts
    for s in range(len(bounds) - 1):
        flat = (ids[:, bounds[s] : bounds[s + 1]] + base).ravel()
        counts[s] = np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
    return counts


def transitions_kept(ids: IdArray, share: npt.NDArray[np.floating[Any]], bounds: Bounds) -> FloatArray:
    """[S, L-1] sum over tokens of the share of their k x k transitions that stay where they are. share: [L, E, G]."""
    layers = np.arange(ids.shape[0])[:, None]
    share = share.astype(np.float32, copy=False)
    mass = share[layers, ids[:, :, 0]]
    for rank in range(1, ids.shape[2]):
        mass = mass + share[layers, ids[:, :, rank]]
    kept = np.einsum("ltg,ltg->lt", mass[:-1], mass[1:]) / ids.shape[2] ** 2
    return sum_steps(kept, bounds)


def sum_steps(values: npt.NDArray[np.floating[Any]], bounds: Bounds) -> FloatArray:
    """[S, L, ...] sums over each step's tokens from [L, T, ...]; a step may be empty."""
    result = np.zeros((len(bounds) - 1, values.shape[0], *values.shape[2:]))
    filled = bounds[:-1] < bounds[1:]
    if filled.any() and values.shape[0]:
        summed = np.add.reduceat(values, bounds[:-1][filled], axis=1, dtype=np.float64)
        result[filled] = np.moveaxis(summed, 1, 0)
    return result
