"""Annealing one layer's placement with exact incremental evaluation, for tokens that live on home ranks.

A proposal exchanges the experts of two slots, gives a slot to another expert, or shifts shares between two replicas;
its effect on every step is computed from the tokens of the (at most two) experts it touches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..jit import kernel
from .moves import (
    accepted,
    aim_value,
    commit,
    first_moved,
    first_work,
    more_moved,
    propose,
    remember,
    shift_work,
    slot_tables,
    step_cost,
)
from .source_traffic import (
    count_split,
    exchange,
    fill_homes,
    fill_state,
    first_home_work,
    first_ledgers,
    node_rows,
    serve_rows,
    shift_home_work,
    walk,
    walk_homes,
)
from .traffic import (
    account,
    coherent_step_cost,
    compute_cost,
    exchange_traffic,
    recount,
    replace_traffic,
    support,
    supports,
    token_counts,
    transfer_cost,
    ways_onward,
    whole_devices,
    whole_traffic,
)


@kernel
def anneal(
    layer: Any,
    rates: Any,
    aim: Any,
    moves: Any,
    limit: Any,
    slot_expert: Any,
    slot_device: Any,
    share: Any,
    proposals: int,
    hot: float,
    cold: float,
    seed: int,
) -> tuple[float, Any, Any, Any, Any, Any, Any, float]:
    """Anneals from temperature `hot` to `cold` (seconds), geometrically; the start counts as the first incumbent.

    slot_expert: [P]. slot_device: [P]. share: [E, G]. No expert may stand twice on one device.
    Returns the best placement seen (value, slot_expert, share, step costs [S]), where the walk ended (slot_expert,
    share, step costs), and the mean absolute change of the value over proposals.
    """
    np.random.seed(seed)
    experts, devices = share.shape
    nodes, steps = rates.node_size.shape[0], layer.counts.shape[0]
    tokens = layer.experts.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at, replicas = slot_tables(slot_expert, slot_device, experts, devices)
    node_share = np.zeros((experts, nodes))
    node_rows(share, rates.node_of, node_share)
    zeros, node_zeros = np.zeros((tokens, devices), np.uint8), np.zeros((tokens, nodes), np.uint8)
    soft, node_soft = np.ones((tokens, devices)), np.ones((tokens, nodes))
    reach, node_reach = np.zeros((steps, devices)), np.zeros((steps, nodes))
    fill_state(layer, share, zeros, soft, reach)
    fill_state(layer, node_share, node_zeros, node_soft, node_reach)
    load, hit = first_work(layer, share, slot_at)
    cost = np.empty(steps)
    for s in range(steps):
        cost[s] = step_cost(reach[s], node_reach[s], load[s], hit[s], rates)
    value = aim_value(cost, aim)
    best, best_expert, best_share, best_cost = value, slot_expert.copy(), share.copy(), cost.copy()

    old, new = np.zeros((2, devices)), np.zeros((2, devices))
    node_old, node_new = np.zeros((2, nodes)), np.zeros((2, nodes))
    d_reach, d_node = np.zeros((steps, devices)), np.zeros((steps, nodes))
    new_load, new_hit = load.copy(), hit.copy()
    new_cost = cost.copy()
    plain = slot_expert.shape[0] == experts
    cooling = (cold / hot) ** (1.0 / max(1, proposals - 1)) if hot > 0.0 else 0.0
    temperature = hot
    moved = first_moved(slot_expert, slot_device, limit)
    remember(value, moved, slot_expert, slot_device, share, limit)
    changes, counted = 0.0, 0
    for _ in range(proposals):
        temperature *= cooling
        kind, p, q, a, b = propose(slot_expert, slot_device, slot_at, share, replicas, moves, new)
        if kind == 0:
            continue
        more = more_moved(kind, p, q, a, b, slot_device, limit)
        if more > 0 and moved + more > limit.most:
            continue
        old[0] = share[a]
        old[1] = 0.0
        if b >= 0:
            old[1] = share[b]
        d_reach[:] = 0.0
        d_node[:] = 0.0
        new_load[:] = load
        new_hit[:] = hit
        g, h = slot_device[p], slot_device[max(q, 0)]
        whole = kind == 1 and share[a, g] >= 1.0 and share[b, h] >= 1.0
        m, n = rates.node_of[g], rates.node_of[h]
        if whole:
            exchange(layer, a, b, g, h, zeros, soft, plain, d_reach, False)
            if m != n:
                exchange(layer, a, b, m, n, node_zeros, node_soft, plain, d_node, False)
        else:
            node_rows(old, rates.node_of, node_old)
            node_rows(new, rates.node_of, node_new)
            walk(layer, a, b, old, new, zeros, soft, d_reach, False)
            walk(layer, a, b, node_old, node_new, node_zeros, node_soft, d_node, False)
        shift_work(layer, a, b, old, new, new_load, new_hit)
        for s in range(steps):
            new_cost[s] = step_cost(reach[s] + d_reach[s], node_reach[s] + d_node[s], new_load[s], new_hit[s], rates)
        new_value = aim_value(new_cost, aim)
        changes += abs(new_value - value)
        counted += 1
        if not accepted(value, new_value + more * limit.price, temperature):
            continue
        if whole:
            exchange(layer, a, b, g, h, zeros, soft, plain, d_reach, True)
            if m != n:
                exchange(layer, a, b, m, n, node_zeros, node_soft, plain, d_node, True)
        else:
            walk(layer, a, b, old, new, zeros, soft, d_reach, True)
            walk(layer, a, b, node_old, node_new, node_zeros, node_soft, d_node, True)
        # Applying added the same changes a second time.
        reach += 0.5 * d_reach
        node_reach += 0.5 * d_node
        load[:] = new_load
        hit[:] = new_hit
        commit(kind, p, q, a, b, new, slot_expert, slot_device, slot_at, share, replicas)
        cost[:] = new_cost
        value = new_value
        moved += more
        remember(value, moved, slot_expert, slot_device, share, limit)
        if value < best:
            best = value
            best_expert[:] = slot_expert
            best_share[:] = share
            best_cost[:] = cost
    typical = changes / counted if counted > 0 else 0.0
    return best, best_expert, best_share, best_cost, slot_expert, share, cost, typical


# Annealing one layer's placement for tokens whose home devices are known: replicas near the token pay here.


@kernel
def home_step_cost(load: Any, hit: Any, ledger: Any, node_ledger: Any, rates: Any) -> float:
    """Seconds of one step in one layer, latency left out."""
    return compute_cost(load, hit, rates) + (1.0 + rates.back) * transfer_cost(ledger, node_ledger, rates)


@kernel
def anneal_homes(
    layer: Any,
    rates: Any,
    aim: Any,
    moves: Any,
    limit: Any,
    slot_expert: Any,
    slot_device: Any,
    share: Any,
    proposals: int,
    hot: float,
    cold: float,
    seed: int,
) -> tuple[float, Any, Any, Any, Any, Any, Any, float]:
    """As `anneal`, for a layer's `HomeTokens`."""
    np.random.seed(seed)
    experts, devices = share.shape
    nodes, steps, tokens = rates.node_size.shape[0], layer.counts.shape[2], layer.experts.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at, replicas = slot_tables(slot_expert, slot_device, experts, devices)
    rows, node_rows = np.zeros((experts, devices, devices)), np.zeros((experts, devices, nodes))
    for e in range(experts):
        serve_rows(share[e], rates.node_of, layer.nearest, rows[e], node_rows[e])
    zeros, node_zeros = np.zeros((tokens, devices), np.uint8), np.zeros((tokens, nodes), np.uint8)
    soft, node_soft = np.ones((tokens, devices)), np.ones((tokens, nodes))
    split, node_split = np.zeros((devices, devices), np.int64), np.zeros((devices, nodes), np.int64)
    for e in range(experts):
        count_split(rows[e], split, 1)
        count_split(node_rows[e], node_split, 1)
    products, node_products = (zeros, soft, split), (node_zeros, node_soft, node_split)
    fill_homes(layer, rows, zeros, soft)
    fill_homes(layer, node_rows, node_zeros, node_soft)
    ledgers, node_ledgers = np.zeros((steps, 3, devices)), np.zeros((steps, 2, nodes))
    first_ledgers(layer, zeros, soft, node_zeros, node_soft, ledgers, node_ledgers, rates)
    load, hit = np.zeros((steps, devices)), np.zeros((steps, devices))
    first_home_work(layer, rows, load, hit)
    cost = np.empty(steps)
    for s in range(steps):
        cost[s] = home_step_cost(load[s], hit[s], ledgers[s], node_ledgers[s], rates)
    value = aim_value(cost, aim)
    best, best_expert, best_share, best_cost = value, slot_expert.copy(), share.copy(), cost.copy()

    new = np.zeros((2, devices))
    old_rows, new_rows = np.zeros((2, devices, devices)), np.zeros((2, devices, devices))
    old_node_rows, new_node_rows = np.zeros((2, devices, nodes)), np.zeros((2, devices, nodes))
    new_load, new_hit, new_cost = load.copy(), hit.copy(), cost.copy()
    new_ledgers, new_node_ledgers = ledgers.copy(), node_ledgers.copy()
    cooling = (cold / hot) ** (1.0 / max(1, proposals - 1)) if hot > 0.0 else 0.0
    temperature = hot
    moved = first_moved(slot_expert, slot_device, limit)
    remember(value, moved, slot_expert, slot_device, share, limit)
    changes, counted = 0.0, 0
    for _ in range(proposals):
        temperature *= cooling
        kind, p, q, a, b = propose(slot_expert, slot_device, slot_at, share, replicas, moves, new)
        if kind == 0:
            continue
        more = more_moved(kind, p, q, a, b, slot_device, limit)
        if more > 0 and moved + more > limit.most:
            continue
        for turn in range(2):
            e = a if turn == 0 else b
            if e < 0:
                old_rows[turn] = 0.0
                old_node_rows[turn] = 0.0
                new_rows[turn] = 0.0
                new_node_rows[turn] = 0.0
            else:
                old_rows[turn] = rows[e]
                old_node_rows[turn] = node_rows[e]
                serve_rows(new[turn], rates.node_of, layer.nearest, new_rows[turn], new_node_rows[turn])
        new_ledgers[:] = ledgers
        new_node_ledgers[:] = node_ledgers
        new_load[:] = load
        new_hit[:] = hit
        walk_homes(layer, a, b, old_rows, new_rows, products, new_ledgers, new_node_ledgers, rates, False, False)
        if rates.dedup:
            walk_homes(
                layer,
                a,
                b,
                old_node_rows,
                new_node_rows,
                node_products,
                new_ledgers,
                new_node_ledgers,
                rates,
                True,
                False,
            )
        shift_home_work(layer, a, b, old_rows, new_rows, new_load, new_hit)
        for s in range(steps):
            new_cost[s] = home_step_cost(new_load[s], new_hit[s], new_ledgers[s], new_node_ledgers[s], rates)
        new_value = aim_value(new_cost, aim)
        changes += abs(new_value - value)
        counted += 1
        if not accepted(value, new_value + more * limit.price, temperature):
            continue
        walk_homes(layer, a, b, old_rows, new_rows, products, new_ledgers, new_node_ledgers, rates, False, True)
        if rates.dedup:
            walk_homes(
                layer,
                a,
                b,
                old_node_rows,
                new_node_rows,
                node_products,
                new_ledgers,
                new_node_ledgers,
                rates,
                True,
                True,
            )
        for turn in range(2):
            e = a if turn == 0 else b
            if e >= 0:
                count_split(old_rows[turn], split, -1)
                count_split(new_rows[turn], split, 1)
                count_split(old_node_rows[turn], node_split, -1)
                count_split(new_node_rows[turn], node_split, 1)
                rows[e] = new_rows[turn]
                node_rows[e] = new_node_rows[turn]
        ledgers[:] = new_ledgers
        node_ledgers[:] = new_node_ledgers
        load[:] = new_load
        hit[:] = new_hit
        cost[:] = new_cost
        commit(kind, p, q, a, b, new, slot_expert, slot_device, slot_at, share, replicas)
        value = new_value
        moved += more
        remember(value, moved, slot_expert, slot_device, share, limit)
        if value < best:
            best = value
            best_expert[:] = slot_expert
            best_share[:] = share
            best_cost[:] = cost
    typical = changes / counted if counted > 0 else 0.0
    return best, best_expert, best_share, best_cost, slot_expert, share, cost, typical


