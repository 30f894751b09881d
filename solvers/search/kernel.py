"""Annealing one layer's placement with exact incremental evaluation, for tokens that live on home ranks.

Compiled with numba. A proposal exchanges the experts of two slots, gives a slot to another expert, or shifts shares
between two replicas; its effect on every step is computed from the tokens of the (at most two) experts it touches.

A token's copies: device g is reached with probability 1 - prod_j (1 - w[e_j, g]) over its k experts. For O(1) updates
the product is kept in two parts a token and device: how many factors are zero (experts wholly on g), and the product
of the others. T tokens, S steps, E experts, P slots, G devices, N nodes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class LayerTokens(NamedTuple):
    """One layer of the scenario steps.

    experts: [T, k] int32. step_of: [T] int32. first, tokens: CSR lists of the tokens of each expert ([E+1], [T*k]).
    counts: [S, E] tokens each expert got.
    """

    experts: npt.NDArray[np.int32]
    step_of: npt.NDArray[np.int32]
    first: Ints
    tokens: npt.NDArray[np.int32]
    counts: Floats


class Rates(NamedTuple):
    """Seconds a unit costs: [G] token-expert pair, expert read, copy over the device's links; [N] copy over the node's.

    back: what a returning copy costs, relative to one going out. node_of: [G]. node_size: [N]. dedup: one copy a
    (token, node) between nodes.
    """

    per_pair: Floats
    per_expert: Floats
    per_copy: Floats
    per_node_copy: Floats
    back: float
    node_of: Ints
    node_size: Floats
    dedup: bool


class Aim(NamedTuple):
    """What of the step times counts: (1 - worst) * weighted mean + worst * the largest group mean over its reference.

    weight: [S], summing to 1. group: [S] workload of a step. group_weight: [S], summing to 1 in each group.
    reference: [W] subtracted from each group's mean. worst: 0 for means, 1 for the worst group.
    """

    weight: Floats
    group: Ints
    group_weight: Floats
    reference: Floats
    worst: float


class Moves(NamedTuple):
    """What a proposal may do. allowed: [E, G]. free: shares may differ. home: [E, G] where experts stand today;
    price: seconds charged for each slot filled with an expert that does not stand there today."""

    allowed: npt.NDArray[np.bool_]
    free: bool
    home: npt.NDArray[np.bool_]
    price: float


@njit(cache=True, nogil=True)
def step_cost(reach: Any, node_reach: Any, load: Any, hit: Any, rates: Any) -> float:
    """Seconds of one step in one layer, latency left out: compute and both transfers."""
    devices, nodes = load.shape[0], node_reach.shape[0]
    compute = 0.0
    for g in range(devices):
        compute = max(compute, load[g] * rates.per_pair[g], hit[g] * rates.per_expert[g])
    transfer = 0.0
    total_in_node = 0.0
    total_node_reach = 0.0
    for n in range(nodes):
        total_node_reach += node_reach[n]
    for g in range(devices):
        total_in_node += reach[g]
    first = 0
    for n in range(nodes):
        size = rates.node_size[n]
        last = first + int(size)
        in_node = 0.0
        for g in range(first, last):
            in_node += reach[g]
        split = size if rates.dedup else float(devices)
        for g in range(first, last):
            crossing = max(reach[g] * (size - 1.0), in_node - reach[g]) / split
            transfer = max(transfer, crossing * rates.per_copy[g])
        entering, everywhere = (node_reach[n], total_node_reach) if rates.dedup else (in_node, total_in_node)
        share = size / devices
        crossing = max(entering * (1.0 - share), (everywhere - entering) * share)
        transfer = max(transfer, crossing * rates.per_node_copy[n])
        first = last
    return compute + (1.0 + rates.back) * transfer


@njit(cache=True, nogil=True)
def aim_value(cost: Any, aim: Any) -> float:
    """The layer's figure from its step costs [S]."""
    groups = aim.reference.shape[0]
    mean = 0.0
    sums = np.zeros(groups)
    for s in range(cost.shape[0]):
        mean += aim.weight[s] * cost[s]
        sums[aim.group[s]] += aim.group_weight[s] * cost[s]
    if aim.worst == 0.0:
        return mean
    worst = -np.inf
    for w in range(groups):
        worst = max(worst, sums[w] - aim.reference[w])
    return (1.0 - aim.worst) * mean + aim.worst * worst


@njit(cache=True, nogil=True)
def idle_chance(share: float, count: float) -> float:
    """Chance that none of `count` tokens draws a replica of that share."""
    if count == 0.0 or share == 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    return (1.0 - share) ** count


