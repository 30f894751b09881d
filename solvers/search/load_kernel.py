"""Balancing one layer on several load vectors at once, where loads are all that is known.

The figure is a weighted mean over load rows of the heaviest device's load. It has plateaus: a move that leaves every
row's heaviest device alone changes nothing. So the walk follows, for each row, the soft maximum
(1 / sharpness) ln sum_g exp(sharpness * load_g), which falls when any heavy device gets lighter, and which takes two
exponentials a row and exchange. The figure itself decides what is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..compiled import kernel
from .layout import Moves
from .proposals import survives
from .slots import accepted, slot_tables

Floats = npt.NDArray[np.float64]

REFRESH = 4096
"""Proposals after which sums are made anew, so that rounding does not add up."""
LOST = 1e-6
"""A sum of exponentials that has changed by this factor is made anew too, from another zero."""
MOST = 600.0
"""An exponent's limit: a row that counts little may rise far beside those that sharpness was chosen for."""
COOLED = 0.01
"""The last temperature, relative to the first."""
REPLICA_MOVES, SHARE_MOVES = 0.3, 0.25
"""Of all proposals, how many give a slot to another expert, and, with free shares, how many shift share."""
AIMED = 0.5
"""How many take their first slot from a row's heaviest device rather than from anywhere."""


class LoadLayer(NamedTuple):
    """One layer as the kernel reads it. K load rows, E experts, G devices.

    rows: [K, E], each summing to 1. weight: [K], summing to 1. slowness: [G], such that a row spread in proportion to
    speed gives every device 1. stray: [E, G] what all of an expert's load on a device adds to a sum that may not
    exceed `limit`.
    """

    rows: Floats
    weight: Floats
    slowness: Floats
    stray: Floats
    limit: float
    moves: Moves


@kernel
def balance_loads(
    layer: Any,
    slot_expert: Any,
    slot_device: Any,
    share: Any,
    proposals: int,
    sharpness: float,
    hot: float,
    enough: float,
    seed: int,
) -> Any:
    """Anneals for `proposals`, from temperature `hot` to a hundredth; ends early at a figure of at most `enough`.

    slot_expert: [P]. slot_device: [P]. share: [E, G]. No expert may stand twice on one device.
    Returns the best placement seen, the start included: (slot_expert, share).
    """
    np.random.seed(seed)
    experts, devices = share.shape
    rows = layer.rows.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at, replicas = slot_tables(slot_expert, slot_device, experts, devices)
    first_slot, width = _runs(slot_device, devices)
    loads, lifted = np.empty((rows, devices)), np.empty((rows, devices))
    heaviest, zero, sums = np.zeros(rows, np.int64), np.empty(rows), np.empty(rows)
    changes = (np.empty(2 * devices, np.int64), np.empty(2 * devices, np.int64), np.empty(2 * devices))
    where, touched = np.full(devices, -1, np.int64), np.empty(devices, np.int64)
    shift, risen = np.zeros((rows, devices)), np.empty((rows, devices))
    new_sums = np.empty(rows)
    best, best_expert, best_share = np.inf, slot_expert.copy(), share.copy()
    strayed, temperature = 0.0, hot
    # A row is aimed at as often as it counts.
    upto = np.cumsum(layer.weight)
    cooling = COOLED ** (1.0 / max(1, proposals))
    for turn in range(proposals + 1):
        if turn % REFRESH == 0 or turn == proposals:
            _load(layer, share, loads)
            value = _peaks(layer, loads, heaviest)
            _lift(loads, heaviest, sharpness, zero, lifted, sums)
            strayed = (layer.stray * share).sum()
            if value < best:
                best, best_expert[:], best_share[:] = value, slot_expert, share
            if best <= enough or turn == proposals:
                break
        temperature *= cooling
        p = np.random.randint(slot_expert.shape[0])
        if np.random.random() < AIMED:
            g = heaviest[min(rows - 1, np.searchsorted(upto, np.random.random() * upto[-1]))]
            p = first_slot[g] + np.random.randint(width[g])
        kind, q, b, count = _draw(layer, p, slot_expert, slot_device, slot_at, replicas, share, changes)
        if kind == 0:
            continue
        more = 0.0
        found = 0
        for i in range(count):
            e, g, part = changes[0][i], changes[1][i], changes[2][i]
            more += layer.stray[e, g] * part
            if where[g] < 0:
                where[g] = found
                touched[found] = g
                shift[:, found] = 0.0
                found += 1
            for k in range(rows):
                shift[k, where[g]] += layer.rows[k, e] * part * layer.slowness[g]
        for i in range(found):
            where[touched[i]] = -1
        if more > 0.0 and strayed + more > layer.limit:
            continue
        change = 0.0
        for k in range(rows):
            new_sums[k] = sums[k]
            for i in range(found):
                g = touched[i]
                risen[k, i] = np.exp(min(MOST, sharpness * (loads[k, g] + shift[k, i] - zero[k])))
                new_sums[k] += risen[k, i] - lifted[k, g]
            # What is left of a sum when nearly all is taken away is rounding.
            change += layer.weight[k] * np.log(max(new_sums[k] / sums[k], LOST))
        if not accepted(0.0, change / sharpness, temperature):
            continue
        strayed += more
        for k in range(rows):
            sums[k] = new_sums[k]
            for i in range(found):
                loads[k, touched[i]] += shift[k, i]
                lifted[k, touched[i]] = risen[k, i]
        for i in range(count):
            share[changes[0][i], changes[1][i]] += changes[2][i]
        _commit(kind, p, q, b, slot_expert, slot_device, slot_at, replicas, share)
        value = _peaks(layer, loads, heaviest)
        if sums.min() < LOST or sums.max() > 1.0 / LOST:
            _lift(loads, heaviest, sharpness, zero, lifted, sums)
        # Rounding alone is no progress; what follows copies the placement.
        if value < best * (1.0 - 1e-9):
            best, best_expert[:], best_share[:] = value, slot_expert, share
            if best <= enough:
                break
    return best_expert, best_share


