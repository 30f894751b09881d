"""What the tokens of one layer charge devices and links with: seconds of a step, and the work it is made of."""

from __future__ import annotations

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.jit import kernel
from .kernel_types import LayerTokens, Rates


@kernel
def compute_seconds(load: FloatArray, hit: FloatArray, rates: Rates) -> float:
    """The slowest device's, from token-expert pairs and experts read on each [G]."""
    pairs, slowest = 0.0, 0.0
    for g in range(load.shape[0]):
        pairs += load[g]
    for g in range(load.shape[0]):
        arithmetic = load[g] * rates.pair[0, g] + hit[g] * rates.read[0, g]
        reading = load[g] * rates.pair[1, g] + hit[g] * rates.read[1, g]
        slowest = max(slowest, rates.fixed[g] + rates.passing[g] * pairs + max(arithmetic, reading))
    return slowest


@kernel
def transfer_seconds(ledger: FloatArray, node_ledger: FloatArray, rates: Rates, kind: int) -> float:
    """Of one all-to-all of a kind, what no plan changes left out.

    ledger: [3, G] copies sent, received inside the node, arriving from other nodes; node_ledger: [2, N] sent, received.
    """
    slowest = 0.0
    first = 0
    for n in range(node_ledger.shape[1]):
        size = rates.node_size[n]
        last = first + int(size)
        arriving = 0.0
        for g in range(first, last):
            arriving += ledger[2, g]
        for g in range(first, last):
            sent = ledger[0, g] + (arriving - ledger[2, g]) / size
            received = ledger[1, g] + ledger[2, g] * (size - 1.0) / size
            slowest = max(slowest, max(sent, received) * rates.per_copy[kind, g])
        slowest = max(slowest, max(node_ledger[0, n], node_ledger[1, n]) * rates.per_node_copy[kind, n])
        first = last
    return slowest


@kernel
def post(ledger: FloatArray, node_ledger: FloatArray, h: int, g: int, amount: float, rates: Rates, dedup: bool) -> None:
    """Adds copies of tokens held by device h for device g. ledger: [3, G] sent, received inside the node, arriving from
    other nodes, to be fanned out; node_ledger: [2, N] sent, received, of copies that are not merged by node."""
    m, n = rates.node_of[h], rates.node_of[g]
    if m == n:
        if g != h:
            ledger[0, h] += amount
            ledger[1, g] += amount
    elif dedup:
        ledger[2, g] += amount
    else:
        node_ledger[0, m] += amount
        node_ledger[1, n] += amount


@kernel
def post_node(node_ledger: FloatArray, m: int, n: int, amount: float) -> None:
    """Adds tokens held in node m that need node n, where copies to its devices travel as one."""
    if m != n:
        node_ledger[0, m] += amount
        node_ledger[1, n] += amount


@kernel
def idle_chance(share: float, count: float) -> float:
    """Chance that none of `count` tokens draws a replica of that share."""
    if count == 0.0 or share == 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    return (1.0 - share) ** count


@kernel
def first_work(layer: LayerTokens, share: FloatArray, slot_at: IntArray) -> tuple[FloatArray, FloatArray]:
    """[S, G] token-expert pairs and experts hit on each device."""
    load = layer.counts @ share
    hit = np.zeros(load.shape)
    for s in range(load.shape[0]):
        for e in range(share.shape[0]):
            for g in range(share.shape[1]):
                if slot_at[e, g] >= 0:
                    hit[s, g] += 1.0 - idle_chance(share[e, g], layer.counts[s, e])
    return load, hit


@kernel
def shift_work(
    layer: LayerTokens, a: int, b: int, old: FloatArray, new: FloatArray, load: FloatArray, hit: FloatArray
) -> None:
    """Changes load and hit [S, G] when the rows of experts a and b (or -1) go from old to new ([2, G] each)."""
    for r in range(2):
        e = a if r == 0 else b
        if e < 0:
            continue
        for g in range(old.shape[1]):
            if old[r, g] != new[r, g]:
                for s in range(load.shape[0]):
                    count = layer.counts[s, e]
                    load[s, g] += count * (new[r, g] - old[r, g])
                    hit[s, g] += idle_chance(old[r, g], count) - idle_chance(new[r, g], count)
