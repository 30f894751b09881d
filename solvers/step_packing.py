"""Tables of slots that are level in every recorded step, in milliseconds: greedy by steps first, then exchanges.

What is minimised is a layer's largest device load of each step, summed over steps; replicas share equally, devices have
as many slots each, and none has an expert twice unless there is no other way.

L layers, S steps, E experts, P slots, G devices.
"""

from __future__ import annotations

import numpy as np

from .._types import FloatArray, IntArray
from ..placement.jit import kernel

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
    return _greedy_and_exchanges(by_layer, slots, devices, proposals, seed, as_published)


def lower_to(
    load: FloatArray, table: IntArray, published: IntArray, devices: int, proposals: int, seed: int = 0
) -> None:
    """Lowers layers of a table, in place, to where another ends that is lower: from that one with no expert twice on a
    device, and from their own, with more exchanges each time.

    Args:
        load: [S, L, E]. table, published: [L, P]. devices: G.
        proposals: exchanges tried a layer at first.
        seed: of the exchanges.
    """
    by_layer = np.ascontiguousarray(load.transpose(1, 2, 0), dtype=np.float64)
    _lower_to(by_layer, table, published, devices, proposals, seed)


def extrapolated(load: FloatArray, seed: int = 0) -> FloatArray:
    """[W + MIXES, L, E] workloads of one size, and mixes of them drawn at random and taken further from their mean.

    A table that is level for those is level for what changes as the workloads do, only more so.

    Args:
        load: [W, L, E] tokens of each workload.
        seed: of the mixes.
    """
    workloads, _, experts = load.shape
    total = load.sum(axis=2, keepdims=True)
    scaled = load / np.where(total > 0, total, 1.0) * experts
    mean = scaled.mean(axis=0)
    if workloads == 1:
        return np.asarray(scaled)
    weights = np.random.default_rng(seed).dirichlet(np.ones(workloads), size=MIXES) - 1.0 / workloads
    beyond = mean + FURTHER * np.tensordot(weights, scaled, axes=1)
    return np.concatenate([scaled, np.maximum(beyond, LEAST * mean)])


def largest_loads(load: FloatArray, table: IntArray, devices: int) -> FloatArray:
    """[S, L] largest device load of each step and layer, from loads [S, L, E] and a table [L, P]."""
    return np.asarray(_largest(np.ascontiguousarray(load.transpose(1, 2, 0), dtype=np.float64), table, devices).T)


@kernel
def _greedy_and_exchanges(
    load: FloatArray, slots: int, devices: int, proposals: int, seed: int, as_published: bool
) -> IntArray:
    """`pack_steps` of loads [L, E, S]."""
    table = np.empty((load.shape[0], slots), dtype=np.int64)
    for layer in range(load.shape[0]):
        table[layer] = pack_layer(load[layer], replicate_layer(load[layer], slots, devices, 0.0), devices, False)
        exchange_layer(load[layer], table[layer], devices, proposals, seed + layer)
        if as_published:
            rule = pack_layer(load[layer], replicate_layer(load[layer], slots, slots, APART), devices, True)
            _reach_published(load[layer], table[layer], rule, devices, proposals, seed + layer)
    return table


@kernel
def _lower_to(load: FloatArray, table: IntArray, published: IntArray, devices: int, proposals: int, seed: int) -> None:
    """`lower_to` of loads [L, E, S]."""
    for layer in range(len(table)):
        _reach_published(load[layer], table[layer], published[layer].copy(), devices, proposals, seed + layer)


@kernel
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


@kernel
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
def _largest(load: FloatArray, table: IntArray, devices: int) -> FloatArray:
    """[L, S] from [L, E, S]."""
    result = np.empty((load.shape[0], load.shape[2]))
    for layer in range(load.shape[0]):
        result[layer] = _peak(load[layer], table[layer], devices)
    return result


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
