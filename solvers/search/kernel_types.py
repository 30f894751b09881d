"""What the compiled kernels read. T tokens, S steps, E experts, G devices, N nodes, W workloads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..._types import BoolArray, FloatArray, IntArray

Floats = FloatArray
Ints = IntArray
Ids = npt.NDArray[np.int32]


class LayerTokens(NamedTuple):
    """One layer of the scenario steps.

    experts: [T, k] int32. step_of: [T] int32. first, tokens: CSR lists of the tokens of each expert ([E+1], [T*k]).
    counts: [S, E] tokens each expert got.
    """

    experts: npt.NDArray[np.int32]
    step_of: npt.NDArray[np.int32]
    first: Ints
    tokens: npt.NDArray[np.int32]
    counts: Floats


class Rates(NamedTuple):
    """Seconds a unit costs: [G] token-expert pair, expert read, copy over the device's links; [N] copy over the node's.

    back: what a returning copy costs, relative to one going out. node_of: [G]. node_size: [N]. dedup: one copy a
    (token, node) between nodes.
    """

    per_pair: Floats
    per_expert: Floats
    per_copy: Floats
    per_node_copy: Floats
    back: float
    node_of: Ints
    node_size: Floats
    dedup: bool


class Aim(NamedTuple):
    """What of the step times counts: (1 - worst) * weighted mean + worst * the largest group mean over its reference.

    weight: [S], summing to 1. group: [S] workload of a step. group_weight: [S], summing to 1 in each group.
    reference: [W] subtracted from each group's mean. worst: 0 for means, 1 for the worst group.
    """

    weight: Floats
    group: Ints
    group_weight: Floats
    reference: Floats
    worst: float


class Moves(NamedTuple):
    """What a proposal may do. allowed: [E, G] where experts may stand. free: whether replicas' shares may differ.
    failures: [F, G] sets of devices outside each of which every expert must keep a replica."""

    allowed: BoolArray
    free: bool
    failures: BoolArray = np.zeros((0, 0), dtype=np.bool_)


class Limit(NamedTuple):
    """How far one layer may go from a plan in force, and the best seen at every distance.

    held: [E, G] what devices hold in that plan. most: slots that may hold what their device does not hold yet, -1 for
    any number (then nothing else here is read). price: seconds such a slot is charged on the walk, not in values.
    value: [K] best value seen with each number of such slots, slot_expert: [K, P] and slot_share: [K, P] of that
    placement; K is 0 where values of other rounds do not compare.
    """

    held: BoolArray
    most: int
    price: float
    value: Floats
    slot_expert: Ints
    slot_share: Floats


def no_limit() -> Limit:
    """Anything may move."""
    return Limit(np.zeros((0, 0), dtype=np.bool_), -1, 0.0, np.zeros(0), np.zeros((0, 0), np.int64), np.zeros((0, 0)))


class Neighbours(NamedTuple):
    """The fixed layers around. before: [T] expert that owns the token before (-1: spread evenly over all devices);
    before_share: [E, G]. after: [T, k] experts of the next layer (k = 0 for the last one); after_share: [E, G]."""

    before: Ids
    before_share: Floats
    after: Ids
    after_share: Floats
