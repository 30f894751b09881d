"""Annealing one layer's placement with exact incremental evaluation, for tokens that live on home ranks.

A proposal exchanges the experts of two slots, gives a slot to another expert, or shifts shares between two replicas;
its effect on every step is computed from the tokens of the (at most two) experts it touches.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel
from .costs import aim_value, step_cost
from .proposals import propose
from .reach import exchange, fill_state, node_rows, walk
from .slots import accepted, commit, first_moved, first_work, more_moved, remember, shift_work, slot_tables


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
