"""Traffic of context-coherent execution in one layer, on the links it loads.

A token enters from the device of its highest-weight expert in the layer before, goes to the devices of its experts
(dispatch), the outputs go to the device of its highest-weight expert here (back), and from there on to the next layer's
devices (onward). What that puts on links is linear in the (from, to) pairs of tokens, so each of the three is kept as a
ledger of sums a link, [3, G] and [2, N] a step, and updated token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..jit import kernel


@kernel
def supports(share: Any, node_of: Any, nodes: int) -> Any:
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
        support(e, share[e], node_of, count, where, part, node_count, node_where, node_part)
    return count, where, part, node_count, node_where, node_part


@kernel
def support(
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


@kernel
def reach_of(experts: Any, first: int, count: Any, where: Any, part: Any, targets: Any, chance: Any, mark: Any) -> int:
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


@kernel
def post(ledger: Any, node_ledger: Any, h: int, g: int, amount: float, rates: Any) -> None:
    """Adds tokens held by device h that need device g. ledger: [3, G] sent, received inside the node, arriving from other
    nodes, to be fanned out; node_ledger: [2, N] sent, received, of copies that are not merged by node."""
    m, n = rates.node_of[h], rates.node_of[g]
    if m == n:
        if g != h:
            ledger[0, h] += amount
            ledger[1, g] += amount
    elif rates.dedup:
        ledger[2, g] += amount
    else:
        node_ledger[0, m] += amount
        node_ledger[1, n] += amount


@kernel
def post_node(node_ledger: Any, m: int, n: int, amount: float) -> None:
    """Adds tokens held in node m that need node n, where copies to its devices travel as one."""
    if m != n:
        node_ledger[0, m] += amount
        node_ledger[1, n] += amount


@kernel
def post_reached(
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
    """Adds `weight` tokens held by device h that need what `reach_of` found, devices and nodes."""
    for i in range(found):
        post(ledger, node_ledger, h, targets[i], weight * chance[targets[i]], rates)
    if rates.dedup:
        for i in range(node_found):
            post_node(node_ledger, rates.node_of[h], node_targets[i], weight * node_chance[node_targets[i]])


@kernel
def compute_cost(load: Any, hit: Any, rates: Any) -> float:
    """Seconds of the slowest device's expert work in a step, from token-expert pairs and experts read [G] (`Roofline`)."""
    slowest = 0.0
    for g in range(load.shape[0]):
        slowest = max(slowest, load[g] * rates.per_pair[g], hit[g] * rates.per_expert[g])
    return slowest


@kernel
def transfer_cost(ledger: Any, node_ledger: Any, rates: Any) -> float:
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


