"""Judging a plan by replaying steps through it: predicted times, traffic, and what each layer waits for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._arguments import check_types
from .._display import Displayed, data_size, plural
from .._types import FloatArray, IntArray
from .cost import (
    ExpertCost,
    Flows,
    PredictionBasis,
    all_to_all_latency,
    combine_bytes,
    dispatch_bytes,
    link_seconds,
    prediction_basis,
    transfer_seconds,
)
from .degraded import on_survivors
from .errors import InputError
from .model import ModelSpec
from .objective import Objective
from .plan import Plan
from .problem import Problem
from .replay import Demand, replay
from .risk import risk_value
from .steps import Steps
from .topology import Topology

CodeArray = npt.NDArray[np.int16]
"""Which term of the cost model a phase waits for. Compute: device g doing arithmetic is g, reading weights G + g.
Transfers: the links of device g inside its node are g, those of node n are G + n."""
LATENCY, NOTHING = -1, -2
"""Codes of transfers that wait for no link: latency alone, or nothing to send."""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Displayed):
    """Predicted times and traffic of a plan on S steps of L layers.

    tokens: [S] in each step. dispatch, compute, combine: [S, L] seconds. device_tokens: [S, L, G] token-expert pairs.
    device_bytes: [S, G] bytes over each device's links in a step, both directions' larger. node_bytes: [S, N] the same
    between nodes. reached, node_reached: [S, L] devices and nodes a token needs, summed over tokens; crossing,
    node_crossing: [S, L] dispatch copies that leave their device or node; local, node_local: [S, L-1] transitions that
    stay, in tokens. device_memory: [G] bytes of expert weights. dispatch_at, compute_at, combine_at: [S, L] what each
    of these seconds waited for, as codes that `bottleneck_terms` reads. basis: what the times rest on.
    """

    tokens: IntArray
    top_k: int
    step_workload: IntArray
    workloads: tuple[str, ...]
    dispatch: FloatArray
    compute: FloatArray
    combine: FloatArray
    device_tokens: FloatArray
    device_bytes: FloatArray
    node_bytes: FloatArray
    reached: FloatArray
    node_reached: FloatArray
    crossing: FloatArray
    node_crossing: FloatArray
    local: FloatArray
    node_local: FloatArray
    device_memory: FloatArray
    objective: Objective
    dispatch_at: CodeArray
    compute_at: CodeArray
    combine_at: CodeArray
    basis: PredictionBasis

    def _summary(self) -> tuple[str, dict[str, str]]:
        figures = self.summary()
        ms = {name: f"{seconds * 1e3:.4g}" for name, seconds in figures.items() if "seconds" in name}
        share = {
            name: f"{value:.1%}" for name, value in figures.items() if name.startswith(("cross", "local", "node_local"))
        }
        steps = plural(len(self.tokens), "step")
        title = f"{ms['step_seconds_mean']} ms a step, {steps}, {self.tokens.mean():.4g} tokens each"
        return title, {
            "step ms": f"mean {ms['step_seconds_mean']}, p50 {ms['step_seconds_p50']}, p95 {ms['step_seconds_p95']}, "
            f"p99 {ms['step_seconds_p99']}",
            "times are": self.basis.text,
            "of these": f"compute {ms['compute_seconds']}, transfer {ms['transfer_seconds']}",
            "device load": f"max/mean {figures['load_max_mean']:.3f}, p99 {figures['load_max_mean_p99']:.3f}",
            "a token needs": f"{figures['devices_per_token']:.2f} devices, {figures['nodes_per_token']:.2f} nodes",
            "copies leave": f"their device {share['cross_device_fraction']}, their node {share['cross_node_fraction']}",
            "transitions": f"stay on a device {share['local_transitions']}, "
            f"in a node {share['node_local_transitions']}",
            "busiest links": f"{data_size(figures['device_bytes_max'])} a device and step, "
            f"{data_size(figures['node_bytes_max'])} a node and step",
            "weights": f"{data_size(figures['device_memory_max'])} on the fullest device",
        }

    @cached_property
    def step_seconds(self) -> FloatArray:
        """[S] predicted seconds of all MoE layers of a step."""
        return np.asarray((self.dispatch + self.compute + self.combine).sum(axis=1))

    @cached_property
    def load_max_mean(self) -> FloatArray:
        """[S] device load over the mean device load, the largest of each layer, mean over layers."""
        mean = self.device_tokens.mean(axis=2)
        ratio = self.device_tokens.max(axis=2) / np.where(mean > 0, mean, 1.0)
        return np.asarray(np.where(mean > 0, ratio, 1.0).mean(axis=1))

    def risk(self, best: FloatArray | None = None) -> float:
        """The objective's figure in seconds; see `risk_value`."""
        return risk_value(self.step_seconds, self.step_workload, self.objective, best)

    def summary(self) -> dict[str, float]:
        """Figures by name. Seconds are a step's; fractions are of token-expert pairs or of transitions."""
        seconds = self.step_seconds
        layer_tokens = float(self.tokens.sum()) * self.dispatch.shape[1]
        steps_between = float(self.tokens.sum()) * self.local.shape[1]
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
        return {
            "step_seconds_mean": float(seconds.mean()),
            "step_seconds_p50": float(p50),
            "step_seconds_p95": float(p95),
            "step_seconds_p99": float(p99),
            "compute_seconds": float(self.compute.sum(axis=1).mean()),
            "transfer_seconds": float((self.dispatch + self.combine).sum(axis=1).mean()),
            "load_max_mean": float(self.load_max_mean.mean()),
            "load_max_mean_p99": float(np.percentile(self.load_max_mean, 99)),
            "devices_per_token": float(self.reached.sum()) / layer_tokens,
            "nodes_per_token": float(self.node_reached.sum()) / layer_tokens,
            "cross_device_fraction": float(self.crossing.sum()) / (layer_tokens * self.top_k),
            "cross_node_fraction": float(self.node_crossing.sum()) / (layer_tokens * self.top_k),
            "local_transitions": float(self.local.sum()) / steps_between if steps_between else 1.0,
            "node_local_transitions": float(self.node_local.sum()) / steps_between if steps_between else 1.0,
            "device_bytes_max": float(self.device_bytes.max()),
            "node_bytes_max": float(self.node_bytes.max()),
            "device_memory_max": float(self.device_memory.max()),
        }


