"""Search on counts alone: every layer balanced on all recorded load vectors together, by swaps and by annealing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.division import window_shares
from ...placement.jit import kernel
from ...placement.objective import tail_weight, weighted_mean
from ...placement.plan import Stop
from ...placement.problem import Problem
from ..base import Budget, Solution
from ..table_packing import pack_steps
from .annealer import CoolingSchedule
from .device_work import begin_division, divide_steps, keep_division
from .evaluator import Answer, Evaluator, better, with_noise
from .moves import Change, MoveRules, Placement, accepted, carry_out, copy, copy_all, propose, slot_tables, survives
from .scenario import Scenario, with_drawn_windows
from .starts import GroupHomes, balanced_layer, even_layer_share, even_shares

# Which recorded windows count how much beside their tokens, so that balancing their weighted mean serves the
# objective's risk.


LEAST_EXCESS = 1e-9


class WindowWeights:
    """`weight` [S], summing to 1, and what is learnt from a plan's figures about it.

    Under `worst_workload` and `regret` the workloads that lie above the others gain weight in proportion
    (multiplicative weights, Arora, Hazan and Kale 2012), which raises the mean of what is left to the worst.
    `reference` [W] is what regret is measured against.
    """

    def __init__(self, problem: Problem, scenario: Scenario) -> None:
        self._objective = problem.objective
        self._workload = scenario.workload
        self._learnt = 0
        self.reference: FloatArray | None = None
        self._even = scenario.step_weight
        size = np.bincount(scenario.workload, weights=self._even)
        self._part = self._even / size[scenario.workload]
        """[S] what each window is of its workload."""
        if problem.objective.risk in ("worst_workload", "regret"):
            self.weight = self._part / (size > 0).sum()
        else:
            self.weight = self._even

    def learn(self, figures: FloatArray, bound: FloatArray) -> None:
        """Shifts weight to where `figures` [S] of a plan lie high; bound: [S]."""
        tail = self._objective.tail
        if tail is not None:
            self._shift(tail_weight(figures, tail, self._even))
        elif self._objective.risk != "mean":
            base = bound if self.reference is None else self.reference[self._workload]
            above = np.bincount(self._workload, weights=(figures - base) * self._part)[self._workload]
            # A loss may be negative under regret, its reference being a plan found, not the best there is.
            above = np.maximum(above - min(0.0, float(above.min())), LEAST_EXCESS)
            self._shift(self.weight * above)

    def _shift(self, towards: FloatArray) -> None:
        # By less each time (fictitious play), else two sets of windows would take turns for ever.
        self._learnt += 1
        self.weight = self.weight + (towards / towards.sum() - self.weight) / (self._learnt + 1)


# Shares that level a single load vector exactly, by handing on what is too much from device to device.


def level_layer(
    load: FloatArray, slots: IntArray, speed: FloatArray, moves: MoveRules
) -> tuple[IntArray, FloatArray] | None:
    """A layer's slots [P] and shares [E, G] in exact balance of one load vector [E], or None where this finds none.

    slots, speed: [G] of each device.
    """
    spare = int(slots.sum()) - len(load)
    if spare < len(slots) - 1 or len(moves.failures):
        return None
    # One slot is kept free on every device but the one with most, and more on the roomiest while there are any.
    reserved = (np.arange(len(slots)) != int(slots.argmax())).astype(np.int64)
    for _ in range(spare - int(reserved.sum())):
        reserved[int((slots - reserved).argmax())] += 1
    if (slots < reserved).any():
        return None
    table = balanced_layer(load, slots - reserved, speed / speed.mean(), moves.allowed)
    base = np.empty(len(load), dtype=np.int64)
    base[table] = np.repeat(np.arange(len(slots)), slots - reserved)
    return level_shares(load, slots, speed, moves.allowed, base)


def level_shares(
    load: FloatArray, slots: IntArray, speed: FloatArray, allowed: BoolArray, base: IntArray
) -> tuple[IntArray, FloatArray] | None:
    """A layer's slots [P] and shares [E, G] under which every device carries load in proportion to its speed, or None.

    Wrap-around filling (McNaughton 1959): each device in turn, the least loaded first, is topped up to its due from one
    expert of the most loaded, and is done; at most G - 1 experts are split in two at a time, so G - 1 extra slots
    suffice. load: [E]. slots: [G]. speed: [G]. allowed: [E, G]. base: [E] the device of each expert, one of them at
    least a slot short of full everywhere but on one device. None where some expert to hand on would have to be two, or
    where the topped-up device may not hold it. Slots left over are given replicas of share 0.
    """
    experts, devices = allowed.shape
    due = load.sum() * speed / speed.sum()
    share = np.zeros((experts, devices))
    share[np.arange(experts), base] = 1.0
    hosts = share > 0
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
        fits = (pieces >= need) & ~hosts[:, [taker]] & allowed[:, [taker]]
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
        hosts[expert, taker] = True
        carried[giver] -= need
        carried[taker] += need
        free[taker] -= 1
    for device in range(devices):
        extra = np.flatnonzero(~hosts[:, device] & allowed[:, device])[: free[device]]
        if len(extra) < free[device]:
            return None
        hosts[extra, device] = True
    table = np.concatenate([np.flatnonzero(hosts[:, g]) for g in range(devices)]).astype(np.int64)
    return table, np.maximum(share, 0.0) / np.maximum(share, 0.0).sum(axis=1, keepdims=True)


# Balancing one layer on several load vectors at once, where loads are all that is known. The figure is a weighted
# mean over load rows of the heaviest device's load. It has plateaus: a move that leaves every row's heaviest device
# alone changes nothing. So the walk follows, for each row, the soft maximum (1 / sharpness) ln sum_g exp(sharpness *
# load_g), which falls when any heavy device gets lighter, and which takes two exponentials a row and exchange. The
# figure itself decides what is kept.


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


Changes = tuple[IntArray, IntArray, FloatArray]
"""Expert, device and amount of each change of share."""


class CountLayer(NamedTuple):
    """One layer as the kernel reads it. K load rows, E experts, G devices.

    rows: [K, E], each summing to 1. weight: [K], summing to 1. slowness: [G], such that a row spread in proportion to
    speed gives every device 1. stray: [E, G] what all of an expert's load on a device adds to a sum that may not
    exceed `limit`.
    """

    rows: FloatArray
    weight: FloatArray
    slowness: FloatArray
    stray: FloatArray
    limit: float
    moves: MoveRules


@kernel
def anneal_counts(
    layer: CountLayer,
    slot_expert: IntArray,
    slot_device: IntArray,
    share: FloatArray,
    proposals: int,
    sharpness: float,
    hot: float,
    enough: float,
    seed: int,
) -> tuple[IntArray, FloatArray]:
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
            strayed = _strayed(layer.stray, share)
            if value < best:
                best = value
                copy(slot_expert, best_expert)
                copy_all(share, best_share)
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
        changed = 0
        for i in range(count):
            e, g, part = changes[0][i], changes[1][i], changes[2][i]
            more += layer.stray[e, g] * part
            if where[g] < 0:
                where[g] = changed
                touched[changed] = g
                shift[:, changed] = 0.0
                changed += 1
            for k in range(rows):
                shift[k, where[g]] += layer.rows[k, e] * part * layer.slowness[g]
        for i in range(changed):
            where[touched[i]] = -1
        if more > 0.0 and strayed + more > layer.limit:
            continue
        change = 0.0
        for k in range(rows):
            new_sums[k] = sums[k]
            for i in range(changed):
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
            for i in range(changed):
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
            best = value
            copy(slot_expert, best_expert)
            copy_all(share, best_share)
            if best <= enough:
                break
    return best_expert, best_share


@kernel
def _runs(slot_device: IntArray, devices: int) -> tuple[IntArray, IntArray]:
    """First slot and number of slots of each device."""
    first, width = np.zeros(devices, np.int64), np.zeros(devices, np.int64)
    for p in range(slot_device.shape[0] - 1, -1, -1):
        first[slot_device[p]] = p
        width[slot_device[p]] += 1
    return first, width


@kernel
def _load(layer: CountLayer, share: FloatArray, loads: FloatArray) -> None:
    """Loads [K, G], slowness included, of shares [E, G]."""
    loads[:] = 0.0
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            if share[e, g] > 0.0:
                for k in range(loads.shape[0]):
                    loads[k, g] += layer.rows[k, e] * share[e, g] * layer.slowness[g]


@kernel
def window_peaks(rows: FloatArray, share: FloatArray, slowness: FloatArray) -> FloatArray:
    """[K] heaviest load of each row [K, E], slowness included, of shares [E, G]."""
    loads = np.zeros((share.shape[1], rows.shape[0]))
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            if share[e, g] > 0.0:
                part = share[e, g] * slowness[g]
                for k in range(rows.shape[0]):
                    loads[g, k] += rows[k, e] * part
    peaks = loads[0].copy()
    for g in range(1, loads.shape[0]):
        peaks = np.maximum(peaks, loads[g])
    return peaks


@kernel
def _peaks(layer: CountLayer, loads: FloatArray, heaviest: IntArray) -> float:
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
def _lift(
    loads: FloatArray, heaviest: IntArray, sharpness: float, zero: FloatArray, lifted: FloatArray, sums: FloatArray
) -> None:
    """Exponentials [K, G] of loads over each row's heaviest, `zero` [K], and their sums [K]."""
    for k in range(loads.shape[0]):
        zero[k] = loads[k, heaviest[k]]
        sums[k] = 0.0
        for g in range(loads.shape[1]):
            lifted[k, g] = np.exp(sharpness * (loads[k, g] - zero[k]))
            sums[k] += lifted[k, g]


