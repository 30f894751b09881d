"""MoETuner: even clusters of experts first, then the clusters to devices so that no device pair's traffic sticks out."""

from __future__ import annotations

import math

import numpy as np

from .._types import FloatArray, IntArray
from ..placement.cost import dispatch_bytes
from ..placement.errors import InputError
from ..placement.plan import Certificate
from ..placement.problem import Problem
from .base import Budget, Feature, Needs, Solution, fill_slots
from .ilp import check_backend
from .moetuner_clusters import LayerClusters, cluster_layer
from .moetuner_mapping import MappingTask, check_method, map_clusters, pair_cost


class MoeTuner:
    """The two integer programs of Go and Mahajan, "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert
    Placement and Token Routing" (arXiv 2502.06643). The first parts each layer's experts into one cluster a device,
    minimising the sum of abs(cluster load - target); the second puts clusters on devices, minimising the largest
    transfer between two devices, summed over layers. Targets are equal, or in proportion to the devices' compute.
    """

    name = "moetuner"
    supports = frozenset({Feature.UNEVEN_SLOTS})
    needs = frozenset({Needs.TRANSITIONS})

    def solve(
        self,
        problem: Problem,
        budget: Budget,
        *,
        backend: str = "highs",
        tolerance: float = 0.025,
        program2: str = "auto",
        warm_start: bool = True,
    ) -> Solution:
        """Places the experts; see `Solver` for the contract.

        backend: "highs" or "cbc". tolerance: relative gap at which each program may stop, the paper's by default (see
        `cluster_layer` for the first). program2: "ilp", "chain" (exact, few devices) or "auto". warm_start: begin
        from greedy solutions, so that there is always a plan. The first program gets half of the time limit.

        The certificate speaks of the second program: its value and bound hold among plans with these clusters, and
        its text says how far from their targets the clusters are, and have to be. Clusters of other loads may allow
        less traffic: nothing is proven about the two together.

        Raises:
            InputError: an unknown backend or program2, or a tolerance outside [0, 1).
            UnsupportedError: no transitions, or too large a program. SolveError: no placement in time (without
                warm_start).
        """
        check_backend(backend)
        check_method(program2)
        if not (math.isfinite(tolerance) and 0.0 <= tolerance < 1.0):
            raise InputError(f"tolerance ({tolerance}) must be at least 0 and below 1 (0.025 stops within 2.5 %)")
        transitions, load = problem.statistics.total_transitions, problem.statistics.total_load
        clusters = _clusters(problem, load, budget, backend, tolerance, warm_start)
        cluster_of = np.stack([layer.cluster_of for layer in clusters])
        task = _task(problem, transitions, cluster_of)
        mapped = map_clusters(
            task, budget, method=program2, backend=backend, tolerance=tolerance, warm_start=warm_start
        )
        budget.report(mapped.seconds, mapped.bound)
        device_of = np.take_along_axis(mapped.device_of, cluster_of, axis=1)
        finished = mapped.finished and all(layer.finished for layer in clusters)
        return Solution(
            fill_slots(device_of),
            Certificate(_objective(clusters, float(load.sum())), mapped.seconds, mapped.bound),
            stop="finished" if finished else "time limit",
        )


def _clusters(
    problem: Problem, load: FloatArray, budget: Budget, backend: str, tolerance: float, warm_start: bool
) -> list[LayerClusters]:
    """The first program, layer by layer; each takes an even part of what the first half of the budget has left."""
    sizes = problem.slots_per_device
    compute = np.where(sizes > 0, problem.topology.compute, 0.0)
    half = None if budget.left is None else budget.elapsed + budget.left / 2
    clusters = []
    for layer, name in enumerate(problem.model.moe_layers):
        budget.report(None, None, f"clustering the experts of layer {name}")
        clusters.append(
            cluster_layer(
                load[layer],
                sizes,
                load[layer].sum() * compute / compute.sum(),
                budget,
                backend=backend,
                tolerance=tolerance,
                seconds=None if half is None else max(0.0, half - budget.elapsed) / (len(load) - layer),
                warm_start=warm_start,
            )
        )
    return clusters


def _task(problem: Problem, transitions: FloatArray, cluster_of: IntArray) -> MappingTask:
    """The second program's traffic, in bytes of a million tokens."""
    topology, devices = problem.topology, problem.num_devices
    member = np.zeros((*cluster_of.shape, devices))
    np.put_along_axis(member, cluster_of[:, :, None], 1.0, axis=2)
    tokens = float(transitions.sum(axis=(1, 2)).max(initial=0.0)) / problem.model.top_k
    scale = 1e6 * dispatch_bytes(problem.model, problem.objective) / tokens if tokens > 0 else 0.0
    same = list(zip(problem.slots_per_device.tolist(), topology.compute.tolist(), strict=True))
    kinds = np.array([same.index(kind) for kind in same], dtype=np.int64)
    return MappingTask(
        traffic=scale * np.einsum("lic,lij,ljd->lcd", member[:-1], transitions, member[1:], optimize=True),
        cost=pair_cost(topology),
        kinds=kinds,
        nodes=topology.node_of if topology.is_uniform and not kinds.any() else None,
    )


def _objective(clusters: list[LayerClusters], load: float) -> str:
    misses, bound = (
        sum(values) / load if load else 0.0 for values in zip(*((c.deviation, c.bound) for c in clusters), strict=True)
    )
    return (
        "largest device-pair transfer, summed over layers, seconds per million tokens, given these clusters "
        f"(their loads miss even targets by {misses:.3%} of all load, any clusters by {bound:.3%} or more)"
    )
