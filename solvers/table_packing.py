"""Tables of slots in milliseconds, compiled: level in every recorded step, and, further down, from one load table.

What steps minimise is a layer's largest device load of each, summed over steps: greedy first, then exchanges. Replicas
share equally, devices have as many slots each, and none has an expert twice unless there is no other way.

L layers, S steps, E experts, P slots, G devices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .._types import FloatArray, IntArray
from ..placement.jit import kernel
from ..placement.packing import LEAST_GAIN

HOT, COLD = 0.03, 0.001
"""Temperatures, in what the start has above the mean."""
APART = 1e-4
"""Tokens that DeepInfer's rule takes neighbours to differ by."""
EQUAL = 1e-12
"""Within which values are the same."""
TURNS, MOST = 5, 200_000
"""Tries, each with four times the exchanges of the last and at most so many, to end where a published rule does."""
MIXES, FURTHER, LEAST = 28, 4.0, 0.02
"""Mixes of workloads, how many times further from the mean than drawn, and what of its mean load an expert keeps."""
REPLICA_MOVES = 0.25
"""Of the proposals, that give a slot to another expert, where experts have several."""


def pack_steps(
    load: FloatArray, slots: int, devices: int, proposals: int, seed: int = 0, as_published: bool = False
) -> IntArray:
    """[L, P] the expert of each slot; slots in equal runs, a device each.

    Args:
        load: [S, L, E] of each step.
        slots: P, a multiple of devices, at least E.
        devices: G.
        proposals: exchanges tried a layer, after the greedy table.
        seed: of the exchanges.
        as_published: layers in which DeepInfer's rule ends lower begin anew from where it ends, with more exchanges.
    """
    by_layer = np.ascontiguousarray(load.transpose(1, 2, 0), dtype=np.float64)
    table = np.empty((len(by_layer), slots), dtype=np.int64)
    for layer, (steps, row) in enumerate(zip(by_layer, table, strict=True)):
        row[:] = pack_layer(steps, replicate_layer(steps, slots, devices, 0.0), devices, False)
        exchange_layer(steps, row, devices, proposals, seed + layer)
        if as_published:
            rule = pack_layer(steps, replicate_layer(steps, slots, slots, APART), devices, True)
            _reach_published(steps, row, rule, devices, proposals, seed + layer)
    return table


def lower_to(load: FloatArray, table: IntArray, published: IntArray, devices: int, proposals: int) -> None:
    """Lowers layers of a table, in place, to where another ends that is lower: from that one with no expert twice on a
    device, and from their own, with more exchanges each time.

    Args:
        load: [S, L, E]. table, published: [L, P]. devices: G.
        proposals: exchanges tried a layer at first.
    """
    by_layer = np.ascontiguousarray(load.transpose(1, 2, 0), dtype=np.float64)
    for layer, (steps, row, other) in enumerate(zip(by_layer, table, published, strict=True)):
        _reach_published(steps, row, other.copy(), devices, proposals, layer)


def extrapolated(load: FloatArray) -> FloatArray:
    """[W + MIXES, L, E] workloads of one size, and mixes of them drawn at random and taken further from their mean.

    A table that is level for those is level for what changes as the workloads do, only more so.

    Args:
        load: [W, L, E] tokens of each workload.
    """
    workloads, _, experts = load.shape
    total = load.sum(axis=2, keepdims=True)
    scaled = load / np.where(total > 0, total, 1.0) * experts
    mean = scaled.mean(axis=0)
    if workloads == 1:
        return np.asarray(scaled)
    weights = np.random.default_rng(0).dirichlet(np.ones(workloads), size=MIXES) - 1.0 / workloads
    beyond = mean + FURTHER * np.tensordot(weights, scaled, axes=1)
    return np.concatenate([scaled, np.maximum(beyond, LEAST * mean)])


def largest_loads(load: FloatArray, table: IntArray, devices: int) -> FloatArray:
    """[S, L] largest device load of each step and layer, from loads [S, L, E] and a table [L, P]."""
    by_layer = np.ascontiguousarray(load.transpose(1, 2, 0), dtype=np.float64)
    return np.stack([_peak(steps, row, devices) for steps, row in zip(by_layer, table, strict=True)], axis=1)