# Annealing one layer's placement for context-coherent execution, its neighbour layers fixed.


@kernel
def anneal_coherent(
    layer: Any,
    around: Any,
    rates: Any,
    aim: Any,
    moves: Any,
    limit: Any,
    slot_expert: Any,
    slot_device: Any,
    share: Any,
    proposals: int,
    hot: float,
    cold: float,
    seed: int,
) -> tuple[float, Any, Any, Any, Any, Any, Any, float]:
    """As `anneal`; step costs hold this layer's time and the next layer's dispatch, which it decides too."""
    np.random.seed(seed)
    experts, devices = share.shape
    nodes, steps, tokens = rates.node_size.shape[0], layer.counts.shape[0], layer.experts.shape[0]
    slot_expert, share = slot_expert.copy(), share.copy()
    slot_at, replicas = slot_tables(slot_expert, slot_device, experts, devices)
    here = supports(share, rates.node_of, nodes)
    before = supports(around.before_share, rates.node_of, nodes)
    after = supports(around.after_share, rates.node_of, nodes)
    work = (
        np.zeros(devices, np.int64),
        np.zeros(devices),
        np.zeros(devices, np.bool_),
        np.zeros(nodes, np.int64),
        np.zeros(nodes),
        np.zeros(nodes, np.bool_),
    )
    ledgers, node_ledgers = np.zeros((steps, 3, 3, devices)), np.zeros((steps, 3, 2, nodes))
    plain = slot_expert.shape[0] == experts
    held, device_of, device_after = (
        np.full(tokens, -1, np.int64),
        whole_devices(share),
        whole_devices(around.after_share),
    )
    change, owned, node_owned = (
        np.zeros((2, steps, devices + 1, 4)),
        np.zeros((steps, devices)),
        np.zeros((steps, nodes)),
    )
    if plain:
        device_before = whole_devices(around.before_share)
        for t in range(tokens):
            if around.before[t] >= 0:
                held[t] = device_before[around.before[t]]
    counts = token_counts(layer, device_of, rates.node_of, nodes, plain)
    ways = ways_onward(layer, around, device_after, rates.node_of, nodes, plain)
    if plain:
        whole_traffic(layer, held, device_of, ways, rates, ledgers, node_ledgers)
    else:
        for t in range(tokens):
            s = layer.step_of[t]
            account(layer, around, t, 1.0, here, before, after, ledgers[s], node_ledgers[s], rates, work)
    load, hit = first_work(layer, share, slot_at)
    cost = np.empty(steps)
    for s in range(steps):
        cost[s] = coherent_step_cost(load[s], hit[s], ledgers[s], node_ledgers[s], rates)
    value = aim_value(cost, aim)
    best, best_expert, best_share, best_cost = value, slot_expert.copy(), share.copy(), cost.copy()

    new = np.zeros((2, devices))
    old = np.zeros((2, devices))
    new_load, new_hit = load.copy(), hit.copy()
    new_ledgers, new_node_ledgers = ledgers.copy(), node_ledgers.copy()
    new_cost = cost.copy()
    cooling = (cold / hot) ** (1.0 / max(1, proposals - 1)) if hot > 0.0 else 0.0
    temperature = hot
    moved = first_moved(slot_expert, slot_device, limit)
    remember(value, moved, slot_expert, slot_device, share, limit)
    changes, counted = 0.0, 0
    for _ in range(proposals):
        temperature *= cooling
        kind, p, q, a, b = propose(slot_expert, slot_device, slot_at, share, replicas, moves, new)
        if kind == 0:
            continue
        more = more_moved(kind, p, q, a, b, slot_device, limit)
        if more > 0 and moved + more > limit.most:
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
            exchange_traffic(
                layer,
                held,
                counts,
                ways,
                a,
                b,
                slot_device[p],
                slot_device[q],
                device_of,
                rates,
                new_ledgers,
                new_node_ledgers,
                change,
                owned,
                node_owned,
            )
        else:
            replace_traffic(layer, around, a, b, new, here, before, after, new_ledgers, new_node_ledgers, rates, work)
        shift_work(layer, a, b, old, new, new_load, new_hit)
        for s in range(steps):
            new_cost[s] = coherent_step_cost(new_load[s], new_hit[s], new_ledgers[s], new_node_ledgers[s], rates)
        new_value = aim_value(new_cost, aim)
        changes += abs(new_value - value)
        counted += 1
        if not accepted(value, new_value + more * limit.price, temperature):
            if plain:
                continue
            support(a, old[0], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
            if b >= 0:
                support(b, old[1], rates.node_of, here[0], here[1], here[2], here[3], here[4], here[5])
            continue
        load[:] = new_load
        hit[:] = new_hit
        ledgers[:] = new_ledgers
        node_ledgers[:] = new_node_ledgers
        cost[:] = new_cost
        if plain:
            recount(layer, a, b, slot_device[p], slot_device[q], rates.node_of, counts[0], counts[1])
            device_of[a], device_of[b] = slot_device[q], slot_device[p]
        commit(kind, p, q, a, b, new, slot_expert, slot_device, slot_at, share, replicas)
        value = new_value
        moved += more
        remember(value, moved, slot_expert, slot_device, share, limit)
        if value < best:
            best = value
            best_expert[:] = slot_expert
            best_share[:] = share
            best_cost[:] = cost
    typical = changes / counted if counted > 0 else 0.0
    return best, best_expert, best_share, best_cost, slot_expert, share, cost, typical
