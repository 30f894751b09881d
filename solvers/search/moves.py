"""Random changes of one layer's placement."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..jit import kernel
from .traffic import compute_cost

# Compiled arithmetic of the cost model for one step of one layer, and of what of the steps counts.


@kernel
def step_cost(reach: Any, node_reach: Any, load: Any, hit: Any, rates: Any) -> float:
    """Seconds of one step in one layer, latency left out: compute and both transfers."""
    devices, nodes = load.shape[0], node_reach.shape[0]
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
    return compute_cost(load, hit, rates) + (1.0 + rates.back) * transfer


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


# What both kinds of annealing keep about a layer's slots and the work of its devices.


@kernel
def slot_tables(slot_expert: Any, slot_device: Any, experts: int, devices: int) -> Any:
    """([E, G] the slot of an expert on a device, -1 where it has none; [E] slots each expert has)."""
    slot_at = np.full((experts, devices), -1, dtype=np.int64)
    replicas = np.zeros(experts, dtype=np.int64)
    for p in range(slot_expert.shape[0]):
        slot_at[slot_expert[p], slot_device[p]] = p
        replicas[slot_expert[p]] += 1
    return slot_at, replicas


@kernel
def first_work(layer: Any, share: Any, slot_at: Any) -> Any:
    """[S, G] token-expert pairs and experts hit on each device."""
    load = layer.counts @ share
    hit = np.zeros(load.shape)
    for s in range(load.shape[0]):
        for e in range(share.shape[0]):
            for g in range(share.shape[1]):
                if slot_at[e, g] >= 0:
                    hit[s, g] += 1.0 - idle_chance(share[e, g], layer.counts[s, e])
    return load, hit


@kernel
def shift_work(layer: Any, a: int, b: int, old: Any, new: Any, load: Any, hit: Any) -> None:
    """Changes load and hit [S, G] when the rows of experts a and b (or -1) go from old to new ([2, G] each)."""
    for r in range(2):
        e = a if r == 0 else b
        if e < 0:
            continue
        for g in range(old.shape[1]):
            if old[r, g] != new[r, g]:
                for s in range(load.shape[0]):
                    count = layer.counts[s, e]
                    load[s, g] += count * (new[r, g] - old[r, g])
                    hit[s, g] += idle_chance(old[r, g], count) - idle_chance(new[r, g], count)


@kernel
def commit(
    kind: int,
    p: int,
    q: int,
    a: int,
    b: int,
    new: Any,
    slot_expert: Any,
    slot_device: Any,
    slot_at: Any,
    share: Any,
    replicas: Any,
) -> None:
    """Carries out an accepted proposal (see `propose`) on slots, shares and replica counts."""
    share[a] = new[0]
    if b < 0:
        return
    share[b] = new[1]
    g = slot_device[p]
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


@kernel
def accepted(value: float, new_value: float, temperature: float) -> bool:
    """Metropolis: what improves always, what worsens with a chance that falls with the temperature."""
    if new_value <= value:
        return True
    return np.random.random() < np.exp((value - new_value) / max(temperature, 1e-300))


@kernel
def first_moved(slot_expert: Any, slot_device: Any, limit: Any) -> int:
    """Slots that hold what their device did not hold in the plan in force."""
    moved = 0
    if limit.most >= 0:
        for p in range(slot_expert.shape[0]):
            if not limit.held[slot_expert[p], slot_device[p]]:
                moved += 1
    return moved


@kernel
def more_moved(kind: int, p: int, q: int, a: int, b: int, slot_device: Any, limit: Any) -> int:
    """How many more such slots there are after a proposal (see `propose`)."""
    if limit.most < 0 or b < 0:
        return 0
    g = slot_device[p]
    more = int(limit.held[a, g]) - int(limit.held[b, g])
    if kind == 1:
        h = slot_device[q]
        more += int(limit.held[b, h]) - int(limit.held[a, h])
    return more


@kernel
def remember(value: float, moved: int, slot_expert: Any, slot_device: Any, share: Any, limit: Any) -> None:
    """Keeps a placement that is the best so far of those as far from the plan in force."""
    if moved < limit.value.shape[0] and value < limit.value[moved]:
        limit.value[moved] = value
        for p in range(slot_expert.shape[0]):
            limit.slot_expert[moved, p] = slot_expert[p]
            limit.slot_share[moved, p] = share[slot_expert[p], slot_device[p]]


@kernel
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
        if not survives(a, g, -1, slot_at, moves.failures):
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
    if not survives(a, g, h, slot_at, moves.failures) or not survives(b, h, g, slot_at, moves.failures):
        return 0, 0, 0, 0, 0
    new[0, :] = share[a]
    new[1, :] = share[b]
    new[0, h] = share[a, g]
    new[0, g] = 0.0
    new[1, g] = share[b, h]
    new[1, h] = 0.0
    return 1, p, q, a, b


@kernel
def survives(e: int, left: int, joined: int, slot_at: Any, failures: Any) -> bool:
    """Whether expert e keeps a replica in every failure [F, G] once it has left a device and joined another (or -1)."""
    for f in range(failures.shape[0]):
        kept = joined >= 0 and not failures[f, joined]
        for g in range(failures.shape[1]):
            if kept:
                break
            kept = g != left and slot_at[e, g] >= 0 and not failures[f, g]
        if not kept:
            return False
    return True
