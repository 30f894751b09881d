"""Plain annealing over pair swaps, one layer after the other: devices a token, plus a weight times load max/mean of a
step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

import moeplace as mp

IntArray = npt.NDArray[np.int64]
HOT, COLD = 0.02, 1e-5


def plain_annealing(steps: mp.Steps, devices: int, weight: float, proposals: int, seed: int = 0) -> IntArray:
    """[L, E] device of each expert, equally many on each. proposals: swaps tried a layer."""
    loads = steps.loads().astype(np.float64)
    return np.stack(
        [
            _anneal(
                np.ascontiguousarray(steps.expert_ids[:, layer], dtype=np.int64),
                np.ascontiguousarray(loads[:, layer]),
                _heaviest_first(loads[:, layer].sum(axis=0), devices),
                devices,
                weight,
                proposals,
                seed,
            )
            for layer in range(steps.num_layers)
        ]
    )


def _heaviest_first(load: npt.NDArray[np.float64], devices: int) -> IntArray:
    device_of, held, loaded = np.zeros(len(load), np.int64), np.zeros(devices), np.zeros(devices)
    for expert in np.argsort(-load, kind="stable"):
        device = int(np.where(held < len(load) // devices, loaded, np.inf).argmin())
        device_of[expert] = device
        held[device] += 1
        loaded[device] += load[expert]
    return device_of


@njit(cache=True)
def _anneal(ids: Any, counts: Any, device_of: Any, devices: int, weight: float, proposals: int, seed: int) -> Any:
    np.random.seed(seed)
    tokens, k = ids.shape
    steps, experts = counts.shape
    on = np.zeros((tokens, devices), np.int8)
    load = np.zeros((steps, devices))
    for t in range(tokens):
        for j in range(k):
            on[t, device_of[ids[t, j]]] += 1
    for s in range(steps):
        for e in range(experts):
            load[s, device_of[e]] += counts[s, e]
    scale = weight * devices / counts.sum()
    reached = 0
    for t in range(tokens):
        for g in range(devices):
            reached += on[t, g] > 0
    heaviest = 0.0
    for s in range(steps):
        heaviest += load[s].max()
    value = reached / tokens + scale * heaviest
    best, answer = value, device_of.copy()
    for i in range(proposals):
        temperature = HOT * (COLD / HOT) ** (i / proposals)
        a, b = np.random.randint(experts), np.random.randint(experts)
        g, h = device_of[a], device_of[b]
        if g == h:
            continue
        more = 0
        for t in range(tokens):
            has_a, has_b = False, False
            for j in range(k):
                has_a |= ids[t, j] == a
                has_b |= ids[t, j] == b
            if has_a and not has_b:
                more += int(on[t, h] == 0) - int(on[t, g] == 1)
            elif has_b and not has_a:
                more += int(on[t, g] == 0) - int(on[t, h] == 1)
        heaviest = 0.0
        for s in range(steps):
            shift = counts[s, b] - counts[s, a]
            most = max(load[s, g] + shift, load[s, h] - shift)
            for other in range(devices):
                if other not in (g, h):
                    most = max(most, load[s, other])
            heaviest += most
        after = (reached + more) / tokens + scale * heaviest
        if after > value and np.random.random() >= np.exp((value - after) / temperature):
            continue
        for t in range(tokens):
            for j in range(k):
                if ids[t, j] == a:
                    on[t, g] -= 1
                    on[t, h] += 1
                elif ids[t, j] == b:
                    on[t, h] -= 1
                    on[t, g] += 1
        for s in range(steps):
            shift = counts[s, b] - counts[s, a]
            load[s, g] += shift
            load[s, h] -= shift
        device_of[a], device_of[b] = h, g
        reached += more
        value = after
        if value < best:
            best, answer = value, device_of.copy()
    return answer
