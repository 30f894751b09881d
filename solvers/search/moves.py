"""Random changes of one layer's placement, and what of its step costs counts."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.jit import kernel
from .kernel_types import Change, MoveLimit, MoveRules, Placement, RiskWeights

A = TypeVar("A", FloatArray, IntArray)


@kernel
def copy(source: A, target: A) -> None:
    """Writes a row over another of its length. A slice's assignment would also compile the text of its errors."""
    for i in range(source.shape[0]):
        target[i] = source[i]


@kernel
def copy_all(source: FloatArray, target: FloatArray) -> None:
    """As `copy`, for arrays of any dimensions, contiguous ones."""
    flat_source, flat_target = source.reshape(-1), target.reshape(-1)
    for i in range(flat_source.shape[0]):
        flat_target[i] = flat_source[i]


@kernel
def layer_value(cost: FloatArray, risk: RiskWeights) -> float:
    """The layer's figure from its step costs [S]."""
    groups = risk.reference.shape[0]
    mean = 0.0
    sums = np.zeros(groups)
    for s in range(cost.shape[0]):
        mean += risk.weight[s] * cost[s]
        sums[risk.group[s]] += risk.group_weight[s] * cost[s]
    if risk.worst == 0.0:
        return mean
    worst = -np.inf
    for w in range(groups):
        worst = max(worst, sums[w] - risk.reference[w])
    return (1.0 - risk.worst) * mean + risk.worst * worst


@kernel
def accepted(value: float, new_value: float, temperature: float) -> bool:
    """Metropolis: what improves always, what worsens with a chance that falls with the temperature."""
    if new_value <= value:
        return True
    return bool(np.random.random() < np.exp((value - new_value) / max(temperature, 1e-300)))


@kernel
def slot_tables(slot_expert: IntArray, slot_device: IntArray, experts: int, devices: int) -> tuple[IntArray, IntArray]:
    """([E, G] the slot of an expert on a device, -1 where it has none; [E] slots each expert has)."""
    slot_at = np.full((experts, devices), -1, dtype=np.int64)
    replicas = np.zeros(experts, dtype=np.int64)
    for p in range(slot_expert.shape[0]):
        slot_at[slot_expert[p], slot_device[p]] = p
        replicas[slot_expert[p]] += 1
    return slot_at, replicas


@kernel
def propose(placement: Placement, rules: MoveRules, new: FloatArray) -> Change:
    """A random change that the rules allow, or none; `new` [2, G] gets the shares of the two experts after it."""
    slot_expert, slot_device, share, slot_at, replicas = placement
    slots, experts, devices = slot_expert.shape[0], share.shape[0], share.shape[1]
    nothing = Change(0, 0, 0, 0, 0)
    draw = np.random.random()
    p = np.random.randint(slots)
    g, a = slot_device[p], slot_expert[p]
    spare = slots > experts
    if spare and draw < 0.35:
        b = np.random.randint(experts)
        if replicas[a] < 2 or b == a or slot_at[b, g] >= 0 or not rules.allowed[b, g]:
            return nothing
        if not survives(a, g, -1, slot_at, rules.failures):
            return nothing
        copy(share[a], new[0])
        copy(share[b], new[1])
        gone = share[a, g]
        for h in range(devices):
            if slot_at[a, h] >= 0:
                new[0, h] = share[a, h] + gone / (replicas[a] - 1) if rules.free else 1.0 / (replicas[a] - 1)
            if slot_at[b, h] >= 0:
                part = replicas[b] / (replicas[b] + 1.0)
                new[1, h] = share[b, h] * part if rules.free else 1.0 / (replicas[b] + 1.0)
        new[0, g] = 0.0
        new[1, g] = 1.0 / (replicas[b] + 1.0)
        if replicas[a] == 2:
            for h in range(devices):
                if slot_at[a, h] >= 0 and h != g:
                    new[0, h] = 1.0
        return Change(2, p, -1, a, b)
    if spare and rules.free and draw < 0.6:
        if replicas[a] < 2:
            return nothing
        h = np.random.randint(devices)
        if h == g or slot_at[a, h] < 0 or share[a, g] == 0.0:
            return nothing
        amount = share[a, g] * (1.0 if np.random.random() < 0.05 else np.random.random())
        copy(share[a], new[0])
        new[0, g] -= amount
        new[0, h] += amount
        if new[0, g] < 1e-9:
            new[0, h] += new[0, g]
            new[0, g] = 0.0
        if new[0, h] > 1.0 - 1e-9:
            new[0, h] = 1.0
        new[1, :] = 0.0
        return Change(3, p, slot_at[a, h], a, -1)
    q = np.random.randint(slots)
    h, b = slot_device[q], slot_expert[q]
    if g == h or a == b or slot_at[a, h] >= 0 or slot_at[b, g] >= 0:
        return nothing
    if not rules.allowed[a, h] or not rules.allowed[b, g]:
        return nothing
    if not survives(a, g, h, slot_at, rules.failures) or not survives(b, h, g, slot_at, rules.failures):
        return nothing
    copy(share[a], new[0])
    copy(share[b], new[1])
    new[0, h] = share[a, g]
    new[0, g] = 0.0
    new[1, g] = share[b, h]
    new[1, h] = 0.0
    return Change(1, p, q, a, b)


@kernel
def survives(e: int, left: int, joined: int, slot_at: IntArray, failures: BoolArray) -> bool:
    """Whether expert e keeps a replica in every failure [F, G] once it has left a device and joined another (or -1)."""
    for f in range(failures.shape[0]):
        stays = joined >= 0 and not failures[f, joined]
        for g in range(failures.shape[1]):
            if stays:
                break
            stays = g != left and slot_at[e, g] >= 0 and not failures[f, g]
        if not stays:
            return False
    return True


@kernel
def carry_out(change: Change, new: FloatArray, placement: Placement) -> None:
    """Makes an accepted change (see `propose`)."""
    slot_expert, slot_device, share, slot_at, replicas = placement
    kind, p, q, a, b = change
    copy(new[0], share[a])
    if b < 0:
        return
    copy(new[1], share[b])
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


# Slots that hold what their device did not hold in the plan in force.


@kernel
def count_moved(placement: Placement, limit: MoveLimit) -> int:
    """How many slots do so."""
    moved = 0
    if limit.most >= 0:
        for p in range(placement.slot_expert.shape[0]):
            if not limit.held[placement.slot_expert[p], placement.slot_device[p]]:
                moved += 1
    return moved


@kernel
def more_moved(change: Change, slot_device: IntArray, limit: MoveLimit) -> int:
    """How many more do so after a change."""
    kind, p, q, a, b = change
    if limit.most < 0 or b < 0:
        return 0
    g = slot_device[p]
    more = int(limit.held[a, g]) - int(limit.held[b, g])
    if kind == 1:
        h = slot_device[q]
        more += int(limit.held[b, h]) - int(limit.held[a, h])
    return more


@kernel
def remember(value: float, moved: int, placement: Placement, limit: MoveLimit) -> None:
    """Keeps a placement that is the best so far of those as far from the plan in force."""
    if moved < limit.value.shape[0] and value < limit.value[moved]:
        limit.value[moved] = value
        for p in range(placement.slot_expert.shape[0]):
            expert = placement.slot_expert[p]
            limit.slot_expert[moved, p] = expert
            limit.slot_share[moved, p] = placement.share[expert, placement.slot_device[p]]
