"""Seconds and copies from counts: the cost model's arithmetic, on arrays with any leading axes (steps, layers).

    compute_g  = launch_g + passing_g * tokens + max((tokens_g + rows_g * experts_hit_g) * flops_per_token / rate_g,
                                                     experts_hit_g * bytes_per_expert / memory_bandwidth_g)
    transfer   = wait + max(max_n inter_n / inter_bandwidth_n,  max_g intra_g / intra_bandwidth_g)
    layer time = dispatch transfer + max_g compute_g + combine transfer

inter_n and intra_g are the larger of bytes sent and bytes received. Prefill is bound by tokens, small-batch decode by
the distinct experts whose weights must be read: both terms are kept. launch, passing and rows are of kernels that were
measured (`kernels`), and 0 where only a roofline is known. wait and bandwidths of a transfer are of the kind that runs
(`transfers`), where that was measured on the cluster's GPUs, else latency and the topology's links.

Shapes: G devices, H devices as the ones that hold tokens, N nodes, L layers, E experts, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .._arguments import check_types
from .._types import BoolArray, FloatArray, IntArray
from .errors import InputError, UnsupportedError, nearest
from .kernels import kernel_fit, known_kernels
from .model import ModelSpec, row_value_bytes
from .objective import DispatchKind, Objective
from .plan import Plan
from .problem import Problem
from .steps import Steps
from .topology import ENGINES, PRESETS, Topology
from .transfers import MOST_DECODE_TOKENS, Leg, TransferFit, transfer_fit

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
        fits = [kernel_fit(gpu, topology.engine, model, topology.num_devices) for gpu in topology.gpus]
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

    def balanced(self, pairs: FloatArray, experts_hit: FloatArray) -> FloatArray:
        """[...] seconds of the same work, [..., G] of each, shared out over devices by their speed."""
        together = self.pooled(np.zeros(1, np.int64))
        return np.asarray(
            together.seconds(pairs.sum(axis=-1, keepdims=True), experts_hit.sum(axis=-1, keepdims=True))[..., 0]
        )

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
        fit = kernel_fit(name, engine, model, len(pairs))
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


class TransferCost(NamedTuple):
    """What dispatch and combine of a layer cost, of one kind.

    Dispatch takes fixed[0] + token[0] * tokens of the step + root[0] * sqrt(tokens), whatever the plan, and what copies
    on the busiest link take: per_copy [G] seconds over a device's links inside its node, per_node_copy [N] over a
    node's. Combine has the second of each pair, and a copy costs `back` times as much. pairs: a copy goes to every
    expert of a token, not to every device. dedup: one copy a (token, node) between nodes. measured: what it is of, by
    GPU; empty where it is latency and the topology's links.
    """

    kind: DispatchKind
    fixed: tuple[float, float]
    token: tuple[float, float]
    root: tuple[float, float]
    per_copy: FloatArray
    per_node_copy: FloatArray
    back: float
    pairs: bool
    dedup: bool
    measured: tuple[TransferFit, ...]

    @classmethod
    def of(cls, kind: DispatchKind, model: ModelSpec, topology: Topology, objective: Objective) -> TransferCost:
        """That of a kind on a cluster, by measurements where all its GPUs have them for its engine."""
        pairs = kind in ("low_latency", "all_to_all")
        dedup = kind == "all_gather" or (objective.node_dedup and not pairs)
        rows = dispatch_bytes(model, objective), combine_bytes(model, objective)
        gpus = sorted(set(topology.gpus)) if topology.engine and objective.execution == "dispatch_combine" else []
        fits = [transfer_fit(gpu, topology.engine, kind, topology.num_nodes, model.hidden_size) for gpu in gpus]
        measured = tuple(fit for fit in fits if fit is not None)
        if not measured or len(measured) < len(gpus) or topology.num_devices == 1:
            latency = all_to_all_latency(topology, dedup)
            plain = cls(
                kind,
                (latency, latency),
                (0.0, 0.0),
                (0.0, 0.0),
                rows[0] / topology.intra_bandwidth,
                rows[0] / topology.inter_bandwidth,
                rows[1] / rows[0],
                pairs,
                dedup,
                (),
            )
            return plain._everywhere(topology) if kind == "all_gather" else plain
        legs = [(fit.dispatch, fit.combine) for fit in measured]
        waits = [
            [_waits(leg, row, kind, model, topology, fit.nodes) for leg, row in zip(both, rows, strict=True)]
            for fit, both in zip(measured, legs, strict=True)
        ]
        fixed, token, root = ((max(of[0][term] for of in waits), max(of[1][term] for of in waits)) for term in range(3))
        inside, between = _link_rates(measured, topology)
        # One relation of the two ways for all links: that of the links which are waited for.
        first, second = (between if topology.num_nodes > 1 else inside)[:, 0]
        made = cls(
            kind,
            fixed,
            token,
            root,
            rows[0] / inside[0],
            rows[0] / between[0],
            float(rows[1] / rows[0] * first / second),
            pairs,
            dedup,
            measured,
        )
        return made._everywhere(topology) if kind == "all_gather" else made

    def _everywhere(self, topology: Topology) -> TransferCost:
        """With every token going everywhere: links are as busy whatever the plan."""
        all_devices, all_nodes = np.ones(topology.num_devices), np.ones(topology.num_nodes)
        flows = flows_from_even_sources(all_devices, all_nodes, topology, True)
        out = float(self.links(flows).max())
        return self._replace(
            token=(self.token[0] + out, self.token[1] + out * self.back),
            per_copy=np.zeros_like(self.per_copy),
            per_node_copy=np.zeros_like(self.per_node_copy),
        )

    def waits(self, tokens: FloatArray) -> tuple[FloatArray, FloatArray]:
        """[...] seconds of dispatch and of combine that no plan changes, from the tokens [...] of steps."""
        out, back = (
            fixed + token * tokens + root * np.sqrt(tokens)
            for fixed, token, root in zip(self.fixed, self.token, self.root, strict=True)
        )
        return np.asarray(out), np.asarray(back)

    def links(self, flows: Flows) -> FloatArray:
        """[..., G + N] seconds that each device's and then each node's links are busy with dispatch."""
        return np.concatenate([flows.intra * self.per_copy, flows.inter * self.per_node_copy], axis=-1)

    def balanced(self, flows: Flows) -> FloatArray:
        """[...] seconds of dispatch's copies on links that all carry the same of their kind for their bandwidth."""
        on_devices, on_nodes = self.all_links
        return np.asarray(np.maximum(flows.intra.sum(axis=-1) * on_devices, flows.inter.sum(axis=-1) * on_nodes))

    @property
    def all_links(self) -> tuple[float, float]:
        """Seconds that a copy takes on all links inside nodes together, and on all those between nodes."""
        if self.kind == "all_gather":
            return 0.0, 0.0
        return float(1.0 / (1.0 / self.per_copy).sum()), float(1.0 / (1.0 / self.per_node_copy).sum())


