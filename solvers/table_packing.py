"""Tables of slots from one load table, compiled: the published greedy in a millisecond or two, and exchanges on top.

As `placement/packing.py` does for many layers at once in NumPy, with the same ties: the lower index goes first.

L layers, E experts, P slots, G devices; replicas share equally, devices have as many slots each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._types import FloatArray, IntArray
from ..placement.jit import kernel
from ..placement.packing import LEAST_GAIN
from .step_packing import layer_value, pack_layer, part_layer, reach, replicate_layer, stands

ENOUGH = 3e-4
"""Above the mean load: nearer to it no exchange is worth its time."""
MOST_EXCHANGES = 40
"""Of a layer, a slot."""
DIVIDED = (3, 4, 5)
"""Slots of a device for which all ways to divide three devices' are looked through."""
IN_COMMON = 1
"""Experts that the three may have in common."""
DIVISIONS = 6
"""Pairs of devices tried beside the heaviest."""


@kernel
def packed_tables(load: npt.NDArray[np.floating[Any]], slots: int, devices: int) -> IntArray:
    """[L, P] the published plan (`solvers/eplb.py`, one group and node) in the precision of the load [L, E].

    Spare slots go one by one to the highest load a replica, replicas from the heaviest on to the lightest device with a
    free slot."""
    layers, experts = load.shape
    width = slots // devices
    table = np.empty((layers, slots), dtype=np.int64)
    expert, each = np.empty(slots, dtype=np.int64), np.empty(slots, dtype=load.dtype)
    for layer in range(layers):
        counts, part = np.ones(experts, dtype=load.dtype), load[layer].copy()
        expert[:experts] = np.arange(experts)
        for extra in range(experts, slots):
            chosen = np.argmax(part)
            expert[extra] = chosen
            counts[chosen] += load.dtype.type(1)
            part[chosen] = load[layer, chosen] / counts[chosen]
        for slot in range(slots):
            each[slot] = -part[expert[slot]]
        carried, filled = np.zeros(devices, dtype=load.dtype), np.zeros(devices, dtype=np.int64)
        for slot in np.argsort(each, kind="mergesort"):
            lightest = -1
            for g in range(devices):
                if filled[g] < width and (lightest < 0 or carried[g] < carried[lightest]):
                    lightest = g
            table[layer, lightest * width + filled[lightest]] = expert[slot]
            filled[lightest] += 1
            carried[lightest] -= each[slot]
    return table


