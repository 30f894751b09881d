"""What both kinds of annealing keep about a layer's slots and the work of its devices."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel
from .costs import idle_chance


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
