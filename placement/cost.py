"""Seconds and copies from counts: the cost model's arithmetic, on arrays with any leading axes (steps, layers).

    compute_g  = launch_g + passing_g * tokens + max((tokens_g + rows_g * experts_hit_g) * flops_per_token / rate_g,
                                                     experts_hit_g * bytes_per_expert / memory_bandwidth_g)
    transfer   = latency + max(max_n inter_n / inter_bandwidth_n,  max_g intra_g / intra_bandwidth_g)
    layer time = dispatch transfer + max_g compute_g + combine transfer

inter_n and intra_g are the larger of bytes sent and bytes received. Prefill is bound by tokens, small-batch decode by
the distinct experts whose weights must be read: both terms are kept. launch, passing and rows are of kernels that were
measured (`kernels`), and 0 where only a roofline is known.

Shapes: G devices, H devices as the ones that hold tokens, N nodes, L layers, E experts, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._arguments import check_types
from .._types import FloatArray, IntArray
from .errors import InputError, UnsupportedError, nearest
from .kernels import ENGINES, kernel_fit, known_kernels
from .model import DTYPE_BYTES, ModelSpec
from .objective import Objective
from .plan import Plan
from .problem import Problem
from .topology import Topology

# Expert work.


class ExpertCost(NamedTuple):
    """What expert work costs devices, or groups of devices: fixed + passing * pairs of all devices + the greater of two
    lines, each pair * pairs here + read * experts hit.

    fixed: [G] seconds. passing: [G] seconds a pair of any device: kernels pass over all tokens of the step. pair, read:
    [2, G] seconds a token-expert pair and an expert hit: of arithmetic, tiles that its tokens leave unfilled included,
    then of reading weights. Arithmetic of a pair and reading of an expert are above 0.
    """

    fixed: FloatArray
    passing: FloatArray
    pair: FloatArray
    read: FloatArray

    @classmethod
    def roofline(cls, per_pair: FloatArray, per_read: FloatArray) -> ExpertCost:
        """max(pairs * per_pair, experts hit * per_read), [G] seconds each."""
        none = np.zeros_like(per_pair)
        return cls(none, none, np.stack([per_pair, none]), np.stack([none, per_read]))

    @classmethod
    def of(cls, model: ModelSpec, topology: Topology) -> ExpertCost:
        """That of each device for the model's experts, of its measured kernels where these are known."""
        fits = [kernel_fit(gpu, topology.engine, model) for gpu in topology.gpus]
        measured = np.array([fit is not None for fit in fits])
        plain = cls.roofline(
            model.flops_per_token / topology.rate(model.expert_dtype),
            model.bytes_per_expert / topology.memory_bandwidth,
        )
        if not measured.any():
            return plain
        launch, reading, arithmetic, rows, passing = np.array(
            [(0.0,) * 5 if fit is None else fit.seconds(model) for fit in fits]
        ).T
        lines = np.stack([arithmetic, np.zeros_like(reading)]), np.stack([rows * arithmetic, reading])
        return cls(launch, passing, *(np.where(measured, fit, of) for fit, of in zip(lines, plain[2:], strict=True)))

    def seconds(self, pairs: FloatArray, experts_hit: FloatArray) -> FloatArray:
        """[..., G] seconds of expert work, from [..., G] token-expert pairs and experts whose weights are read."""
        return np.asarray(self.base(pairs.sum(axis=-1)) + self.lines(pairs, experts_hit).max(axis=0))

    def base(self, pairs: FloatArray) -> FloatArray:
        """[..., G] seconds whatever the device is given, from the [...] pairs of all devices."""
        return np.asarray(self.fixed + self.passing * pairs[..., None])

    def lines(self, pairs: FloatArray, experts_hit: FloatArray) -> FloatArray:
        """[2, ..., G] seconds of arithmetic and of reading beside `base`; the greater counts."""
        return np.stack([pairs * pair + experts_hit * read for pair, read in zip(self.pair, self.read, strict=True)])

    def pooled(self, starts: IntArray) -> ExpertCost:
        """Groups of neighbouring devices as one device each, no slower than they are together, whose rates add up.

        starts: [N] first device of each group.
        """
        pair, read = np.empty((2, 2, len(starts)))
        for line, (of_pair, of_read) in enumerate(zip(self.pair, self.read, strict=True)):
            # Devices weighed by their rates for one of the two: of the other a group takes at least its least.
            unit = (of_pair, of_read)[line]
            together = 1.0 / np.add.reduceat(1.0 / unit, starts)
            pair[line] = together * np.minimum.reduceat(of_pair / unit, starts)
            read[line] = together * np.minimum.reduceat(of_read / unit, starts)
        fixed, passing = (np.minimum.reduceat(of, starts) for of in (self.fixed, self.passing))
        return ExpertCost(fixed, passing, pair, read)

    def fastest(self) -> ExpertCost:
        """Of one device ([..., 1]) the least of each cost: no device is faster."""
        return ExpertCost(*(seconds.min(axis=-1, keepdims=True) for seconds in self))


