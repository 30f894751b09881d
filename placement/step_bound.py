"""A lower bound of the predicted step time that holds for every placement, replicas and shares of a problem.

Term by term, each by an argument that no placement escapes: the slowest device does at least its part of the work, some
device carries what packing experts into slots forces on it, every expert that is hit is read somewhere, and k experts
stand on at least as many devices (nodes) as it takes to hold k slots, so that copies must travel; and few experts can
stand in every token's home node.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .cost import all_to_all_latency, combine_bytes, dispatch_bytes
from .home_bound import least_leaving
from .layer_slots import alike_layers
from .load_bound import least_layer_load
from .problem import Problem
from .steps import Steps

FloatArray = npt.NDArray[np.float64]


def step_seconds_bound(steps: Steps, problem: Problem) -> FloatArray:
    """[S] seconds below which no plan for `problem` can bring each step."""
    return np.asarray(layer_seconds_bound(steps, problem).sum(axis=1))


def layer_seconds_bound(steps: Steps, problem: Problem) -> FloatArray:
    """[S, L] the part of `step_seconds_bound` of each layer."""
    tokens = steps.tokens.astype(np.float64)
    transfers = np.empty((steps.num_steps, problem.model.layers))
    for slots, layers in alike_layers(problem.layer_slots):
        found = _transfer_bound(tokens, slots, problem, homes_known=steps.source is not None)
        transfers[:, layers] = found[:, None]
    compute = compute_bound(steps.loads().astype(np.float64), problem)
    return np.asarray(compute + np.maximum(transfers, _leaving_bound(steps, problem)))


def compute_bound(loads: FloatArray, problem: Problem) -> FloatArray:
    """[S, L] seconds of the slowest device's expert work, from expert loads [S, L, E]."""
    model, topology = problem.model, problem.topology
    flat = loads.reshape(-1, loads.shape[2])
    shared = flat.sum(axis=1) / topology.compute.sum()
    packed = least_layer_load(loads, problem.layer_slots).ravel() / topology.compute.max()
    hit = (flat > 0).sum(axis=1).astype(np.float64)
    read = hit / topology.memory_bandwidth.sum()
    if not problem.has_replicas:
        # Whole experts: some device reads at least the average, rounded up.
        holders = int((problem.slots_per_device > 0).sum())
        read = np.maximum(read, np.ceil(hit / holders) / topology.memory_bandwidth.max())
    seconds = np.maximum(np.maximum(shared, packed) * model.flops_per_token, read * model.bytes_per_expert)
    return np.asarray(seconds.reshape(loads.shape[:2]))


def _transfer_bound(
    tokens: FloatArray, slots: npt.NDArray[np.int64], problem: Problem, homes_known: bool
) -> FloatArray:
    """[S] seconds of all the all-to-alls of one layer with slots [G], from the tokens [S] of a step.

    A token whose home is known may live where one of its experts stands, and one that takes the nearest replica where
    all of them do; else one spread evenly is mostly elsewhere.
    """
    topology, objective, model = problem.topology, problem.objective, problem.model
    latency = all_to_all_latency(topology, objective.node_dedup)
    sizes, devices = topology.node_size, topology.num_devices
    node_slots = np.add.reduceat(slots, np.concatenate([[0], np.cumsum(sizes)[:-1]]))
    reached = fewest_holders(slots, model.top_k)
    nodes_reached = fewest_holders(node_slots, model.top_k)
    bytes_out, bytes_back = dispatch_bytes(model, objective), combine_bytes(model, objective)
    may_meet = homes_known or (objective.replica_choice == "nearest" and problem.has_replicas)
    if objective.execution == "dispatch_combine" and not may_meet:
        away = 1.0 - sizes / devices
        entering = (nodes_reached if objective.node_dedup else reached) * away.min()
        split = sizes if objective.node_dedup else np.full(len(sizes), devices)
        inside = reached * ((sizes - 1) / split).min()
    else:
        entering = float(nodes_reached - 1)
        inside = float(reached - 1) if topology.num_nodes == 1 else 0.0
    ways = 2 if objective.execution == "dispatch_combine" or model.top_k > 1 else 1
    seconds = np.maximum(
        tokens * entering / topology.inter_bandwidth.sum(), tokens * inside / topology.intra_bandwidth.sum()
    )
    carried = bytes_out + (bytes_back if ways == 2 else 0.0)
    return np.asarray(seconds * carried + ways * latency)


def _leaving_bound(steps: Steps, problem: Problem) -> FloatArray:
    """[S, 1 or L] seconds of all the all-to-alls of a layer, from the copies that leave their home."""
    topology, objective, model = problem.topology, problem.objective, problem.model
    if objective.execution == "context_coherent":
        return np.zeros((steps.num_steps, 1))
    links = topology.inter_bandwidth if topology.num_nodes > 1 else topology.intra_bandwidth
    carried = dispatch_bytes(model, objective) + combine_bytes(model, objective)
    latency = all_to_all_latency(topology, objective.node_dedup)
    return np.asarray(least_leaving(steps, problem) / links.sum() * carried + 2 * latency)


def fewest_holders(slots: npt.NDArray[np.int64], experts: int) -> int:
    """The least number of holders (devices or nodes) whose slots can take that many experts."""
    most = np.cumsum(np.sort(slots)[::-1])
    return int(np.searchsorted(most, experts) + 1)
