"""What a plan asks of every device when recorded steps run through it.

A replica is taken by chance with its share, each token on its own, or the nearest to the token's home (see `nearest`);
counts are expected values, without replicas exact. Shapes: S steps, T tokens of a block of steps, L layers, k experts a token, G devices, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cost import Flows
from .flows import flows_between, flows_from_even_sources
from .nearest import nearest_counts
from .objective import Objective
from .plan import Plan
from .steps import Steps
from .token_counts import IdArray, chosen_share, expert_counts, reach_chance, sum_steps, transitions_kept
from .topology import Topology

FloatArray = npt.NDArray[np.float64]
HitArray = npt.NDArray[np.float32]

BLOCK_VALUES = 1 << 22
"""Floats a working array of one block may hold: bounds memory to some 100 MB whatever the number of steps, and stays near
the cache, which is faster."""


@dataclass(frozen=True)
class Demand:
    """Counts of a run of steps, each [S, L, ...].

    tokens: [S, L, G] token-expert pairs computed. experts_hit: [S, L, G] experts whose weights are read.
    reached: [S, L, G] tokens that need the device. node_reached: [S, L, N]. dispatch: copies to experts.
    combine: copies back, None where nothing returns. crossing: [S, L] dispatch copies that leave their device;
    node_crossing: [S, L] that leave their node. local: [S, L-1] share of a token's k x k transitions that stay on
    their device, summed over tokens; node_local the same for nodes.
    """

    tokens: FloatArray
    experts_hit: FloatArray
    reached: FloatArray
    node_reached: FloatArray
    dispatch: Flows
    combine: Flows | None
    crossing: FloatArray
    node_crossing: FloatArray
    local: FloatArray
    node_local: FloatArray


def replay(plan: Plan, steps: Steps, topology: Topology, objective: Objective) -> Iterator[Demand]:
    """Runs blocks of whole steps through the plan, in order."""
    placement = _Placement(plan, topology)
    per_token = steps.num_layers * max(topology.num_devices, steps.top_k, 8)
    # Without replicas there is nothing to choose, and every rule serves a token alike.
    nearest = objective.replica_choice == "nearest" and bool((plan.device_share % 1.0 != 0.0).any())
    for first, last in _blocks(steps, max(1, BLOCK_VALUES // per_token)):
        if nearest:
            yield _nearest_demand(plan, steps, first, last, topology, objective)
        else:
            yield _demand(placement, steps, first, last, topology, objective)


class _Placement:
    """A plan's shares in the layouts that replay reads."""

    def __init__(self, plan: Plan, topology: Topology) -> None:
        self.plan = plan
        self.device_share = plan.device_share.astype(np.float32)
        self.in_node = np.eye(topology.num_nodes, dtype=np.float32)[topology.node_of]
        self.node_share = self.device_share @ self.in_node
        self.slot_owner = np.eye(topology.num_devices)[plan.slot_device]


def _blocks(steps: Steps, tokens: int) -> Iterator[tuple[int, int]]:
    first = 0
    while first < steps.num_steps:
        last = int(np.searchsorted(steps.offsets, steps.offsets[first] + tokens, side="right")) - 1
        last = min(max(last, first + 1), steps.num_steps)
        yield first, last
        first = last


def _demand(
    placement: _Placement, steps: Steps, first: int, last: int, topology: Topology, objective: Objective
) -> Demand:
    start, end = steps.offsets[first], steps.offsets[last]
    bounds = steps.offsets[first : last + 1] - start
    ids = np.ascontiguousarray(steps.expert_ids[start:end].transpose(1, 0, 2))
    source = None if steps.source is None else steps.source[start:end]
    tokens, experts_hit = _work(placement, ids, bounds, steps.num_experts)
    chosen = chosen_share(ids, placement.device_share)
    node_chosen = chosen @ placement.in_node
    hit = reach_chance(ids, placement.device_share, chosen)
    node_hit = reach_chance(ids, placement.node_share, node_chosen)
    reached, node_reached = sum_steps(hit, bounds), sum_steps(node_hit, bounds)
    combine: Flows | None
    if objective.execution == "context_coherent":
        owner = _owners(placement, ids)
        holder = np.concatenate([_home(source, owner.shape[1:], topology), owner[:-1]])
        pairs, node_pairs = _pairs(holder, hit, bounds), _pairs(holder, node_hit, bounds)
        dispatch = flows_between(pairs, node_pairs, topology, objective.node_dedup)
        combine = _back_to_owner(placement, ids, owner, bounds, topology, objective) if steps.top_k > 1 else None
        crossing, node_crossing = _crossing(pairs, node_pairs, topology)
    elif source is None:
        dispatch = flows_from_even_sources(reached, node_reached, topology, objective.node_dedup)
        combine = dispatch
        crossing = reached.sum(axis=2) * (1.0 - 1.0 / topology.num_devices)
        node_crossing = (node_reached * (1.0 - topology.node_size / topology.num_devices)).sum(axis=2)
    else:
        holder = _one_hot(source, topology.num_devices, steps.num_layers)
        pairs, node_pairs = _pairs(holder, hit, bounds), _pairs(holder, node_hit, bounds)
        dispatch = flows_between(pairs, node_pairs, topology, objective.node_dedup)
        combine = dispatch
        crossing, node_crossing = _crossing(pairs, node_pairs, topology)
    local, node_local = (transitions_kept(shares, steps.top_k, bounds) for shares in (chosen, node_chosen))
    return Demand(
        tokens, experts_hit, reached, node_reached, dispatch, combine, crossing, node_crossing, local, node_local
    )