def compute_seconds(tokens: FloatArray, experts_hit: FloatArray, model: ModelSpec, topology: Topology) -> FloatArray:
    """[..., G] seconds of expert work. tokens: [..., G] token-expert pairs; experts_hit: [..., G] weights to read."""
    return ExpertCost.of(model, topology).seconds(tokens, experts_hit)


class PredictionBasis(NamedTuple):
    """What predicted times of expert work rest on.

    error: median relative error of the measured kernels, the largest of the cluster's devices; None where some device
    has a roofline alone. text: `predicted, compute ±6 % (vllm 0.24.0 kernels on h100-sxm, mxfp4); links not measured`.
    """

    error: float | None
    text: str


def prediction_basis(model: ModelSpec, topology: Topology) -> PredictionBasis:
    """What the times predicted for a model on a cluster rest on, in a line to print beside them."""
    gpus = sorted(set(topology.gpus))
    fits = [(gpu, kernel_fit(gpu, topology.engine, model)) for gpu in gpus]
    measured = [fit for _, fit in fits if fit is not None]
    if len(measured) < len(gpus):
        rest = ", ".join(gpu or "devices without a gpu name" for gpu, fit in fits if fit is None)
        known = {fit.gpu for fit in known_kernels()} & set(gpus)
        why = "name an engine for its measured kernels" if known and not topology.engine else "no kernels known"
        return PredictionBasis(None, f"predicted by a roofline, not measured ({rest}: {why})")
    error = max(fit.error for fit in measured)
    kernels = ", ".join(
        f"{fit.engine} {fit.version} kernels on {fit.gpu}, {model.expert_dtype}"
        + (f", fitted to other shapes than {model.hidden_size}x{model.ffn_size}" if fit.shape == "any" else "")
        for fit in measured
    )
    return PredictionBasis(error, f"predicted, compute ±{error:.0%} ({kernels}); links not measured".replace("%", " %"))


@check_types
def expert_seconds(
    model: ModelSpec,
    gpu: str | Sequence[str],
    engine: str,
    tokens: Sequence[float] | FloatArray,
    experts_hit: Sequence[float] | FloatArray,
) -> FloatArray:
    """[G] seconds that devices take for one layer's experts, by the measured kernels of an engine.

    Args:
        model: whose experts; their shape and type choose the coefficients.
        gpu: what kernels were measured on (`moeplace topology kernels`), of all devices or of each.
        engine: vllm, sglang or trtllm.
        tokens: [G] token-expert pairs of each device; kernels pass over those of all.
        experts_hit: [G] experts on it that at least one of them chose.

    Raises:
        InputError: no such engine, or nothing known of the GPU or the experts' type; arrays that do not fit.
    """
    if engine not in ENGINES:
        raise InputError(f"expert_seconds: engine is {engine!r}; {nearest(engine, ENGINES)}")
    pairs, hit = np.asarray(tokens, dtype=np.float64), np.asarray(experts_hit, dtype=np.float64)
    if pairs.ndim != 1 or pairs.shape != hit.shape:
        raise InputError(
            f"expert_seconds: tokens {list(pairs.shape)} and experts_hit {list(hit.shape)} must be as long"
        )
    if not (np.isfinite(pairs).all() and np.isfinite(hit).all() and (pairs >= 0).all() and (hit >= 0).all()):
        raise InputError("expert_seconds: tokens and experts_hit must be finite and at least 0")
    gpus = [gpu] * len(pairs) if isinstance(gpu, str) else list(gpu)
    if len(gpus) != len(pairs):
        raise InputError(f"expert_seconds: {len(gpus)} GPUs are named for {len(pairs)} devices")
    seconds = np.empty(len(pairs))
    for g, name in enumerate(gpus):
        fit = kernel_fit(name, engine, model)
        if fit is None:
            known = sorted({fit.gpu for fit in known_kernels() if fit.engine == engine})
            what = f"{model.expert_dtype} experts on {name!r}" if name in known else f"{name!r}; {nearest(name, known)}"
            raise InputError(f"expert_seconds: {engine} has no measured kernels for {what}")
        launch, reading, arithmetic, rows, passing = fit.seconds(model)
        seconds[g] = launch + pairs.sum() * passing + max((pairs[g] + rows * hit[g]) * arithmetic, hit[g] * reading)
    return seconds


