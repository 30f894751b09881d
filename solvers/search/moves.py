"""Random changes of one layer's placement, what of its step costs counts, and the types that compiled kernels read and
keep.

T tokens, S steps, E experts, G devices, N nodes, P slots, W workloads.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.jit import kernel

Ids = npt.NDArray[np.int32]
Counts = npt.NDArray[np.uint8]


class LayerTokens(NamedTuple):
    """One layer of the scenario steps.

    experts: [T, k] int32. step_of: [T] int32. first, tokens: CSR lists of the tokens of each expert ([E+1], [T*k]).
    counts: [S, E] tokens each expert got.
    """

    experts: Ids
    step_of: Ids
    first: IntArray
    tokens: Ids
    counts: FloatArray


class SourceTokens(NamedTuple):
    """One layer of scenario steps whose tokens have source ranks. T tokens in order of source and step, H sources.

    experts: [T, k] int32. source, step_of: [T] int32. first, tokens: CSR lists of the tokens of each (expert, source)
    ([E * H + 1], [T * k]). counts: [E, H, S] tokens that chose the expert, those not walked over too. nearest: whether
    a token takes the replica nearest to its source rank, or any by share. divided: whether each step's tokens are
    divided to level devices; copies are then those of nearest replicas, or of shares, and of what is spilled. part: of
    the tokens counted, those walked over.
    """

    experts: Ids
    source: Ids
    step_of: Ids
    first: IntArray
    tokens: Ids
    counts: FloatArray
    nearest: bool
    divided: bool
    part: float


class Neighbours(NamedTuple):
    """The fixed layers around. before: [T] expert that owns the token before (-1: spread evenly over all devices);
    before_share: [E, G]. after: [T, k] experts of the next layer (k = 0 for the last one); after_share: [E, G]."""

    before: Ids
    before_share: FloatArray
    after: Ids
    after_share: FloatArray


class CoherentTokens(NamedTuple):
    """One layer in context-coherent execution, between its neighbours."""

    layer: LayerTokens
    around: Neighbours


class Rates(NamedTuple):
    """Seconds a unit costs: fixed, passing, pair, read as in `ExpertCost`; of each of K kinds of transfers [K, G] a
    copy over the device's links; [K, N] a copy over the node's.

    back: [K] what a returning copy costs, relative to one going out. pairs: [K] a copy goes to every expert of a token.
    dedup: [K] one copy a (token, node) between nodes. kind: [S] of each step. node_of: [G]. node_size: [N].
    """

    fixed: FloatArray
    passing: FloatArray
    pair: FloatArray
    read: FloatArray
    per_copy: FloatArray
    per_node_copy: FloatArray
    back: FloatArray
    pairs: BoolArray
    dedup: BoolArray
    kind: IntArray
    node_of: IntArray
    node_size: FloatArray


class RiskWeights(NamedTuple):
    """What of the step times counts: (1 - worst) * weighted mean + worst * the largest group mean over its reference.

    weight: [S], summing to 1. group: [S] workload of a step. group_weight: [S], summing to 1 in each group.
    reference: [W] subtracted from each group's mean. worst: 0 for means, 1 for the worst group.
    """

    weight: FloatArray
    group: IntArray
    group_weight: FloatArray
    reference: FloatArray
    worst: float


class MoveRules(NamedTuple):
    """What a proposal may do. allowed: [E, G] where experts may stand. free: whether replicas' shares may differ.
    failures: [F, G] sets of devices outside each of which every expert must keep a replica."""

    allowed: BoolArray
    free: bool
    failures: BoolArray = np.zeros((0, 0), dtype=np.bool_)


class MoveLimit(NamedTuple):
    """How far one layer may go from a plan in force, and the best seen at every distance.

    holds: [E, G] what devices hold in that plan. most: slots that may hold what their device does not hold yet, -1 for
    any number (then nothing else here is read). price: seconds such a slot is charged on the walk, not in values.
    value: [K] best value seen with each number of such slots, slot_expert: [K, P] and slot_share: [K, P] of that
    placement; K is 0 where values of other rounds do not compare.
    """

    holds: BoolArray
    most: int
    price: float
    value: FloatArray
    slot_expert: IntArray
    slot_share: FloatArray


def no_move_limit() -> MoveLimit:
    """Anything may move."""
    return MoveLimit(
        np.zeros((0, 0), dtype=np.bool_), -1, 0.0, np.zeros(0), np.zeros((0, 0), np.int64), np.zeros((0, 0))
    )


class Placement(NamedTuple):
    """One layer's placement while it is changed.

    slot_expert, slot_device: [P]. share: [E, G]. slot_at: [E, G] the slot of an expert on a device, -1 where it has
    none. replicas: [E] slots each expert has.
    """

    slot_expert: IntArray
    slot_device: IntArray
    share: FloatArray
    slot_at: IntArray
    replicas: IntArray


class Change(NamedTuple):
    """A proposal. kind: 0 none, 1 exchange slots p and q, 2 give slot p of expert a to b, 3 shift share of a from p to
    q. a, b: the experts whose shares change; b is -1 where only a's do."""

    kind: int
    p: int
    q: int
    a: int
    b: int


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
            if not limit.holds[placement.slot_expert[p], placement.slot_device[p]]:
                moved += 1
    return moved


@kernel
def more_moved(change: Change, slot_device: IntArray, limit: MoveLimit) -> int:
    """How many more do so after a change."""
    kind, p, q, a, b = change
    if limit.most < 0 or b < 0:
        return 0
    g = slot_device[p]
    more = int(limit.holds[a, g]) - int(limit.holds[b, g])
    if kind == 1:
        h = slot_device[q]
        more += int(limit.holds[b, h]) - int(limit.holds[a, h])
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
