"""Annealing one layer's placement for context-coherent execution, its neighbour layers fixed."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel
from .costs import aim_value
from .exchange_traffic import exchange_traffic, recount, token_counts, ways_onward, whole_devices, whole_traffic
from .proposals import propose
from .slots import accepted, commit, first_moved, first_work, more_moved, remember, shift_work, slot_tables
from .traffic import account, coherent_step_cost, replace_traffic, support, supports


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