# Transfers.


@dataclass(frozen=True)
class Flows:
    """Copies of token activations that cross links, as the larger of sent and received.

    intra: [..., G] copies over each device's links inside its node. inter: [..., N] over each node's links.
    """

    intra: FloatArray
    inter: FloatArray


def link_seconds(flows: Flows, topology: Topology) -> FloatArray:
    """[..., G + N] seconds that each device's and then each node's links are busy, for copies of one byte."""
    return np.concatenate([flows.intra / topology.intra_bandwidth, flows.inter / topology.inter_bandwidth], axis=-1)


def transfer_seconds(flows: Flows, bytes_per_copy: float, topology: Topology, latency: float) -> FloatArray:
    """[...] seconds of one all-to-all: latency and the slower of its busiest node link and busiest device link."""
    return np.asarray(latency + bytes_per_copy * link_seconds(flows, topology).max(axis=-1))


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
    return _row_width(model, objective, model.expert_input_size) * DTYPE_BYTES[objective.dispatch_dtype]


def combine_bytes(model: ModelSpec, objective: Objective) -> float:
    """Bytes of one expert output on its way back."""
    return _row_width(model, objective, model.expert_output_size) * DTYPE_BYTES[objective.combine_dtype]


def _row_width(model: ModelSpec, objective: Objective, expert: int) -> int:
    """Values of a row that travels: an expert's own, or all of the residual stream where the token moves with it."""
    return model.hidden_size if objective.execution == "context_coherent" else expert


# Copies that cross links, from who holds tokens and which devices they must reach. Between nodes one copy a (token,
# node) travels when `dedup`, and lands on a device of the node chosen evenly, which fans it out inside (as DeepEP
# does).


def flows_from_even_sources(reached: FloatArray, node_reached: FloatArray, topology: Topology, dedup: bool) -> Flows:
    """Flows when tokens' source ranks are spread evenly over all devices.

    Args:
        reached: [..., G] tokens that must reach each device.
        node_reached: [..., N] tokens that must reach each node.
        topology: devices, nodes and their sizes.
        dedup: whether one copy a (token, node) travels between nodes.
    """
    size, node_of, devices = topology.node_size, topology.node_of, topology.num_devices
    in_node = sum_nodes(reached, topology)
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
    """Flows from who needs what.

    Args:
        pairs: [..., H, G] tokens on device h that must reach device g.
        node_pairs: [..., H, N] tokens on device h that must reach node n.
        topology: devices, nodes and their sizes.
        dedup: whether one copy a (token, node) travels between nodes.
    """
    node_of, size = topology.node_of, topology.node_size
    same_node = node_of[:, None] == node_of[None, :]
    own = np.eye(topology.num_devices, dtype=bool)
    within = np.where(same_node & ~own, pairs, 0.0)
    intra_sent, intra_received = within.sum(axis=-1), within.sum(axis=-2)
    remote = node_pairs if dedup else sum_nodes(pairs, topology)
    leaving = np.where(node_of[:, None] == np.arange(topology.num_nodes)[None, :], 0.0, remote)
    sent = sum_nodes(leaving.sum(axis=-1), topology)
    received = leaving.sum(axis=-2)
    if dedup:
        arriving = np.where(same_node, 0.0, pairs).sum(axis=-2) / size[node_of]
        intra_received = intra_received + arriving * (size[node_of] - 1)
        intra_sent = intra_sent + sum_nodes(arriving, topology)[..., node_of] - arriving
    return Flows(intra=np.maximum(intra_sent, intra_received), inter=np.maximum(sent, received))