def _reach_published(
    load: FloatArray, table: IntArray, other: IntArray, devices: int, proposals: int, seed: int
) -> None:
    """Lowers a layer's table [P], in place, to where a published rule's table ends, if that is lower: from that table
    with no expert twice on a device, and from its own, with more exchanges each time. load: [E, S].

    The rule may put an expert twice on a device, and then end where no table without does.
    """
    goal = layer_value(load, other, devices)
    if layer_value(load, table, devices) <= goal * (1.0 + EQUAL):
        return
    if len(table) <= load.shape[0] * devices:
        part_layer(load, other, devices)
    reach(load, table, other, goal, devices, proposals, seed)


def reach(
    load: FloatArray, table: IntArray, other: IntArray, goal: float, devices: int, proposals: int, seed: int
) -> None:
    """Lowers a layer's table [P], in place, to a goal, if that can be found: to another table, then by exchanges that
    begin from either, more each time. load: [E, S]."""
    value = layer_value(load, table, devices)
    for turn in range(TURNS):
        if value <= goal * (1.0 + EQUAL):
            break
        tried = other.copy() if turn % 2 == 0 else table.copy()
        if turn:
            exchange_layer(load, tried, devices, min(MOST, proposals << (2 * turn)), seed + turn)
        new_value = layer_value(load, tried, devices)
        if new_value < value:
            value = new_value
            table[:] = tried


