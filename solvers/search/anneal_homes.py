"""Annealing one layer's placement for tokens whose home devices are known: replicas near the token pay here."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel
from .costs import aim_value
from .home_traffic import (
    count_split,
    fill_homes,
    first_home_work,
    first_ledgers,
    serve_rows,
    shift_home_work,
    walk_homes,
)
from .proposals import propose
from .slots import accepted, commit, first_moved, more_moved, remember, slot_tables
from .traffic import transfer_cost


@kernel
def home_step_cost(load: Any, hit: Any, ledger: Any, node_ledger: Any, rates: Any) -> float:
    """Seconds of one step in one layer, latency left out."""
    compute = 0.0
    for g in range(load.shape[0]):
        compute = max(compute, load[g] * rates.per_pair[g], hit[g] * rates.per_expert[g])
    return compute + (1.0 + rates.back) * transfer_cost(ledger, node_ledger, rates)


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