def copies_between(pairs: FloatArray, node_pairs: FloatArray, topology: Topology, dedup: bool) -> FloatArray:
    """[H, G] copies as they travel between devices, the diagonal zero; their sums are the flows of `flows_between`.

    With `dedup` a copy for another node counts once into the node and again where it is fanned out.

    Args:
        pairs: [H, G] tokens on device h that must reach device g.
        node_pairs: [H, N] tokens on device h that must reach node n.
        topology: devices, nodes and their sizes.
        dedup: whether one copy a (token, node) travels between nodes.
    """
    node_of, size = topology.node_of, topology.node_size
    same_node = node_of[:, None] == node_of[None, :]
    if dedup:
        entering = (node_pairs / size)[:, node_of]
        arriving = np.where(same_node, 0.0, pairs).sum(axis=0) / size[node_of]
        copies = np.where(same_node, pairs + arriving, entering)
    else:
        copies = np.array(pairs)
    np.fill_diagonal(copies, 0.0)
    return copies


def sum_nodes(per_device: FloatArray, topology: Topology) -> FloatArray:
    """[..., N] sums over the devices of each node from [..., G]; a node owns a run of devices."""
    return np.add.reduceat(per_device, topology.node_start, axis=-1)


# Cost from counts: predicted step times from expert loads alone, when no token was recorded. What counts cannot tell is
# assumed: a token's k choices in a layer are independent draws from the layer's loads, every step of a window is like
# its mean, and source ranks are spread evenly. Peaks within a window and experts chosen together are therefore not
# seen; plans are ranked by what their loads imply. The pricing is that of `evaluate`.


def chance_reached(chance: FloatArray | float, draws: int) -> FloatArray:
    """[...] chance that any of so many independent draws falls on a target that each falls on with `chance` [...]."""
    return np.asarray(1.0 - (1.0 - np.minimum(chance, 1.0)) ** draws)


def drawn_loads(plan: Plan, load: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Where one choice of a token falls under the plan, by the loads [..., L, E] of each layer.

    Returns:
        ([..., L, P] chance that it falls on each slot, [..., L, G] on each device), zero in layers without load.
    """
    total = load.sum(axis=-1, keepdims=True)
    chance = load / np.where(total > 0, total, 1.0)
    table = np.broadcast_to(plan.physical_to_logical, (*load.shape[:-1], plan.physical_to_logical.shape[-1]))
    # Empty slots read some expert's loads, and take none of them.
    at_slot = np.take_along_axis(chance, table, axis=-1) * plan.shares
    return at_slot, at_slot @ np.eye(plan.topology.num_devices)[plan.slot_device]


def reached_by_draws(on_device: FloatArray, top_k: int, topology: Topology) -> tuple[FloatArray, FloatArray]:
    """Chances that a token needs a device or node, from the chance [..., G] that one of its choices falls on each
    device.

    Returns:
        ([..., G], [..., N]) chances for `top_k` independent choices.
    """
    return chance_reached(on_device, top_k), chance_reached(sum_nodes(on_device, topology), top_k)


def window_seconds(plan: Plan, load: FloatArray, problem: Problem, step_tokens: int) -> FloatArray:
    """[S] seconds of all MoE layers of a step of `step_tokens` tokens, for the loads of each of S windows.

    A layer without tokens in a window takes what its other layers take on average; of a window without any nothing is
    known, and its seconds are 0: leave it out, or weigh windows by their tokens (`window_weights`).

    Args:
        plan: the placement, for the problem's model and as many devices.
        load: [S, L, E] tokens that chose each expert in each window.
        problem: gives the model, topology and objective.
        step_tokens: tokens of a step, over all devices.

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
    draws = step_tokens * model.top_k
    at_slot, on_device = drawn_loads(plan, load)
    # A slot stays idle when none of the step's draws takes it.
    slot_hit = -np.expm1(draws * np.log1p(-np.minimum(at_slot, 1.0 - 1e-12)))
    experts_hit = slot_hit @ np.eye(topology.num_devices)[plan.slot_device]
    compute = compute_seconds(on_device * draws, experts_hit, model, topology).max(axis=2)
    reached, node_reached = (step_tokens * chance for chance in reached_by_draws(on_device, model.top_k, topology))
    flows = flows_from_even_sources(reached, node_reached, topology, objective.node_dedup)
    latency = all_to_all_latency(topology, objective.node_dedup)
    transfers = sum(
        transfer_seconds(flows, size(model, objective), topology, latency) for size in (dispatch_bytes, combine_bytes)
    )
    busy = load.any(axis=2)
    seconds = np.where(busy, compute + transfers, 0.0).sum(axis=1)
    return np.asarray(seconds * model.layers / np.maximum(busy.sum(axis=1), 1))
