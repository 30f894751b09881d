"""Traffic of context-coherent execution in one layer, on the links it loads.

A token enters from the device of its highest-weight expert in the layer before, goes to the devices of its experts
(dispatch), the outputs go to the device of its highest-weight expert here (back), and from there on to the next layer's
devices (onward). What that puts on links is linear in the (from, to) pairs of tokens, so each of the three is kept as a
ledger of sums a link, [3, G] and [2, N] a step, and updated token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel


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
def post(
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
            post(
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
            post(
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
            post(
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
            post(
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
    compute = 0.0
    for g in range(load.shape[0]):
        compute = max(compute, load[g] * rates.per_pair[g], hit[g] * rates.per_expert[g])
    return (
        compute
        + transfer_cost(ledgers[0], node_ledgers[0], rates)
        + rates.back * transfer_cost(ledgers[1], node_ledgers[1], rates)
        + transfer_cost(ledgers[2], node_ledgers[2], rates)
    )