def _waits(
    leg: Leg, row: float, kind: DispatchKind, model: ModelSpec, topology: Topology, nodes: int
) -> tuple[float, float, float]:
    """(seconds, a token of a step, a root of its tokens) of dispatch or combine as it was measured on so many nodes."""
    devices = topology.num_devices
    # What was measured inside a node says nothing of messages between nodes.
    further = topology.inter_latency * (topology.num_nodes - 1) if nodes == 1 else 0.0
    fixed = leg.launch + leg.expert * model.experts + leg.row * row + leg.peer * devices + further
    sent = row * (devices - 1) / devices * (1.0 if kind == "all_gather" else model.top_k / devices)
    return fixed, leg.token / devices, float(leg.root * np.sqrt(sent))


def _link_rates(measured: tuple[TransferFit, ...], topology: Topology) -> tuple[FloatArray, FloatArray]:
    """([2, G], [2, N]) bytes/s of devices' links inside nodes and of nodes' links, out and back: the topology's, by
    what transfers reached of the links of a preset of that GPU."""
    boxes = {box.gpu: box for box in reversed(PRESETS.values())}
    inside, between = {}, np.ones(2)
    for fit in measured:
        box, near = boxes[fit.gpu], fit
        if fit.nodes > 1:
            one = transfer_fit(fit.gpu, topology.engine, fit.kind, 1)
            near = fit if one is None else one
            reached = [leg.inter * box.devices / box.inter_bandwidth for leg in (fit.dispatch, fit.combine)]
            between = np.minimum(between, reached) if fit is not measured[0] else np.array(reached)
        inside[fit.gpu] = [leg.intra / box.intra_bandwidth or 1.0 for leg in (near.dispatch, near.combine)]
    reached_inside = np.array([inside[gpu] for gpu in topology.gpus]).T
    return reached_inside * topology.intra_bandwidth, between[:, None] * topology.inter_bandwidth


