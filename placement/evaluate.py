"""Judging a plan by replaying steps through it: predicted times, traffic, and what each layer waits for."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._arguments import check_types
from .._deprecated import renamed_argument
from .._display import Displayed, data_size, plural
from .._types import FloatArray, IntArray
from .cost import (
    ExpertCost,
    PredictionBasis,
    combine_bytes,
    dispatch_bytes,
    prediction_basis,
)
from .degraded import on_survivors
from .errors import InputError
from .model import ModelSpec
from .objective import Objective, percentiles, risk_value, weighted_mean, weighted_means
from .plan import Plan
from .problem import Problem
from .replay import Demand, replay
from .statistics import RoutingStatistics
from .step_mix import problem_steps
from .steps import Steps
from .topology import Topology
from .trace import RoutingTrace
from .validation import check_choice

CodeArray = npt.NDArray[np.int16]
"""Which term of the cost model a phase waits for. Compute: device g doing arithmetic is g, reading weights G + g.
Transfers: the links of device g inside its node are g, those of node n are G + n."""
LATENCY, NOTHING = -1, -2
"""Codes of transfers that wait for no link: for what no plan changes, or nothing to send."""


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Displayed):
    """Predicted times and traffic of a plan on S steps of L layers.

    tokens: [S] in each step. dispatch, compute, combine: [S, L] seconds. device_tokens: [S, L, G] token-expert pairs.
    device_bytes: [S, G] bytes over each device's links in a step, both directions' larger. node_bytes: [S, N] the same
    between nodes. reached, node_reached: [S, L] devices and nodes a token needs, summed over tokens; crossing,
    node_crossing: [S, L] dispatch copies that leave their device or node; local, node_local: [S, L-1] transitions that
    stay, in tokens. device_memory: [G] bytes of expert weights. dispatch_at, compute_at, combine_at: [S, L] what each
    of these seconds waited for, as codes that `bottleneck_terms` reads. copied: [S, L] experts copied for the step
    alone (the objective's `online`), whose weights travel with the dispatch. basis: what the times rest on. ideal: [S]
    seconds that the step would take if every device and link carried the mean of what all carry. weight, batch,
    batches, notes: the steps', as `Steps` has them. grouped: [S] seconds of a step if the experts of a token are
    grouped as the model's router limits them, where steps were drawn from counts, which do not tell; else None.
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
    copied: IntArray
    basis: PredictionBasis
    ideal: FloatArray
    weight: FloatArray | None = None
    batch: IntArray | None = None
    batches: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    grouped: FloatArray | None = None

    def _summary(self) -> tuple[str, dict[str, str]]:
        figures = self.summary()
        ms = {name: f"{seconds * 1e3:.4g}" for name, seconds in figures.items() if "seconds" in name}
        share = {
            name: f"{value:.1%}" for name, value in figures.items() if name.startswith(("cross", "local", "node_local"))
        }
        steps = plural(len(self.tokens), "step")
        kinds = len(self.batches) > 1
        size = " and ".join(self.batches) if kinds else f"{self.tokens.mean():.4g} tokens each"
        title = f"{ms['step_seconds_mean']} ms a step, {steps}, {size}"
        each = {
            name: f"{part.mean_seconds * 1e3:.4g} ms, {self.step_weight[self.batch == code].sum():.1%} of steps"
            for code, (name, part) in enumerate(self.by_batch().items() if kinds else ())
        }
        return title, {
            "step ms": f"mean {ms['step_seconds_mean']}, p50 {ms['step_seconds_p50']}, p95 {ms['step_seconds_p95']}, "
            f"p99 {ms['step_seconds_p99']}",
            **({} if self.grouped is None else {"if grouped": f"mean {ms['step_seconds_grouped']}"}),
            **each,
            "times are": self.basis.text,
            "of the ideal": f"{figures['ideal_share']:.1%}, what it takes with every device at the mean load",
            "of these": f"compute {ms['compute_seconds']}, transfer {ms['transfer_seconds']}",
            "device load": f"max/mean {figures['load_max_mean']:.3f}, p99 {figures['load_max_mean_p99']:.3f}",
            "a token needs": f"{figures['devices_per_token']:.2f} devices, {figures['nodes_per_token']:.2f} nodes",
            "copies leave": f"their device {share['cross_device_fraction']}, their node {share['cross_node_fraction']}",
            "transitions": f"stay on a device {share['local_transitions']}, "
            f"in a node {share['node_local_transitions']}",
            "busiest links": f"{data_size(figures['device_bytes_max'])} a device and step, "
            f"{data_size(figures['node_bytes_max'])} a node and step",
            "weights": f"{data_size(figures['device_memory_max'])} on the fullest device",
            **({"copied": f"{figures['experts_copied']:.2f} experts a step, layer"} if self.objective.online else {}),
            **({"note": " ".join(self.notes)} if self.notes else {}),
        }

    @property
    def step_weight(self) -> FloatArray:
        """[S] how much each step counts, together 1."""
        return np.full(len(self.tokens), 1.0 / len(self.tokens)) if self.weight is None else self.weight

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
        return risk_value(self.step_seconds, self.step_workload, self.objective, best, self.weight, self.batch)

    @property
    def mean_seconds(self) -> float:
        """Of a step, each counting by its weight."""
        return weighted_mean(self.step_seconds, self.weight)

    @property
    def ideal_share(self) -> float:
        """Of the force-balanced ideal: the step time with every device and link at the mean load, over the step
        time."""
        return weighted_mean(self.ideal, self.weight) / self.mean_seconds

    def by_batch(self) -> dict[str, Evaluation]:
        """The steps of each batch by its name; all under "" where none is named."""
        if self.batch is None:
            return {"": self}
        return {name: self.select(self.batch == code) for code, name in enumerate(self.batches)}

    def select(self, steps: npt.ArrayLike) -> Evaluation:
        """Of some of the steps, in the order given."""
        count = len(self.tokens)
        chosen = np.arange(count)[check_choice("Evaluation.select: steps", steps, count)]
        columns = {
            field.name: value[chosen]
            for field in fields(self)
            if field.name != "device_memory" and isinstance(value := getattr(self, field.name), np.ndarray)
        }
        if self.weight is not None:
            columns["weight"] = columns["weight"] / columns["weight"].sum()
        return replace(self, **columns)

    def summary(self) -> dict[str, float]:
        """Figures by name. Seconds are a step's; fractions are of token-expert pairs or of transitions."""
        seconds, tokens = self.step_seconds, weighted_mean(self.tokens, self.weight)
        layer_tokens, steps_between = tokens * self.dispatch.shape[1], tokens * self.local.shape[1]
        p50, p95, p99 = percentiles(seconds, (50, 95, 99), self.weight)

        def mean(by_layer: FloatArray) -> float:
            return weighted_mean(by_layer.sum(axis=1), self.weight)

        return {
            "step_seconds_mean": self.mean_seconds,
            "step_seconds_p50": float(p50),
            "step_seconds_p95": float(p95),
            "step_seconds_p99": float(p99),
            "compute_seconds": mean(self.compute),
            "transfer_seconds": mean(self.dispatch + self.combine),
            **({} if self.grouped is None else {"step_seconds_grouped": weighted_mean(self.grouped, self.weight)}),
            "ideal_share": self.ideal_share,
            "load_max_mean": weighted_mean(self.load_max_mean, self.weight),
            "load_max_mean_p99": percentiles(self.load_max_mean, (99,), self.weight)[0],
            "devices_per_token": mean(self.reached) / layer_tokens,
            "nodes_per_token": mean(self.node_reached) / layer_tokens,
            "cross_device_fraction": mean(self.crossing) / (layer_tokens * self.top_k),
            "cross_node_fraction": mean(self.node_crossing) / (layer_tokens * self.top_k),
            "local_transitions": mean(self.local) / steps_between if steps_between else 1.0,
            "node_local_transitions": mean(self.node_local) / steps_between if steps_between else 1.0,
            "device_bytes_max": float(self.device_bytes.max()),
            "node_bytes_max": float(self.node_bytes.max()),
            "device_memory_max": float(self.device_memory.max()),
        } | ({"experts_copied": float(self.copied.mean())} if self.objective.online else {})


@renamed_argument("steps", "held_out")
@check_types
def evaluate(
    plan: Plan, held_out: RoutingTrace | RoutingStatistics | Steps, problem: Problem, *, seed: int = 0
) -> Evaluation:
    """Replays steps through `plan` under the problem's topology and objective.

    Where the problem's engine masks lost ranks, devices without slots are lost: they send no tokens and do no work.

    Args:
        plan: the placement.
        held_out: routing that the plan was not solved on, a trace or statistics, of which steps of the problem's
            batches are made (`problem_steps`); or steps.
        problem: gives the model, topology, objective and batches.
        seed: of the steps that are made.

    Raises:
        InputError: the plan, the routing and the problem are not about the same model or number of devices.
        UnsupportedError: counts alone, for context-coherent execution.
    """
    steps = problem_steps(held_out, problem, seed=seed)
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
    other = None if steps.grouped is None else evaluate_on(plan, steps.grouped, model, topology, objective)
    joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Evaluation(
        tokens=steps.tokens,
        top_k=steps.top_k,
        step_workload=steps.step_workload,
        workloads=steps.workloads,
        device_memory=plan.device_memory,
        objective=objective,
        basis=prediction_basis(model, topology, objective),
        weight=steps.weight,
        batch=steps.batch,
        batches=steps.batches,
        notes=steps.notes,
        grouped=None if other is None else other.step_seconds,
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
    transfer, out, back = demand.transfer, dispatch_bytes(model, objective), combine_bytes(model, objective)
    wait_out, wait_back = (wait[:, None] for wait in transfer.waits(demand.step_tokens))
    cost = ExpertCost.of(model, topology)
    compute = cost.seconds(demand.tokens, demand.experts_hit)
    going, coming = demand.travelling
    outgoing = going.flows(topology, transfer.dedup)
    links = transfer.links(outgoing)
    ideal = cost.balanced(demand.tokens, demand.experts_hit) + wait_out + transfer.balanced(outgoing)
    device_bytes, node_bytes = outgoing.intra * out, outgoing.inter * out
    outbound = links
    if demand.copied is not None:
        # Weights travel with the tokens that they are for.
        weights = demand.copied * model.bytes_per_expert
        outbound = links.copy()
        outbound[..., : topology.num_devices] += weights / topology.intra_bandwidth
        device_bytes = device_bytes + weights
    dispatch = wait_out + outbound.max(axis=-1)
    combine = np.zeros_like(dispatch)
    combine_at = np.full(combine.shape, NOTHING, dtype=np.int16)
    if coming is not None:
        same = coming is going
        returning = outgoing if same else coming.flows(topology, transfer.dedup)
        returned = transfer.back * (links if same else transfer.links(returning))
        combine = wait_back + returned.max(axis=-1)
        combine_at = _transfer_bottleneck(returned, wait_back)
        ideal = ideal + wait_back + transfer.back * transfer.balanced(returning)
        device_bytes = device_bytes + returning.intra * back
        node_bytes = node_bytes + returning.inter * back
    crossing, node_crossing = demand.dispatch.crossing(topology)
    return {
        "dispatch": dispatch,
        "dispatch_at": _transfer_bottleneck(outbound, wait_out),
        "compute_at": _compute_bottleneck(demand, compute, cost),
        "combine_at": combine_at,
        "compute": compute.max(axis=2),
        # No more than it takes, where the mean of a link's two directions is above either's largest.
        "ideal": np.minimum(ideal, dispatch + compute.max(axis=2) + combine).sum(axis=1),
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
        "copied": np.zeros(dispatch.shape, dtype=np.int64) if demand.arrived is None else demand.arrived,
    }


def _compute_bottleneck(demand: Demand, seconds: FloatArray, cost: ExpertCost) -> CodeArray:
    """[...] codes of the slowest device and the greater of its terms, from [..., G] seconds."""
    slowest = seconds.argmax(axis=-1)
    arithmetic, reading = np.take_along_axis(
        cost.lines(demand.tokens, demand.experts_hit), slowest[None, ..., None], axis=-1
    )[..., 0]
    return np.asarray(slowest + np.where(arithmetic < reading, seconds.shape[-1], 0), dtype=np.int16)


def _transfer_bottleneck(links: FloatArray, wait: FloatArray) -> CodeArray:
    """[...] codes of the busiest link, from [..., G + N] seconds, or of what is waited for beside links."""
    waits = links.max(axis=-1) < wait
    busy = np.where(links.max(axis=-1) > 0, links.argmax(axis=-1), NOTHING)
    return np.asarray(np.where(waits, LATENCY, busy), dtype=np.int16)


# Bottlenecks: which term of the cost model a plan's layers wait for, in how many steps, for how long, and where.


PHASES = ("dispatch", "compute", "combine")
TERMS = ("compute", "memory", "intra", "inter", "latency")
"""Arithmetic of a device; its reading of weights; links inside a node; links between nodes; latency, and whatever
of a transfer no plan changes."""


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
    layers, weight = evaluation.dispatch.shape[1], evaluation.weight
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
            steps[:, phase, TERMS.index(term)] = weighted_means(waits, weight)
            seconds[:, phase, TERMS.index(term)] = weighted_means(np.where(waits, spent, 0.0), weight)
        on_node = second == "inter"
        for layer in range(layers):
            column = codes[:, layer]
            busy = (column != NOTHING) & (column != LATENCY)
            owner = np.where(busy, column if on_node else column % devices, -1)
            counted = weighted_means(owner[:, None] == np.arange(devices + nodes), weight)
            device_steps[layer, phase] = counted[:devices]
            if on_node:
                node_steps[layer, phase] = counted[devices : devices + nodes]
    return BottleneckTerms(steps, seconds, device_steps, node_steps)
