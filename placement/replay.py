"""What a plan asks of every device when recorded steps run through it: work, copies between devices, and locality.

A replica is taken by chance with its share, each token on its own, or near the token (`replica_choice` "nearest").
Counts are expected values, without replicas exact. Shapes: S steps, T tokens of a block of steps, L layers, k experts a
token, E experts, P slots, G devices, H devices as the ones that hold tokens, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from .._types import FloatArray, IntArray
from .cost import (
    Flows,
    combine_bytes,
    copies_between,
    dispatch_bytes,
    drawn_loads,
    flows_between,
    flows_from_even_sources,
    reached_by_draws,
)
from .model import ModelSpec
from .objective import Objective
from .plan import Plan
from .steps import Steps
from .topology import Topology

ChanceArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.unsignedinteger[Any]]

BLOCK_VALUES = 1 << 22
"""Floats a working array of one block may hold: bounds memory to some 100 MB whatever the number of steps, and stays
near
the cache, which is faster."""


@dataclass(frozen=True)
class Reach:
    """Tokens that need devices and nodes in one all-to-all of each step and layer.

    devices: [S, L, G] and nodes: [S, L, N] tokens that need any expert there. by_holder: ([S, L, H, G], [S, L, H, N])
    the same by the device on which the token is; None where tokens are spread evenly over all devices.
    """

    devices: FloatArray
    nodes: FloatArray
    by_holder: tuple[FloatArray, FloatArray] | None

    def flows(self, topology: Topology, dedup: bool) -> Flows:
        """[S, L, ...] copies that cross each link."""
        if self.by_holder is None:
            return flows_from_even_sources(self.devices, self.nodes, topology, dedup)
        return flows_between(*self.by_holder, topology, dedup)

    def copies(self, topology: Topology, dedup: bool) -> FloatArray:
        """[H, G] copies as they travel between devices, over all steps and layers (`copies_between`)."""
        if self.by_holder is None:
            devices = topology.num_devices
            pairs = np.tile(self.devices.sum(axis=(0, 1)) / devices, (devices, 1))
            node_pairs = np.tile(self.nodes.sum(axis=(0, 1)) / devices, (devices, 1))
        else:
            pairs, node_pairs = self.by_holder[0].sum(axis=(0, 1)), self.by_holder[1].sum(axis=(0, 1))
        return copies_between(pairs, node_pairs, topology, dedup)

    def crossing(self, topology: Topology) -> tuple[FloatArray, FloatArray]:
        """([S, L] tokens that need another device, each device counted, [S, L] another node)."""
        if self.by_holder is None:
            elsewhere = 1.0 - topology.node_size / topology.num_devices
            crossing = self.devices.sum(axis=2) * (1.0 - 1.0 / topology.num_devices)
            return crossing, np.asarray((self.nodes * elsewhere).sum(axis=2))
        pairs, node_pairs = self.by_holder
        devices = np.arange(topology.num_devices)
        stay = pairs[..., devices, devices].sum(axis=-1)
        node_stay = node_pairs[..., devices, topology.node_of].sum(axis=-1)
        return pairs.sum(axis=(-1, -2)) - stay, node_pairs.sum(axis=(-1, -2)) - node_stay


@dataclass(frozen=True)
class Demand:
    """Counts of a run of steps.

    tokens: [S, L, G] token-expert pairs computed. experts_hit: [S, L, G] experts whose weights are read. dispatch: who
    needs whom on the way to experts. combine: on the way back, whose links carry as much in the larger direction; None
    where nothing returns. local: [S, L-1] share of a token's k x k transitions that stay on their device, summed over
    tokens; node_local: the same for nodes.
    """

    tokens: FloatArray
    experts_hit: FloatArray
    dispatch: Reach
    combine: Reach | None
    local: FloatArray
    node_local: FloatArray


def replay(plan: Plan, steps: Steps, topology: Topology, objective: Objective) -> Iterator[Demand]:
    """Runs blocks of whole steps through the plan, in order."""
    per_token = steps.num_layers * max(topology.num_devices, steps.top_k, 8)
    # Without replicas there is nothing to choose, and every rule serves a token alike.
    near = objective.replica_choice == "nearest" and bool((plan.device_share % 1.0 != 0.0).any())
    by_share = _ByShare(plan, topology)
    for block in _blocks(steps, max(1, BLOCK_VALUES // per_token)):
        if near:
            yield _near_tokens(plan, block, topology)
        elif objective.execution == "context_coherent":
            yield by_share.coherent(block)
        else:
            yield by_share.dispatch_combine(block)


class _Block(NamedTuple):
    """Whole steps. ids: [L, T, k]. bounds: [S+1] where each step begins. source: [T] ranks, None: even."""

    ids: IdArray
    bounds: IntArray
    source: IntArray | None


def _blocks(steps: Steps, tokens: int) -> Iterator[_Block]:
    first = 0
    while first < steps.num_steps:
        last = int(np.searchsorted(steps.offsets, steps.offsets[first] + tokens, side="right")) - 1
        last = min(max(last, first + 1), steps.num_steps)
        start, end = steps.offsets[first], steps.offsets[last]
        ids = np.ascontiguousarray(steps.expert_ids[start:end].transpose(1, 0, 2))
        source = None if steps.source is None else steps.source[start:end]
        yield _Block(ids, steps.offsets[first : last + 1] - start, source)
        first = last


# Replicas by their shares, whoever asks.


class _ByShare:
    """A plan's shares in the layouts that replay reads."""

    def __init__(self, plan: Plan, topology: Topology) -> None:
        self._plan, self._topology = plan, topology
        self._share = plan.device_share.astype(np.float32)
        self._in_node = np.eye(topology.num_nodes, dtype=np.float32)[topology.node_of]
        self._node_share = self._share @ self._in_node

    def dispatch_combine(self, block: _Block) -> Demand:
        """Tokens live on their source ranks, and results return there."""
        chosen, hit, node_hit = self._hits(block.ids)
        if block.source is None:
            reach = Reach(sum_steps(hit, block.bounds), sum_steps(node_hit, block.bounds), None)
        else:
            one_hot = np.eye(self._topology.num_devices, dtype=np.float32)[block.source]
            reach = _reach(np.broadcast_to(one_hot, (len(hit), *one_hot.shape)), hit, node_hit, block.bounds)
        return self._demand(block, chosen, reach, reach)

    def coherent(self, block: _Block) -> Demand:
        """Tokens stay where the expert of the highest weight ran, which is sent the outputs of the others."""
        chosen, hit, node_hit = self._hits(block.ids)
        owner = self._share[np.arange(len(block.ids))[:, None], block.ids[:, :, 0]]
        if block.source is None:
            first = np.full(owner[:1].shape, 1.0 / self._topology.num_devices, dtype=np.float32)
        else:
            first = np.eye(self._topology.num_devices, dtype=np.float32)[block.source][None]
        dispatch = _reach(np.concatenate([first, owner[:-1]]), hit, node_hit, block.bounds)
        others = block.ids[:, :, 1:]
        if not others.shape[2]:
            return self._demand(block, chosen, dispatch, None)
        combine = _reach(owner, reach_chance(others, self._share), reach_chance(others, self._node_share), block.bounds)
        return self._demand(block, chosen, dispatch, combine)

    def _hits(self, ids: IdArray) -> tuple[ChanceArray, ChanceArray, ChanceArray]:
        """[L, T, G] shares of a token's experts on each device; chances that it needs each device, and each node."""
        chosen = chosen_share(ids, self._share)
        hit = reach_chance(ids, self._share, chosen)
        return chosen, hit, reach_chance(ids, self._node_share, chosen @ self._in_node)

    def _demand(self, block: _Block, chosen: ChanceArray, dispatch: Reach, combine: Reach | None) -> Demand:
        top_k, bounds = block.ids.shape[2], block.bounds
        work = _SlotWork(self._plan, len(bounds) - 1)
        work.serve(self._plan.shares, expert_counts(block.ids, bounds, self._plan.model.experts))
        local, node_local = (transitions_local(part, top_k, bounds) for part in (chosen, chosen @ self._in_node))
        return Demand(*work.on_devices(), dispatch, combine, local, node_local)