class Transfers(NamedTuple):
    """What transfers cost in decode and in prefill steps: those of more than `most` tokens where nothing else says."""

    decode: TransferCost
    prefill: TransferCost
    most: int

    @classmethod
    def of(cls, model: ModelSpec, topology: Topology, objective: Objective) -> Transfers:
        """Those of the kinds that the objective names."""
        decode = TransferCost.of(objective.decode_dispatch, model, topology, objective)
        if objective.prefill_dispatch == objective.decode_dispatch:
            return cls(decode, decode, MOST_DECODE_TOKENS * topology.num_devices)
        prefill = TransferCost.of(objective.prefill_dispatch, model, topology, objective)
        return cls(decode, prefill, MOST_DECODE_TOKENS * topology.num_devices)

    @property
    def each(self) -> tuple[TransferCost, ...]:
        """Those that differ, decode first."""
        return (self.decode,) if self.decode is self.prefill else (self.decode, self.prefill)

    def which(self, steps: Steps) -> IntArray:
        """[S] index into `each` of what each step has."""
        if len(self.each) == 1:
            return np.zeros(steps.num_steps, np.int64)
        return steps.are_prefill(self.most).astype(np.int64)

    def of_steps(self, steps: Steps) -> list[tuple[TransferCost, BoolArray]]:
        """Each cost that the steps have, and which of them [S] have it."""
        kind = self.which(steps)
        return [(cost, kind == index) for index, cost in enumerate(self.each) if (kind == index).any()]

    def of_size(self, tokens: int) -> TransferCost:
        """That of a step of so many tokens."""
        return self.prefill if tokens > self.most else self.decode

    def waits(self, steps: Steps) -> tuple[FloatArray, FloatArray]:
        """[S] seconds of dispatch and of combine that no plan changes."""
        kind, tokens = self.which(steps), steps.tokens.astype(np.float64)
        each = np.array([cost.waits(tokens) for cost in self.each])
        out, back = np.take_along_axis(each, kind[None, None], axis=0)[0]
        return out, back


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
    return _row_width(model, objective, model.expert_input_size) * row_value_bytes(objective.dispatch_dtype)


def combine_bytes(model: ModelSpec, objective: Objective) -> float:
    """Bytes of one expert output on its way back."""
    return _row_width(model, objective, model.expert_output_size) * row_value_bytes(objective.combine_dtype)


def _row_width(model: ModelSpec, objective: Objective, expert: int) -> int:
    """Values of a row that travels: an expert's own, or all of the residual stream where the token moves with it."""
    return model.hidden_size if objective.execution == "context_coherent" else expert


class PredictionBasis(NamedTuple):
    """What predicted times rest on.

    error: median relative error of the measured kernels, the largest of the cluster's devices; None where some device
    has a roofline alone. transfer_error: that of measured transfers, the larger of decode's and prefill's; None where
    they are latency and the topology's links. text: `predicted, ±6 % (compute ±6 %: vllm 0.24.0 kernels on h100-sxm,
    mxfp4; transfer ±4 %: NCCL 2.29.2 all_gather)`.
    """

    error: float | None
    transfer_error: float | None
    text: str


@check_types
def prediction_basis(model: ModelSpec, topology: Topology, objective: Objective | None = None) -> PredictionBasis:
    """What the times predicted for a model on a cluster rest on, in a line to print beside them.

    objective: tells the kinds of transfers (None: those of `Objective()`).
    """
    gpus = sorted(set(topology.gpus))
    error, compute = _compute_basis(model, topology, gpus)
    transfers = Transfers.of(model, topology, Objective() if objective is None else objective)
    errors = [fit.error for cost in transfers.each for fit in cost.measured]
    all_measured = all(cost.measured for cost in transfers.each)
    transfer_error = max(errors) if all_measured else None
    if topology.num_devices == 1:
        transfer, transfer_error = "no transfers", None
    elif not errors:
        transfer = "transfers by the topology's links, not measured"
    else:
        names = _transfer_names(transfers.each, topology)
        transfer = f"transfer ±{max(errors):.0%}: {names}" if transfer_error is not None else f"transfer: {names}"
    if error is None and not errors:
        plain = compute.replace("a roofline", "a roofline and the topology's links")
        return PredictionBasis(None, None, f"predicted by {plain}")
    worst = max([*errors, *([] if error is None else [error])])
    whole = error is not None and (transfer_error is not None or topology.num_devices == 1)
    bar = f"±{worst:.0%}" if whole else f"±{worst:.0%} of what was measured"
    return PredictionBasis(error, transfer_error, f"predicted, {bar} ({compute}; {transfer})".replace("%", " %"))


