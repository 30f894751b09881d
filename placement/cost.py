"""Seconds from counts: the cost model's arithmetic, on arrays with any leading axes (steps, layers).

    compute_g  = max(tokens_g * flops_per_token / rate_g,  experts_hit_g * bytes_per_expert / memory_bandwidth_g)
    transfer   = latency + max(max_n inter_n / inter_bandwidth_n,  max_g intra_g / intra_bandwidth_g)
    layer time = dispatch transfer + max_g compute_g + combine transfer

inter_n and intra_g are the larger of bytes sent and bytes received. Prefill is bound by tokens, small-batch decode by
the distinct experts whose weights must be read: both terms are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .._types import FloatArray
from .errors import InputError, UnsupportedError
from .model import DTYPE_BYTES, ModelSpec
from .objective import Objective
from .plan import Plan
from .problem import Problem
from .topology import Topology


@dataclass(frozen=True)
class Flows:
    """Copies of token activations that cross links, as the larger of sent and received.

    intra: [..., G] copies over each device's links inside its node. inter: [..., N] over each node's links.
    """

    intra: FloatArray
    inter: FloatArray


def compute_seconds(tokens: FloatArray, experts_hit: FloatArray, model: ModelSpec, topology: Topology) -> FloatArray:
    """[..., G] seconds of expert work. tokens: [..., G] token-expert pairs; experts_hit: [..., G] weights to read."""
    arithmetic = tokens * (model.flops_per_token / topology.compute)
    reading = experts_hit * (model.bytes_per_expert / topology.memory_bandwidth)
    return np.asarray(np.maximum(arithmetic, reading))


def transfer_seconds(flows: Flows, bytes_per_copy: float, topology: Topology, latency: float) -> FloatArray:
    """[...] seconds of one all-to-all: latency and the slower of its busiest node link and busiest device link."""
    intra = (flows.intra / topology.intra_bandwidth).max(axis=-1)
    inter = (flows.inter / topology.inter_bandwidth).max(axis=-1)
    return np.asarray(latency + bytes_per_copy * np.maximum(intra, inter))


def all_to_all_latency(topology: Topology, node_dedup: bool) -> float:
    """Seconds an all-to-all takes for its messages alone: one to every peer in the node, and one to every other
    node (or to every device of other nodes when copies are not merged by node). Zero on a single device."""
    if topology.num_devices == 1:
        return 0.0
    largest = int(topology.node_size.max())
    remote = topology.num_nodes - 1 if node_dedup else topology.num_devices - largest
    return topology.intra_latency * (largest - 1) + topology.inter_latency * remote


def dispatch_bytes(model: ModelSpec, objective: Objective) -> float:
    """Bytes of one token's activation on its way to an expert."""
    return model.hidden_size * DTYPE_BYTES[objective.dispatch_dtype]


def combine_bytes(model: ModelSpec, objective: Objective) -> float:
    """Bytes of one expert output on its way back."""
    return model.hidden_size * DTYPE_BYTES[objective.combine_dtype]


# Copies that cross links, from who holds tokens and which devices they must reach. H indexes the device a token comes
# from, G the device it must reach, N nodes. Between nodes one copy a (token, node) travels when `dedup`, and lands on
# a device of the node chosen evenly, which fans it out inside (as DeepEP does).


def flows_from_even_sources(reached: FloatArray, node_reached: FloatArray, topology: Topology, dedup: bool) -> Flows:
    """Flows when tokens' homes are spread evenly over all devices.

    reached: [..., G] tokens that must reach each device. node_reached: [..., N] tokens that must reach each node.
    """
    size, node_of, devices = topology.node_size, topology.node_of, topology.num_devices
    in_node = _sum_nodes(reached, topology)
    if dedup:
        crossing, within = node_reached, reached / size[node_of]
        within_node = in_node / size
    else:
        crossing, within = in_node, reached / devices
        within_node = in_node / devices
    received = crossing * (1.0 - size / devices)
    sent = (crossing.sum(axis=-1, keepdims=True) - crossing) * (size / devices)
    intra_received = within * (size - 1)[node_of]
    intra_sent = within_node[..., node_of] - within
    return Flows(intra=np.maximum(intra_sent, intra_received), inter=np.maximum(sent, received))