def _reach(holder: ChanceArray, hit: ChanceArray, node_hit: ChanceArray, bounds: IntArray) -> Reach:
    """From chances that devices hold a token [L, T, H] and that it needs devices [L, T, G] and nodes [L, T, N]."""
    by_holder = []
    for needed in (hit, node_hit):
        pairs = np.empty((len(bounds) - 1, holder.shape[0], holder.shape[2], needed.shape[2]))
        for s in range(len(bounds) - 1):
            step = slice(bounds[s], bounds[s + 1])
            pairs[s] = holder[:, step].transpose(0, 2, 1) @ needed[:, step]
        by_holder.append(pairs)
    return Reach(sum_steps(hit, bounds), sum_steps(node_hit, bounds), (by_holder[0], by_holder[1]))


# Replicas near the token: on its source rank, else in that rank's node, else anywhere. The rule of SGLang's expert
# dispatch (`_find_nearest_expert` and `compute_logical_to_rank_dispatch_physical_map` in
# python/sglang/srt/eplb/expert_location.py, read in 0.5.23): a rank uses the replica on its own GPU; else one in its
# own node, where only some of the replicas are; else ranks are dealt fairly over all replicas. Of several in the node
# SGLang takes the first, here they are taken by their shares, so the two agree where a node holds at most one replica
# off the source rank.


