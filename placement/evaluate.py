"""Judging a plan by replaying steps through it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .binding_codes import NOTHING, compute_binding, transfer_binding
from .cost import all_to_all_latency, combine_bytes, compute_seconds, dispatch_bytes, transfer_seconds
from .errors import InputError
from .model import ModelSpec
from .objective import Objective
from .plan import Plan
from .problem import Problem
from .replay import Demand, replay
from .risk import risk_value
from .steps import Steps
from .topology import Topology

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predicted times and traffic of a plan on S steps of L layers.

    dispatch, compute, combine: [S, L] seconds. device_tokens: [S, L, G] token-expert pairs. device_bytes: [S, G] bytes
    over each device's links in a step, both directions' larger. node_bytes: [S, N] the same between nodes.
    reached, node_reached: [S, L] devices and nodes a token needs, summed over tokens; crossing, node_crossing: [S, L]
    copies that leave their device or node; local, node_local: [S, L-1] transitions that stay, in tokens.
    device_memory: [G] bytes of expert weights. dispatch_at, compute_at, combine_at: [S, L] what each of these seconds
    waited for, as codes that `binding_terms` reads.
    """

    tokens: npt.NDArray[np.int64]
    top_k: int
    step_workload: npt.NDArray[np.int64]
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
    dispatch_at: npt.NDArray[np.int16]
    compute_at: npt.NDArray[np.int16]
    combine_at: npt.NDArray[np.int16]

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


def evaluate(plan: Plan, steps: Steps, problem: Problem) -> Evaluation:
    """Replays `steps` through `plan` under the problem's topology and objective.

    Raises:
        InputError: the plan, the steps and the problem are not about the same model or number of devices.
    """
    _check_same(plan, steps, problem)
    return evaluate_on(plan, steps, problem.model, problem.topology, problem.objective)


def evaluate_on(plan: Plan, steps: Steps, model: ModelSpec, topology: Topology, objective: Objective) -> Evaluation:
    """`evaluate` without a problem: the plan's devices are taken to be those of `topology`, in order."""
    parts = [_priced(demand, model, topology, objective) for demand in replay(plan, steps, topology, objective)]
    joined: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Evaluation(
        tokens=steps.tokens,
        top_k=steps.top_k,
        step_workload=steps.step_workload,
        workloads=steps.workloads,
        device_memory=plan.slots_per_device.sum(axis=0) * np.float64(model.bytes_per_expert),
        objective=objective,
        **joined,
    )


def _priced(demand: Demand, model: ModelSpec, topology: Topology, objective: Objective) -> dict[str, Any]:
    latency = all_to_all_latency(topology, objective.node_dedup)
    out, back = dispatch_bytes(model, objective), combine_bytes(model, objective)
    compute = compute_seconds(demand.tokens, demand.experts_hit, model, topology)
    dispatch = transfer_seconds(demand.dispatch, out, topology, latency)
    device_bytes, node_bytes = demand.dispatch.intra * out, demand.dispatch.inter * out
    combine = np.zeros_like(dispatch)
    combine_at = np.full(combine.shape, NOTHING, dtype=np.int16)
    if demand.combine is not None:
        combine = transfer_seconds(demand.combine, back, topology, latency)
        combine_at = transfer_binding(demand.combine, back, topology, latency)
        device_bytes = device_bytes + demand.combine.intra * back
        node_bytes = node_bytes + demand.combine.inter * back
    return {
        "dispatch": dispatch,
        "dispatch_at": transfer_binding(demand.dispatch, out, topology, latency),
        "compute_at": compute_binding(demand.tokens, compute, model, topology),
        "combine_at": combine_at,
        "compute": compute.max(axis=2),
        "combine": combine,
        "device_tokens": demand.tokens,
        "device_bytes": device_bytes.sum(axis=1),
        "node_bytes": node_bytes.sum(axis=1),
        "reached": demand.reached.sum(axis=2),
        "node_reached": demand.node_reached.sum(axis=2),
        "crossing": demand.crossing,
        "node_crossing": demand.node_crossing,
        "local": demand.local,
        "node_local": demand.node_local,
    }


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
