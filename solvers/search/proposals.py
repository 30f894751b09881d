"""Random changes of one layer's placement."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..compiled import kernel


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