@kernel
def account(
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
    found = reach_of(experts, 0, count, where, part, targets, chance, mark)
    node_found = reach_of(experts, 0, node_count, node_where, node_part, node_targets, node_chance, node_mark)
    e = around.before[t]
    if e < 0:
        for h in range(devices):
            post_reached(
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
            post_reached(
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
        found = reach_of(experts, 1, count, where, part, targets, chance, mark)
        node_found = reach_of(experts, 1, node_count, node_where, node_part, node_targets, node_chance, node_mark)
        for i in range(count[top]):
            post_reached(
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
        found = reach_of(around.after[t], 0, after[0], after[1], after[2], targets, chance, mark)
        node_found = reach_of(around.after[t], 0, after[3], after[4], after[5], node_targets, node_chance, node_mark)
        for i in range(count[top]):
            post_reached(
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


@kernel
def replace_traffic(
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
            support(a, new[0], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
            if b >= 0:
                support(b, new[1], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
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
                    account(layer, around, t, weight, here, before, after, ledgers[s], node_ledgers[s], rates, work)


@kernel
def coherent_step_cost(load: Any, hit: Any, ledgers: Any, node_ledgers: Any, rates: Any) -> float:
    return (
        compute_cost(load, hit, rates)
        + transfer_cost(ledgers[0], node_ledgers[0], rates)
        + rates.back * transfer_cost(ledgers[1], node_ledgers[1], rates)
        + transfer_cost(ledgers[2], node_ledgers[2], rates)
    )


# The same ledgers for the commonest move, two whole experts changing places: counts instead of probabilities. How
# many of a token's experts stand on each device and node is kept, so that what an exchange changes of a token's
# targets is two comparisons. Where tokens go from an expert that owns them is summed over tokens once: it stays while
# the neighbour layers do.


@kernel
def whole_devices(share: Any) -> Any:
    """Device of each expert, for placements without replicas."""
    device_of = np.zeros(share.shape[0], np.int64)
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            if share[e, g] > 0.0:
                device_of[e] = g
    return device_of


@kernel
def token_counts(layer: Any, device_of: Any, node_of: Any, nodes: int, plain: bool) -> Any:
    """([T, G], [T, N] experts of each token on each device and node); nothing where replicas make them probabilities."""
    tokens, top_k = layer.experts.shape
    tokens = tokens if plain else 0
    counted = np.zeros((tokens, node_of.shape[0]), np.uint8)
    node_counted = np.zeros((tokens, nodes), np.uint8)
    for t in range(tokens):
        for j in range(top_k):
            g = device_of[layer.experts[t, j]]
            counted[t, g] += 1
            node_counted[t, node_of[g]] += 1
    return counted, node_counted


@kernel
def recount(layer: Any, a: int, b: int, g: int, h: int, node_of: Any, counted: Any, node_counted: Any) -> None:
    """Keeps `token_counts` up to date when a goes from device g to h and b from h to g."""
    m, n = node_of[g], node_of[h]
    for turn in range(2):
        expert, leave, enter, left, entered = (a, g, h, m, n) if turn == 0 else (b, h, g, n, m)
        for i in range(layer.first[expert], layer.first[expert + 1]):
            t = layer.tokens[i]
            counted[t, leave] -= 1
            counted[t, enter] += 1
            node_counted[t, left] -= 1
            node_counted[t, entered] += 1


@kernel
def ways_onward(layer: Any, around: Any, after_device: Any, node_of: Any, nodes: int, plain: bool) -> Any:
    """([E, S, G], [E, S, N] tokens of each step whose highest-weight expert is e and that need a device, a node, next)."""
    experts, steps, devices = layer.first.shape[0] - 1, layer.counts.shape[0], node_of.shape[0]
    experts = experts if plain else 0
    toward, node_toward = np.zeros((experts, steps, devices)), np.zeros((experts, steps, nodes))
    for t in range(layer.experts.shape[0] if plain else 0):
        e, s = layer.experts[t, 0], layer.step_of[t]
        for j in range(around.after.shape[1]):
            g = after_device[around.after[t, j]]
            new, new_node = True, True
            for i in range(j):
                before = after_device[around.after[t, i]]
                new &= before != g
                new_node &= node_of[before] != node_of[g]
            toward[e, s, g] += new
            node_toward[e, s, node_of[g]] += new_node
    return toward, node_toward


@kernel
def _pair(ledgers: Any, s: int, w: int, source: int, target: int, x: float, rates: Any, node_ledgers: Any) -> None:
    """Adds x tokens from a device (or, for source G, evenly from all) to a device in ledger w of step s; merging by node is
    left to `_node_pair`."""
    if x == 0.0:
        return
    devices = rates.node_of.shape[0]
    first, last = (source, source + 1) if source < devices else (0, devices)
    for h in range(first, last):
        post(ledgers[s, w], node_ledgers[s, w], h, target, x / (last - first), rates)


@kernel
def _node_pair(node_ledgers: Any, s: int, w: int, source: int, target: int, x: float, rates: Any) -> None:
    """Adds x tokens from a device (or evenly from all) to a node, where copies to its devices travel as one."""
    if x == 0.0 or not rates.dedup:
        return
    devices = rates.node_of.shape[0]
    first, last = (source, source + 1) if source < devices else (0, devices)
    for h in range(first, last):
        post_node(node_ledgers[s, w], rates.node_of[h], target, x / (last - first))


@kernel
def whole_traffic(
    layer: Any, held: Any, device_of: Any, ways: Any, rates: Any, ledgers: Any, node_ledgers: Any
) -> None:
    """Adds all traffic of a placement without replicas; see `exchange_traffic`."""
    devices, nodes = rates.node_of.shape[0], rates.node_size.shape[0]
    steps, top_k = layer.counts.shape[0], layer.experts.shape[1]
    pairs, node_pairs = np.zeros((3, steps, devices + 1, devices)), np.zeros((3, steps, devices + 1, nodes))
    experts, step_of, node_of = layer.experts, layer.step_of, rates.node_of
    for t in range(experts.shape[0]):
        s, owner = step_of[t], device_of[experts[t, 0]]
        source = held[t] if held[t] >= 0 else devices
        for j in range(top_k):
            # Outputs of all but the first expert go back; inputs of all come.
            place = device_of[experts[t, j]]
            new, new_node, other, other_node = True, True, j > 0, j > 0
            for i in range(j):
                before = device_of[experts[t, i]]
                new &= before != place
                new_node &= node_of[before] != node_of[place]
                other &= i == 0 or before != place
                other_node &= i == 0 or node_of[before] != node_of[place]
            pairs[0, s, source, place] += new
            node_pairs[0, s, source, node_of[place]] += new_node
            pairs[1, s, owner, place] += other
            node_pairs[1, s, owner, node_of[place]] += other_node
    toward, node_toward = ways
    for e in range(toward.shape[0]):
        pairs[2, :, device_of[e]] += toward[e]
        node_pairs[2, :, device_of[e]] += node_toward[e]
    for w in range(3):
        for s in range(steps):
            for source in range(devices + 1):
                for d in range(devices):
                    _pair(ledgers, s, w, source, d, pairs[w, s, source, d], rates, node_ledgers)
                for d in range(nodes):
                    _node_pair(node_ledgers, s, w, source, d, node_pairs[w, s, source, d], rates)


@kernel
def exchange_traffic(
    layer: Any,
    held: Any,
    counts: Any,
    ways: Any,
    a: int,
    b: int,
    g: int,
    h: int,
    device_of: Any,
    rates: Any,
    ledgers: Any,
    node_ledgers: Any,
    change: Any,
    owned: Any,
    node_owned: Any,
) -> None:
    """Traffic changes when whole expert a goes from device g to h and b from h to g (no replicas).

    held: [T] device before (-1: all evenly). counts: of `token_counts`. ways: of `ways_onward`. To work in: change
    [2, S, G + 1, 4], what inputs and outputs by source come to g, h and their nodes more than before; owned [S, G] and
    node_owned [S, N], outputs by source that go to h rather than g.
    """
    experts, tokens, step_of, first = layer.experts, layer.tokens, layer.step_of, layer.first
    counted, node_counted = counts
    node_of = rates.node_of
    devices, steps, nodes, top_k = node_of.shape[0], layer.counts.shape[0], rates.node_size.shape[0], experts.shape[1]
    m, n = node_of[g], node_of[h]
    crossing = m != n
    change[:] = 0.0
    owned[:] = 0.0
    node_owned[:] = 0.0
    for turn in range(2):
        expert, other = (a, b) if turn == 0 else (b, a)
        leave, enter = (g, h) if turn == 0 else (h, g)
        left, entered = (m, n) if turn == 0 else (n, m)
        sign = 1.0 - 2.0 * turn
        for i in range(first[expert], first[expert + 1]):
            t = tokens[i]
            s, top = step_of[t], experts[t, 0]
            both = False
            for j in range(top_k):
                both |= experts[t, j] == other
            if both:
                # The same devices are needed; only the owner may be another.
                if turn == 0 and top in (a, b):
                    _turned(experts, t, s, device_of, a, b, g, h, rates, ledgers, node_ledgers)
                continue
            gone, new = counted[t, leave] == 1, counted[t, enter] == 0
            node_gone = crossing and node_counted[t, left] == 1
            node_new = crossing and node_counted[t, entered] == 0
            source = held[t] if held[t] >= 0 else devices
            change[0, s, source, turn] -= gone
            change[0, s, source, 1 - turn] += new
            change[0, s, source, 2 + turn] -= node_gone
            change[0, s, source, 3 - turn] += node_new
            if top == expert:
                for j in range(1, top_k):
                    place = device_of[experts[t, j]]
                    alone, alone_node = True, True
                    for c in range(1, j):
                        before = device_of[experts[t, c]]
                        alone &= before != place
                        alone_node &= node_of[before] != node_of[place]
                    owned[s, place] += sign * alone
                    node_owned[s, node_of[place]] += sign * alone_node
            else:
                # Where the owner stands, too, nothing is sent, and posting posts nothing.
                owner = device_of[top]
                change[1, s, owner, turn] -= gone
                change[1, s, owner, 1 - turn] += new
                change[1, s, owner, 2 + turn] -= node_gone
                change[1, s, owner, 3 - turn] += node_new
    dedup = rates.dedup
    for s in range(steps):
        for w in range(2):
            for side in range(2):
                target = g if side == 0 else h
                node = node_of[target]
                spread = change[w, s, devices, side] / devices
                node_spread = change[w, s, devices, 2 + side] / devices
                near, far, node_far = 0.0, 0.0, 0.0
                for d in range(devices):
                    x = change[w, s, d, side] + spread
                    if d == target:
                        continue
                    if node_of[d] == node:
                        ledgers[s, w, 0, d] += x
                        near += x
                        continue
                    far += x
                    if dedup:
                        x = change[w, s, d, 2 + side] + node_spread
                    node_ledgers[s, w, 0, node_of[d]] += x
                    node_far += x
                ledgers[s, w, 1, target] += near
                if dedup:
                    ledgers[s, w, 2, target] += far
                node_ledgers[s, w, 1, node] += node_far
    toward, node_toward = ways
    for side in range(2):
        source, sign = (g, -1.0) if side == 0 else (h, 1.0)
        node = node_of[source]
        for s in range(steps):
            for w in range(1, 3):
                sent, node_sent = 0.0, 0.0
                for d in range(devices):
                    x = sign * (owned[s, d] if w == 1 else toward[a, s, d] - toward[b, s, d])
                    if d == source:
                        continue
                    if node_of[d] == node:
                        sent += x
                        ledgers[s, w, 1, d] += x
                    elif dedup:
                        ledgers[s, w, 2, d] += x
                    else:
                        node_sent += x
                        node_ledgers[s, w, 1, node_of[d]] += x
                ledgers[s, w, 0, source] += sent
                if dedup:
                    for d in range(nodes):
                        if d != node:
                            x = sign * (node_owned[s, d] if w == 1 else node_toward[a, s, d] - node_toward[b, s, d])
                            node_sent += x
                            node_ledgers[s, w, 1, d] += x
                node_ledgers[s, w, 0, node] += node_sent


@kernel
def _turned(
    experts: Any,
    t: int,
    s: int,
    device_of: Any,
    a: int,
    b: int,
    g: int,
    h: int,
    rates: Any,
    ledgers: Any,
    node_ledgers: Any,
) -> None:
    """Outputs of token t, which chose both a and b, one of them first, when the two change places."""
    node_of = rates.node_of
    for turn in range(2):
        sign = 2.0 * turn - 1.0
        if turn == 1:
            device_of[a], device_of[b] = h, g
        owner = device_of[experts[t, 0]]
        for j in range(1, experts.shape[1]):
            place = device_of[experts[t, j]]
            alone, alone_node = True, True
            for c in range(1, j):
                before = device_of[experts[t, c]]
                alone &= before != place
                alone_node &= node_of[before] != node_of[place]
            _pair(ledgers, s, 1, owner, place, sign * alone, rates, node_ledgers)
            _node_pair(node_ledgers, s, 1, owner, node_of[place], sign * alone_node, rates)
    device_of[a], device_of[b] = g, h