@njit(cache=True, nogil=True)
def _reach_change(zeros: int, soft: float, old: float, new: float) -> tuple[float, int, float]:
    """(change of the chance of being reached, zero factors, product) when one factor goes from 1-old to 1-new."""
    before = soft if zeros == 0 else 0.0
    if old >= 1.0:
        zeros -= 1
    else:
        soft /= 1.0 - old
    if new >= 1.0:
        zeros += 1
    else:
        soft *= 1.0 - new
    after = soft if zeros == 0 else 0.0
    return before - after, zeros, soft


@njit(cache=True, nogil=True)
def _fill_state(layer: Any, share: Any, zeros: Any, soft: Any, reach: Any) -> None:
    """Products of a token's factors on every target (device or node), and tokens reaching each target a step."""
    zeros[:] = 0
    soft[:] = 1.0
    reach[:] = 0.0
    for t in range(layer.experts.shape[0]):
        s = layer.step_of[t]
        for j in range(layer.experts.shape[1]):
            e = layer.experts[t, j]
            for g in range(share.shape[1]):
                w = share[e, g]
                if w >= 1.0:
                    zeros[t, g] += 1
                elif w > 0.0:
                    soft[t, g] *= 1.0 - w
        for g in range(share.shape[1]):
            reach[s, g] += 1.0 - (soft[t, g] if zeros[t, g] == 0 else 0.0)


@njit(cache=True, nogil=True)
def _walk(layer: Any, a: int, b: int, old: Any, new: Any, zeros: Any, soft: Any, change: Any, apply: bool) -> None:
    """Changes of `reach` [S, targets] when the rows of experts a and b go from old to new ([2, targets] each).

    b may be -1. With `apply` the token products are updated too.
    """
    targets = old.shape[1]
    touched = np.empty(targets, dtype=np.int64)
    for turn in range(2):
        e = a if turn == 0 else b
        if e < 0:
            continue
        count = 0
        for g in range(targets):
            if old[0, g] != new[0, g] or old[1, g] != new[1, g]:
                touched[count] = g
                count += 1
        for i in range(layer.first[e], layer.first[e + 1]):
            t = layer.tokens[i]
            other = False
            for j in range(layer.experts.shape[1]):
                if layer.experts[t, j] == (b if turn == 0 else a):
                    other = True
            if turn == 1 and other:
                continue
            s = layer.step_of[t]
            for c in range(count):
                g = touched[c]
                z, p = int(zeros[t, g]), soft[t, g]
                total = 0.0
                if old[turn, g] != new[turn, g]:
                    delta, z, p = _reach_change(z, p, old[turn, g], new[turn, g])
                    total += delta
                if other and old[1, g] != new[1, g]:
                    delta, z, p = _reach_change(z, p, old[1, g], new[1, g])
                    total += delta
                change[s, g] += total
                if apply:
                    zeros[t, g] = z
                    soft[t, g] = p


@njit(cache=True, nogil=True)
def _exchange(
    layer: Any, a: int, b: int, g: int, h: int, zeros: Any, soft: Any, plain: bool, change: Any, apply: bool
) -> None:
    """`_walk` for the commonest move: whole expert a goes from target g to h, whole expert b from h to g.

    A token that chose both needs the same targets afterwards. plain: no expert is split, so every product is one.
    """
    for turn in range(2):
        e, other, leave, enter = (a, b, g, h) if turn == 0 else (b, a, h, g)
        for i in range(layer.first[e], layer.first[e + 1]):
            t = layer.tokens[i]
            alone = True
            for j in range(layer.experts.shape[1]):
                alone &= layer.experts[t, j] != other
            s = layer.step_of[t]
            if plain:
                # Without branches: which tokens lose or gain a target is not predictable.
                change[s, leave] -= alone & (zeros[t, leave] == 1)
                change[s, enter] += alone & (zeros[t, enter] == 0)
            elif alone:
                if zeros[t, leave] == 1:
                    change[s, leave] -= soft[t, leave]
                if zeros[t, enter] == 0:
                    change[s, enter] += soft[t, enter]
            if apply and alone:
                zeros[t, leave] -= 1
                zeros[t, enter] += 1


@njit(cache=True, nogil=True)
def _node_rows(rows: Any, node_of: Any, result: Any) -> None:
    result[:] = 0.0
    for r in range(rows.shape[0]):
        for g in range(rows.shape[1]):
            result[r, node_of[g]] += rows[r, g]
        for n in range(result.shape[1]):
            # Thirds and sevenths do not add up to one exactly; whole experts must be recognised as whole.
            if result[r, n] > 1.0 - 1e-9:
                result[r, n] = 1.0