def routed_share(device_share: FloatArray, topology: Topology, source: int) -> FloatArray:
    """[L, E, G] fraction of each expert's tokens from one source rank that each device serves.

    Args:
        device_share: [L, E, G] fractions as the plan states them; a replica with share 0 serves nobody.
        topology: tells which devices share the source rank's node.
        source: the rank on which the tokens live.
    """
    in_node = np.where(topology.node_of == topology.node_of[source], device_share, 0.0)
    inside = in_node.sum(axis=2, keepdims=True)
    share = np.where(inside > 0.0, in_node / np.where(inside > 0.0, inside, 1.0), device_share)
    on_rank = device_share[:, :, source] > 0.0
    share[on_rank] = np.eye(topology.num_devices)[source]
    return np.asarray(share)


def _near_tokens(plan: Plan, block: _Block, topology: Topology) -> Demand:
    """Demand of tokens that each take the replicas near their source rank."""
    ids, bounds, source = block
    steps, layers, devices = len(bounds) - 1, ids.shape[0], topology.num_devices
    in_node = np.eye(topology.num_nodes)[topology.node_of]
    pairs = np.zeros((steps, layers, devices, devices))
    node_pairs = np.zeros((steps, layers, devices, topology.num_nodes))
    local, node_local = np.zeros((steps, layers - 1)), np.zeros((steps, layers - 1))
    work, mean_served = _SlotWork(plan, steps), np.zeros(plan.shares.shape)
    weight = 1.0 / devices if source is None else 1.0
    for rank in range(devices):
        mine = np.arange(ids.shape[1]) if source is None else np.flatnonzero(source == rank)
        ids_h, bounds_h = ids[:, mine], np.searchsorted(mine, bounds)
        share = routed_share(plan.device_share, topology, rank)
        # Thirds do not add up to one exactly, and what is whole must be recognised as whole.
        node_share = np.where((summed := share @ in_node) > 1.0 - 1e-9, 1.0, summed)
        chosen, node_chosen = chosen_share(ids_h, share), chosen_share(ids_h, node_share)
        pairs[:, :, rank] = weight * sum_steps(reach_chance(ids_h, share, chosen), bounds_h)
        node_pairs[:, :, rank] = weight * sum_steps(reach_chance(ids_h, node_share, node_chosen), bounds_h)
        local += weight * transitions_local(chosen, ids_h.shape[2], bounds_h)
        node_local += weight * transitions_local(node_chosen, ids_h.shape[2], bounds_h)
        if source is None:
            mean_served += weight * work.served(share)
        else:
            work.serve(work.served(share), expert_counts(ids_h, bounds_h, plan.model.experts))
    if source is None:
        # Each token may have come from any rank.
        work.serve(mean_served, expert_counts(ids, bounds, plan.model.experts))
    reach = Reach(pairs.sum(axis=2), node_pairs.sum(axis=2), (pairs, node_pairs))
    return Demand(*work.on_devices(), reach, reach, local, node_local)


class _SlotWork:
    """Token-expert pairs and the chance of staying idle of every slot, summed over what is served."""

    def __init__(self, plan: Plan, steps: int) -> None:
        self._plan = plan
        self._tokens = np.zeros((steps, *plan.shares.shape))
        self._idle = np.ones((steps, *plan.shares.shape))

    def served(self, share: FloatArray) -> FloatArray:
        """[L, P] fraction of its expert's tokens that each slot serves, from what devices serve [L, E, G]."""
        plan, layers = self._plan, np.arange(len(self._plan.physical_to_logical))[:, None]
        at_slot, planned = (of[layers, plan.physical_to_logical, plan.slot_device] for of in (share, plan.device_share))
        # Two slots of one device may hold the same expert; they split what the device serves.
        return np.asarray(at_slot * (plan.shares / np.where(planned > 0.0, planned, 1.0)))

    def serve(self, served: FloatArray, counts: FloatArray) -> None:
        """Takes in tokens that chose each expert [S, L, E], of which each slot serves a fraction [L, P]."""
        # Of an empty slot any expert's counts are read here, and its share of 0 takes none of them.
        at_slot = np.take_along_axis(counts, self._plan.physical_to_logical[None], axis=2)
        self._tokens += at_slot * served
        # A slot stays idle when none of its expert's tokens draws it: (1 - share) ** count.
        self._idle *= np.power(1.0 - np.minimum(served, 1.0), at_slot)

    def on_devices(self) -> tuple[FloatArray, FloatArray]:
        """[S, L, G] pairs computed and experts read."""
        owner = np.eye(self._plan.topology.num_devices)[self._plan.slot_device]
        return self._tokens @ owner, (1.0 - self._idle) @ owner