def flows_between(pairs: FloatArray, node_pairs: FloatArray, topology: Topology, dedup: bool) -> Flows:
    """Flows from a traffic matrix.

    pairs: [..., H, G] tokens held by device h that must reach device g. node_pairs: [..., H, N] tokens held by device
    h that must reach node n.
    """
    node_of, size = topology.node_of, topology.node_size
    same_node = node_of[:, None] == node_of[None, :]
    own = np.eye(topology.num_devices, dtype=bool)
    within = np.where(same_node & ~own, pairs, 0.0)
    intra_sent, intra_received = within.sum(axis=-1), within.sum(axis=-2)
    remote = node_pairs if dedup else _sum_nodes(pairs, topology)
    leaving = np.where(node_of[:, None] == np.arange(topology.num_nodes)[None, :], 0.0, remote)
    sent = _sum_nodes(leaving.sum(axis=-1), topology)
    received = leaving.sum(axis=-2)
    if dedup:
        arriving = np.where(same_node, 0.0, pairs).sum(axis=-2) / size[node_of]
        intra_received = intra_received + arriving * (size[node_of] - 1)
        intra_sent = intra_sent + _sum_nodes(arriving, topology)[..., node_of] - arriving
    return Flows(intra=np.maximum(intra_sent, intra_received), inter=np.maximum(sent, received))


def _sum_nodes(per_device: FloatArray, topology: Topology) -> FloatArray:
    """[..., N] sums over the devices of each node from [..., G]; a node owns a run of devices."""
    starts = np.concatenate([[0], np.cumsum(topology.node_size)[:-1]])
    return np.add.reduceat(per_device, starts, axis=-1)


# Predicted step times from expert loads alone, when no token was recorded. What counts cannot tell is assumed: a
# token's k choices in a layer are independent draws from the layer's loads, every step of a window is like its mean,
# and homes are spread evenly. Peaks within a window and experts chosen together are therefore not seen; plans are
# ranked by what their loads imply. The pricing is that of `evaluate`.


def window_seconds(plan: Plan, load: FloatArray, problem: Problem, step_tokens: int) -> FloatArray:
    """[S] seconds of all MoE layers of a step of `step_tokens` tokens, for the loads [S, L, E] of each window.

    A layer without tokens in a window takes what its other layers take on average; of a window without any nothing is
    known, and its seconds are 0: leave it out, or weigh windows by their tokens (`window_weights`).

    Raises:
        InputError: loads of another shape than the plan's model, or step_tokens below 1.
        UnsupportedError: context-coherent execution, whose times depend on transitions.
    """
    model, topology, objective = problem.model, problem.topology, problem.objective
    if load.ndim != 3 or load.shape[1:] != (model.layers, model.experts):
        raise InputError(f"load has shape {load.shape}, expected [windows, {model.layers}, {model.experts}]")
    if step_tokens < 1:
        raise InputError(f"step_tokens ({step_tokens}) must be at least 1")
    if plan.topology.num_devices != topology.num_devices or plan.moe_layers != model.moe_layers:
        raise InputError("the plan is for another model or number of devices than the problem")
    if objective.execution == "context_coherent":
        raise UnsupportedError("context-coherent step times depend on transitions, counts tell of none; record tokens")
    total = load.sum(axis=2, keepdims=True)
    chance = load / np.where(total > 0, total, 1.0)
    # Empty slots read some expert's loads, and take none of them.
    at_slot = np.take_along_axis(chance, plan.physical_to_logical[None], axis=2) * plan.shares
    owner = np.eye(topology.num_devices)[plan.slot_device]
    draws = step_tokens * model.top_k
    drawn = at_slot @ owner
    tokens = drawn * draws
    # A slot stays idle when none of the step's draws takes it.
    experts_hit = -np.expm1(draws * np.log1p(-np.minimum(at_slot, 1.0 - 1e-12))) @ owner
    node_drawn = drawn @ np.eye(topology.num_nodes)[topology.node_of]
    reached, node_reached = (
        step_tokens * (1.0 - (1.0 - np.minimum(p, 1.0)) ** model.top_k) for p in (drawn, node_drawn)
    )
    flows = flows_from_even_sources(reached, node_reached, topology, objective.node_dedup)
    latency = all_to_all_latency(topology, objective.node_dedup)
    compute = compute_seconds(tokens, experts_hit, model, topology).max(axis=2)
    moved = (
        transfer_seconds(flows, width(model, objective), topology, latency) for width in (dispatch_bytes, combine_bytes)
    )
    busy = total[:, :, 0] > 0
    seconds = np.where(busy, compute + sum(moved), 0.0).sum(axis=1)
    return np.asarray(seconds * model.layers / np.maximum(busy.sum(axis=1), 1))