@njit(cache=True, nogil=True)
def propose(
    slot_expert: Any, slot_device: Any, slot_at: Any, share: Any, replicas: Any, moves: Any, new: Any
) -> tuple[int, int, int, int, int]:
    """(kind, slot, slot or -1, expert a, expert b or -1) and the experts' new rows; kind 0 is no move.

    Kinds: 1 exchange two slots, 2 give a slot of a to b, 3 shift share between two replicas of a.
    """
    slots, experts, devices = slot_expert.shape[0], share.shape[0], share.shape[1]
    draw = np.random.random()
    p = np.random.randint(slots)
    g, a = slot_device[p], slot_expert[p]
    spare = slots > experts
    if spare and draw < 0.35:
        b = np.random.randint(experts)
        if replicas[a] < 2 or b == a or slot_at[b, g] >= 0 or not moves.allowed[b, g]:
            return 0, 0, 0, 0, 0
        new[0, :] = share[a]
        new[1, :] = share[b]
        gone = share[a, g]
        for h in range(devices):
            if slot_at[a, h] >= 0:
                new[0, h] = share[a, h] + gone / (replicas[a] - 1) if moves.free else 1.0 / (replicas[a] - 1)
            if slot_at[b, h] >= 0:
                kept = replicas[b] / (replicas[b] + 1.0)
                new[1, h] = share[b, h] * kept if moves.free else 1.0 / (replicas[b] + 1.0)
        new[0, g] = 0.0
        new[1, g] = 1.0 / (replicas[b] + 1.0)
        if replicas[a] == 2:
            for h in range(devices):
                if slot_at[a, h] >= 0 and h != g:
                    new[0, h] = 1.0
        return 2, p, -1, a, b
    if spare and moves.free and draw < 0.6:
        if replicas[a] < 2:
            return 0, 0, 0, 0, 0
        h = np.random.randint(devices)
        if h == g or slot_at[a, h] < 0 or share[a, g] == 0.0:
            return 0, 0, 0, 0, 0
        amount = share[a, g] * (1.0 if np.random.random() < 0.05 else np.random.random())
        new[0, :] = share[a]
        new[0, g] -= amount
        new[0, h] += amount
        if new[0, g] < 1e-9:
            new[0, h] += new[0, g]
            new[0, g] = 0.0
        if new[0, h] > 1.0 - 1e-9:
            new[0, h] = 1.0
        new[1, :] = 0.0
        return 3, p, slot_at[a, h], a, -1
    q = np.random.randint(slots)
    h, b = slot_device[q], slot_expert[q]
    if g == h or a == b or slot_at[a, h] >= 0 or slot_at[b, g] >= 0:
        return 0, 0, 0, 0, 0
    if not moves.allowed[a, h] or not moves.allowed[b, g]:
        return 0, 0, 0, 0, 0
    new[0, :] = share[a]
    new[1, :] = share[b]
    new[0, h] = share[a, g]
    new[0, g] = 0.0
    new[1, g] = share[b, h]
    new[1, h] = 0.0
    return 1, p, q, a, b


@njit(cache=True, nogil=True)
def price_change(kind: int, p: int, q: int, a: int, b: int, slot_device: Any, moves: Any) -> float:
    if moves.price == 0.0 or kind == 3:
        return 0.0
    g = slot_device[p]
    change = (0.0 if moves.home[b, g] else 1.0) - (0.0 if moves.home[a, g] else 1.0)
    if kind == 1:
        h = slot_device[q]
        change += (0.0 if moves.home[a, h] else 1.0) - (0.0 if moves.home[b, h] else 1.0)
    return moves.price * change


