"""What the tokens of one layer charge devices and links with: seconds of a step, and the work it is made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.jit import kernel
from .moves import Change, LayerTokens, Placement, Rates


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


# Loads of one layer whose steps' tokens are divided among replicas anew (`placement/division.py`), under proposals.
#
# For few devices the largest load is known exactly: tokens bound to each set of devices are kept, and a proposal shifts
# those of the one or two experts it touches. For more, each step's own division is kept, slot by slot; a proposal's is
# reached from it by letting each replicated expert in turn fill its devices from the lowest up. Some division has these
# loads, so that none is priced lower than it can be.

SETS_UP_TO = 9
"""Devices of which all sets are gone through."""
SWEEPS = 8
"""Over the experts with replicas, at most."""
LEVEL = 1e-3
"""Of the mean load, what a sweep has to change for another to follow."""


class DivisionState(NamedTuple):
    """What is known of a placement and, from `shift` on, of a change.

    counts: [E, S] tokens that chose each expert. sets: [S, 2^G] tokens of experts whose replicas all stand in each set,
    none where devices are many. size: [2^G] one over its devices. part: [S, P] tokens that slots compute, none where
    devices are few. shift: [2, 2^G] sets that gain and lose the experts of a change. new_part: [S, P], expert: [P]
    after it. replicated: [P] the experts that may be divided then; first, slots: CSR lists of their slots ([P + 1],
    [P]).
    """

    counts: FloatArray
    sets: FloatArray
    size: FloatArray
    part: FloatArray
    shift: FloatArray
    new_part: FloatArray
    expert: IntArray
    replicated: IntArray
    first: IntArray
    slots: IntArray


@kernel
def begin_division(counts: FloatArray, placement: Placement) -> DivisionState:
    """The state of a placement for counts [E, S] of each step's tokens; of no size for no steps."""
    experts, devices = placement.share.shape
    steps, slots = counts.shape[1], placement.slot_expert.shape[0]
    few = devices <= SETS_UP_TO
    width = 1 << devices if few else 1
    sets, size = np.zeros((steps if few else 0, width)), np.zeros(width)
    part = np.zeros((0 if few else steps, slots))
    if few:
        for e in range(experts):
            mask = _devices_of(placement, e)
            for s in range(steps):
                sets[s, mask] += counts[e, s]
        for g in range(devices):
            for i in range(width):
                if i >> g & 1:
                    size[i] += 1.0
                    for s in range(steps):
                        sets[s, i] += sets[s, i ^ (1 << g)]
        for i in range(1, width):
            size[i] = 1.0 / size[i]
    for s in range(part.shape[0]):
        for p in range(slots):
            e = placement.slot_expert[p]
            part[s, p] = counts[e, s] / placement.replicas[e]
    return DivisionState(
        counts,
        sets,
        size,
        part,
        np.zeros((2, width)),
        part.copy(),
        placement.slot_expert.copy(),
        np.zeros(slots, np.int64),
        np.zeros(slots + 1, np.int64),
        np.zeros(slots, np.int64),
    )


@kernel
def divide_steps(state: DivisionState, placement: Placement, change: Change, load: FloatArray) -> None:
    """Fills `load` [S, G] with what devices compute after a change (of kind 0: of none); the placement is the old
    one."""
    if state.sets.shape[0] > 0:
        _by_sets(state, placement, change, load)
    else:
        _by_filling(state, placement, change, load)


@kernel
def keep_division(state: DivisionState, change: Change) -> None:
    """Keeps a change that was divided last."""
    if change.kind == 1 or change.kind == 2:
        for s in range(state.sets.shape[0]):
            for turn in range(2):
                count = state.counts[change.a if turn == 0 else change.b, s]
                for i in range(state.sets.shape[1]):
                    state.sets[s, i] += state.shift[turn, i] * count
    for s in range(state.part.shape[0]):
        for p in range(state.part.shape[1]):
            state.part[s, p] = state.new_part[s, p]


@kernel
def _devices_of(placement: Placement, e: int) -> int:
    """The set of devices with a replica of an expert, as bits."""
    mask = 0
    for g in range(placement.share.shape[1]):
        if placement.slot_at[e, g] >= 0:
            mask |= 1 << g
    return mask


