"""Traffic of context-coherent execution in one layer, its neighbour layers fixed, on the links it loads.

A token enters from the device of its highest-weight expert in the layer before, goes to the devices of its experts
(dispatch), the outputs go to the device of its highest-weight expert here (back), and from there on to the next layer's
devices (onward). What that puts on links is linear in the (from, to) pairs of tokens, so each of the three is kept as a
ledger of sums a link, [3, G] and [2, N] a step, and updated token by token.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.jit import kernel
from .device_work import compute_seconds, first_work, post, post_node, shift_work, transfer_seconds
from .moves import Change, CoherentTokens, Counts, Ids, LayerTokens, Neighbours, Placement, Rates, copy, copy_all


class Supports(NamedTuple):
    """Devices and nodes each expert stands on: how many [E], which [E, G] or [E, N], and its share there."""

    number: IntArray
    where: IntArray
    part: FloatArray
    node_number: IntArray
    node_where: IntArray
    node_part: FloatArray


class Covered(NamedTuple):
    """To work in: devices [G] and nodes [N] one token covers, with what chance. The marks are all False in between."""

    targets: IntArray
    chance: FloatArray
    mark: BoolArray
    node_targets: IntArray
    node_chance: FloatArray
    node_mark: BoolArray


class TokenCounts(NamedTuple):
    """[T, G], [T, N] experts of each token on each device and node; nothing where replicas make them probabilities."""

    devices: Counts
    nodes: Counts


class Onward(NamedTuple):
    """[E, S, G], [E, S, N] tokens of each step whose highest-weight expert is e and that need a device, a node,
    next."""

    toward: FloatArray
    node_toward: FloatArray


class CoherentState(NamedTuple):
    """What is known of a placement and, from `new_ledgers` on, of a change.

    here, before, after: where experts of this layer and its neighbours stand. came_from: [T] device before, -1 for all
    evenly. device_of: [E], counts and onward: without replicas only (plain). ledgers: [S, 3, 3, G]. node_ledgers:
    [S, 3, 2, N]. load, hit: [S, G]. cost: [S] seconds, of this layer and the next one's dispatch, which it decides too.
    """

    here: Supports
    before: Supports
    after: Supports
    came_from: IntArray
    device_of: IntArray
    counts: TokenCounts
    onward: Onward
    plain: bool
    ledgers: FloatArray
    node_ledgers: FloatArray
    load: FloatArray
    hit: FloatArray
    cost: FloatArray
    old: FloatArray
    new_ledgers: FloatArray
    new_node_ledgers: FloatArray
    new_load: FloatArray
    new_hit: FloatArray
    new_cost: FloatArray
    change: FloatArray
    owned: FloatArray
    node_owned: FloatArray
    covered: Covered


def begin(tokens: CoherentTokens, rates: Rates, placement: Placement) -> CoherentState:
    """The state of a placement."""
    layer, around = tokens
    share = placement.share
    experts, devices = share.shape
    nodes, steps, count = rates.node_size.shape[0], layer.counts.shape[0], layer.experts.shape[0]
    here = supports(share, rates.node_of, nodes)
    before = supports(around.before_share, rates.node_of, nodes)
    after = supports(around.after_share, rates.node_of, nodes)
    covered = Covered(
        np.zeros(devices, np.int64),
        np.zeros(devices),
        np.zeros(devices, np.bool_),
        np.zeros(nodes, np.int64),
        np.zeros(nodes),
        np.zeros(nodes, np.bool_),
    )
    ledgers, node_ledgers = np.zeros((steps, 3, 3, devices)), np.zeros((steps, 3, 2, nodes))
    plain = placement.slot_expert.shape[0] == experts
    came_from, device_of = np.full(count, -1, np.int64), whole_devices(share)
    if plain:
        device_before = whole_devices(around.before_share)
        for t in range(count):
            if around.before[t] >= 0:
                came_from[t] = device_before[around.before[t]]
    counts = token_counts(layer, device_of, rates.node_of, nodes, plain)
    onward = tokens_onward(layer, around, whole_devices(around.after_share), rates.node_of, nodes, plain)
    if plain:
        whole_traffic(layer, came_from, device_of, onward, rates, ledgers, node_ledgers)
    else:
        for t in range(count):
            s = layer.step_of[t]
            account(
                layer.experts[t],
                around.before[t],
                around.after[t],
                1.0,
                here,
                before,
                after,
                ledgers[s],
                node_ledgers[s],
                rates,
                covered,
            )
    load, hit = first_work(layer, share, placement.slot_at)
    cost = np.empty(steps)
    for s in range(steps):
        cost[s] = step_seconds(load[s], hit[s], ledgers[s], node_ledgers[s], rates)
    return CoherentState(
        here,
        before,
        after,
        came_from,
        device_of,
        counts,
        onward,
        plain,
        ledgers,
        node_ledgers,
        load,
        hit,
        cost,
        np.zeros((2, devices)),
        np.zeros((steps, 3, 3, devices)),
        np.zeros((steps, 3, 2, nodes)),
        np.zeros((steps, devices)),
        np.zeros((steps, devices)),
        np.zeros(steps),
        np.zeros((2, steps, devices + 1, 4)),
        np.zeros((steps, devices)),
        np.zeros((steps, nodes)),
        covered,
    )


def delta(
    state: CoherentState, tokens: CoherentTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Prices a change into `state.new_cost`; `state.here` already holds it. new: [2, G] shares of its experts."""
    layer, around = tokens
    _, p, q, a, b = change
    ledgers, node_ledgers = state.new_ledgers, state.new_node_ledgers
    copy_all(state.load, state.new_load)
    copy_all(state.hit, state.new_hit)
    copy_all(state.ledgers, ledgers)
    copy_all(state.node_ledgers, node_ledgers)
    copy(placement.share[a], state.old[0])
    if b >= 0:
        copy(placement.share[b], state.old[1])
    else:
        state.old[1] = 0.0
    if state.plain:
        exchange_traffic(
            layer,
            state.came_from,
            state.counts,
            state.onward,
            a,
            b,
            placement.slot_device[p],
            placement.slot_device[q],
            state.device_of,
            rates,
            ledgers,
            node_ledgers,
            state.change,
            state.owned,
            state.node_owned,
        )
    else:
        replace_traffic(
            layer, around, a, b, new, state.here, state.before, state.after, ledgers, node_ledgers, rates, state.covered
        )
    shift_work(layer, a, b, state.old, new, state.new_load, state.new_hit)
    for s in range(state.cost.shape[0]):
        state.new_cost[s] = step_seconds(state.new_load[s], state.new_hit[s], ledgers[s], node_ledgers[s], rates)


