"""What a plan asks of every device when recorded steps run through it: work, copies between devices, and locality.

A replica is taken by chance with its share, each token on its own, or near the token (`replica_choice` "nearest"), or
as each step's tokens are divided ("balanced", see `division`). Counts are expected values, without replicas exact.
Shapes: S steps, T tokens of a block of steps, L layers, k experts a token, E experts, P slots, G devices, H devices as
the ones that hold tokens, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from .._types import BoolArray, FloatArray, IntArray
from .cost import (
    Flows,
    TransferCost,
    Transfers,
    combine_bytes,
    copies_between,
    dispatch_bytes,
    drawn_loads,
    flows_between,
    flows_from_even_sources,
    reached_by_draws,
    sum_nodes,
)
from .division import divide, source_division
from .jit import kernel
from .model import ModelSpec
from .objective import Objective
from .plan import Plan
from .steps import Steps
from .topology import Topology


@kernel
def near_sums(
    ids: npt.NDArray[np.unsignedinteger[Any]],
    bounds: IntArray,
    row: IntArray,
    share: npt.NDArray[np.float32],
    pairs: bool,
) -> tuple[FloatArray, FloatArray]:
    """([S, L, R, G] tokens of each step that need a device, by the row their shares stand in, [S, L-1] products of what
    a token chose in a layer and in the next, summed).

    Args:
        ids: [L, T, k] experts that tokens chose.
        bounds: [S+1] where each step begins.
        row: [T] of a token in the shares; one outside them is left out.
        share: [L, E, R, G] fractions of an expert's tokens that each device (or node) serves.
        pairs: whether a copy goes to every expert of a token, and not one to a device.
    """
    layers, _, top_k = ids.shape
    steps, rows, devices = len(bounds) - 1, share.shape[2], share.shape[3]
    reached, together = np.zeros((steps, layers, rows, devices)), np.zeros((steps, layers - 1))
    # Where two layers take turns, the last one's stays for the transition.
    chosen, missed = np.empty((2, devices), np.float32), np.empty(devices, np.float32)
    for s in range(steps):
        stays = np.zeros((layers, devices))
        for t in range(bounds[s], bounds[s + 1]):
            r = row[t]
            if r < 0 or r >= rows:
                continue
            for layer in range(layers):
                now, last = layer % 2, 1 - layer % 2
                for i in range(devices):
                    chosen[now, i] = 0.0
                    missed[i] = 1.0
                for j in range(top_k):
                    expert = ids[layer, t, j]
                    for i in range(devices):
                        part = share[layer, expert, r, i]
                        chosen[now, i] += part
                        missed[i] *= np.float32(1.0) - part
                if pairs:
                    for i in range(devices):
                        reached[s, layer, r, i] += chosen[now, i]
                else:
                    for i in range(devices):
                        reached[s, layer, r, i] += np.float32(1.0) - missed[i]
                if layer:
                    for i in range(devices):
                        stays[layer, i] += np.float64(chosen[now, i]) * np.float64(chosen[last, i])
        for layer in range(1, layers):
            together[s, layer - 1] = stays[layer].sum()
    return reached, together


ChanceArray = npt.NDArray[np.float32]
IdArray = npt.NDArray[np.unsignedinteger[Any]]

BLOCK_VALUES = 1 << 22
"""Floats a working array of one block may hold: bounds memory to some 100 MB whatever the number of steps, and stays
near the cache, which is faster."""


@dataclass(frozen=True)
class Reach:
    """Copies for devices and nodes in one all-to-all of each step and layer.

    devices: [S, L, G] and nodes: [S, L, N] tokens that need any expert there, or where a copy goes to every expert of a
    token, its pairs there. by_holder: ([S, L, H, G], [S, L, H, N])
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


def _everywhere(tokens: FloatArray | float, reach: Reach) -> Reach:
    """Every token [S, 1, 1] on every device and node, in the shape of what is reached."""
    return Reach(np.zeros_like(reach.devices) + tokens, np.zeros_like(reach.nodes) + tokens, None)


