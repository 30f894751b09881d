"""What the compiled kernels read and keep. T tokens, S steps, E experts, G devices, N nodes, P slots, W workloads."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..._types import BoolArray, FloatArray, IntArray

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
    divided to level devices; copies are then those of nearest replicas, or of shares.
    """

    experts: Ids
    source: Ids
    step_of: Ids
    first: IntArray
    tokens: Ids
    counts: FloatArray
    nearest: bool
    divided: bool


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

    held: [E, G] what devices hold in that plan. most: slots that may hold what their device does not hold yet, -1 for
    any number (then nothing else here is read). price: seconds such a slot is charged on the walk, not in values.
    value: [K] best value seen with each number of such slots, slot_expert: [K, P] and slot_share: [K, P] of that
    placement; K is 0 where values of other rounds do not compare.
    """

    held: BoolArray
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