def _nearest_demand(
    plan: Plan, steps: Steps, first: int, last: int, topology: Topology, objective: Objective
) -> Demand:
    start, end = steps.offsets[first], steps.offsets[last]
    ids = np.ascontiguousarray(steps.expert_ids[start:end].transpose(1, 0, 2))
    source = None if steps.source is None else steps.source[start:end]
    counts = nearest_counts(plan, ids, steps.offsets[first : last + 1] - start, source, topology)
    dispatch = flows_between(counts.pairs, counts.node_pairs, topology, objective.node_dedup)
    crossing, node_crossing = _crossing(counts.pairs, counts.node_pairs, topology)
    return Demand(
        counts.tokens,
        counts.experts_hit,
        counts.pairs.sum(axis=2),
        counts.node_pairs.sum(axis=2),
        dispatch,
        dispatch,
        crossing,
        node_crossing,
        counts.local,
        counts.node_local,
    )


def _work(
    placement: _Placement, ids: IdArray, bounds: npt.NDArray[np.int64], experts: int
) -> tuple[FloatArray, FloatArray]:
    """[S, L, G] token-expert pairs and distinct experts hit on each device."""
    counts = expert_counts(ids, bounds, experts)
    plan = placement.plan
    # Of an empty slot any expert's counts are read here, and its share of 0 takes none of them.
    at_slot = np.take_along_axis(counts, plan.physical_to_logical[None], axis=2)
    tokens = (at_slot * plan.shares) @ placement.slot_owner
    # A slot stays idle when none of its expert's tokens draws it: (1 - share) ** count.
    experts_hit = (1.0 - np.power(1.0 - plan.shares, at_slot)) @ placement.slot_owner
    return tokens, experts_hit


def _back_to_owner(
    placement: _Placement,
    ids: IdArray,
    owner: HitArray,
    bounds: npt.NDArray[np.int64],
    topology: Topology,
    objective: Objective,
) -> Flows:
    """Outputs of all experts but the owner's own, to the owner. A link's larger direction is the same both ways."""
    others = reach_chance(ids[:, :, 1:], placement.device_share)
    node_others = reach_chance(ids[:, :, 1:], placement.node_share)
    return flows_between(
        _pairs(owner, others, bounds), _pairs(owner, node_others, bounds), topology, objective.node_dedup
    )


def _owners(placement: _Placement, ids: IdArray) -> HitArray:
    """[L, T, G] who holds the residual stream after each layer: the device of the highest-weight expert."""
    layers = np.arange(ids.shape[0])[:, None]
    return placement.device_share[layers, ids[:, :, 0]]


def _home(source: npt.NDArray[np.int64] | None, shape: tuple[int, ...], topology: Topology) -> HitArray:
    """[1, T, G] who holds tokens before the first layer: their source rank, or all devices evenly."""
    if source is None:
        return np.full((1, *shape), 1.0 / topology.num_devices, dtype=np.float32)
    return _one_hot(source, topology.num_devices, 1)


def _one_hot(source: npt.NDArray[np.int64], devices: int, layers: int) -> HitArray:
    hot = np.eye(devices, dtype=np.float32)[source]
    return np.broadcast_to(hot, (layers, *hot.shape))


def _pairs(holder: HitArray, hit: HitArray, bounds: npt.NDArray[np.int64]) -> FloatArray:
    """[S, L, H, G] tokens held by h that need g, from [L, T, H] and [L, T, G]."""
    result = np.empty((len(bounds) - 1, holder.shape[0], holder.shape[2], hit.shape[2]))
    for s in range(len(bounds) - 1):
        block = slice(bounds[s], bounds[s + 1])
        result[s] = holder[:, block].transpose(0, 2, 1) @ hit[:, block]
    return result


def _crossing(pairs: FloatArray, node_pairs: FloatArray, topology: Topology) -> tuple[FloatArray, FloatArray]:
    devices = np.arange(topology.num_devices)
    stay = pairs[..., devices, devices].sum(axis=-1)
    node_stay = node_pairs[..., devices, topology.node_of].sum(axis=-1)
    return pairs.sum(axis=(-1, -2)) - stay, node_pairs.sum(axis=(-1, -2)) - node_stay
