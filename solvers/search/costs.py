"""Compiled arithmetic of the cost model for one step of one layer, and of what of the steps counts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel


@kernel
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


@kernel
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


@kernel
def idle_chance(share: float, count: float) -> float:
    """Chance that none of `count` tokens draws a replica of that share."""
    if count == 0.0 or share == 0.0:
        return 1.0
    if share >= 1.0:
        return 0.0
    return (1.0 - share) ** count
