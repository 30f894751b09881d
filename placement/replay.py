"""What a plan asks of every device when recorded steps run through it.

A replica is taken by chance with its share, each token on its own, or the nearest to the token's home (see `nearest`);
counts are expected values, without replicas exact. Shapes: S steps, T tokens of a block of steps, L layers, k experts a token, G devices, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from .._types import FloatArray, IntArray
from .cost import Flows, flows_between, flows_from_even_sources
from .objective import Objective
from .plan import Plan
from .steps import Steps
from .topology import Topology

# Sums over the tokens of steps: who is reached, how often each expert is chosen, which transitions stay. Shapes: S
# steps, T tokens of a block of steps (bounds: [S+1] where each begins), L layers, k experts a token, E experts, G
# devices or nodes.


ChanceArray = npt.NDArray[np.float32]
Bounds = IntArray
IdArray = npt.NDArray[np.unsignedinteger[Any]]


def chosen_share(ids: IdArray, share: npt.NDArray[np.floating[Any]]) -> ChanceArray:
    """[L, T, G] shares of a token's experts served there, summed over its experts. ids: [L, T, k]; share: [L, E, G]."""
    layers, tokens, k = ids.shape
    result = np.empty((layers, tokens, share.shape[2]), dtype=np.float32)
    ones, ends = np.ones(tokens * k, dtype=np.float32), np.arange(0, tokens * k + 1, k, dtype=np.int32)
    for layer in range(layers):
        # A row of one-hot sums a token: gathering rows of shares one expert after the other takes five times as long.
        chosen = csr_array((ones, ids[layer].ravel().astype(np.int32), ends), shape=(tokens, share.shape[1]))
        result[layer] = chosen @ share[layer].astype(np.float32, copy=False)
    return result


def reach_chance(ids: IdArray, share: npt.NDArray[np.floating[Any]], chosen: ChanceArray | None = None) -> ChanceArray:
    """[L, T, G] chance that any of a token's experts is served there. ids: [L, T, k]; share: [L, E, G].

    chosen: what `chosen_share` says of the same, where it is known already.
    """
    share = share.astype(np.float32, copy=False)
    if ((share == 0) | (share == 1)).all():
        return np.minimum(chosen_share(ids, share) if chosen is None else chosen, np.float32(1.0))
    result = np.empty((*ids.shape[:2], share.shape[2]), dtype=np.float32)
    for layer, missed in enumerate(1.0 - share):
        all_missed = missed[ids[layer, :, 0]]
        for rank in range(1, ids.shape[2]):
            all_missed *= missed.take(ids[layer, :, rank], axis=0)
        np.subtract(np.float32(1.0), all_missed, out=result[layer])
    return result


def expert_counts(ids: IdArray, bounds: Bounds, experts: int) -> FloatArray:
    """[S, L, E] tokens that chose each expert, from ids [L, T, k]."""
    layers = ids.shape[0]
    counts = np.empty((len(bounds) - 1, layers, experts))
    base = np.arange(layers)[:, None, None] * experts
    for s in range(len(bounds) - 1):
        flat = (ids[:, bounds[s] : bounds[s + 1]] + base).ravel()
        counts[s] = np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
    return counts


def transitions_kept(chosen: ChanceArray, top_k: int, bounds: Bounds) -> FloatArray:
    """[S, L-1] sum over tokens of the share of their k x k transitions that stay where they are, from `chosen_share`."""
    kept = np.einsum("ltg,ltg->lt", chosen[:-1], chosen[1:]) / top_k**2
    return sum_steps(kept, bounds)


def sum_steps(values: npt.NDArray[np.floating[Any]], bounds: Bounds) -> FloatArray:
    """[S, L, ...] sums over each step's tokens from [L, T, ...]; a step may be empty."""
    result = np.zeros((len(bounds) - 1, values.shape[0], *values.shape[2:]))
    filled = bounds[:-1] < bounds[1:]
    if filled.any() and values.shape[0]:
        summed = np.add.reduceat(values, bounds[:-1][filled], axis=1, dtype=np.float64)
        result[filled] = np.moveaxis(summed, 1, 0)
    return result


# Replicas taken where the token lives: on its home device, else in its home node, else anywhere. The rule of SGLang's
# expert dispatch (`_find_nearest_expert` and `compute_logical_to_rank_dispatch_physical_map` in
# python/sglang/srt/eplb/expert_location.py, read in 0.5.23): a rank uses the replica on its own GPU; else one in its
# own node, where only some of the replicas are; else ranks are dealt fairly over all replicas. Of several in the home
# node SGLang takes the first, here they are taken by their shares, so the two agree where a node holds at most one
# replica off the home device. Shapes as in `token_counts`; H indexes homes.


@dataclass(frozen=True)
class NearestCounts:
    """Expected counts of steps. tokens, experts_hit: [S, L, G] token-expert pairs computed and experts read.

    pairs, node_pairs: [S, L, H, G] and [S, L, H, N] tokens of each home that need each device and node. local,
    node_local: [S, L-1] transitions that stay on their device or node, in tokens.
    """

    tokens: FloatArray
    experts_hit: FloatArray
    pairs: FloatArray
    node_pairs: FloatArray
    local: FloatArray
    node_local: FloatArray