@dataclass(frozen=True)
class Demand:
    """Counts of a run of steps whose transfers are of one kind.

    tokens: [S, L, G] token-expert pairs computed. experts_hit: [S, L, G] experts whose weights are read. dispatch: who
    needs whom on the way to experts. combine: on the way back, whose links carry as much in the larger direction; None
    where nothing returns. transfer: what both cost. step_tokens: [S] tokens of each step. local: [S, L-1] share of a
    token's k x k transitions that stay on their device, summed over tokens; node_local: the same for nodes. copied: [S,
    L, G] experts that cross each device's links for the step alone, as the larger of sent and received, and arrived:
    [S, L] their number; None where none are copied.
    """

    tokens: FloatArray
    experts_hit: FloatArray
    dispatch: Reach
    combine: Reach | None
    transfer: TransferCost
    step_tokens: FloatArray
    local: FloatArray
    node_local: FloatArray
    copied: FloatArray | None = None
    arrived: IntArray | None = None

    @property
    def travelling(self) -> tuple[Reach, Reach | None]:
        """Copies on the way to experts and back: those for who needs them, or all tokens everywhere."""
        if self.transfer.kind != "all_gather":
            return self.dispatch, self.combine
        everywhere = _everywhere(self.step_tokens[:, None, None], self.dispatch)
        return everywhere, everywhere


