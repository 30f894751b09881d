"""Lowers the largest device load of slot tables, all layers at once, replicas of an expert sharing equally.

Slot i stands on device i // (slots / devices), device g in node g // (devices / nodes); no move leaves its node.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

# A gain below rounding is none, and would let two placements of one load alternate for ever.
_LEAST_GAIN = 1e-9
_CELLS = 1 << 21


def largest_load(load: FloatArray, table: IntArray, devices: int) -> FloatArray:
    """[L] load of the heaviest device, from expert loads [L, E] and a slot table [L, P]."""
    slot_load = np.take_along_axis(load / replica_counts(table, load.shape[1]), table, axis=1)
    return np.asarray(slot_load.reshape(len(table), devices, -1).sum(axis=2).max(axis=1))


def replica_counts(table: IntArray, experts: int) -> IntArray:
    """[L, E] slots of each expert in a slot table [L, P]; 1 for an expert without any, so that loads divide by it."""
    layers = len(table)
    flat = (table + (np.arange(layers) * experts)[:, None]).ravel()
    return np.maximum(np.bincount(flat, minlength=layers * experts).reshape(layers, experts), 1)


def lighten(load: FloatArray, table: IntArray, nodes: int, devices: int) -> IntArray:
    """[L, P] a table whose largest device load is at most that of `table` in every layer; load [L, E].

    Takes turns: slots of the heaviest device change places with slots of its node for as long as that lowers it, then
    an expert of that device takes over a slot of an expert with several; until neither helps.
    """
    table = table.copy()
    layers = np.arange(len(table))
    while len(layers):
        part = table[layers]
        slot_load = np.take_along_axis(load[layers] / replica_counts(part, load.shape[1]), part, axis=1)
        part = exchange(slot_load, part, nodes, devices)
        part, moved = _move_replicas(load[layers], part, nodes, devices)
        table[layers] = part
        layers = layers[moved]
    return table


def exchange(slot_load: FloatArray, table: IntArray, nodes: int, devices: int) -> IntArray:
    """[L, P] the slots of `table`, of loads `slot_load` [L, P], rearranged by the best swaps with the heaviest device."""
    table, slot_load = table.copy(), slot_load.astype(np.float64)
    if devices == nodes:
        return table
    slots = table.shape[1]
    block = max(1, _CELLS // (slots // devices * (slots // nodes)))
    for first in range(0, len(table), block):
        rows = slice(first, first + block)
        _exchange_in_block(slot_load[rows], table[rows], nodes, devices)
    return table


def _exchange_in_block(slot_load: FloatArray, table: IntArray, nodes: int, devices: int) -> None:
    """Rearranges both in place."""
    layers, slots = table.shape
    width, in_node = slots // devices, slots // nodes
    on_device, on_node = slot_load.reshape(layers, devices, width), slot_load.reshape(layers, nodes, in_node)
    loads = on_device.sum(axis=2)
    node_loads = loads.reshape(layers, nodes, devices // nodes)
    active = np.arange(layers)
    while len(active):
        heaviest = loads[active].argmax(axis=1)
        node = heaviest // (devices // nodes)
        peak = loads[active, heaviest]
        other = np.repeat(node_loads[active, node], width, axis=1)
        shift = on_device[active, heaviest][:, :, None] - on_node[active, node][:, None, :]
        after = np.maximum(peak[:, None, None] - shift, other[:, None, :] + shift).reshape(len(active), -1)
        best = after.argmin(axis=1)
        gains = after[np.arange(len(active)), best] < peak * (1 - _LEAST_GAIN)
        active, heaviest, node, best = active[gains], heaviest[gains], node[gains], best[gains]
        given, taken = heaviest * width + best // in_node, node * in_node + best % in_node
        for array in (table, slot_load):
            array[active, given], array[active, taken] = array[active, taken], array[active, given]
        for device in (heaviest, taken // width):
            loads[active, device] = on_device[active, device].sum(axis=1)


def _move_replicas(load: FloatArray, table: IntArray, nodes: int, devices: int) -> tuple[IntArray, BoolArray]:
    """Gives an expert of each layer's heaviest device another's slot, where that lowers the peak: (table, which did)."""
    layers, slots = table.shape
    table, moved = table.copy(), np.zeros(layers, dtype=bool)
    spare = slots - load.shape[1]
    if spare == 0:
        return table, moved
    donors = min(2 * spare, slots // nodes)
    cells = (slots // devices) * donors * (devices // nodes) + (slots // nodes) * donors
    block = max(1, _CELLS // cells)
    slot_load = np.take_along_axis(load / replica_counts(table, load.shape[1]), table, axis=1)
    loads = slot_load.reshape(layers, nodes, devices // nodes, -1).sum(axis=3)
    # A node keeps its load, so its devices are never all below their mean.
    movable = np.flatnonzero(loads.mean(axis=2).max(axis=1) < loads.max(axis=(1, 2)) * (1 - _LEAST_GAIN))
    for first in range(0, len(movable), block):
        rows = movable[first : first + block]
        table[rows], moved[rows] = _move_in_block(load[rows], table[rows], nodes, devices, donors)
    return table, moved


def _move_in_block(
    load: FloatArray, table: IntArray, nodes: int, devices: int, donors: int
) -> tuple[IntArray, BoolArray]:
    layers, slots = table.shape
    width, in_node, per_node = slots // devices, slots // nodes, devices // nodes
    counts = replica_counts(table, load.shape[1])
    slot_load = np.take_along_axis(load / counts, table, axis=1)
    loads = slot_load.reshape(layers, devices, width).sum(axis=2)
    row = np.arange(layers)
    heaviest = loads.argmax(axis=1)
    node, peak = heaviest // per_node, loads[row, heaviest]
    expert = table.reshape(layers, nodes, in_node)[row, node]
    # Slots of experts with several, as many a layer as the largest number of them; the padding is ruled out below.
    several = np.take_along_axis(counts, expert, axis=1) > 1
    slot = np.argsort(~several, axis=1, kind="stable")[:, :donors]
    giver, gives = np.take_along_axis(expert, slot, axis=1), np.take_along_axis(several, slot, axis=1)
    taker = table.reshape(layers, devices, width)[row, heaviest]
    giver_count = np.maximum(np.take_along_axis(counts, giver, axis=1), 2)
    giver_new = np.take_along_axis(load, giver, axis=1) / (giver_count - 1)
    giver_rise = giver_new - np.take_along_axis(load, giver, axis=1) / giver_count
    taker_count = np.take_along_axis(counts, taker, axis=1)
    taker_new = np.take_along_axis(load, taker, axis=1) / (taker_count + 1)
    taker_fall = np.take_along_axis(load, taker, axis=1) / taker_count - taker_new
    # after[l, t, s, g]: load of device g of the node once taker t has the slot of giver s.
    by_giver = _on_devices(giver, expert, per_node) * giver_rise[:, :, None]
    by_taker = _on_devices(taker, expert, per_node) * taker_fall[:, :, None]
    after = (
        loads.reshape(layers, nodes, per_node)[row, node][:, None, None, :] + by_giver[:, None] - by_taker[:, :, None]
    )
    change = taker_new[:, :, None] - giver_new[:, None, :]
    t, s = np.arange(width)[:, None], np.arange(slot.shape[1])
    after[row[:, None, None], t, s, (slot // width)[:, None, :]] += change
    value = after.max(axis=3)
    value[~(gives[:, None, :] & (taker[:, :, None] != giver[:, None, :]))] = np.inf
    best = value.reshape(layers, -1).argmin(axis=1)
    moved = value.reshape(layers, -1)[row, best] < peak * (1 - _LEAST_GAIN)
    chosen = node * in_node + slot[row, best % slot.shape[1]]
    result = table.copy()
    result[row[moved], chosen[moved]] = taker[row, best // slot.shape[1]][moved]
    return result, moved


def _on_devices(wanted: IntArray, expert: IntArray, devices: int) -> FloatArray:
    """[L, n, devices] replicas of the `wanted` [L, n] on each device, from the experts of its slots [L, slots]."""
    same = wanted[:, :, None] == expert[:, None, :]
    return np.asarray(same.reshape(*wanted.shape, devices, -1).sum(axis=3), dtype=np.float64)
