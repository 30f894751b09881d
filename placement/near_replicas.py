"""Sums over the tokens of steps where each takes replicas near its source rank.

Compiled, since a token whose rank is not known is looked at from every rank.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._types import FloatArray, IntArray
from .jit import kernel


@kernel
def near_sums(
    ids: npt.NDArray[np.unsignedinteger[Any]],
    bounds: IntArray,
    row: IntArray,
    share: npt.NDArray[np.float32],
    pairs: bool,
) -> tuple[FloatArray, FloatArray]:
    """([S, L, R, G] tokens of each step that need a device, by the row their shares stand in, [S, L-1] products of what
    a token chose in a layer and in the next, summed).

    Args:
        ids: [L, T, k] experts that tokens chose.
        bounds: [S+1] where each step begins.
        row: [T] of a token in the shares; one outside them is left out.
        share: [L, E, R, G] fractions of an expert's tokens that each device (or node) serves.
        pairs: whether a copy goes to every expert of a token, and not one to a device.
    """
    layers, _, top_k = ids.shape
    steps, rows, devices = len(bounds) - 1, share.shape[2], share.shape[3]
    reached, together = np.zeros((steps, layers, rows, devices)), np.zeros((steps, layers - 1))
    # Where two layers take turns, the last one's stays for the transition.
    chosen, missed = np.empty((2, devices), np.float32), np.empty(devices, np.float32)
    for s in range(steps):
        stays = np.zeros((layers, devices))
        for t in range(bounds[s], bounds[s + 1]):
            r = row[t]
            if r < 0 or r >= rows:
                continue
            for layer in range(layers):
                now, last = layer % 2, 1 - layer % 2
                for i in range(devices):
                    chosen[now, i] = 0.0
                    missed[i] = 1.0
                for j in range(top_k):
                    expert = ids[layer, t, j]
                    for i in range(devices):
                        part = share[layer, expert, r, i]
                        chosen[now, i] += part
                        missed[i] *= np.float32(1.0) - part
                if pairs:
                    for i in range(devices):
                        reached[s, layer, r, i] += chosen[now, i]
                else:
                    for i in range(devices):
                        reached[s, layer, r, i] += np.float32(1.0) - missed[i]
                if layer:
                    for i in range(devices):
                        stays[layer, i] += np.float64(chosen[now, i]) * np.float64(chosen[last, i])
        for layer in range(1, layers):
            together[s, layer - 1] = stays[layer].sum()
    return reached, together