def _compute_basis(model: ModelSpec, topology: Topology, gpus: list[str]) -> tuple[float | None, str]:
    """(error, words) of expert work."""
    fits = [(gpu, kernel_fit(gpu, topology.engine, model, topology.num_devices)) for gpu in gpus]
    measured = [fit for _, fit in fits if fit is not None]
    if len(measured) < len(gpus):
        rest = ", ".join(gpu or "devices without a gpu name" for gpu, fit in fits if fit is None)
        known = {fit.gpu for fit in known_kernels()} & set(gpus)
        why = "name an engine for its measured kernels" if known and not topology.engine else "no kernels known"
        return None, f"a roofline, not measured ({rest}: {why})"
    error = max(fit.error for fit in measured)
    kernels = ", ".join(
        f"{fit.engine} {fit.version} kernels on {fit.gpu}, {model.expert_dtype}"
        + (f", fitted to other shapes than {model.hidden_size}x{model.ffn_size}" if fit.shape == "any" else "")
        for fit in measured
    )
    return error, f"compute ±{error:.0%}: {kernels}"


def _transfer_names(costs: Sequence[TransferCost], topology: Topology) -> str:
    """The kinds, whose measurements they are of, and what was not measured."""
    by_library: dict[str, list[str]] = {}
    for cost in costs:
        library = ", ".join(dict.fromkeys(fit.library for fit in cost.measured)) or "the topology's links"
        inside = topology.num_nodes > 1 and cost.measured and all(fit.nodes == 1 for fit in cost.measured)
        by_library.setdefault(library + (", links between nodes not measured" if inside else ""), []).append(cost.kind)
    return "; ".join(f"{' and '.join(kinds).replace('_', ' ')} by {name}" for name, kinds in by_library.items())


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
# assumed: a token's k choices in a layer are independent draws from the layer's loads (or, where the model limits them
# to groups of experts and that is asked, from groups drawn first), every step of a window is like its mean, and source
# ranks are spread evenly. Peaks within a window and experts chosen together are therefore not seen; plans are ranked by
# what their loads imply. The pricing is that of `evaluate`.


def chance_reached(chance: FloatArray | float, draws: int) -> FloatArray:
    """[...] chance that any of so many independent draws falls on a target that each falls on with `chance` [...]."""
    return np.asarray(1.0 - (1.0 - np.minimum(chance, 1.0)) ** draws)


def slot_shares(plan: Plan, load: FloatArray, objective: Objective) -> FloatArray:
    """[..., L, P] part of its expert's load that each slot computes, for loads [..., L, E] of each layer: the plan's
    shares, or where replicas are "balanced" those of each load divided like a step."""
    if objective.replica_choice != "balanced":
        return plan.shares
    # Compiled code, which nothing else here needs.
    from .division import window_shares

    served = window_shares(load, plan.holds, plan.topology.node_of, objective.division)
    layers = np.arange(plan.shares.shape[0])[:, None]
    twins = np.zeros(plan.holds.shape)
    np.add.at(twins, (layers, plan.physical_to_logical, plan.slot_device), plan.filled)
    at_slot = (served / np.maximum(twins, 1))[..., layers, plan.physical_to_logical, plan.slot_device]
    return np.asarray(at_slot * plan.filled)


def drawn_loads(plan: Plan, load: FloatArray, objective: Objective) -> tuple[FloatArray, FloatArray]:
    """Where one choice of a token falls under the plan, by the loads [..., L, E] of each layer.

    Returns:
        ([..., L, P] chance that it falls on each slot, [..., L, G] on each device), zero in layers without load.
    """
    total = load.sum(axis=-1, keepdims=True)
    chance = load / np.where(total > 0, total, 1.0)
    table = np.broadcast_to(plan.physical_to_logical, (*load.shape[:-1], plan.physical_to_logical.shape[-1]))
    # Empty slots read some expert's loads, and take none of them.
    at_slot = np.take_along_axis(chance, table, axis=-1) * slot_shares(plan, load, objective)
    return at_slot, at_slot @ np.eye(plan.topology.num_devices)[plan.slot_device]


def reached_by_draws(on_device: FloatArray, top_k: int, topology: Topology) -> tuple[FloatArray, FloatArray]:
    """Chances that a token needs a device or node, from the chance [..., G] that one of its choices falls on each
    device.

    Returns:
        ([..., G], [..., N]) chances for `top_k` independent choices.
    """
    return chance_reached(on_device, top_k), chance_reached(sum_nodes(on_device, topology), top_k)