@kernel
def _draw(
    layer: CountLayer,
    p: int,
    slot_expert: IntArray,
    slot_device: IntArray,
    slot_at: IntArray,
    replicas: IntArray,
    share: FloatArray,
    changes: Changes,
) -> tuple[int, int, int, int]:
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
def _list(changes: Changes, count: int, expert: int, device: int, amount: float) -> int:
    changes[0][count], changes[1][count], changes[2][count] = expert, device, amount
    return count + 1


@kernel
def _commit(
    kind: int,
    p: int,
    q: int,
    b: int,
    slot_expert: IntArray,
    slot_device: IntArray,
    slot_at: IntArray,
    replicas: IntArray,
    share: FloatArray,
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


# The same where each window is divided among replicas anew: the largest load that is left then is walked on itself.


@kernel
def anneal_divided(
    layer: CountLayer,
    slot_expert: IntArray,
    slot_device: IntArray,
    share: FloatArray,
    proposals: int,
    hot: float,
    enough: float,
    seed: int,
) -> tuple[IntArray, FloatArray]:
    """As `anneal_counts`, for loads divided anew in every row; shares stay equal."""
    np.random.seed(seed)
    experts, devices = share.shape
    slot_at, replicas = slot_tables(slot_expert, slot_device, experts, devices)
    placement = Placement(slot_expert.copy(), slot_device, share.copy(), slot_at, replicas)
    state = begin_division(np.ascontiguousarray(layer.rows.T), placement)
    loads, new = np.empty((layer.rows.shape[0], devices)), np.zeros((2, devices))
    value = np.inf
    best, best_expert, best_share = np.inf, placement.slot_expert.copy(), placement.share.copy()
    temperature = hot
    cooling = COOLED ** (1.0 / max(1, proposals))
    change = Change(0, 0, 0, 0, 0)
    for turn in range(proposals + 1):
        temperature *= cooling
        if turn > 0:
            change = propose(placement, layer.moves, new)
            if change.kind == 0:
                continue
        divide_steps(state, placement, change, loads)
        new_value = 0.0
        for k in range(loads.shape[0]):
            heaviest = 0.0
            for g in range(devices):
                heaviest = max(heaviest, loads[k, g] * layer.slowness[g])
            new_value += layer.weight[k] * heaviest
        if turn > 0 and not accepted(value, new_value, temperature):
            continue
        value = new_value
        keep_division(state, change)
        if change.kind != 0:
            carry_out(change, new, placement)
        if value < best:
            best = value
            copy(placement.slot_expert, best_expert)
            copy_all(placement.share, best_share)
            if best <= enough:
                break
    return best_expert, best_share


# The quick way down on one load vector: the best exchange with the heaviest device, for as long as one lowers it.


LEAST_GAIN = 1e-9
"""A gain below rounding is none, and would let two placements of one load alternate for ever."""


@kernel
def _strayed(stray: FloatArray, share: FloatArray) -> float:
    """The limited sum of shares [E, G]."""
    total = 0.0
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            total += stray[e, g] * share[e, g]
    return total


@kernel
def steepest_swap(
    layer: CountLayer, slot_expert: IntArray, slot_device: IntArray, share: FloatArray, enough: float
) -> tuple[IntArray, FloatArray]:
    """(slot_expert, share) once no exchange lowers the heaviest device of `layer`'s first row, or it is at `enough`.

    slot_expert: [P]. slot_device: [P]. share: [E, G].
    """
    experts, devices = share.shape
    slots = slot_expert.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at, _ = slot_tables(slot_expert, slot_device, experts, devices)
    carried, loads = np.empty(slots), np.zeros(devices)
    for p in range(slots):
        carried[p] = layer.rows[0, slot_expert[p]] * share[slot_expert[p], slot_device[p]]
        loads[slot_device[p]] += carried[p] * layer.slowness[slot_device[p]]
    strayed = _strayed(layer.stray, share)
    allowed, failures = layer.moves.allowed, layer.moves.failures
    while True:
        g = int(loads.argmax())
        if loads[g] <= enough:
            break
        least, best_p, best_q = loads[g] * (1.0 - LEAST_GAIN), -1, -1
        for p in range(slots):
            if slot_device[p] != g:
                continue
            a = slot_expert[p]
            for q in range(slots):
                h = slot_device[q]
                less = carried[p] - carried[q]
                if h == g or less <= 0.0:
                    continue
                peak = max(loads[g] - less * layer.slowness[g], loads[h] + less * layer.slowness[h])
                if peak >= least:
                    continue
                b = slot_expert[q]
                if slot_at[a, h] >= 0 or slot_at[b, g] >= 0 or not allowed[a, h] or not allowed[b, g]:
                    continue
                if not survives(a, g, h, slot_at, failures) or not survives(b, h, g, slot_at, failures):
                    continue
                more = _strays(layer.stray, share, a, g, h) + _strays(layer.stray, share, b, h, g)
                if more > 0.0 and strayed + more > layer.limit:
                    continue
                least, best_p, best_q = peak, p, q
        if best_p < 0:
            break
        p, q = best_p, best_q
        h, a, b = slot_device[q], slot_expert[p], slot_expert[q]
        strayed += _strays(layer.stray, share, a, g, h) + _strays(layer.stray, share, b, h, g)
        less = carried[p] - carried[q]
        loads[g] -= less * layer.slowness[g]
        loads[h] += less * layer.slowness[h]
        carried[p], carried[q] = carried[q], carried[p]
        slot_at[a, g], slot_at[b, h], slot_at[a, h], slot_at[b, g] = -1, -1, q, p
        slot_expert[p], slot_expert[q] = b, a
        share[a, h], share[a, g] = share[a, g], 0.0
        share[b, g], share[b, h] = share[b, h], 0.0
    return slot_expert, share


@kernel
def _strays(stray: FloatArray, share: FloatArray, expert: int, left: int, joined: int) -> float:
    """What an expert's part on device `left` adds to the limited sum by moving to `joined`."""
    return share[expert, left] * (stray[expert, joined] - stray[expert, left])


PROPOSALS = 120_000
"""A layer, when neither they nor seconds are given."""
DIVIDED = 64
"""Proposals that take as long as one where windows are divided anew."""
ROUNDS, ALONE_ROUNDS = 12, 4
ENDING = 0.1
"""Of a time limit, kept for the answer's own figures and their noise."""
HOT, COLD = 1.0, 0.3
"""First temperature of the first round and of the last, in a layer's excess over its bound, a slot."""
LEAPS = 1000
"""Slots below which the first round is hotter, in proportion: with few slots every exchange is a leap."""
PATIENCE = 50
"""Proposals a slot that a cooling from far takes to end better than it began; with fewer it begins nearer."""
TIMED_ROUND = 100
"""Proposals of the first round under a time limit."""
SHORT_ROUNDS = 4
"""Rounds where they get fewer proposals than there are slots."""
TOLERANCE = 1e-3
"""A figure this close to its bound, relatively, is good enough; a layer is done at half of it."""
LEAST_LAYER_EXCESS = 1e-6
"""What a layer is taken to lie above its bound at least, so that sharpness stays finite."""


@dataclass(frozen=True)
class BalancedLayer:
    """A layer's experts of its own slots [P], shares [E, G], and heaviest load over the mean in each window [S]."""

    slot_expert: IntArray
    share: FloatArray
    peaks: FloatArray


def search_counts(
    problem: Problem,
    budget: Budget,
    scenario: Scenario,
    moves: Sequence[MoveRules],
    tables: Sequence[IntArray],
    current: tuple[list[IntArray], list[FloatArray]] | None,
    proposals: int | None,
    homes: GroupHomes | None,
) -> Solution:
    """Balances the windows' loads [S, L, E] from slot tables [P], one a layer, or the plan in force (tables and shares
    [E, G]) in layers where that is better; see `Search` for `proposals`."""
    divided = problem.objective.replica_choice == "balanced" and problem.has_replicas
    if divided:
        scenario = with_drawn_windows(scenario, budget.seed)
    evaluator = Evaluator(problem, scenario)
    if proposals is None:
        proposals = PROPOSALS // DIVIDED if divided else PROPOSALS
    best, stop = balance_windows(problem, budget, evaluator, moves, tables, current, proposals, homes)
    best = best._replace(certificate=evaluator.certificate(best.table, best.shares))
    certificate = with_noise(problem, best, budget.seed)
    if homes is not None:
        limited = f"{certificate.objective}, at most {homes.most:g} of a layer's load off its groups' home nodes"
        certificate = replace(certificate, objective=limited)
    return Solution(best.table, certificate, shares=best.shares, stop=stop, separable=True)


def balance_windows(
    problem: Problem,
    budget: Budget,
    evaluator: Evaluator,
    moves: Sequence[MoveRules],
    tables: Sequence[IntArray],
    current: tuple[list[IntArray], list[FloatArray]] | None,
    proposals: int,
    homes: GroupHomes | None,
) -> tuple[Answer, Stop]:
    """The best placement for the evaluator's windows, and why there was an end; arguments as of `search_counts`."""
    scenario = evaluator.scenario
    windows = WindowWeights(problem, scenario)
    balance = _Balance(problem, scenario, evaluator.window_bounds, moves, budget.seed, homes, current)
    stop: Stop = "finished"
    try:
        balance.start(tables, windows.weight)
        if scenario.num_steps == 1 and homes is None:
            balance.level()
        best = _best_start(balance, evaluator)
        budget.report(best.value, best.bound, "start")
        try:
            if problem.objective.risk == "regret":
                evaluator.reference = _alone(balance, evaluator, scenario, tables, proposals, budget)
                windows.reference = evaluator.reference
                balance.start(tables, windows.weight)
                best = _best_start(balance, evaluator)
            schedule = CoolingSchedule(budget, proposals, ROUNDS, ENDING * (budget.seconds or 0.0), TIMED_ROUND)
            round_ = 0
            while round_ < schedule.rounds and not schedule.spent and not balance.done:
                with schedule.timing():
                    balance.run(
                        windows.weight, schedule.proposals(round_), round_ / (schedule.rounds - 1), schedule.expected
                    )
                round_ += 1
                if budget.seconds is not None and schedule.expected < ROUNDS * problem.num_slots:
                    schedule.rounds = SHORT_ROUNDS
                best = better(best, _answer(balance, evaluator))
                budget.report(best.value, best.bound, f"round {round_} of {schedule.rounds}")
                windows.learn(scenario.over_layers(balance.peaks()), evaluator.bound)
            stop = "time limit" if schedule.spent else "finished"
        except KeyboardInterrupt:
            stop = "interrupted"
    finally:
        balance.close()
    return best, stop


MOST_PACKED, EXCHANGES = 128, 500
"""Windows that tables are packed by, neighbours being added up where there are more; exchanges tried a layer."""


def tables_by_steps(problem: Problem, scenario: Scenario, allowed: BoolArray) -> list[IntArray] | None:
    """Slot tables [P] packed by all windows at once, where there are several and devices are alike; else None.

    What balances the sum of windows is a start that annealing needs seconds to leave.
    """
    slots, speed = problem.layer_slots, problem.topology.compute
    alike = (slots == slots[0, 0]).all() and (speed == speed[0]).all()
    if scenario.num_steps < 2 or not alike or not allowed.all() or problem.tolerates:
        return None
    rows = scenario.loads * scenario.layer_weights(scenario.step_weight)[:, :, None]
    if len(rows) > MOST_PACKED:
        rows = np.add.reduceat(rows, np.linspace(0, len(rows), MOST_PACKED, endpoint=False).astype(np.int64))
    blocks = np.array_split(np.arange(rows.shape[1]), min(rows.shape[1], os.cpu_count() or 1))

    def pack(block: IntArray) -> IntArray:
        first = int(block[0])
        return pack_steps(rows[:, block], problem.num_slots, problem.num_devices, EXCHANGES, first)

    with ThreadPoolExecutor(len(blocks)) as pool:
        return [table for tables in pool.map(pack, blocks) for table in tables]


class _Balance:
    """Holds one state a layer and improves it, layers side by side on all cores."""

    def __init__(
        self,
        problem: Problem,
        scenario: Scenario,
        bounds: FloatArray,
        moves: Sequence[MoveRules],
        seed: int,
        homes: GroupHomes | None,
        current: tuple[list[IntArray], list[FloatArray]] | None,
    ) -> None:
        speed = problem.topology.compute
        self.problem, self._rules = problem, moves
        self._divided = problem.objective.replica_choice == "balanced" and problem.has_replicas
        self._rows = scenario.loads.transpose(1, 0, 2).copy()
        self._slowness = speed.sum() / speed
        nowhere = np.zeros((problem.model.experts, problem.num_devices))
        self._stray = [nowhere] * len(moves) if homes is None else list(homes.stray)
        self._limit = 0.0 if homes is None else homes.most
        self._bounds = bounds
        self._scenario = scenario
        self._seeds = np.random.SeedSequence(seed)
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
        self.current = (
            [] if current is None else [self._placed(layer, *at) for layer, at in enumerate(zip(*current, strict=True))]
        )
        if any(
            (layer.share * stray).sum() > self._limit + 1e-9
            for layer, stray in zip(self.current, self._stray, strict=False)
        ):
            self.current = []
        self.layers: list[BalancedLayer] = []
        self.done = False
        """Whether the figure is within `TOLERANCE` of the bound, by the weights of the last round."""

    def start(self, tables: Sequence[IntArray], weight: FloatArray) -> None:
        """Takes slot tables with equal shares as the state, or the plan in force in layers where that is better."""
        even = even_shares(self.problem, tables)
        self.layers = [self._placed(layer, table, even[layer]) for layer, table in enumerate(tables)]
        for layer, mine in enumerate(self._scenario.layer_weights(weight).T[: len(self.current)]):
            if mine @ self.current[layer].peaks <= mine @ self.layers[layer].peaks:
                self.layers[layer] = self.current[layer]
        self._look(weight)

    def level(self) -> None:
        """Of a single window, with shares free: levels layers exactly where handing on load from device to device
        does."""
        problem = self.problem
        if problem.objective.split != "free" or self._divided:
            return
        for layer, moves in enumerate(self._rules):
            levelled = level_layer(self._rows[layer][0], problem.layer_slots[layer], problem.topology.compute, moves)
            if levelled is not None:
                placed = self._placed(layer, *levelled)
                if placed.peaks[0] < self.layers[layer].peaks[0]:
                    self.layers[layer] = placed
        self._look(np.ones(1))

    def run(self, weight: FloatArray, proposals: int, progress: float, expected: float) -> None:
        """One round of at most `proposals` a layer, windows counting by `weight` [S]. progress: 0 first, 1 last.
        expected: proposals of all rounds."""
        slots, last = self.problem.num_slots, progress >= 0.5
        patience = min(1.0, expected * (DIVIDED if self._divided else 1) / (PATIENCE * slots))
        hot = COLD * ((HOT + LEAPS / slots) / COLD) ** patience
        # Where windows are divided each half of the rounds is a cooling of its own.
        cooled = 2.0 * (progress - 0.5 * last) if self._divided else progress
        heat = hot * (COLD / hot) ** cooled
        seeds = self._seeds.spawn(1)[0].generate_state(len(self.layers))
        tasks = [
            self._pool.submit(self._one, layer, mine, proposals, heat, int(seed) % (1 << 31), last)
            for layer, (mine, seed) in enumerate(zip(self._scenario.layer_weights(weight).T, seeds, strict=True))
        ]
        self.layers = [task.result() for task in tasks]
        self._look(weight)

    def _look(self, weight: FloatArray) -> None:
        counts = self._scenario.layer_weights(weight)
        self.done = bool((counts * self.peaks()).sum() <= (counts * self._bounds).sum() * (1.0 + TOLERANCE))

    def peaks(self) -> FloatArray:
        """[S, L] heaviest load over the mean of the state."""
        return np.stack([layer.peaks for layer in self.layers], axis=1)

    def _one(self, layer: int, weight: FloatArray, proposals: int, heat: float, seed: int, last: bool) -> BalancedLayer:
        """weight: [S] what this layer's windows count. last: whether of the second half of rounds."""
        state, counted = self.layers[layer], weight > 0
        if self._divided and not last:
            # Windows that were drawn are for what can be divided.
            counted[len(counted) - self._scenario.drawn :] = False
        if not counted.any():
            return state
        weight = np.where(counted, weight, 0.0) / weight[counted].sum()
        least = float(weight @ self._bounds[:, layer])
        excess = max(float(weight @ state.peaks) - least, LEAST_LAYER_EXCESS)
        counts = CountLayer(
            self._rows[layer][counted],
            weight[counted],
            self._slowness,
            self._stray[layer],
            self._limit,
            self._rules[layer],
        )
        slot_device, enough = self.problem.layer_slot_device(layer), least * (1.0 + 0.5 * TOLERANCE)
        table, share = state.slot_expert, state.share
        if self._divided and last:
            hot = heat * excess / len(table)
            table, share = anneal_divided(counts, table, slot_device, share, proposals, hot, enough, seed)
            return self._placed(layer, table, share)
        if self._divided:
            # What equal shares level needs no dividing, and is found at a fraction of the effort.
            proposals *= DIVIDED
            peaks = window_peaks(counts.rows, share, self._slowness)
            excess = max(float(counts.weight @ peaks) - least, LEAST_LAYER_EXCESS)
        if counted.sum() == 1:
            table, share = steepest_swap(counts, table, slot_device, share, enough)
            excess = max(float((counts.rows[0] @ share * self._slowness).max()) - least, LEAST_LAYER_EXCESS)
        # A device this much above the others is felt, and ln G of them together are not mistaken for one.
        sharpness = np.log(self.problem.num_devices) / excess
        hot = heat * excess / len(table)
        table, share = anneal_counts(counts, table, slot_device, share, proposals, sharpness, hot, enough, seed)
        if self.problem.objective.split == "equal":
            share = even_layer_share(self.problem, layer, table)
        return self._placed(layer, table, share)

    def _placed(self, layer: int, table: IntArray, share: FloatArray) -> BalancedLayer:
        rows = self._rows[layer]
        if self._divided:
            node_of = self.problem.topology.node_of
            served = window_shares(rows[:, None], (share > 0)[None], node_of, self.problem.objective.division)
            peaks = (np.einsum("se,seg->sg", rows, served[:, 0]) * self._slowness).max(axis=1)
        else:
            peaks = window_peaks(rows, share, self._slowness)
        return BalancedLayer(table, share, np.maximum(1.0, peaks))

    def close(self) -> None:
        """Stops the threads; rounds already handed out end first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _alone(
    balance: _Balance,
    evaluator: Evaluator,
    scenario: Scenario,
    tables: Sequence[IntArray],
    proposals: int,
    budget: Budget,
) -> FloatArray:
    """[W] figure of each workload's own plan, which regret is measured against: a quarter of all effort, over them."""
    present = np.unique(scenario.workload)
    reference = np.zeros(len(scenario.workloads))
    for w, code in enumerate(present):
        weight = np.where(scenario.workload == code, scenario.step_weight, 0.0)
        weight /= weight.sum()
        balance.start(tables, weight)
        timed = budget.seconds is not None
        schedule = CoolingSchedule(
            budget, max(1, proposals // 4), rounds=4 * ROUNDS * (len(present) - w) // 3 if timed else ALONE_ROUNDS
        )
        for round_ in range(ALONE_ROUNDS):
            with schedule.timing():
                balance.run(weight, schedule.proposals(round_), round_ / (ALONE_ROUNDS - 1), schedule.expected)
        reference[code] = weighted_mean(scenario.over_layers(balance.peaks()), weight)
    return reference


def _best_start(balance: _Balance, evaluator: Evaluator) -> Answer:
    """The state, or the whole plan in force: under some risks the better layers are not the better plan."""
    best = _answer(balance, evaluator)
    current = _answer(balance, evaluator, balance.current) if balance.current else best
    return better(best, current)


def _answer(balance: _Balance, evaluator: Evaluator, layers: Sequence[BalancedLayer] | None = None) -> Answer:
    """The state, or other `layers`."""
    layers = balance.layers if layers is None else layers
    figures = evaluator.scenario.over_layers(np.stack([layer.peaks for layer in layers], axis=1))
    return evaluator.answer([layer.slot_expert for layer in layers], [layer.share for layer in layers], figures)
