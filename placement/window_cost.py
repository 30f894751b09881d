"""Predicted step times from expert loads alone, when no token was recorded.

What counts cannot tell is assumed: a token's k choices in a layer are independent draws from the layer's loads, every
step of a window is like its mean, and homes are spread evenly. Peaks within a window and experts chosen together are
therefore not seen; plans are ranked by what their loads imply. The pricing is that of `evaluate`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .cost import all_to_all_latency, combine_bytes, compute_seconds, dispatch_bytes, transfer_seconds
from .errors import InputError, UnsupportedError
from .flows import flows_from_even_sources
from .plan import Plan
from .problem import Problem

FloatArray = npt.NDArray[np.float64]


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