def nearest_share(device_share: FloatArray, topology: Topology, home: int) -> FloatArray:
    """[L, E, G] fraction of each expert's tokens from one home device that each device serves.

    device_share: [L, E, G] fractions as the plan states them; a replica with share 0 serves nobody.
    """
    in_node = np.where(topology.node_of == topology.node_of[home], device_share, 0.0)
    inside = in_node.sum(axis=2, keepdims=True)
    share = np.where(inside > 0.0, in_node / np.where(inside > 0.0, inside, 1.0), device_share)
    at_home = device_share[:, :, home] > 0.0
    share[at_home] = np.eye(topology.num_devices)[home]
    return np.asarray(share)


def nearest_counts(
    plan: Plan, ids: IdArray, bounds: Bounds, source: IntArray | None, topology: Topology
) -> NearestCounts:
    """Counts of tokens [L, T, k] whose homes are `source` [T], or, when None, spread evenly over all devices."""
    steps, layers, devices = len(bounds) - 1, ids.shape[0], topology.num_devices
    nodes = np.eye(topology.num_nodes)[topology.node_of]
    pairs = np.zeros((steps, layers, devices, devices))
    node_pairs = np.zeros((steps, layers, devices, topology.num_nodes))
    local, node_local = np.zeros((steps, layers - 1)), np.zeros((steps, layers - 1))
    work = _Work(plan, steps)
    weight = 1.0 / devices if source is None else 1.0
    for home in range(devices):
        mine = np.arange(ids.shape[1]) if source is None else np.flatnonzero(source == home)
        ids_h, bounds_h = ids[:, mine], np.searchsorted(mine, bounds)
        share = nearest_share(plan.device_share, topology, home)
        # Thirds do not add up to one exactly, and what is whole must be recognised as whole.
        node_share = np.where((summed := share @ nodes) > 1.0 - 1e-9, 1.0, summed)
        chosen, node_chosen = chosen_share(ids_h, share), chosen_share(ids_h, node_share)
        pairs[:, :, home] = weight * sum_steps(reach_chance(ids_h, share, chosen), bounds_h)
        node_pairs[:, :, home] = weight * sum_steps(reach_chance(ids_h, node_share, node_chosen), bounds_h)
        local += weight * transitions_kept(chosen, ids_h.shape[2], bounds_h)
        node_local += weight * transitions_kept(node_chosen, ids_h.shape[2], bounds_h)
        work.add(share, weight, None if source is None else expert_counts(ids_h, bounds_h, plan.model.experts))
    if source is None:
        work.spread(expert_counts(ids, bounds, plan.model.experts))
    return NearestCounts(*work.on_devices(devices), pairs, node_pairs, local, node_local)


class _Work:
    """Token-expert pairs and the chance of staying idle of every slot, summed over homes."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self._plan = plan
        self._layers = np.arange(len(plan.physical_to_logical))[:, None]
        at_slot = self._at_slots(plan.device_share)
        # Two slots of one device may hold the same expert; they split what the device serves.
        self._part = plan.shares / np.where(at_slot > 0.0, at_slot, 1.0)
        self._mean = np.zeros(plan.shares.shape)
        self._tokens = np.zeros((steps, *plan.shares.shape))
        self._idle = np.ones((steps, *plan.shares.shape))

    def _at_slots(self, share: FloatArray) -> FloatArray:
        """[L, P] from [L, E, G]; what stands here of empty slots is never served, their share being 0."""
        return np.asarray(share[self._layers, self._plan.physical_to_logical, self._plan.slot_device])

    def add(self, share: FloatArray, weight: float, counts: FloatArray | None) -> None:
        """Takes in what one home asks for: counts [S, L, E], or None where homes are not told apart."""
        served = self._at_slots(share) * self._part
        self._mean += weight * served
        if counts is not None:
            self._serve(served, counts)

    def spread(self, counts: FloatArray) -> None:
        """Takes in counts [S, L, E] of tokens of which each may have come from any home."""
        self._serve(self._mean, counts)

    def _serve(self, served: FloatArray, counts: FloatArray) -> None:
        at_slot = np.take_along_axis(counts, self._plan.physical_to_logical[None], axis=2)
        self._tokens += at_slot * served
        self._idle *= np.power(1.0 - np.minimum(served, 1.0), at_slot)

    def on_devices(self, devices: int) -> tuple[FloatArray, FloatArray]:
        """[S, L, G] pairs computed and experts read."""
        owner = np.eye(devices)[self._plan.slot_device]
        return self._tokens @ owner, (1.0 - self._idle) @ owner


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


def _work(placement: _Placement, ids: IdArray, bounds: IntArray, experts: int) -> tuple[FloatArray, FloatArray]:
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
    bounds: IntArray,
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


def _home(source: IntArray | None, shape: tuple[int, ...], topology: Topology) -> HitArray:
    """[1, T, G] who holds tokens before the first layer: their source rank, or all devices evenly."""
    if source is None:
        return np.full((1, *shape), 1.0 / topology.num_devices, dtype=np.float32)
    return _one_hot(source, topology.num_devices, 1)


def _one_hot(source: IntArray, devices: int, layers: int) -> HitArray:
    hot = np.eye(devices, dtype=np.float32)[source]
    return np.broadcast_to(hot, (layers, *hot.shape))


def _pairs(holder: HitArray, hit: HitArray, bounds: IntArray) -> FloatArray:
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