@kernel
def part_layer(load: FloatArray, table: IntArray, devices: int) -> None:
    """Takes experts that stand twice on a device from there, in place: a slot is exchanged with another's, or given to
    another expert, whichever is lowest then."""
    experts, steps = load.shape
    slots = len(table)
    width = slots // devices
    counts = np.bincount(table, minlength=experts)
    carried = np.zeros((devices, steps))
    for slot in range(slots):
        carried[slot // width] += load[table[slot]] / counts[table[slot]]
    without, tried = np.empty_like(carried), np.empty_like(carried)
    first, second, at = np.empty(steps), np.empty(steps), np.empty(steps, dtype=np.int64)
    head, following = np.empty(experts, dtype=np.int64), np.empty(slots, dtype=np.int64)
    for p in range(slots):
        g, e = p // width, table[p]
        if not stands(table, e, g * width, p):
            continue
        # Of the other devices, the two most loaded of each step.
        first[:], second[:], at[:] = 0.0, 0.0, -1
        for h in range(devices):
            for s in range(steps):
                if h != g and carried[h, s] > first[s]:
                    first[s], second[s], at[s] = carried[h, s], first[s], h
                elif h != g and carried[h, s] > second[s]:
                    second[s] = carried[h, s]
        least, best_slot, best_expert = np.inf, -1, -1
        for q in range(slots):
            h, f = q // width, table[q]
            if h == g or stands(table, e, h * width, (h + 1) * width) or stands(table, f, g * width, (g + 1) * width):
                continue
            value = 0.0
            for s in range(steps):
                shift = load[f, s] / counts[f] - load[e, s] / counts[e]
                largest = max(carried[g, s] + shift, carried[h, s] - shift)
                value += max(largest, second[s] if at[s] == h else first[s])
            if value < least:
                least, best_slot = value, q
        # The slots of each expert, and loads with one replica of e fewer.
        head[:] = -1
        without[:] = carried
        rise = load[e] / (counts[e] - 1) - load[e] / counts[e]
        for slot in range(slots):
            following[slot] = head[table[slot]]
            head[table[slot]] = slot
            if table[slot] == e:
                without[slot // width] += rise
        without[g] -= load[e] / (counts[e] - 1)
        for f in range(experts):
            if stands(table, f, g * width, (g + 1) * width):
                continue
            tried[:] = without
            slot = head[f]
            while slot >= 0:
                for s in range(steps):
                    tried[slot // width, s] += load[f, s] / (counts[f] + 1) - load[f, s] / counts[f]
                slot = following[slot]
            value = 0.0
            for s in range(steps):
                largest = tried[g, s] + load[f, s] / (counts[f] + 1)
                for h in range(devices):
                    largest = max(largest, tried[h, s])
                value += largest
            if value < least:
                least, best_slot, best_expert = value, -1, f
        if best_slot >= 0:
            table[p], table[best_slot] = table[best_slot], e
        elif best_expert >= 0:
            table[p] = best_expert
            counts[e] -= 1
            counts[best_expert] += 1
        carried[:] = 0.0
        for slot in range(slots):
            carried[slot // width] += load[table[slot]] / counts[table[slot]]


@kernel
def layer_value(load: FloatArray, table: IntArray, devices: int) -> float:
    """The largest device load, summed over steps, of a layer's loads [E, S] in a table [P]."""
    return float(_peak(load, table, devices).sum())


@kernel
def _peak(load: FloatArray, table: IntArray, devices: int) -> FloatArray:
    """[S] the largest device load of each step, of a layer's loads [E, S] in a table [P]."""
    width = len(table) // devices
    counts = np.bincount(table, minlength=load.shape[0])
    peak = np.zeros(load.shape[1])
    for g in range(devices):
        carried = np.zeros(load.shape[1])
        for slot in range(g * width, (g + 1) * width):
            carried += load[table[slot]] / counts[table[slot]]
        peak = np.maximum(peak, carried)
    return peak


@kernel
def replicate_layer(load: FloatArray, slots: int, most: int, apart: float) -> IntArray:
    """[P] experts once each, then those that get a spare slot, no more than `most` where others may have more: who
    lowers the sum over steps of the largest load a replica most, of equals the one with most load a replica. load: [E,
    S]. apart: what loads of neighbours are taken to differ by, so that few are equal."""
    experts, steps = load.shape
    result = np.arange(slots)
    counts = np.ones(experts, dtype=np.int64)
    taken = load.copy()
    for e in range(experts):
        taken[e] += apart * e
    each = taken.T.copy()
    total = np.empty(experts)
    for e in range(experts):
        total[e] = taken[e].sum()
    first, second = np.full(steps, -1), np.full(steps, -1)
    for spare in range(experts, slots):
        gain = np.zeros(experts)
        for s in range(steps):
            # The two largest of a step stay what they are until one of them gets a replica.
            if first[s] < 0:
                first[s], second[s] = 0, -1
                for e in range(1, experts):
                    if each[s, e] > each[s, first[s]]:
                        first[s], second[s] = e, first[s]
                    elif second[s] < 0 or each[s, e] > each[s, second[s]]:
                        second[s] = e
            e = first[s]
            lower = load[e, s] / (counts[e] + 1)
            gain[e] += each[s, e] - max(lower, each[s, second[s]] if second[s] >= 0 else lower)
        for e in range(experts):
            if counts[e] >= most:
                gain[e] = -1.0
        best = int(np.argmax(gain))
        if apart == 0.0:
            for e in range(experts):
                near = gain[e] >= 0.0 and gain[e] >= gain[best] * (1.0 - 1e-12)
                if near and total[e] > total[best] * (1.0 + 1e-12):
                    best = e
        counts[best] += 1
        lowered = taken[best] / counts[best]
        total[best] = lowered.sum()
        for s in range(steps):
            each[s, best] = lowered[s]
            if first[s] == best or second[s] == best:
                first[s] = -1
        result[spare] = best
    return result


@kernel
def pack_layer(load: FloatArray, replicas: IntArray, devices: int, as_published: bool) -> IntArray:
    """[P] replicas from the heaviest on, each where the sum over steps of the largest load is lowest then.
    as_published: as DeepInfer's rule has it, on the first of equal devices, wherever else the expert stands."""
    experts, steps = load.shape
    slots = len(replicas)
    width = slots // devices
    counts = np.bincount(replicas, minlength=experts)
    weight = np.empty(slots)
    for slot in range(slots):
        weight[slot] = -load[replicas[slot]].sum() / counts[replicas[slot]]
    carried, peak = np.zeros((devices, steps)), np.zeros(steps)
    filled = np.zeros(devices, dtype=np.int64)
    table = np.full(slots, -1, dtype=np.int64)
    for slot in np.argsort(weight, kind="mergesort"):
        e = replicas[slot]
        part = load[e] / counts[e]
        best, least, least_load = -1, np.inf, np.inf
        ahead = peak.sum() - np.cumsum(peak)
        for twice in range(2):
            if twice and _make_room(table, carried, load, counts, filled, e):
                break
            for g in range(devices):
                apart = not twice and not as_published
                if filled[g] == width or (apart and stands(table, e, g * width, g * width + filled[g])):
                    continue
                value, total = 0.0, 0.0
                for s in range(steps):
                    value += max(peak[s], carried[g, s] + part[s])
                    # What is left adds its largest loads so far at least.
                    if value + ahead[s] > least * (1.0 + 1e-9):
                        value = np.inf
                        break
                if value == np.inf:
                    continue
                for s in range(steps):
                    total += carried[g, s]
                if as_published:
                    total = least_load
                # Far below the largest load every device is as good: the emptiest then.
                if value < least * (1.0 - 1e-12) or (value <= least * (1.0 + 1e-12) and total < least_load):
                    best, least, least_load = g, value, total
            if best >= 0:
                break
        if best < 0:
            for s in range(steps):
                peak[s] = carried[:, s].max()
            continue
        table[best * width + filled[best]] = e
        filled[best] += 1
        carried[best] += part
        peak = np.maximum(peak, carried[best])
    return table


@kernel
def _make_room(
    table: IntArray, carried: FloatArray, load: FloatArray, counts: IntArray, filled: IntArray, expert: int
) -> bool:
    """Places an expert that stands on all devices with free slots: on a full one, another of whose experts takes the
    free slot; whether that goes."""
    devices = len(filled)
    width = len(table) // devices
    for g in range(devices):
        if filled[g] == width:
            continue
        for slot in range(len(table)):
            other, there = table[slot], slot // width
            if there == g or filled[there] < width or other == expert:
                continue
            if stands(table, expert, there * width, (there + 1) * width):
                continue
            if stands(table, other, g * width, g * width + filled[g]):
                continue
            table[slot], table[g * width + filled[g]] = expert, other
            filled[g] += 1
            moved = load[other] / counts[other]
            carried[g] += moved
            carried[there] += load[expert] / counts[expert] - moved
            return True
    return False


@kernel
def stands(table: IntArray, expert: int, first: int, last: int) -> bool:
    """Whether an expert is in one of the slots from `first` to before `last`."""
    for slot in range(first, last):  # noqa: SIM110 (numba compiles no generators here)
        if table[slot] == expert:
            return True
    return False


@kernel
def exchange_layer(load: FloatArray, table: IntArray, devices: int, proposals: int, seed: int) -> None:
    """Annealing of one layer's table [P], in place: slots of devices that are some step's most loaded change places
    with others, or give their expert one more replica. Ends with the best table seen."""
    np.random.seed(seed)
    experts, steps = load.shape
    slots = len(table)
    width = slots // devices
    counts = np.zeros(experts, dtype=np.int64)
    for slot in range(slots):
        counts[table[slot]] += 1
    part = np.empty((experts, steps))
    for e in range(experts):
        part[e] = load[e] / max(1, counts[e])
    carried = np.zeros((steps, devices))
    for slot in range(slots):
        for s in range(steps):
            carried[s, slot // width] += part[table[slot], s]
    peak, at = np.zeros(steps), np.zeros(steps, dtype=np.int64)
    for s in range(steps):
        at[s] = np.argmax(carried[s])
        peak[s] = carried[s, at[s]]
    mean = load.sum() / devices
    value = peak.sum()
    least, best = value, table.copy()
    temperature = HOT * max(value - mean, 0.0) / max(1.0, np.sqrt(steps * 1.0))
    if value <= mean * (1.0 + 1e-9) or devices == 1:
        return
    cooling = (COLD / HOT) ** (1.0 / max(1, proposals))
    replicas = slots > experts
    # Loads after the exchange of the devices that it touches, which have a place each.
    new, fresh = np.empty((devices, steps)), np.empty(steps)
    touched, place, number = np.empty(devices, dtype=np.int64), np.full(devices, -1), 0
    for _ in range(proposals):
        temperature *= cooling
        a = at[np.random.randint(steps)]
        p, q = a * width + np.random.randint(width), np.random.randint(slots)
        b = q // width
        e, f = table[p], table[q]
        if e == f:
            continue
        for i in range(number):
            place[touched[i]] = -1
        number = 0
        moved = replicas and counts[f] > 1 and np.random.random() < REPLICA_MOVES
        if moved:
            # The expert of the loaded device takes over a slot of one that has several.
            if stands(table, e, b * width, (b + 1) * width):
                continue
            more, less = load[f] / (counts[f] - 1) - part[f], part[e] - load[e] / (counts[e] + 1)
            for slot in range(slots):
                if table[slot] != e and table[slot] != f:
                    continue
                g = slot // width
                if place[g] < 0:
                    place[g], touched[number] = number, g
                    for s in range(steps):
                        new[number, s] = carried[s, g]
                    number += 1
                if table[slot] == e:
                    new[place[g]] -= less
                else:
                    new[place[g]] += more
            new[place[b]] += load[e] / (counts[e] + 1) - load[f] / (counts[f] - 1)
        else:
            if a == b or stands(table, e, b * width, (b + 1) * width) or stands(table, f, a * width, (a + 1) * width):
                continue
            for s in range(steps):
                shift = part[f, s] - part[e, s]
                new[0, s], new[1, s] = carried[s, a] + shift, carried[s, b] - shift
            place[a], place[b], touched[0], touched[1], number = 0, 1, a, b, 2
        change = 0.0
        for s in range(steps):
            largest = peak[s] if place[at[s]] < 0 else 0.0
            for i in range(number):
                largest = max(largest, new[i, s])
            if largest < peak[s]:
                for g in range(devices):
                    if place[g] < 0:
                        largest = max(largest, carried[s, g])
            fresh[s] = largest
            change += largest - peak[s]
        if change > 0.0 and (temperature <= 0.0 or np.random.random() >= np.exp(-change / temperature)):
            continue
        if moved:
            counts[e] += 1
            counts[f] -= 1
            part[e], part[f] = load[e] / counts[e], load[f] / counts[f]
            table[q] = e
        else:
            table[p], table[q] = f, e
        for s in range(steps):
            for i in range(number):
                carried[s, touched[i]] = new[i, s]
            if place[at[s]] >= 0 or fresh[s] > peak[s]:
                at[s] = np.argmax(carried[s])
        peak[:] = fresh
        value += change
        if value < least * (1.0 - 1e-12):
            least = value
            best[:] = table
    table[:] = best


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


def level_tables(load: FloatArray, table: IntArray, nodes: int, devices: int) -> None:
    """Lightens each layer's heaviest device, in place, for as long as that goes.

    By the best exchange of one of its slots with one of its node, of two with two, else by dividing its slots and those
    of two more devices anew, else by giving an expert of it the slot of another that has several.

    No largest load rises, and no expert comes to stand twice on a device where it does not.

    Args:
        load: [L, E]. table: [L, P]. nodes: of as many devices. devices: G.
    """
    for loads, row in zip(load, table, strict=True):
        _level_layer(loads, row, devices // nodes, devices)


@kernel
def _level_layer(load: FloatArray, table: IntArray, per_node: int, devices: int) -> None:
    """`level_tables` of one layer: load [E], table [P]."""
    slots = len(table)
    width = slots // devices
    part, carried = np.empty(slots), np.empty(devices)
    counts = np.zeros(len(load), dtype=np.int64)
    for slot in range(slots):
        counts[table[slot]] += 1
    enough = load.sum() / devices * (1.0 + ENOUGH)
    for _ in range(MOST_EXCHANGES * slots):
        carried[:] = 0.0
        for slot in range(slots):
            part[slot] = load[table[slot]] / counts[table[slot]]
            carried[slot // width] += part[slot]
        if not _lighten(load, table, counts, part, carried, enough, per_node):
            break


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