@njit(cache=True, nogil=True)
def anneal(
    layer: Any,
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
    """Anneals from temperature `hot` to `cold` (seconds), geometrically; the start counts as the first incumbent.

    slot_expert: [P]. slot_device: [P]. share: [E, G]. No expert may stand twice on one device.
    Returns (value of the best placement, its slot_expert, its share, its step costs [S]).
    """
    np.random.seed(seed)
    experts, devices = share.shape
    nodes, steps = rates.node_size.shape[0], layer.counts.shape[0]
    tokens = layer.experts.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at = np.full((experts, devices), -1, dtype=np.int64)
    replicas = np.zeros(experts, dtype=np.int64)
    for p in range(slot_expert.shape[0]):
        slot_at[slot_expert[p], slot_device[p]] = p
        replicas[slot_expert[p]] += 1
    node_share = np.zeros((experts, nodes))
    _node_rows(share, rates.node_of, node_share)
    zeros, node_zeros = np.zeros((tokens, devices), np.uint8), np.zeros((tokens, nodes), np.uint8)
    soft, node_soft = np.ones((tokens, devices)), np.ones((tokens, nodes))
    reach, node_reach = np.zeros((steps, devices)), np.zeros((steps, nodes))
    _fill_state(layer, share, zeros, soft, reach)
    _fill_state(layer, node_share, node_zeros, node_soft, node_reach)
    load, hit = layer.counts @ share, np.zeros((steps, devices))
    for s in range(steps):
        for e in range(experts):
            for g in range(devices):
                if slot_at[e, g] >= 0:
                    hit[s, g] += 1.0 - idle_chance(share[e, g], layer.counts[s, e])
    cost = np.empty(steps)
    for s in range(steps):
        cost[s] = step_cost(reach[s], node_reach[s], load[s], hit[s], rates)
    extra = 0.0
    for p in range(slot_expert.shape[0]):
        if not moves.home[slot_expert[p], slot_device[p]]:
            extra += moves.price
    value = aim_value(cost, aim) + extra
    best, best_expert, best_share, best_cost = value, slot_expert.copy(), share.copy(), cost.copy()

    old, new = np.zeros((2, devices)), np.zeros((2, devices))
    node_old, node_new = np.zeros((2, nodes)), np.zeros((2, nodes))
    d_reach, d_node = np.zeros((steps, devices)), np.zeros((steps, nodes))
    d_load, d_hit = np.zeros((steps, devices)), np.zeros((steps, devices))
    new_cost = cost.copy()
    plain = slot_expert.shape[0] == experts
    cooling = (cold / hot) ** (1.0 / max(1, proposals - 1)) if hot > 0.0 else 0.0
    temperature = hot
    for _ in range(proposals):
        temperature *= cooling
        kind, p, q, a, b = propose(slot_expert, slot_device, slot_at, share, replicas, moves, new)
        if kind == 0:
            continue
        old[0] = share[a]
        old[1] = 0.0
        if b >= 0:
            old[1] = share[b]
        d_reach[:] = 0.0
        d_node[:] = 0.0
        d_load[:] = 0.0
        d_hit[:] = 0.0
        g, h = slot_device[p], slot_device[max(q, 0)]
        whole = kind == 1 and share[a, g] >= 1.0 and share[b, h] >= 1.0
        m, n = rates.node_of[g], rates.node_of[h]
        if whole:
            _exchange(layer, a, b, g, h, zeros, soft, plain, d_reach, False)
            if m != n:
                _exchange(layer, a, b, m, n, node_zeros, node_soft, plain, d_node, False)
        else:
            _node_rows(old, rates.node_of, node_old)
            _node_rows(new, rates.node_of, node_new)
            _walk(layer, a, b, old, new, zeros, soft, d_reach, False)
            _walk(layer, a, b, node_old, node_new, node_zeros, node_soft, d_node, False)
        for r in range(2):
            e = a if r == 0 else b
            if e < 0:
                continue
            for d in range(devices):
                if old[r, d] != new[r, d]:
                    for s in range(steps):
                        count = layer.counts[s, e]
                        d_load[s, d] += count * (new[r, d] - old[r, d])
                        d_hit[s, d] += idle_chance(old[r, d], count) - idle_chance(new[r, d], count)
        for s in range(steps):
            new_cost[s] = step_cost(
                reach[s] + d_reach[s], node_reach[s] + d_node[s], load[s] + d_load[s], hit[s] + d_hit[s], rates
            )
        new_extra = extra + price_change(kind, p, q, a, b, slot_device, moves)
        new_value = aim_value(new_cost, aim) + new_extra
        if new_value > value and np.random.random() >= np.exp((value - new_value) / max(temperature, 1e-300)):
            continue
        if whole:
            _exchange(layer, a, b, g, h, zeros, soft, plain, d_reach, True)
            if m != n:
                _exchange(layer, a, b, m, n, node_zeros, node_soft, plain, d_node, True)
        else:
            _walk(layer, a, b, old, new, zeros, soft, d_reach, True)
            _walk(layer, a, b, node_old, node_new, node_zeros, node_soft, d_node, True)
        # Applying added the same changes a second time.
        reach += 0.5 * d_reach
        node_reach += 0.5 * d_node
        load += d_load
        hit += d_hit
        share[a] = new[0]
        if b >= 0:
            share[b] = new[1]
            slot_at[a, g] = -1
            slot_at[b, g] = p
            slot_expert[p] = b
            if kind == 1:
                slot_at[b, h] = -1
                slot_at[a, h] = q
                slot_expert[q] = a
            else:
                replicas[a] -= 1
                replicas[b] += 1
        cost[:] = new_cost
        value, extra = new_value, new_extra
        if value < best:
            best = value
            best_expert[:] = slot_expert
            best_share[:] = share
            best_cost[:] = cost
    return best, best_expert, best_share, best_cost