def replay(plan: Plan, steps: Steps, topology: Topology, objective: Objective) -> Iterator[Demand]:
    """Runs blocks of whole steps through the plan, in order."""
    per_token = steps.num_layers * max(topology.num_devices, steps.top_k, 8)
    # Without replicas there is nothing to choose, and every rule serves a token alike.
    near = objective.replica_choice == "nearest" and bool((plan.device_share % 1.0 != 0.0).any())
    balanced = objective.replica_choice == "balanced" and bool((plan.holds.sum(axis=2) > 1).any())
    by_share, transfers = _ByShare(plan, topology), Transfers.of(plan.model, topology, objective)
    for block in _blocks(steps, max(1, BLOCK_VALUES // per_token), transfers):
        if near:
            yield _near_tokens(plan, block, topology)
        elif balanced or objective.online:
            yield _divided_tokens(plan, block, topology, objective)
        elif objective.execution == "context_coherent":
            yield by_share.coherent(block)
        else:
            yield by_share.dispatch_combine(block)


class _Block(NamedTuple):
    """Whole steps whose transfers are of one kind. ids: [L, T, k]. bounds: [S+1] where each step begins. source: [T]
    ranks, None: even."""

    ids: IdArray
    bounds: IntArray
    source: IntArray | None
    transfer: TransferCost


def _blocks(steps: Steps, tokens: int, transfers: Transfers) -> Iterator[_Block]:
    first, kind = 0, transfers.which(steps)
    ends = np.append(np.flatnonzero(np.diff(kind)) + 1, steps.num_steps)
    while first < steps.num_steps:
        last = int(np.searchsorted(steps.offsets, steps.offsets[first] + tokens, side="right")) - 1
        last = min(max(last, first + 1), int(ends[np.searchsorted(ends, first, side="right")]))
        start, end = steps.offsets[first], steps.offsets[last]
        ids = np.ascontiguousarray(steps.expert_ids[start:end].transpose(1, 0, 2))
        source = None if steps.source is None else steps.source[start:end]
        yield _Block(ids, steps.offsets[first : last + 1] - start, source, transfers.each[kind[first]])
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
        chosen, hit, node_hit = self._hits(block.ids, block.transfer.pairs)
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

    def _hits(self, ids: IdArray, pairs: bool = False) -> tuple[ChanceArray, ChanceArray, ChanceArray]:
        """[L, T, G] shares of a token's experts on each device; chances that it needs each device, and each node, or
        with `pairs` how many of its experts it needs there."""
        chosen = chosen_share(ids, self._share)
        if pairs:
            return chosen, chosen, chosen @ self._in_node
        hit = reach_chance(ids, self._share, chosen)
        return chosen, hit, reach_chance(ids, self._node_share, chosen @ self._in_node)

    def _demand(self, block: _Block, chosen: ChanceArray, dispatch: Reach, combine: Reach | None) -> Demand:
        top_k, bounds = block.ids.shape[2], block.bounds
        work = _SlotWork(self._plan, len(bounds) - 1)
        work.serve(self._plan.shares, expert_counts(block.ids, bounds, self._plan.model.experts))
        local, node_local = (transitions_local(part, top_k, bounds) for part in (chosen, chosen @ self._in_node))
        step_tokens = np.diff(bounds).astype(np.float64)
        return Demand(*work.on_devices(), dispatch, combine, block.transfer, step_tokens, local, node_local)


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
    # Compiled code, which nothing else here needs.

    ids, bounds, source, transfer = block
    steps, layers, devices = len(bounds) - 1, ids.shape[0], topology.num_devices
    in_node = np.eye(topology.num_nodes)[topology.node_of]
    pairs = np.zeros((steps, layers, devices, devices))
    node_pairs = np.zeros((steps, layers, devices, topology.num_nodes))
    local, node_local = np.zeros((steps, layers - 1)), np.zeros((steps, layers - 1))
    work, mean_served = _SlotWork(plan, steps), np.zeros(plan.shares.shape)
    weight = 1.0 / devices if source is None else 1.0
    together = max(1, BLOCK_VALUES // plan.device_share.size)
    for first in range(0, devices, together):
        near = [routed_share(plan.device_share, topology, rank) for rank in range(devices)[first : first + together]]
        for rank, share in enumerate(near, first):
            if source is None:
                mean_served += weight * work.served(share)
            else:
                mine = np.flatnonzero(source == rank)
                counts = expert_counts(ids[:, mine], np.searchsorted(mine, bounds), plan.model.experts)
                work.serve(work.served(share), counts)
        # Thirds do not add up to one exactly, and what is whole must be recognised as whole.
        near_nodes = [np.where((summed := share @ in_node) > 1.0 - 1e-9, 1.0, summed) for share in near]
        for shares, reached, stays in ((near, pairs, local), (near_nodes, node_pairs, node_local)):
            side_by_side = np.stack(shares, axis=2, dtype=np.float32, casting="same_kind")
            if source is None:
                # One row of all ranks: every token is on each of them.
                rows, of = np.zeros(ids.shape[1], np.int64), side_by_side.reshape(*side_by_side.shape[:2], 1, -1)
            else:
                rows, of = source - first, side_by_side
            tokens, products = near_sums(ids, bounds, rows, of, transfer.pairs)
            reached[:, :, first : first + len(near)] = weight * tokens.reshape(steps, layers, len(near), -1)
            stays += weight / ids.shape[2] ** 2 * products
    if source is None:
        # Each token may have come from any rank.
        work.serve(mean_served, expert_counts(ids, bounds, plan.model.experts))
    reach = Reach(pairs.sum(axis=2), node_pairs.sum(axis=2), (pairs, node_pairs))
    step_tokens = np.diff(bounds).astype(np.float64)
    return Demand(*work.on_devices(), reach, reach, transfer, step_tokens, local, node_local)


# Replicas as the tokens of each step are divided among them.


def _divided_tokens(plan: Plan, block: _Block, topology: Topology, objective: Objective) -> Demand:
    """Demand of steps whose tokens are divided by the objective's rule; of the tokens of one source and expert each is
    as likely to be among those that a device gets."""
    ids, bounds, source, transfer = block
    steps, layers, devices = len(bounds) - 1, ids.shape[0], topology.num_devices
    shape = steps, layers, devices
    pairs, node_pairs = np.zeros((*shape, devices)), np.zeros((*shape, topology.num_nodes))
    local, node_local = np.zeros((steps, layers - 1)), np.zeros((steps, layers - 1))
    work, hit, copied = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    arrived = np.zeros(shape[:2], dtype=np.int64)
    width = max(1, BLOCK_VALUES // (devices * devices * plan.model.experts))
    for first in range(0, steps, width):
        some = slice(first, min(first + width, steps))
        tokens = slice(bounds[some.start], bounds[some.stop])
        batch = _DividedBatch(bounds[some.start : some.stop + 1], source, objective, topology, transfer.pairs)
        before: tuple[ChanceArray, ...] = ()
        for layer, hosts in enumerate(plan.holds):
            divided, parts = batch.divide(ids[layer, tokens], hosts)
            if objective.online:
                copies = (divided > 0) & ~hosts
                sent, received = copies.sum(axis=2) @ hosts, copies.sum(axis=1)
                copied[some, layer], arrived[some, layer] = np.maximum(sent, received), received.sum(axis=1)
            work[some, layer], hit[some, layer] = divided.sum(axis=1), (divided > 0).sum(axis=1)
            chosen, (pairs[some, layer], node_pairs[some, layer]) = batch.serve(ids[layer, tokens], hosts, parts)
            if layer:
                for stays, now, last in zip((local, node_local), chosen, before, strict=True):
                    stays[some, layer - 1] = batch.sums((now * last).sum(axis=1)[:, None]).sum(axis=(1, 2))
            before = chosen
    local /= ids.shape[2] ** 2
    node_local /= ids.shape[2] ** 2
    reach = Reach(pairs.sum(axis=2), node_pairs.sum(axis=2), (pairs, node_pairs))
    step_tokens = np.diff(bounds).astype(np.float64)
    demand = Demand(work, hit, reach, reach, transfer, step_tokens, local, node_local)
    return replace(demand, copied=copied, arrived=arrived) if objective.online else demand


class _DividedBatch:
    """Some steps of a block, one row a token, or where sources are not known one a token and rank it may live on.

    bounds: [S+1] where each step begins in the block. source: [tokens of the block]. pairs: whether a copy goes to
    every expert of a token.
    """

    def __init__(
        self, bounds: IntArray, source: IntArray | None, objective: Objective, topology: Topology, pairs: bool
    ) -> None:
        self._topology, self._objective, self._known = topology, objective, source is not None
        self._pairs = pairs
        self._steps, devices = len(bounds) - 1, topology.num_devices
        self._step = np.repeat(np.arange(self._steps), np.diff(bounds))
        tokens = len(self._step)
        self._rank = np.repeat(np.arange(devices), tokens) if source is None else source[bounds[0] : bounds[-1]]
        self._repeats = devices if source is None else 1
        self._group = np.tile(self._step, self._repeats) * devices + self._rank
        weight = np.full(len(self._group), 1.0 / self._repeats)
        self._sum = csr_array((weight, (self._group, np.arange(len(weight)))), (self._steps * devices, len(weight)))

    def divide(self, ids: IdArray, hosts: BoolArray) -> tuple[IntArray, FloatArray]:
        """([S, E, G], [S, H, E, G]) tokens of experts [T, k] that devices compute, of all sources and of each."""
        experts, devices = hosts.shape
        cells = np.bincount((self._step[:, None] * experts + ids).ravel(), minlength=self._steps * experts)
        counts, by_source = cells.reshape(self._steps, experts), None
        if self._known:
            of_rank = (self._group[:, None] * experts + ids).ravel()
            by_source = np.bincount(of_rank, minlength=self._steps * devices * experts)
            by_source = by_source.reshape(self._steps, devices, experts)
        division, node_of = self._objective.division, self._topology.node_of
        if self._objective.online:
            divided = self._with_copies(counts, hosts, by_source)
        else:
            divided = divide(counts, hosts, node_of, division, by_source)
        return divided, source_division(divided, counts, hosts, node_of, division, by_source)

    def _with_copies(self, counts: IntArray, homes: BoolArray, by_source: IntArray | None) -> IntArray:
        """[S, E, G] tokens that devices compute, experts copied for the step. homes: [E, G] one device an expert."""
        # Compiled code, which nothing else here needs.
        from .online import plan_online

        if by_source is None:
            # Whose tokens these are, nobody knows: no copy is nearer to them than another.
            by_source = np.zeros((*counts.shape[:1], homes.shape[1], counts.shape[1]), dtype=np.int64)
            by_source[:, 0] = counts
        plan = plan_online(
            by_source,
            homes.argmax(axis=1),
            self._objective.online,
            self._topology.node_of,
            self._objective.online_slack,
        )
        return plan.quotas.astype(np.int64)

    def serve(
        self, ids: IdArray, hosts: BoolArray, parts: FloatArray
    ) -> tuple[tuple[ChanceArray, ChanceArray], tuple[FloatArray, FloatArray]]:
        """(what rows chose [rows, G] and [rows, N], copies for devices [S, H, G] and nodes [S, H, N])."""
        total = parts.sum(axis=3, keepdims=True)
        # An expert that nobody chose is served anywhere.
        anywhere = hosts / hosts.sum(axis=1, keepdims=True)
        share = np.where(total > 0, parts / np.where(total > 0, total, 1.0), anywhere)
        node_share = share @ np.eye(self._topology.num_nodes)[self._topology.node_of]
        # Thirds do not add up to one exactly, and what is whole must be recognised as whole.
        of_devices, of_nodes = (self._served(ids, of) for of in (share, np.where(node_share > 1 - 1e-9, 1, node_share)))
        return (of_devices[0], of_nodes[0]), (of_devices[1], of_nodes[1])

    def _served(self, ids: IdArray, share: FloatArray) -> tuple[ChanceArray, FloatArray]:
        served = share.astype(np.float32).reshape(-1, share.shape[3])
        chosen, missed = np.zeros((2, len(self._group), share.shape[3]), dtype=np.float32)
        missed += 1.0
        row = self._group * share.shape[2]
        for expert in ids.T:
            mine = served.take(row + np.tile(expert, self._repeats), axis=0)
            chosen += mine
            missed *= 1.0 - mine
        return chosen, self.sums(chosen if self._pairs else 1.0 - missed)

    def sums(self, values: npt.NDArray[np.floating[Any]]) -> FloatArray:
        """[S, H, ...] of values of rows [rows, ...]."""
        return np.asarray((self._sum @ values.astype(np.float64)).reshape(self._steps, -1, values.shape[1]))


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
    devices = topology.num_devices
    dispatch, combine, returns = np.zeros((devices, devices)), np.zeros((devices, devices)), False
    for demand in replay(plan, steps, topology, objective):
        dedup, (out, back) = demand.transfer.dedup, demand.travelling
        dispatch += out.copies(topology, dedup) / steps.num_steps
        if back is not None:
            combine += back.copies(topology, dedup).T / steps.num_steps
            returns = True
    return Traffic(dispatch, combine if returns else None)


def traffic_from_counts(plan: Plan, load: FloatArray, step_tokens: int, objective: Objective) -> Traffic:
    """Traffic of a step expected from loads alone, where no token was recorded, on the plan's own devices.

    Assumes what `window_seconds` does: source ranks spread evenly, a token's choices independent draws.

    Args:
        plan: the placement.
        load: [L, E] tokens that chose each expert.
        step_tokens: tokens of a step, over all devices.
        objective: tells whether copies are merged by node, and whether replicas divide the load. The traffic is that of
            dispatch_combine whatever it says of execution, since loads tell nothing of transitions.
    """
    _, on_device = drawn_loads(plan, load[None], objective)
    transfer = Transfers.of(plan.model, plan.topology, objective).of_size(step_tokens)
    chances = reached_by_draws(on_device, plan.model.top_k, plan.topology)
    if transfer.pairs:
        chances = on_device * plan.model.top_k, sum_nodes(on_device, plan.topology) * plan.model.top_k
    reach = Reach(step_tokens * chances[0], step_tokens * chances[1], None)
    if transfer.kind == "all_gather":
        reach = _everywhere(float(step_tokens), reach)
    dispatch = reach.copies(plan.topology, transfer.dedup)
    return Traffic(dispatch, dispatch.T)