# Sums over the tokens of steps: who is reached, how often each expert is chosen, which transitions stay. G stands for
# devices or nodes.


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


def expert_counts(ids: IdArray, bounds: IntArray, experts: int) -> FloatArray:
    """[S, L, E] tokens that chose each expert, from ids [L, T, k]."""
    layers = ids.shape[0]
    counts = np.empty((len(bounds) - 1, layers, experts))
    base = np.arange(layers)[:, None, None] * experts
    for s in range(len(bounds) - 1):
        flat = (ids[:, bounds[s] : bounds[s + 1]] + base).ravel()
        counts[s] = np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
    return counts


def transitions_local(chosen: ChanceArray, top_k: int, bounds: IntArray) -> FloatArray:
    """[S, L-1] sums over tokens of the share of their k x k transitions that stay, from `chosen_share`."""
    local = np.einsum("ltg,ltg->lt", chosen[:-1], chosen[1:]) / top_k**2
    return sum_steps(local, bounds)


def sum_steps(values: npt.NDArray[np.floating[Any]], bounds: IntArray) -> FloatArray:
    """[S, L, ...] sums over each step's tokens from [L, T, ...]; a step may be empty."""
    result = np.zeros((len(bounds) - 1, values.shape[0], *values.shape[2:]))
    filled = bounds[:-1] < bounds[1:]
    if filled.any() and values.shape[0]:
        summed = np.add.reduceat(values, bounds[:-1][filled], axis=1, dtype=np.float64)
        result[filled] = np.moveaxis(summed, 1, 0)
    return result


# Who sends how much to whom: the matrix behind the flows that `evaluate` prices.


@dataclass(frozen=True, eq=False)
class Traffic:
    """Expected copies of activations a step from each device (row) to each other (column), over all layers.

    dispatch: [G, G] copies to experts. combine: [G, G] copies of outputs back, None where nothing returns. The
    diagonals are zero. With node de-duplication a copy for another node counts once into the node and again where it
    is fanned out, as it travels.
    """

    dispatch: FloatArray
    combine: FloatArray | None

    def bytes_between(self, model: ModelSpec, objective: Objective) -> FloatArray:
        """[G, G] bytes a step, both ways of the exchange together."""
        total = self.dispatch * dispatch_bytes(model, objective)
        return total if self.combine is None else total + self.combine * combine_bytes(model, objective)


def device_traffic(plan: Plan, steps: Steps, topology: Topology, objective: Objective) -> Traffic:
    """Traffic of a plan, mean over the steps. Its row and column sums are the flows that `evaluate` prices."""
    dedup, devices = objective.node_dedup, topology.num_devices
    dispatch, combine, returns = np.zeros((devices, devices)), np.zeros((devices, devices)), False
    for demand in replay(plan, steps, topology, objective):
        dispatch += demand.dispatch.copies(topology, dedup) / steps.num_steps
        if demand.combine is not None:
            combine += demand.combine.copies(topology, dedup).T / steps.num_steps
            returns = True
    return Traffic(dispatch, combine if returns else None)


def traffic_from_counts(plan: Plan, load: FloatArray, step_tokens: int, objective: Objective) -> Traffic:
    """Traffic of a step expected from loads alone, where no token was recorded, on the plan's own devices.

    Assumes what `window_seconds` does: source ranks spread evenly, a token's choices independent draws.

    Args:
        plan: the placement.
        load: [L, E] tokens that chose each expert.
        step_tokens: tokens of a step, over all devices.
        objective: tells whether copies are merged by node. The traffic is that of dispatch_combine whatever it says of
            execution, since loads tell nothing of transitions.
    """
    _, on_device = drawn_loads(plan, load[None])
    chances = reached_by_draws(on_device, plan.model.top_k, plan.topology)
    devices, nodes = (step_tokens * chance for chance in chances)
    dispatch = Reach(devices, nodes, None).copies(plan.topology, objective.node_dedup)
    return Traffic(dispatch, dispatch.T)