def reached_in_groups(plan: Plan, load: FloatArray, problem: Problem) -> tuple[FloatArray, FloatArray]:
    """`reached_by_draws` where a token's choices are of as few groups of experts as the model limits them to: each
    group is taken with its chance, on its own, and its part of the choices falls on experts inside by their loads.

    load: [..., L, E] tokens that chose each expert.
    """
    model, topology = problem.model, problem.topology
    missed, node_missed = np.ones(1), np.ones(1)
    total = np.maximum(load.sum(axis=-1, keepdims=True), 1e-300)
    for first in range(0, model.experts, size := model.experts // model.groups):
        mine = (np.arange(model.experts) >= first) & (np.arange(model.experts) < first + size)
        of_group = np.where(mine, load, 0.0)
        choices = model.top_k * of_group.sum(axis=-1, keepdims=True) / total
        taken = np.minimum(1.0, choices * model.top_groups / model.top_k)
        draws = choices / np.where(taken > 0, taken, 1.0)
        _, on_device = drawn_loads(plan, of_group, problem.objective)
        missed = missed * (1.0 - taken * (1.0 - (1.0 - np.minimum(on_device, 1.0)) ** draws))
        on_node = np.minimum(sum_nodes(on_device, topology), 1.0)
        node_missed = node_missed * (1.0 - taken * (1.0 - (1.0 - on_node) ** draws))
    return 1.0 - missed, 1.0 - node_missed


class WindowTimes(NamedTuple):
    """Of a step, for the loads of each of S windows: [S] predicted seconds, and [S] what they would be with every
    device and link at the mean load."""

    seconds: FloatArray
    ideal: FloatArray


def window_seconds(plan: Plan, load: FloatArray, problem: Problem, step_tokens: int) -> FloatArray:
    """[S] the seconds of `window_times`."""
    return window_times(plan, load, problem, step_tokens).seconds


def window_times(
    plan: Plan, load: FloatArray, problem: Problem, step_tokens: int, grouped: bool = False
) -> WindowTimes:
    """[S] seconds of all MoE layers of a step of `step_tokens` tokens, for the loads of each of S windows.

    A layer without tokens in a window takes what its other layers take on average; of a window without any nothing is
    known, and its seconds are 0: leave it out, or weigh windows by their tokens (`window_weights`).

    Args:
        plan: the placement, for the problem's model and as many devices.
        load: [S, L, E] tokens that chose each expert in each window.
        problem: gives the model, topology and objective.
        step_tokens: tokens of a step, over all devices.
        grouped: whether a token's choices are of as few groups of experts as the model limits them to; by default they
            are independent.

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
    if objective.online:
        raise UnsupportedError(
            f"online={objective.online} copies experts by the step, counts tell of none; record tokens"
        )
    draws = step_tokens * model.top_k
    at_slot, on_device = drawn_loads(plan, load, objective)
    # A slot stays idle when none of the step's draws takes it.
    slot_hit = -np.expm1(draws * np.log1p(-np.minimum(at_slot, 1.0 - 1e-12)))
    experts_hit = slot_hit @ np.eye(topology.num_devices)[plan.slot_device]
    cost = ExpertCost.of(model, topology)
    compute = cost.seconds(on_device * draws, experts_hit).max(axis=2)
    transfer = Transfers.of(model, topology, objective).of_size(step_tokens)
    chances = reached_by_draws(on_device, model.top_k, topology)
    if grouped and model.limits_groups:
        chances = reached_in_groups(plan, load, problem)
    if transfer.pairs:
        chances = on_device * model.top_k, sum_nodes(on_device, topology) * model.top_k
    reached, node_reached = (step_tokens * chance for chance in chances)
    flows = flows_from_even_sources(reached, node_reached, topology, transfer.dedup)
    waits = sum(transfer.waits(np.array(float(step_tokens))))
    seconds = compute + (waits + transfer.links(flows).max(axis=-1) * (1.0 + transfer.back))
    even = cost.balanced(on_device * draws, experts_hit) + waits + transfer.balanced(flows) * (1.0 + transfer.back)
    busy = load.any(axis=2)
    layers = model.layers / np.maximum(busy.sum(axis=1), 1)
    # No more than it takes, where the mean of a link's two directions is above either's largest.
    both = (np.where(busy, of, 0.0).sum(axis=1) * layers for of in (seconds, np.minimum(even, seconds)))
    return WindowTimes(*both)