@check_types
def evaluate(plan: Plan, steps: Steps, problem: Problem) -> Evaluation:
    """Replays `steps` through `plan` under the problem's topology and objective.

    Where the problem's engine masks lost ranks, devices without slots are lost: they send no tokens and do no work.

    Raises:
        InputError: the plan, the steps and the problem are not about the same model or number of devices.
    """
    _check_same(plan, steps, problem)
    topology = problem.topology
    if problem.profile is not None and problem.profile.masked_ranks:
        # The cluster judged on is the problem's, which may have other links than the plan's.
        plan, steps = on_survivors(replace(plan, topology=topology), steps)
        topology = plan.topology
    return evaluate_on(plan, steps, problem.model, topology, problem.objective)


def evaluate_on(plan: Plan, steps: Steps, model: ModelSpec, topology: Topology, objective: Objective) -> Evaluation:
    """`evaluate` without a problem: the plan's devices are taken to be those of `topology`, in order."""
    parts = [_priced(demand, model, topology, objective) for demand in replay(plan, steps, topology, objective)]
    joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Evaluation(
        tokens=steps.tokens,
        top_k=steps.top_k,
        step_workload=steps.step_workload,
        workloads=steps.workloads,
        device_memory=plan.device_memory,
        objective=objective,
        basis=prediction_basis(model, topology),
        **joined,
    )


def _check_same(plan: Plan, steps: Steps, problem: Problem) -> None:
    model = problem.model
    if plan.topology.num_devices != problem.num_devices:
        raise InputError(
            f"the plan is for {plan.topology.num_devices} devices, the problem's topology has {problem.num_devices}"
        )
    for origin, experts, layers in (
        ("the plan", plan.model.experts, plan.moe_layers),
        ("the steps", steps.num_experts, steps.moe_layers),
    ):
        if (experts, layers) != (model.experts, model.moe_layers):
            raise InputError(
                f"{origin} are of another model: {experts} experts in layers {layers}, "
                f"the problem has {model.experts} in {model.moe_layers}"
            )
    if steps.source is not None and int(steps.source.max()) >= problem.num_devices:
        raise InputError(
            f"the steps were recorded on rank {int(steps.source.max())}, the topology has {problem.num_devices} "
            "devices; drop the source ranks (dataclasses.replace(steps, source=None)) to spread tokens evenly"
        )


def _priced(demand: Demand, model: ModelSpec, topology: Topology, objective: Objective) -> dict[str, Any]:
    """An evaluation's arrays for a run of steps."""
    latency = all_to_all_latency(topology, objective.node_dedup)
    out, back = dispatch_bytes(model, objective), combine_bytes(model, objective)
    cost = ExpertCost.of(model, topology)
    compute = cost.seconds(demand.tokens, demand.experts_hit)
    outgoing = demand.dispatch.flows(topology, objective.node_dedup)
    dispatch = transfer_seconds(outgoing, out, topology, latency)
    device_bytes, node_bytes = outgoing.intra * out, outgoing.inter * out
    combine = np.zeros_like(dispatch)
    combine_at = np.full(combine.shape, NOTHING, dtype=np.int16)
    if demand.combine is not None:
        same = demand.combine is demand.dispatch
        returning = outgoing if same else demand.combine.flows(topology, objective.node_dedup)
        combine = transfer_seconds(returning, back, topology, latency)
        combine_at = _transfer_bottleneck(returning, back, topology, latency)
        device_bytes = device_bytes + returning.intra * back
        node_bytes = node_bytes + returning.inter * back
    crossing, node_crossing = demand.dispatch.crossing(topology)
    return {
        "dispatch": dispatch,
        "dispatch_at": _transfer_bottleneck(outgoing, out, topology, latency),
        "compute_at": _compute_bottleneck(demand, compute, cost),
        "combine_at": combine_at,
        "compute": compute.max(axis=2),
        "combine": combine,
        "device_tokens": demand.tokens,
        "device_bytes": device_bytes.sum(axis=1),
        "node_bytes": node_bytes.sum(axis=1),
        "reached": demand.dispatch.devices.sum(axis=2),
        "node_reached": demand.dispatch.nodes.sum(axis=2),
        "crossing": crossing,
        "node_crossing": node_crossing,
        "local": demand.local,
        "node_local": demand.node_local,
    }