@kernel
def level_tables(load: FloatArray, table: IntArray, nodes: int, devices: int) -> None:
    """Lightens each layer's heaviest device, in place, for as long as that goes.

    By the best exchange of one of its slots with one of its node, of two with two, else by dividing its slots and those
    of two more devices anew, else by giving an expert of it the slot of another that has several.

    No largest load rises, and no expert comes to stand twice on a device where it does not.

    Args:
        load: [L, E]. table: [L, P]. nodes: of as many devices. devices: G.
    """
    layers, experts = load.shape
    slots = table.shape[1]
    width, per_node = slots // devices, devices // nodes
    part, carried = np.empty(slots), np.empty(devices)
    for layer in range(layers):
        counts = np.zeros(experts, dtype=np.int64)
        for slot in range(slots):
            counts[table[layer, slot]] += 1
        enough = load[layer].sum() / devices * (1.0 + ENOUGH)
        for _ in range(MOST_EXCHANGES * slots):
            carried[:] = 0.0
            for slot in range(slots):
                part[slot] = load[layer, table[layer, slot]] / counts[table[layer, slot]]
                carried[slot // width] += part[slot]
            if not _lighten(load[layer], table[layer], counts, part, carried, enough, per_node):
                break


@kernel
def part_tables(load: FloatArray, table: IntArray, goal: FloatArray, nodes: int, devices: int, proposals: int) -> None:
    """Makes layers anew, in place, that have an expert twice on a device: without one, and with a largest load of at
    most `goal`, if that can be found.

    Slots of a node must be no more than its experts times its devices. Groups stay on their nodes.

    Args:
        load: [L, E]. table: [L, P]. goal: [L]. nodes: of as many devices. devices: G.
        proposals: exchanges tried first where a node is above its goal; later more.
    """
    slots, per_node = table.shape[1], devices // nodes
    width, in_node = slots // devices, slots // nodes
    for layer in range(len(load)):
        for node in range(nodes):
            held = table[layer, node * in_node : (node + 1) * in_node]
            if not _stacked(held, width):
                continue
            experts = np.unique(held)
            apart = load[layer][experts].reshape(-1, 1)
            own = apart.reshape(1, -1)
            parted = np.searchsorted(experts, held).reshape(1, -1)
            part_layer(apart, parted[0], per_node)
            level_tables(own, parted, 1, per_node)
            if layer_value(apart, parted[0], per_node) <= own.sum() / per_node * (1.0 + ENOUGH):
                held[:] = experts[parted[0]]
                continue
            made = np.empty_like(parted)
            made[0] = pack_layer(apart, replicate_layer(apart, in_node, per_node, 0.0), per_node, False)
            level_tables(own, made, 1, per_node)
            if layer_value(apart, parted[0], per_node) < layer_value(apart, made[0], per_node):
                parted, made = made, parted
            reach(apart, made[0], parted[0], goal[layer], per_node, proposals, layer)
            held[:] = experts[made[0]]


@kernel
def _stacked(table: IntArray, width: int) -> bool:
    """Whether a device has an expert twice; table [P]."""
    for slot in range(len(table)):  # noqa: SIM110 (numba compiles no generators here)
        if stands(table, table[slot], slot // width * width, slot):
            return True
    return False


@kernel
def _lighten(
    load: FloatArray,
    table: IntArray,
    counts: IntArray,
    part: FloatArray,
    carried: FloatArray,
    enough: float,
    per_node: int,
) -> bool:
    """Exchanges until none helps, then three devices divided anew or one change of replicas: whether there was one.
    All is counted anew then."""
    slots, devices = len(table), len(carried)
    width = slots // devices
    while True:
        heavy = int(np.argmax(carried))
        peak = carried[heavy]
        if peak <= enough:
            return False
        first = heavy // per_node * per_node
        best, out, back = peak * (1.0 - LEAST_GAIN), -1, -1
        for g in range(first, first + per_node):
            if g == heavy or carried[g] >= best:
                continue
            for p in range(heavy * width, (heavy + 1) * width):
                for q in range(g * width, (g + 1) * width):
                    shift = part[p] - part[q]
                    if shift <= peak - best:
                        continue
                    largest = max(peak - shift, carried[g] + shift)
                    if (
                        largest < best
                        and not stands(table, table[p], g * width, (g + 1) * width)
                        and not stands(table, table[q], heavy * width, (heavy + 1) * width)
                    ):
                        best, out, back = largest, p, q
        if out >= 0:
            _swap(table, part, carried, out, back)
        elif not _exchange_pairs(table, part, carried, heavy, first, per_node, enough):
            break
    if _divide_anew(table, part, carried, heavy, first, per_node, enough):
        return True
    best, taker, giver = peak * (1.0 - LEAST_GAIN), -1, -1
    for q in range(first * width, (first + per_node) * width):
        f = table[q]
        if counts[f] < 2:
            continue
        g = q // width
        rise = load[f] / (counts[f] - 1) - part[q]
        for p in range(heavy * width, (heavy + 1) * width):
            e = table[p]
            if e == f or stands(table, e, g * width, (g + 1) * width):
                continue
            new = load[e] / (counts[e] + 1)
            largest = _with_change(table, carried, e, f, part[p] - new, rise, g, new - part[q] - rise, best)
            if largest < best:
                best, taker, giver = largest, e, q
    if giver < 0:
        return False
    counts[taker] += 1
    counts[table[giver]] -= 1
    table[giver] = taker
    return True


@kernel
def _exchange_pairs(
    table: IntArray, part: FloatArray, carried: FloatArray, heavy: int, first: int, per_node: int, enough: float
) -> bool:
    """Exchanges two slots of the heaviest device with two of another, the best such exchange or one that is enough;
    whether one helps."""
    width = len(table) // len(carried)
    peak = carried[heavy]
    best = peak * (1.0 - LEAST_GAIN)
    outs, backs = np.full(2, -1, dtype=np.int64), np.full(2, -1, dtype=np.int64)
    for g in range(first, first + per_node):
        if g == heavy or carried[g] >= best or best <= enough:
            continue
        for p in range(heavy * width, (heavy + 1) * width):
            for p2 in range(p + 1, (heavy + 1) * width):
                load_given = part[p] + part[p2]
                for q in range(g * width, (g + 1) * width):
                    for q2 in range(q + 1, (g + 1) * width):
                        shift = load_given - part[q] - part[q2]
                        if shift <= peak - best or carried[g] + shift >= best:
                            continue
                        free = True
                        for slot in (p, p2):
                            free = free and not stands(table, table[slot], g * width, (g + 1) * width)
                        for slot in (q, q2):
                            free = free and not stands(table, table[slot], heavy * width, (heavy + 1) * width)
                        if free:
                            best = max(peak - shift, carried[g] + shift)
                            outs[0], outs[1], backs[0], backs[1] = p, p2, q, q2
    if outs[0] < 0:
        return False
    _swap(table, part, carried, outs[0], backs[0])
    _swap(table, part, carried, outs[1], backs[1])
    return True


@kernel
def _divide_anew(
    table: IntArray, part: FloatArray, carried: FloatArray, heavy: int, first: int, per_node: int, enough: float
) -> bool:
    """Divides the slots of the heaviest device and of two others among the three anew, so that the heaviest of them is
    lightest or light enough; whether that helps. For devices of few slots, where exchanges soon end."""
    width = len(table) // len(carried)
    if width not in DIVIDED or per_node < 3:
        return False
    by_load = first + np.argsort(carried[first : first + per_node])
    slots = np.empty(3 * width, dtype=np.int64)
    tries = 0
    for upper in range(1, per_node):
        for lower in range(upper):
            a, b = by_load[lower], by_load[upper]
            if a == heavy or b == heavy:
                continue
            for i in range(width):
                slots[i], slots[width + i], slots[2 * width + i] = heavy * width + i, a * width + i, b * width + i
            again = 0
            for i in range(width, 3 * width):
                again += stands(table, table[slots[i]], heavy * width, (heavy + 1) * width)
                again += i < 2 * width and stands(table, table[slots[i]], b * width, (b + 1) * width)
            # What they have in common leaves few ways to divide them.
            if again > IN_COMMON:
                continue
            if tries == DIVISIONS:
                return False
            tries += 1
            ordered = slots[np.argsort(-part[slots])]
            division = _division(part[ordered], table[ordered], carried[heavy] * (1.0 - LEAST_GAIN), enough)
            if division[0] >= 0:
                table[slots] = table[ordered[division]]
                return True
    return False


@kernel
def _division(load: FloatArray, expert: IntArray, limit: float, enough: float) -> IntArray:
    """[3 width] an order of what is loaded on three devices, given from the heaviest on, of whose three equal runs the
    heaviest is below the limit, and lightest or light enough; beginning with -1 where there is none."""
    many = len(load)
    width = many // 3
    total, best = load.sum(), limit
    result, order, rest = np.full(many, -1), np.empty(many, dtype=np.int64), np.empty(many - width, dtype=np.int64)
    for third in _subsets(load, width, total - 2.0 * limit, limit):
        one = load[third].sum()
        if one >= best or total - one >= 2.0 * best:
            continue
        order[:width] = third
        _others(third, rest)
        for half in _subsets(load[rest], width, total - one - best, best):
            order[width : 2 * width] = rest[half]
            _others(half, order[2 * width :])
            order[2 * width :] = rest[order[2 * width :]]
            largest = max(one, load[order[width : 2 * width]].sum(), load[order[2 * width :]].sum())
            if largest < best and not _stacked(expert[order], width):
                best = largest
                result[:] = order
                if best <= enough:
                    return result
    return result


@kernel
def _subsets(load: FloatArray, width: int, least: float, limit: float) -> IntArray:
    """[subsets, width] all choices of the first and others of a descending load that add up to between the two."""
    many = len(load)
    result = np.empty((16, width), dtype=np.int64)
    number = 0
    chosen = np.arange(width)
    few = width - 2
    while True:
        begun = 0.0
        for i in range(few):
            begun += load[chosen[i]]
        # The last two: as the one gets lighter, the lightest that the other may be comes nearer.
        begin, end = chosen[few - 1] + 1, many
        if begun + load[many - 2] + load[many - 1] >= limit or begun + load[begin] + load[begin + 1] < least:
            begin = many
        for i in range(begin, many - 1):
            while end > i + 1 and begun + load[i] + load[end - 1] < least:
                end -= 1
            j = end - 1
            while j > i and begun + load[i] + load[j] < limit:
                if number == len(result):
                    result = np.concatenate((result, np.empty_like(result)))
                chosen[few], chosen[few + 1] = i, j
                result[number] = chosen
                number += 1
                j -= 1
        # The next choice of those before.
        i = few - 1
        while i > 0 and chosen[i] == many - width + i:
            i -= 1
        if i <= 0:
            return result[:number]
        chosen[i] += 1
        for j in range(i + 1, few):
            chosen[j] = chosen[j - 1] + 1


@kernel
def _others(chosen: IntArray, result: IntArray) -> None:
    """The numbers below as many as both that are not chosen, in order; those chosen are in order, too."""
    number, at = 0, 0
    for i in range(len(chosen) + len(result)):
        if at < len(chosen) and chosen[at] == i:
            at += 1
        else:
            result[number] = i
            number += 1


@kernel
def _swap(table: IntArray, part: FloatArray, carried: FloatArray, out: int, back: int) -> None:
    width = len(table) // len(carried)
    shift = part[out] - part[back]
    carried[out // width] -= shift
    carried[back // width] += shift
    part[out], part[back] = part[back], part[out]
    table[out], table[back] = table[back], table[out]


@kernel
def _with_change(
    table: IntArray,
    carried: FloatArray,
    taker: int,
    giver: int,
    fall: float,
    rise: float,
    device: int,
    change: float,
    limit: float,
) -> float:
    """Largest load once each replica of `taker` is lighter by `fall`, of `giver` heavier by `rise`, and `device` by
    `change` besides; some value of at least `limit` where it is not below."""
    width = len(table) // len(carried)
    largest = 0.0
    for g in range(len(carried)):
        total = carried[g] + (change if g == device else 0.0)
        for slot in range(g * width, (g + 1) * width):
            if table[slot] == taker:
                total -= fall
            elif table[slot] == giver:
                total += rise
        largest = max(largest, total)
        if largest >= limit:
            break
    return float(largest)