@kernel
def _by_sets(state: DivisionState, placement: Placement, change: Change, load: FloatArray) -> None:
    width, devices = state.sets.shape[1], load.shape[1]
    kind, p, q, a, b = change
    moves = kind == 1 or kind == 2
    if moves:
        g, h = placement.slot_device[p], placement.slot_device[max(q, 0)]
        for turn in range(2):
            old = _devices_of(placement, a if turn == 0 else b)
            # The first expert leaves slot p, which the other takes; of an exchange the other way round for slot q.
            new = old ^ (1 << g)
            if kind == 1:
                new ^= 1 << h
            for i in range(width):
                state.shift[turn, i] = (1.0 if new & i == new else 0.0) - (1.0 if old & i == old else 0.0)
    for s in range(load.shape[0]):
        count_a, count_b = (state.counts[a, s], state.counts[b, s]) if moves else (0.0, 0.0)
        best, tightest = 0.0, width - 1
        for i in range(1, width):
            average = (state.sets[s, i] + state.shift[0, i] * count_a + state.shift[1, i] * count_b) * state.size[i]
            if average > best:
                best = average
                tightest = i
        # Devices of the tightest set carry its average, the others what is left.
        inside = 1.0 / state.size[tightest]
        total = state.sets[s, width - 1]
        rest = (total - best * inside) / (devices - inside) if inside < devices - 0.5 else 0.0
        for d in range(devices):
            load[s, d] = best if tightest >> d & 1 else rest


@kernel
def _by_filling(state: DivisionState, placement: Placement, change: Change, load: FloatArray) -> None:
    kind, p, q, a, b = change
    slots, devices = placement.slot_expert.shape[0], load.shape[1]
    for slot in range(slots):
        state.expert[slot] = placement.slot_expert[slot]
    if kind == 1 or kind == 2:
        state.expert[p] = b
    if kind == 1:
        state.expert[q] = a
    number = _list_replicas(state, a if kind == 2 else -1)
    base, order = np.empty(devices), np.empty(devices, np.int64)
    for s in range(load.shape[0]):
        part, mean = state.new_part[s], 0.0
        for g in range(devices):
            load[s, g] = 0.0
        for slot in range(slots):
            part[slot] = state.part[s, slot]
        if kind == 1:
            part[p], part[q] = state.part[s, q], state.part[s, p]
        elif kind == 2:
            part[p] = 0.0
        for slot in range(slots):
            load[s, placement.slot_device[slot]] += part[slot]
            mean += part[slot] / devices
        for _ in range(SWEEPS):
            most = 0.0
            for i in range(number):
                first, last = state.first[i], state.first[i + 1]
                for j in range(first, last):
                    slot = state.slots[j]
                    base[j - first] = load[s, placement.slot_device[slot]] - part[slot]
                level = _level(base, order, last - first, state.counts[state.replicated[i], s])
                for j in range(first, last):
                    slot = state.slots[j]
                    filled = max(0.0, level - base[j - first])
                    most = max(most, abs(filled - part[slot]))
                    part[slot] = filled
                    load[s, placement.slot_device[slot]] = base[j - first] + filled
            if most <= LEVEL * mean:
                break


@kernel
def _list_replicas(state: DivisionState, also: int) -> int:
    """Lists the slots of experts that have several, and of expert `also`, and says how many such experts there are."""
    experts, slots = state.counts.shape[0], state.expert.shape[0]
    count, begin = np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    for slot in range(slots):
        count[state.expert[slot]] += 1
    number, filled = 0, 0
    for e in range(experts):
        if count[e] > 1 or e == also:
            state.first[number] = filled
            state.replicated[number] = e
            begin[e] = filled
            filled += count[e]
            number += 1
    state.first[number] = filled
    for slot in range(slots):
        e = state.expert[slot]
        if count[e] > 1 or e == also:
            state.slots[begin[e]] = slot
            begin[e] += 1
    return number


@kernel
def _level(base: FloatArray, order: IntArray, size: int, tokens: float) -> float:
    """How high tokens poured onto the first `size` loads stand, the lowest first."""
    if size == 2:
        low, high = min(base[0], base[1]), max(base[0], base[1])
        return low + tokens if low + tokens <= high else 0.5 * (low + high + tokens)
    for i in range(size):
        j = i
        while j > 0 and base[order[j - 1]] > base[i]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
    total, level = tokens, np.inf
    for i in range(size):
        total += base[order[i]]
        level = min(level, total / (i + 1))
    return level
