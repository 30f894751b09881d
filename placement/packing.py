"""Greedy balancing of many layers at once: who gets the spare slots, which device takes what, which swaps help.

L layers (any independent instances), E experts, G devices, n items to place, P slots of a layer. Every function breaks
ties towards the lower index, and computes in the precision of the loads it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._types import BoolArray, IntArray
from .errors import InputError

Weights = npt.NDArray[np.floating[Any]]

LEAST_GAIN = 1e-9
"""A gain below rounding is none, and would let two placements of one load alternate for ever."""
CELLS = 1 << 21
"""Cells of a temporary array at most: layers are worked on in blocks."""


def add_replicas(load: Weights, counts: IntArray, extra: int, most: IntArray | None = None) -> IntArray:
    """Gives further replicas one by one to whichever expert has the highest load a replica by then.

    Args:
        load: [L, E] load of each expert.
        counts: [L, E] replicas each has already, at least 1.
        extra: further replicas in each layer.
        most: [L, E] replicas that an expert may have; None for any number.

    Returns:
        [L, extra] the experts, in the order in which they were chosen.

    Raises:
        InputError: a layer's experts may not have so many replicas.
    """
    if most is not None:
        room = np.maximum(most - counts, 0).sum(axis=1)
        if len(room) and room.min() < extra:
            raise InputError(
                f"{extra} further replicas of the experts of a layer, but they may have only {int(room.min())} more"
            )
    rows, added = np.arange(len(load)), np.empty((len(load), extra), dtype=np.int64)
    load = np.asarray(load, dtype=np.result_type(load, 1.0))
    replicas = counts.astype(load.dtype)
    each = load / replicas
    if most is not None:
        each[counts >= most] = -1.0
    for turn in range(extra):
        chosen = each.argmax(axis=1)
        added[:, turn] = chosen
        replicas[rows, chosen] += 1
        each[rows, chosen] = load[rows, chosen] / replicas[rows, chosen]
        if most is not None:
            full = replicas[rows, chosen] >= most[rows, chosen]
            each[rows[full], chosen[full]] = -1.0
    return added


def replicate(load: Weights, slots: int, most: IntArray | None = None) -> IntArray:
    """[L, slots] experts: each once, then those that `add_replicas` chooses for the spare slots.

    Args:
        load: [L, E] load of each expert.
        slots: slots of a layer, at least E.
        most: [L, E] replicas that an expert may have; None for any number.

    Raises:
        InputError: fewer slots than experts, or more than the replicas that they may have.
    """
    layers, experts = load.shape
    if slots < experts:
        raise InputError(f"{slots} slots a layer must be at least the {experts} experts")
    once = np.tile(np.arange(experts), (layers, 1))
    return np.concatenate([once, add_replicas(load, np.ones_like(once), slots - experts, most)], axis=1)


def pack(weight: Weights, capacity: IntArray, carried: Weights | None = None) -> tuple[IntArray, IntArray]:
    """Places items heaviest first, each in the lightest pack that has a place left.

    Args:
        weight: [L, n] weight of each item.
        capacity: [G] items that each pack holds.
        carried: [G] weight that lies in each pack already; None for none.

    Returns:
        (pack of each item [L, n], its rank among the items of its pack [L, n]).

    Raises:
        InputError: more items than places.
    """
    layers, items = weight.shape
    if items > capacity.sum():
        raise InputError(f"{items} items to pack, but packs of {capacity.tolist()} hold only {int(capacity.sum())}")
    rows = np.arange(layers)
    total = np.zeros((layers, len(capacity)), dtype=np.result_type(weight, 1.0))
    if carried is not None:
        total += carried
    filled = np.zeros((layers, len(capacity)), dtype=np.int64)
    packs, ranks = np.empty((layers, items), dtype=np.int64), np.empty((layers, items), dtype=np.int64)
    # A full pack is made infinitely heavy, so that the lightest is always one with a place.
    total[:, capacity == 0] = np.inf
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        lightest = total.argmin(axis=1)
        packs[rows, item] = lightest
        ranks[rows, item] = filled[rows, lightest]
        filled[rows, lightest] += 1
        total[rows, lightest] += weight[rows, item]
        full = filled[rows, lightest] == capacity[lightest]
        total[rows[full], lightest[full]] = np.inf
    return packs, ranks


def deal(weight: Weights, expert: IntArray, capacity: IntArray, speed: Weights, allowed: BoolArray) -> IntArray:
    """Deals replicas in the order given, each to the device that is done first with it, no expert twice on a device.

    Args:
        weight: [L, n] load of each replica.
        expert: [L, n] expert of which it is one.
        capacity: [G] slots of each device.
        speed: [G] compute rate of each device.
        allowed: [L, E, G] where each expert may stand.

    Returns:
        [L, n] device of each replica; -1 where the devices left to it are full or hold its expert.
    """
    layers, replicas = weight.shape
    rows = np.arange(layers)
    open_to = allowed & (capacity > 0)
    free = np.tile(capacity, (layers, 1))
    busy = np.zeros((layers, len(capacity)))
    device = np.full((layers, replicas), -1, dtype=np.int64)
    for turn in range(replicas):
        mine = expert[:, turn]
        after = np.where(open_to[rows, mine], busy + weight[:, turn, None] / speed, np.inf)
        first = after.argmin(axis=1)
        placed = np.flatnonzero(np.isfinite(after[rows, first]))
        first = first[placed]
        device[placed, turn] = first
        busy[placed, first] = after[placed, first]
        free[placed, first] -= 1
        open_to[placed, mine[placed], first] = False
        full = free[placed, first] == 0
        open_to[placed[full], :, first[full]] = False
    return device


def steepest_swap(weight: Weights, devices: int, nodes: int = 1) -> IntArray:
    """Swaps slots of the heaviest device with slots of its node, the best swap first, until none lightens it.

    Slot i stands on device i // (P / devices), device g in node g // (devices / nodes).

    Args:
        weight: [L, P] load of each slot.
        devices: number of devices, which divides P.
        nodes: number of nodes, which divides the devices; slots stay in their node.

    Returns:
        [L, P] which slot's content each slot now has: `np.take_along_axis(table, result, axis=1)` rearranges a table.
    """
    layers, slots = weight.shape
    content = np.tile(np.arange(slots), (layers, 1))
    if devices == nodes:
        return content
    load = weight.astype(np.float64)
    block = max(1, CELLS // (slots // devices * (slots // nodes)))
    for first in range(0, layers, block):
        rows = slice(first, first + block)
        _swap_in_block(load[rows], content[rows], devices, nodes)
    return content


def _swap_in_block(slot_load: Weights, content: IntArray, devices: int, nodes: int) -> None:
    """Rearranges both [L, P] in place."""
    layers, slots = slot_load.shape
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
        gains = after[np.arange(len(active)), best] < peak * (1 - LEAST_GAIN)
        active, heaviest, node, best = active[gains], heaviest[gains], node[gains], best[gains]
        out, back = heaviest * width + best // in_node, node * in_node + best % in_node
        for array in (content, slot_load):
            array[active, out], array[active, back] = array[active, back], array[active, out]
        for device in (heaviest, back // width):
            loads[active, device] = on_device[active, device].sum(axis=1)
