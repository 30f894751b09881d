"""Annealing one layer's placement for context-coherent execution, its neighbour layers fixed.

A token enters from the device of its highest-weight expert in the layer before, goes to the devices of its experts
(dispatch), the outputs go to the device of its highest-weight expert here (back), and from there on to the next
layer's devices (onward). Moving an expert changes all three; the traffic they put on links is linear in the (from, to)
pairs of tokens, so each is kept as a ledger of sums a link and updated token by token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from .kernel import Floats, aim_value, idle_chance, price_change, propose

Ids = npt.NDArray[np.int32]


class Neighbours(NamedTuple):
    """The fixed layers around. before: [T] expert that owns the token before (-1: spread evenly over all devices);
    before_share: [E, G]. after: [T, k] experts of the next layer (k = 0 for the last one); after_share: [E, G]."""

    before: Ids
    before_share: Floats
    after: Ids
    after_share: Floats


@njit(cache=True, nogil=True)
def _supports(share: Any, node_of: Any, nodes: int) -> Any:
    """Devices and nodes each expert stands on, with its share there: (count, ids, shares) for both."""
    experts, devices = share.shape
    count, where, part = (
        np.zeros(experts, np.int64),
        np.zeros((experts, devices), np.int64),
        np.zeros((experts, devices)),
    )
    node_count, node_where, node_part = (
        np.zeros(experts, np.int64),
        np.zeros((experts, nodes), np.int64),
        np.zeros((experts, nodes)),
    )
    for e in range(experts):
        _support(e, share[e], node_of, count, where, part, node_count, node_where, node_part)
    return count, where, part, node_count, node_where, node_part


@njit(cache=True, nogil=True)
def _support(
    e: int, row: Any, node_of: Any, count: Any, where: Any, part: Any, node_count: Any, node_where: Any, node_part: Any
) -> None:
    count[e] = 0
    node_count[e] = 0
    for g in range(row.shape[0]):
        if row[g] > 0.0:
            where[e, count[e]] = g
            part[e, count[e]] = row[g]
            count[e] += 1
            n = node_of[g]
            if node_count[e] > 0 and node_where[e, node_count[e] - 1] == n:
                node_part[e, node_count[e] - 1] = min(1.0, node_part[e, node_count[e] - 1] + row[g])
            else:
                node_where[e, node_count[e]] = n
                node_part[e, node_count[e]] = row[g]
                node_count[e] += 1


@njit(cache=True, nogil=True)
def _reach(experts: Any, first: int, count: Any, where: Any, part: Any, targets: Any, chance: Any, mark: Any) -> int:
    """Targets any of experts[first:] reaches and with what chance; returns how many. `mark` is all False around it."""
    found = 0
    for j in range(first, experts.shape[0]):
        e = experts[j]
        for i in range(count[e]):
            g = where[e, i]
            if not mark[g]:
                mark[g] = True
                targets[found] = g
                chance[g] = 1.0
                found += 1
            chance[g] *= 1.0 - part[e, i]
    for i in range(found):
        mark[targets[i]] = False
        chance[targets[i]] = 1.0 - chance[targets[i]]
    return found


@njit(cache=True, nogil=True)
def _post(
    ledger: Any,
    node_ledger: Any,
    h: int,
    weight: float,
    found: int,
    targets: Any,
    chance: Any,
    node_found: int,
    node_targets: Any,
    node_chance: Any,
    rates: Any,
) -> None:
    """Adds tokens held by device h that need the targets. ledger: [3, G] sent, received inside the node, arriving from
    other nodes; node_ledger: [2, N] sent, received."""
    m = rates.node_of[h]
    for i in range(found):
        g = targets[i]
        amount = weight * chance[g]
        n = rates.node_of[g]
        if n == m:
            if g != h:
                ledger[0, h] += amount
                ledger[1, g] += amount
        elif rates.dedup:
            ledger[2, g] += amount
        else:
            node_ledger[0, m] += amount
            node_ledger[1, n] += amount
    if rates.dedup:
        for i in range(node_found):
            n = node_targets[i]
            if n != m:
                node_ledger[0, m] += weight * node_chance[n]
                node_ledger[1, n] += weight * node_chance[n]


@njit(cache=True, nogil=True)
def _transfer(ledger: Any, node_ledger: Any, rates: Any) -> float:
    """Seconds of one all-to-all, latency left out."""
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
            slowest = max(slowest, max(sent, received) * rates.per_copy[g])
        slowest = max(slowest, max(node_ledger[0, n], node_ledger[1, n]) * rates.per_node_copy[n])
        first = last
    return slowest


@njit(cache=True, nogil=True)
def _account(
    layer: Any,
    around: Any,
    t: int,
    weight: float,
    here: Any,
    before: Any,
    after: Any,
    ledgers: Any,
    node_ledgers: Any,
    rates: Any,
    work: Any,
) -> None:
    """Adds (weight 1) or takes out (-1) token t's traffic in its step's ledgers ([3, 3, G] and [3, 2, N])."""
    targets, chance, mark, node_targets, node_chance, node_mark = work
    count, where, part, node_count, node_where, node_part = here
    experts = layer.experts[t]
    devices = rates.node_of.shape[0]
    found = _reach(experts, 0, count, where, part, targets, chance, mark)
    node_found = _reach(experts, 0, node_count, node_where, node_part, node_targets, node_chance, node_mark)
    e = around.before[t]
    if e < 0:
        for h in range(devices):
            _post(
                ledgers[0],
                node_ledgers[0],
                h,
                weight / devices,
                found,
                targets,
                chance,
                node_found,
                node_targets,
                node_chance,
                rates,
            )
    else:
        for i in range(before[0][e]):
            _post(
                ledgers[0],
                node_ledgers[0],
                before[1][e, i],
                weight * before[2][e, i],
                found,
                targets,
                chance,
                node_found,
                node_targets,
                node_chance,
                rates,
            )
    top = experts[0]
    if experts.shape[0] > 1:
        found = _reach(experts, 1, count, where, part, targets, chance, mark)
        node_found = _reach(experts, 1, node_count, node_where, node_part, node_targets, node_chance, node_mark)
        for i in range(count[top]):
            _post(
                ledgers[1],
                node_ledgers[1],
                where[top, i],
                weight * part[top, i],
                found,
                targets,
                chance,
                node_found,
                node_targets,
                node_chance,
                rates,
            )
    if around.after.shape[1] > 0:
        found = _reach(around.after[t], 0, after[0], after[1], after[2], targets, chance, mark)
        node_found = _reach(around.after[t], 0, after[3], after[4], after[5], node_targets, node_chance, node_mark)
        for i in range(count[top]):
            _post(
                ledgers[2],
                node_ledgers[2],
                where[top, i],
                weight * part[top, i],
                found,
                targets,
                chance,
                node_found,
                node_targets,
                node_chance,
                rates,
            )


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
def _exchange_traffic(
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
def _whole_devices(share: Any) -> Any:
    """Device of each expert, for placements without replicas."""
    device_of = np.zeros(share.shape[0], np.int64)
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            if share[e, g] > 0.0:
                device_of[e] = g
    return device_of


@njit(cache=True, nogil=True)
def _step_cost(load: Any, hit: Any, ledgers: Any, node_ledgers: Any, rates: Any) -> float:
    compute = 0.0
    for g in range(load.shape[0]):
        compute = max(compute, load[g] * rates.per_pair[g], hit[g] * rates.per_expert[g])
    return (
        compute
        + _transfer(ledgers[0], node_ledgers[0], rates)
        + rates.back * _transfer(ledgers[1], node_ledgers[1], rates)
        + _transfer(ledgers[2], node_ledgers[2], rates)
    )


@njit(cache=True, nogil=True)
def _replace_traffic(
    layer: Any,
    around: Any,
    a: int,
    b: int,
    new: Any,
    here: Any,
    before: Any,
    after: Any,
    ledgers: Any,
    node_ledgers: Any,
    rates: Any,
    work: Any,
) -> None:
    """Takes out the traffic of the tokens of a and b, gives the two experts their new rows, and adds it again."""
    for phase in range(2):
        if phase == 1:
            _support(a, new[0], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
            if b >= 0:
                _support(b, new[1], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
        for turn in range(2):
            e = a if turn == 0 else b
            if e < 0:
                continue
            for i in range(layer.first[e], layer.first[e + 1]):
                t = layer.tokens[i]
                twice = False
                for j in range(layer.experts.shape[1]):
                    twice |= turn == 1 and layer.experts[t, j] == a
                if not twice:
                    s = layer.step_of[t]
                    weight = -1.0 if phase == 0 else 1.0
                    _account(layer, around, t, weight, here, before, after, ledgers[s], node_ledgers[s], rates, work)


@njit(cache=True, nogil=True)
def anneal_coherent(
    layer: Any,
    around: Any,
    rates: Any,
    aim: Any,
    moves: Any,
    slot_expert: Any,
    slot_device: Any,
    share: Any,
    proposals: int,
    hot: float,
    cold: float,
    seed: int,
) -> tuple[float, Any, Any, Any]:
    """As `kernel.anneal`; step costs hold this layer's time and the next layer's dispatch, which it decides too."""
    np.random.seed(seed)
    experts, devices = share.shape
    nodes, steps, tokens = rates.node_size.shape[0], layer.counts.shape[0], layer.experts.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at = np.full((experts, devices), -1, dtype=np.int64)
    replicas = np.zeros(experts, dtype=np.int64)
    extra = 0.0
    for p in range(slot_expert.shape[0]):
        slot_at[slot_expert[p], slot_device[p]] = p
        replicas[slot_expert[p]] += 1
        if not moves.home[slot_expert[p], slot_device[p]]:
            extra += moves.price
    here = _supports(share, rates.node_of, nodes)
    before = _supports(around.before_share, rates.node_of, nodes)
    after = _supports(around.after_share, rates.node_of, nodes)
    work = (
        np.zeros(devices, np.int64),
        np.zeros(devices),
        np.zeros(devices, np.bool_),
        np.zeros(nodes, np.int64),
        np.zeros(nodes),
        np.zeros(nodes, np.bool_),
    )
    ledgers, node_ledgers = np.zeros((steps, 3, 3, devices)), np.zeros((steps, 3, 2, nodes))
    for t in range(tokens):
        s = layer.step_of[t]
        _account(layer, around, t, 1.0, here, before, after, ledgers[s], node_ledgers[s], rates, work)
    load, hit = layer.counts @ share, np.zeros((steps, devices))
    for s in range(steps):
        for e in range(experts):
            for g in range(devices):
                if slot_at[e, g] >= 0:
                    hit[s, g] += 1.0 - idle_chance(share[e, g], layer.counts[s, e])
    cost = np.empty(steps)
    for s in range(steps):
        cost[s] = _step_cost(load[s], hit[s], ledgers[s], node_ledgers[s], rates)
    value = aim_value(cost, aim) + extra
    best, best_expert, best_share, best_cost = value, slot_expert.copy(), share.copy(), cost.copy()

    plain = slot_expert.shape[0] == experts and devices <= 64
    device_of = _whole_devices(share)
    held, onward = np.full(tokens, -1, np.int64), np.full((tokens, around.after.shape[1]), -1, np.int64)
    if plain:
        device_before, device_after = _whole_devices(around.before_share), _whole_devices(around.after_share)
        for t in range(tokens):
            if around.before[t] >= 0:
                held[t] = device_before[around.before[t]]
            for j in range(around.after.shape[1]):
                onward[t, j] = device_after[around.after[t, j]]
    new = np.zeros((2, devices))
    old = np.zeros((2, devices))
    new_load, new_hit = load.copy(), hit.copy()
    new_ledgers, new_node_ledgers = ledgers.copy(), node_ledgers.copy()
    new_cost = cost.copy()
    cooling = (cold / hot) ** (1.0 / max(1, proposals - 1)) if hot > 0.0 else 0.0
    temperature = hot
    for _ in range(proposals):
        temperature *= cooling
        kind, p, q, a, b = propose(slot_expert, slot_device, slot_at, share, replicas, moves, new)
        if kind == 0:
            continue
        new_load[:] = load
        new_hit[:] = hit
        new_ledgers[:] = ledgers
        new_node_ledgers[:] = node_ledgers
        old[0] = share[a]
        old[1] = 0.0
        if b >= 0:
            old[1] = share[b]
        if plain:
            _exchange_traffic(
                layer,
                held,
                onward,
                a,
                b,
                slot_device[p],
                slot_device[q],
                device_of,
                rates,
                new_ledgers,
                new_node_ledgers,
            )
        else:
            _replace_traffic(layer, around, a, b, new, here, before, after, new_ledgers, new_node_ledgers, rates, work)
        for r in range(2):
            e = a if r == 0 else b
            if e < 0:
                continue
            for d in range(devices):
                if old[r, d] != new[r, d]:
                    for s in range(steps):
                        count = layer.counts[s, e]
                        new_load[s, d] += count * (new[r, d] - old[r, d])
                        new_hit[s, d] += idle_chance(old[r, d], count) - idle_chance(new[r, d], count)
        for s in range(steps):
            new_cost[s] = _step_cost(new_load[s], new_hit[s], new_ledgers[s], new_node_ledgers[s], rates)
        new_extra = extra + price_change(kind, p, q, a, b, slot_device, moves)
        new_value = aim_value(new_cost, aim) + new_extra
        if new_value > value and np.random.random() >= np.exp((value - new_value) / max(temperature, 1e-300)):
            if plain:
                continue
            _support(a, old[0], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
            if b >= 0:
                _support(b, old[1], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
            continue
        load[:] = new_load
        hit[:] = new_hit
        ledgers[:] = new_ledgers
        node_ledgers[:] = new_node_ledgers
        cost[:] = new_cost
        share[a] = new[0]
        g = slot_device[p]
        if plain:
            device_of[a], device_of[b] = slot_device[q], g
        if b >= 0:
            share[b] = new[1]
            slot_at[a, g] = -1
            slot_at[b, g] = p
            slot_expert[p] = b
            if kind == 1:
                h = slot_device[q]
                slot_at[b, h] = -1
                slot_at[a, h] = q
                slot_expert[q] = a
            else:
                replicas[a] -= 1
                replicas[b] += 1
        value, extra = new_value, new_extra
        if value < best:
            best = value
            best_expert[:] = slot_expert
            best_share[:] = share
            best_cost[:] = cost
    return best, best_expert, best_share, best_cost
