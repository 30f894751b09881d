"""Shares that level a single load vector exactly, by handing on what is too much from device to device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .layout import Moves
from .starts import balanced_layer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def level_layer(
    load: FloatArray, slots: IntArray, speed: FloatArray, moves: Moves
) -> tuple[IntArray, FloatArray] | None:
    """A layer's slots [P] and shares [E, G] in exact balance of one load vector [E], or None where this finds none.

    slots, speed: [G] of each device.
    """
    spare = int(slots.sum()) - len(load)
    if spare < len(slots) - 1 or len(moves.failures):
        return None
    # One slot is kept free on every device but the one with most, and more on the roomiest while there are any.
    kept = (np.arange(len(slots)) != int(slots.argmax())).astype(np.int64)
    for _ in range(spare - int(kept.sum())):
        kept[int((slots - kept).argmax())] += 1
    if (slots < kept).any():
        return None
    table = balanced_layer(load, slots - kept, speed / speed.mean(), moves.allowed)
    base = np.empty(len(load), dtype=np.int64)
    base[table] = np.repeat(np.arange(len(slots)), slots - kept)
    return level_shares(load, slots, speed, moves.allowed, base)


def level_shares(
    load: FloatArray, slots: IntArray, speed: FloatArray, allowed: BoolArray, base: IntArray
) -> tuple[IntArray, FloatArray] | None:
    """A layer's slots [P] and shares [E, G] under which every device carries load in proportion to its speed, or None.

    Wrap-around filling (McNaughton 1959): each device in turn, the least loaded first, is topped up to its due from one
    expert of the most loaded, and is done; at most G - 1 experts are split in two at a time, so G - 1 extra slots suffice.
    load: [E]. slots: [G]. speed: [G]. allowed: [E, G]. base: [E] the device of each expert, one of them at least a slot
    short of full everywhere but on one device. None where some expert to hand on would have to be two, or where the
    topped-up device may not hold it. Slots left over are given replicas of share 0.
    """
    experts, devices = allowed.shape
    due = load.sum() * speed / speed.sum()
    share = np.zeros((experts, devices))
    share[np.arange(experts), base] = 1.0
    held = share > 0
    carried = np.bincount(base, weights=load, minlength=devices)
    free = slots - np.bincount(base, minlength=devices)
    waiting = list(range(devices))
    while len(waiting) > 1:
        lack = (due - carried)[waiting]
        candidates = [
            d for d in np.argsort(-lack, kind="stable") if free[waiting[d]] > 0 or abs(lack[d]) <= 1e-12 * due.sum()
        ]
        if not candidates or lack[candidates[0]] < -1e-12 * due.sum():
            return None
        taker = waiting.pop(candidates[0])
        need = due[taker] - carried[taker]
        if need <= 1e-12 * due.sum():
            continue
        pieces = share[:, waiting] * load[:, None]
        fits = (pieces >= need) & ~held[:, [taker]] & allowed[:, [taker]]
        if not fits.any():
            return None
        over = np.where(fits.any(axis=0), (carried - due)[waiting], -np.inf)
        giver = int(over.argmax())
        # The smallest piece that is large enough: large ones stay for those who need more.
        expert = int(np.where(fits[:, giver], pieces[:, giver], np.inf).argmin())
        giver = waiting[giver]
        part = need / load[expert]
        share[expert, giver] -= part
        share[expert, taker] += part
        held[expert, taker] = True
        carried[giver] -= need
        carried[taker] += need
        free[taker] -= 1
    for device in range(devices):
        extra = np.flatnonzero(~held[:, device] & allowed[:, device])[: free[device]]
        if len(extra) < free[device]:
            return None
        held[extra, device] = True
    table = np.concatenate([np.flatnonzero(held[:, g]) for g in range(devices)]).astype(np.int64)
    return table, np.maximum(share, 0.0) / np.maximum(share, 0.0).sum(axis=1, keepdims=True)