@kernel
def _runs(slot_device: Any, devices: int) -> Any:
    """First slot and number of slots of each device."""
    first, width = np.zeros(devices, np.int64), np.zeros(devices, np.int64)
    for p in range(slot_device.shape[0] - 1, -1, -1):
        first[slot_device[p]] = p
        width[slot_device[p]] += 1
    return first, width


@kernel
def _load(layer: Any, share: Any, loads: Any) -> None:
    """Loads [K, G], slowness included, of shares [E, G]."""
    loads[:] = 0.0
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            if share[e, g] > 0.0:
                for k in range(loads.shape[0]):
                    loads[k, g] += layer.rows[k, e] * share[e, g] * layer.slowness[g]


@kernel
def _peaks(layer: Any, loads: Any, heaviest: Any) -> float:
    """The layer's figure; `heaviest` [K] gets each row's heaviest device."""
    value = 0.0
    for k in range(loads.shape[0]):
        top = 0
        for g in range(1, loads.shape[1]):
            if loads[k, g] > loads[k, top]:
                top = g
        heaviest[k] = top
        value += layer.weight[k] * loads[k, top]
    return value


@kernel
def _lift(loads: Any, heaviest: Any, sharpness: float, zero: Any, lifted: Any, sums: Any) -> None:
    """Exponentials [K, G] of loads over each row's heaviest, `zero` [K], and their sums [K]."""
    for k in range(loads.shape[0]):
        zero[k] = loads[k, heaviest[k]]
        sums[k] = 0.0
        for g in range(loads.shape[1]):
            lifted[k, g] = np.exp(sharpness * (loads[k, g] - zero[k]))
            sums[k] += lifted[k, g]


@kernel
def _draw(
    layer: Any, p: int, slot_expert: Any, slot_device: Any, slot_at: Any, replicas: Any, share: Any, changes: Any
) -> Any:
    """A random change that begins at slot p: (kind, slot q, expert b, how many changes of share it lists).

    Kinds: 0 none, 1 exchange p and q, 2 give p to b, 3 shift share from p to q. changes: (expert, device, amount).
    """
    experts, devices = share.shape
    g, a = slot_device[p], slot_expert[p]
    draw = np.random.random() if slot_expert.shape[0] > experts else 1.0
    if draw < REPLICA_MOVES:
        b = np.random.randint(experts)
        if replicas[a] < 2 or slot_at[b, g] >= 0 or not layer.moves.allowed[b, g]:
            return 0, p, a, 0
        if not survives(a, g, -1, slot_at, layer.moves.failures):
            return 0, p, a, 0
        count = 0
        part = 1.0 / (replicas[b] + 1.0)
        for h in range(devices):
            if h != g and slot_at[a, h] >= 0:
                if layer.moves.free:
                    gain = share[a, g] / (replicas[a] - 1.0)
                else:
                    gain = 1.0 / (replicas[a] - 1.0) - share[a, h]
                count = _list(changes, count, a, h, gain)
            if slot_at[b, h] >= 0:
                count = _list(changes, count, b, h, -share[b, h] * part if layer.moves.free else part - share[b, h])
        count = _list(changes, count, a, g, -share[a, g])
        return 2, p, b, _list(changes, count, b, g, part)
    if layer.moves.free and draw < REPLICA_MOVES + SHARE_MOVES:
        h = np.random.randint(devices)
        if h == g or slot_at[a, h] < 0 or share[a, g] <= 0.0:
            return 0, p, a, 0
        amount = share[a, g] * (1.0 if np.random.random() < 0.05 else np.random.random() ** 3)
        count = _list(changes, 0, a, g, -amount)
        return 3, slot_at[a, h], a, _list(changes, count, a, h, amount)
    q = np.random.randint(slot_expert.shape[0])
    h, b = slot_device[q], slot_expert[q]
    if slot_at[a, h] >= 0 or slot_at[b, g] >= 0 or not layer.moves.allowed[a, h] or not layer.moves.allowed[b, g]:
        return 0, p, a, 0
    failures = layer.moves.failures
    if not survives(a, g, h, slot_at, failures) or not survives(b, h, g, slot_at, failures):
        return 0, p, a, 0
    count = _list(changes, 0, a, g, -share[a, g])
    count = _list(changes, count, a, h, share[a, g])
    count = _list(changes, count, b, h, -share[b, h])
    return 1, q, b, _list(changes, count, b, g, share[b, h])


@kernel
def _list(changes: Any, count: int, expert: int, device: int, amount: float) -> int:
    changes[0][count], changes[1][count], changes[2][count] = expert, device, amount
    return count + 1


@kernel
def _commit(
    kind: int, p: int, q: int, b: int, slot_expert: Any, slot_device: Any, slot_at: Any, replicas: Any, share: Any
) -> None:
    """Carries out on slots what `_draw` proposed; a share that rounding left beside 0 becomes 0."""
    a, g, h = slot_expert[p], slot_device[p], slot_device[q]
    if kind == 3:
        if share[a, g] < 1e-12:
            share[a, h] += share[a, g]
            share[a, g] = 0.0
        return
    share[a, g] = 0.0
    slot_at[a, g] = -1
    slot_at[b, g] = p
    slot_expert[p] = b
    if kind == 1:
        share[b, h] = 0.0
        slot_at[b, h] = -1
        slot_at[a, h] = q
        slot_expert[q] = a
    else:
        replicas[a] -= 1
        replicas[b] += 1