def commit(
    state: CoherentState, tokens: CoherentTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Keeps a change that `delta` has priced; the placement is still the old one."""
    copy_all(state.new_load, state.load)
    copy_all(state.new_hit, state.hit)
    copy_all(state.new_ledgers, state.ledgers)
    copy_all(state.new_node_ledgers, state.node_ledgers)
    copy(state.new_cost, state.cost)
    if state.plain:
        g, h = placement.slot_device[change.p], placement.slot_device[change.q]
        recount(tokens.layer, change.a, change.b, g, h, rates.node_of, state.counts)
        state.device_of[change.a], state.device_of[change.b] = h, g


def rollback(
    state: CoherentState, tokens: CoherentTokens, rates: Rates, placement: Placement, change: Change, new: FloatArray
) -> None:
    """Drops a change: its experts stand where they stood."""
    if not state.plain:
        support(change.a, state.old[0], rates.node_of, state.here)
        if change.b >= 0:
            support(change.b, state.old[1], rates.node_of, state.here)


@kernel
def step_seconds(
    load: FloatArray, hit: FloatArray, ledgers: FloatArray, node_ledgers: FloatArray, rates: Rates
) -> float:
    """Of one step in one layer, latency left out."""
    return (
        compute_seconds(load, hit, rates)
        + transfer_seconds(ledgers[0], node_ledgers[0], rates, 0)
        + rates.back[0] * transfer_seconds(ledgers[1], node_ledgers[1], rates, 0)
        + transfer_seconds(ledgers[2], node_ledgers[2], rates, 0)
    )


@kernel
def supports(share: FloatArray, node_of: IntArray, nodes: int) -> Supports:
    """Where each expert stands, by its shares [E, G]."""
    experts, devices = share.shape
    result = Supports(
        np.zeros(experts, np.int64),
        np.zeros((experts, devices), np.int64),
        np.zeros((experts, devices)),
        np.zeros(experts, np.int64),
        np.zeros((experts, nodes), np.int64),
        np.zeros((experts, nodes)),
    )
    for e in range(experts):
        support(e, share[e], node_of, result)
    return result


@kernel
def support(e: int, row: FloatArray, node_of: IntArray, here: Supports) -> None:
    """Keeps `here` of expert e by its shares [G]."""
    count, where, part, node_count, node_where, node_part = here
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
def cover(experts: Ids, first: int, stand: Supports, covered: Covered) -> tuple[int, int]:
    """How many devices and nodes any of experts[first:] covers; which, and with what chance, is put into `covered`."""
    reached = _cover(
        experts, first, stand.number, stand.where, stand.part, covered.targets, covered.chance, covered.mark
    )
    nodes_reached = _cover(
        experts,
        first,
        stand.node_number,
        stand.node_where,
        stand.node_part,
        covered.node_targets,
        covered.node_chance,
        covered.node_mark,
    )
    return reached, nodes_reached


@kernel
def _cover(
    experts: Ids,
    first: int,
    count: IntArray,
    where: IntArray,
    part: FloatArray,
    targets: IntArray,
    chance: FloatArray,
    mark: BoolArray,
) -> int:
    """Targets any of experts[first:] reaches and with what chance; returns how many. `mark` is all False around it."""
    reached = 0
    for j in range(first, experts.shape[0]):
        e = experts[j]
        for i in range(count[e]):
            g = where[e, i]
            if not mark[g]:
                mark[g] = True
                targets[reached] = g
                chance[g] = 1.0
                reached += 1
            chance[g] *= 1.0 - part[e, i]
    for i in range(reached):
        mark[targets[i]] = False
        chance[targets[i]] = 1.0 - chance[targets[i]]
    return reached


@kernel
def post_covered(
    ledger: FloatArray,
    node_ledger: FloatArray,
    h: int,
    weight: float,
    reached: int,
    nodes_reached: int,
    covered: Covered,
    rates: Rates,
) -> None:
    """Adds `weight` tokens held by device h that need what `cover` found: so many devices and nodes."""
    for i in range(reached):
        g = covered.targets[i]
        post(ledger, node_ledger, h, g, weight * covered.chance[g], rates, rates.dedup[0])
    if rates.dedup[0]:
        for i in range(nodes_reached):
            n = covered.node_targets[i]
            post_node(node_ledger, rates.node_of[h], n, weight * covered.node_chance[n])


@kernel
def account(
    experts: Ids,
    e: int,
    following: Ids,
    weight: float,
    here: Supports,
    before: Supports,
    after: Supports,
    ledgers: FloatArray,
    node_ledgers: FloatArray,
    rates: Rates,
    covered: Covered,
) -> None:
    """Adds (weight 1) or takes out (-1) a token's traffic in its step's ledgers ([3, 3, G] and [3, 2, N]).

    experts: [k] of the token. e: that owned it before, or -1. following: [k] of the next layer, none after the last.
    """
    devices, top = rates.node_of.shape[0], experts[0]
    reached, nodes = cover(experts, 0, here, covered)
    if e < 0:
        for h in range(devices):
            post_covered(ledgers[0], node_ledgers[0], h, weight / devices, reached, nodes, covered, rates)
    else:
        for i in range(before.number[e]):
            part = weight * before.part[e, i]
            post_covered(ledgers[0], node_ledgers[0], before.where[e, i], part, reached, nodes, covered, rates)
    if experts.shape[0] > 1:
        reached, nodes = cover(experts, 1, here, covered)
        for i in range(here.number[top]):
            part = weight * here.part[top, i]
            post_covered(ledgers[1], node_ledgers[1], here.where[top, i], part, reached, nodes, covered, rates)
    if following.shape[0] > 0:
        reached, nodes = cover(following, 0, after, covered)
        for i in range(here.number[top]):
            part = weight * here.part[top, i]
            post_covered(ledgers[2], node_ledgers[2], here.where[top, i], part, reached, nodes, covered, rates)


@kernel
def replace_traffic(
    layer: LayerTokens,
    around: Neighbours,
    a: int,
    b: int,
    new: FloatArray,
    here: Supports,
    before: Supports,
    after: Supports,
    ledgers: FloatArray,
    node_ledgers: FloatArray,
    rates: Rates,
    covered: Covered,
) -> None:
    """Takes out the traffic of the tokens of a and b, gives the two experts their new rows, and adds it again."""
    for phase in range(2):
        if phase == 1:
            support(a, new[0], rates.node_of, here)
            if b >= 0:
                support(b, new[1], rates.node_of, here)
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
                    account(
                        layer.experts[t],
                        around.before[t],
                        around.after[t],
                        weight,
                        here,
                        before,
                        after,
                        ledgers[s],
                        node_ledgers[s],
                        rates,
                        covered,
                    )


# The same ledgers for the commonest move, two whole experts changing places: counts instead of probabilities. How
# many of a token's experts stand on each device and node is kept, so that what an exchange changes of a token's
# targets is two comparisons. Where tokens go from an expert that owns them is summed over tokens once: it stays while
# the neighbour layers do.


@kernel
def whole_devices(share: FloatArray) -> IntArray:
    """Device of each expert, for placements without replicas."""
    device_of = np.zeros(share.shape[0], np.int64)
    for e in range(share.shape[0]):
        for g in range(share.shape[1]):
            if share[e, g] > 0.0:
                device_of[e] = g
    return device_of


@kernel
def token_counts(layer: LayerTokens, device_of: IntArray, node_of: IntArray, nodes: int, plain: bool) -> TokenCounts:
    """How many of each token's experts stand where; see `TokenCounts`."""
    tokens, top_k = layer.experts.shape
    tokens = tokens if plain else 0
    counted = np.zeros((tokens, node_of.shape[0]), np.uint8)
    node_counted = np.zeros((tokens, nodes), np.uint8)
    for t in range(tokens):
        for j in range(top_k):
            g = device_of[layer.experts[t, j]]
            counted[t, g] += 1
            node_counted[t, node_of[g]] += 1
    return TokenCounts(counted, node_counted)


@kernel
def recount(layer: LayerTokens, a: int, b: int, g: int, h: int, node_of: IntArray, counts: TokenCounts) -> None:
    """Keeps `token_counts` up to date when a goes from device g to h and b from h to g."""
    counted, node_counted = counts
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
def tokens_onward(
    layer: LayerTokens, around: Neighbours, after_device: IntArray, node_of: IntArray, nodes: int, plain: bool
) -> Onward:
    """Where tokens go from an expert that owns them; see `Onward`."""
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
    return Onward(toward, node_toward)


@kernel
def _pair(
    ledgers: FloatArray, s: int, w: int, source: int, target: int, x: float, rates: Rates, node_ledgers: FloatArray
) -> None:
    """Adds x tokens from a device (or, for source G, evenly from all) to a device in ledger w of step s; merging by
    node is left to `_node_pair`."""
    if x == 0.0:
        return
    devices = rates.node_of.shape[0]
    first, last = (source, source + 1) if source < devices else (0, devices)
    for h in range(first, last):
        post(ledgers[s, w], node_ledgers[s, w], h, target, x / (last - first), rates, rates.dedup[0])


@kernel
def _node_pair(node_ledgers: FloatArray, s: int, w: int, source: int, target: int, x: float, rates: Rates) -> None:
    """Adds x tokens from a device (or evenly from all) to a node, where copies to its devices travel as one."""
    if x == 0.0 or not rates.dedup[0]:
        return
    devices = rates.node_of.shape[0]
    first, last = (source, source + 1) if source < devices else (0, devices)
    for h in range(first, last):
        post_node(node_ledgers[s, w], rates.node_of[h], target, x / (last - first))


@kernel
def whole_traffic(
    layer: LayerTokens,
    came_from: IntArray,
    device_of: IntArray,
    onward: Onward,
    rates: Rates,
    ledgers: FloatArray,
    node_ledgers: FloatArray,
) -> None:
    """Adds all traffic of a placement without replicas; see `exchange_traffic`."""
    devices, nodes = rates.node_of.shape[0], rates.node_size.shape[0]
    steps, top_k = layer.counts.shape[0], layer.experts.shape[1]
    pairs, node_pairs = np.zeros((3, steps, devices + 1, devices)), np.zeros((3, steps, devices + 1, nodes))
    experts, step_of, node_of = layer.experts, layer.step_of, rates.node_of
    for t in range(experts.shape[0]):
        s, owner = step_of[t], device_of[experts[t, 0]]
        source = came_from[t] if came_from[t] >= 0 else devices
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
    toward, node_toward = onward
    for e in range(toward.shape[0]):
        for s in range(steps):
            for d in range(devices):
                pairs[2, s, device_of[e], d] += toward[e, s, d]
            for d in range(nodes):
                node_pairs[2, s, device_of[e], d] += node_toward[e, s, d]
    for w in range(3):
        for s in range(steps):
            for source in range(devices + 1):
                for d in range(devices):
                    _pair(ledgers, s, w, source, d, pairs[w, s, source, d], rates, node_ledgers)
                for d in range(nodes):
                    _node_pair(node_ledgers, s, w, source, d, node_pairs[w, s, source, d], rates)


@kernel
def exchange_traffic(
    layer: LayerTokens,
    came_from: IntArray,
    counts: TokenCounts,
    onward: Onward,
    a: int,
    b: int,
    g: int,
    h: int,
    device_of: IntArray,
    rates: Rates,
    ledgers: FloatArray,
    node_ledgers: FloatArray,
    change: FloatArray,
    owned: FloatArray,
    node_owned: FloatArray,
) -> None:
    """Traffic changes when whole expert a goes from device g to h and b from h to g (no replicas).

    came_from: [T] device before (-1: all evenly). counts: of `token_counts`. onward: of `tokens_onward`. To work in:
    change [2, S, G + 1, 4], what inputs and outputs by source come to g, h and their nodes more than before; owned [S,
    G] and node_owned [S, N], outputs by source that go to h rather than g.
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
            source = came_from[t] if came_from[t] >= 0 else devices
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
    dedup = rates.dedup[0]
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
    toward, node_toward = onward
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
    experts: Ids,
    t: int,
    s: int,
    device_of: IntArray,
    a: int,
    b: int,
    g: int,
    h: int,
    rates: Rates,
    ledgers: FloatArray,
    node_ledgers: FloatArray,
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
