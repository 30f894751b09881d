"""The same ledgers for the commonest move, two whole experts changing places: bit sets instead of probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def _post_pair(
    ledgers: Any, node_of: Any, dedup: bool, node_ledgers: Any, s: int, w: int, h: int, g: int, x: float
) -> None:
    """Adds x tokens from device h to device g to ledger w of step s; merging by node is left to `_post_node`."""
    if node_of[h] == node_of[g]:
        if g != h:
            ledgers[s, w, 0, h] += x
            ledgers[s, w, 1, g] += x
    elif dedup:
        ledgers[s, w, 2, g] += x
    else:
        node_ledgers[s, w, 0, node_of[h]] += x
        node_ledgers[s, w, 1, node_of[g]] += x


@njit(cache=True, nogil=True)
def _post_node(node_ledgers: Any, s: int, w: int, m: int, n: int, x: float) -> None:
    if m != n:
        node_ledgers[s, w, 0, m] += x
        node_ledgers[s, w, 1, n] += x


@njit(cache=True, nogil=True)
def _post_set(
    ledgers: Any, node_ledgers: Any, s: int, w: int, h: int, rows: Any, row: int, first: int, rates: Any, x: float
) -> None:
    """Adds a token from h to the devices rows[row, first:], each device and each node once."""
    seen, seen_nodes = np.uint64(0), np.uint64(0)
    one = np.uint64(1)
    for j in range(first, rows.shape[1]):
        g = rows[row, j]
        n = rates.node_of[g]
        bit, node_bit = one << np.uint64(g), one << np.uint64(n)
        if seen & bit == 0:
            seen |= bit
            _post_pair(ledgers, rates.node_of, rates.dedup, node_ledgers, s, w, h, g, x)
        if rates.dedup and seen_nodes & node_bit == 0:
            seen_nodes |= node_bit
            _post_node(node_ledgers, s, w, rates.node_of[h], n, x)


@njit(cache=True, nogil=True)
def _sets(rows: Any, first: int, node_of: Any) -> Any:
    """Bit sets of devices and nodes in both rows [2, k] from column `first` on: ([2] devices, [2] nodes)."""
    one = np.uint64(1)
    d0, d1, n0, n1 = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
    for j in range(first, rows.shape[1]):
        d0 |= one << np.uint64(rows[0, j])
        d1 |= one << np.uint64(rows[1, j])
        n0 |= one << np.uint64(node_of[rows[0, j]])
        n1 |= one << np.uint64(node_of[rows[1, j]])
    return d0, d1, n0, n1


@njit(cache=True, nogil=True)
def _post_difference(
    ledgers: Any, node_ledgers: Any, s: int, w: int, holder: int, sets: Any, g: int, h: int, rates: Any, x: float
) -> None:
    """Adds what a token's set of targets gains and loses, seen from one holder; only devices g and h can differ."""
    one = np.uint64(1)
    d0, d1, n0, n1 = sets
    for turn in range(2):
        d = g if turn == 0 else h
        change = float((d1 >> np.uint64(d)) & one) - float((d0 >> np.uint64(d)) & one)
        if change != 0.0:
            _post_pair(ledgers, rates.node_of, rates.dedup, node_ledgers, s, w, holder, d, x * change)
        n = rates.node_of[d]
        if rates.dedup and (turn == 0 or n != rates.node_of[g]):
            change = float((n1 >> np.uint64(n)) & one) - float((n0 >> np.uint64(n)) & one)
            if change != 0.0:
                _post_node(node_ledgers, s, w, rates.node_of[holder], n, x * change)


@njit(cache=True, nogil=True)
def exchange_traffic(
    layer: Any,
    held: Any,
    onward: Any,
    a: int,
    b: int,
    g: int,
    h: int,
    device_of: Any,
    rates: Any,
    ledgers: Any,
    node_ledgers: Any,
) -> None:
    """Traffic changes when whole expert a goes from device g to h and b from h to g (no replicas, at most 64 devices).

    held: [T] device before (-1: all evenly). onward: [T, k] devices of the next layer.
    """
    top_k, devices = layer.experts.shape[1], rates.node_of.shape[0]
    rows = np.empty((2, top_k), np.int64)
    for turn in range(2):
        expert = a if turn == 0 else b
        for i in range(layer.first[expert], layer.first[expert + 1]):
            t = layer.tokens[i]
            twice = False
            for j in range(top_k):
                e = layer.experts[t, j]
                twice |= turn == 1 and e == a
                d = device_of[e]
                rows[0, j] = d
                rows[1, j] = h if e == a else (g if e == b else d)
            if twice:
                continue
            s = layer.step_of[t]
            sets = _sets(rows, 0, rates.node_of)
            if held[t] >= 0:
                _post_difference(ledgers, node_ledgers, s, 0, held[t], sets, g, h, rates, 1.0)
            else:
                for d in range(devices):
                    _post_difference(ledgers, node_ledgers, s, 0, d, sets, g, h, rates, 1.0 / devices)
            if rows[0, 0] != rows[1, 0]:
                for side in range(2):
                    owner, sign = rows[side, 0], 2.0 * side - 1.0
                    _post_set(ledgers, node_ledgers, s, 1, owner, rows, side, 1, rates, sign)
                    _post_set(ledgers, node_ledgers, s, 2, owner, onward, t, 0, rates, sign)
            elif top_k > 1:
                sets = _sets(rows, 1, rates.node_of)
                _post_difference(ledgers, node_ledgers, s, 1, rows[0, 0], sets, g, h, rates, 1.0)


@njit(cache=True, nogil=True)
def whole_devices(share: Any) -> Any:
    """Device of each expert, for placements without replicas."""
    device_of = np.zeros(share.shape[0], np.int64)
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            if share[e, g] > 0.0:
                device_of[e] = g
    return device_of