def _compute_bottleneck(demand: Demand, seconds: FloatArray, cost: ExpertCost) -> CodeArray:
    """[...] codes of the slowest device and the greater of its terms, from [..., G] seconds."""
    slowest = seconds.argmax(axis=-1)
    arithmetic, reading = np.take_along_axis(
        cost.lines(demand.tokens, demand.experts_hit), slowest[None, ..., None], axis=-1
    )[..., 0]
    return np.asarray(slowest + np.where(arithmetic < reading, seconds.shape[-1], 0), dtype=np.int16)


def _transfer_bottleneck(flows: Flows, bytes_per_copy: float, topology: Topology, latency: float) -> CodeArray:
    """[...] codes of the busiest link, or of latency."""
    links = link_seconds(flows, topology)
    waits = links.max(axis=-1) * bytes_per_copy < latency
    busy = np.where(links.max(axis=-1) > 0, links.argmax(axis=-1), NOTHING)
    return np.asarray(np.where(waits, LATENCY, busy), dtype=np.int16)


# Bottlenecks: which term of the cost model a plan's layers wait for, in how many steps, for how long, and where.


PHASES = ("dispatch", "compute", "combine")
TERMS = ("compute", "memory", "intra", "inter", "latency")
"""Arithmetic of a device; its reading of weights; links inside a node; links between nodes; latency alone."""


@dataclass(frozen=True, eq=False)
class BottleneckTerms:
    """Per layer, phase and term, over the steps of an evaluation.

    steps: [L, 3, 5] fraction of steps in which the phase waits for the term. seconds: [L, 3, 5] mean seconds a step of
    the phases that wait for it; their sum is the mean step time. device_steps: [L, 3, G] fraction of steps in which
    that device is the one waited for (its arithmetic, its memory or its links); node_steps: [L, 3, N] the same of
    nodes' links. Phases are `PHASES`, terms `TERMS`.
    """

    steps: FloatArray
    seconds: FloatArray
    device_steps: FloatArray
    node_steps: FloatArray

    def term_seconds(self) -> dict[str, float]:
        """Mean seconds of a step that wait for each term, over all layers."""
        return dict(zip(TERMS, self.seconds.sum(axis=(0, 1)).tolist(), strict=True))

    def layer_seconds(self) -> FloatArray:
        """[L, 5] mean seconds of a step that wait for each term in each layer."""
        return np.asarray(self.seconds.sum(axis=1))


@check_types
def bottleneck_terms(evaluation: Evaluation) -> BottleneckTerms:
    """What the steps of an evaluation waited for.

    Where terms tie, the earlier of `TERMS` and the lower device is named.
    """
    devices, nodes = evaluation.device_bytes.shape[1], evaluation.node_bytes.shape[1]
    layers = evaluation.dispatch.shape[1]
    steps, seconds = np.zeros((2, layers, len(PHASES), len(TERMS)))
    device_steps, node_steps = np.zeros((layers, len(PHASES), devices)), np.zeros((layers, len(PHASES), nodes))
    for phase, name in enumerate(PHASES):
        codes, spent = getattr(evaluation, f"{name}_at"), getattr(evaluation, name)
        first, second = ("compute", "memory") if name == "compute" else ("intra", "inter")
        kinds = {
            first: (codes >= 0) & (codes < devices),
            second: codes >= devices,
            "latency": codes == LATENCY,
        }
        for term, waits in kinds.items():
            steps[:, phase, TERMS.index(term)] = waits.mean(axis=0)
            seconds[:, phase, TERMS.index(term)] = np.where(waits, spent, 0.0).mean(axis=0)
        on_node = second == "inter"
        for layer in range(layers):
            column = codes[:, layer]
            column = column[(column != NOTHING) & (column != LATENCY)]
            owners = column if on_node else column % devices
            counted = np.bincount(owners, minlength=devices + nodes) / len(codes)
            device_steps[layer, phase] = counted[:devices]
            if on_node:
                node_steps[layer, phase] = counted[devices : devices + nodes]
    return BottleneckTerms(steps, seconds, device_steps, node_steps)
