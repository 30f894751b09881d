"""The quick way down on one load vector: the best exchange with the heaviest device, for as long as one lowers it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel
from .proposals import survives
from .slots import slot_tables

LEAST_GAIN = 1e-9
"""A gain below rounding is none, and would let two placements of one load alternate for ever."""


@kernel
def settle(layer: Any, slot_expert: Any, slot_device: Any, share: Any, enough: float) -> Any:
    """(slot_expert, share) once no exchange lowers the heaviest device of `layer`'s first row, or it is at `enough`.

    layer: a `LoadLayer`. slot_expert: [P]. slot_device: [P]. share: [E, G].
    """
    experts, devices = share.shape
    slots = slot_expert.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at, _ = slot_tables(slot_expert, slot_device, experts, devices)
    carried, loads = np.empty(slots), np.zeros(devices)
    for p in range(slots):
        carried[p] = layer.rows[0, slot_expert[p]] * share[slot_expert[p], slot_device[p]]
        loads[slot_device[p]] += carried[p] * layer.slowness[slot_device[p]]
    strayed = (layer.stray * share).sum()
    allowed, failures = layer.moves.allowed, layer.moves.failures
    while True:
        g = int(loads.argmax())
        if loads[g] <= enough:
            break
        least, best_p, best_q = loads[g] * (1.0 - LEAST_GAIN), -1, -1
        for p in range(slots):
            if slot_device[p] != g:
                continue
            a = slot_expert[p]
            for q in range(slots):
                h = slot_device[q]
                less = carried[p] - carried[q]
                if h == g or less <= 0.0:
                    continue
                peak = max(loads[g] - less * layer.slowness[g], loads[h] + less * layer.slowness[h])
                if peak >= least:
                    continue
                b = slot_expert[q]
                if slot_at[a, h] >= 0 or slot_at[b, g] >= 0 or not allowed[a, h] or not allowed[b, g]:
                    continue
                if not survives(a, g, h, slot_at, failures) or not survives(b, h, g, slot_at, failures):
                    continue
                more = _strays(layer.stray, share, a, g, h) + _strays(layer.stray, share, b, h, g)
                if more > 0.0 and strayed + more > layer.limit:
                    continue
                least, best_p, best_q = peak, p, q
        if best_p < 0:
            break
        p, q = best_p, best_q
        h, a, b = slot_device[q], slot_expert[p], slot_expert[q]
        strayed += _strays(layer.stray, share, a, g, h) + _strays(layer.stray, share, b, h, g)
        less = carried[p] - carried[q]
        loads[g] -= less * layer.slowness[g]
        loads[h] += less * layer.slowness[h]
        carried[p], carried[q] = carried[q], carried[p]
        slot_at[a, g], slot_at[b, h], slot_at[a, h], slot_at[b, g] = -1, -1, q, p
        slot_expert[p], slot_expert[q] = b, a
        share[a, h], share[a, g] = share[a, g], 0.0
        share[b, g], share[b, h] = share[b, h], 0.0
    return slot_expert, share


@kernel
def _strays(stray: Any, share: Any, expert: int, left: int, joined: int) -> float:
    """What an expert's part on device `left` adds to the limited sum by moving to `joined`."""
    return share[expert, left] * (stray[expert, joined] - stray[expert, left])
