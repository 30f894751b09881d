"""Copies that one expert alone puts on the links of its device, whatever stands where.

The tokens that chose an expert must reach its device: the busiest device receives at least those of the most chosen expert,
less the ones that may be there already. With one expert a device that is all there is to know.
"""

from __future__ import annotations

import numpy as np

from ..._types import FloatArray, IntArray
from ...placement.problem import Problem
from ...placement.steps import Steps


def link_floors(problem: Problem, steps: Steps, loads: FloatArray) -> tuple[FloatArray, FloatArray]:
    """([S, L], [S, L]) seconds a byte that dispatch and combine take at least, latency left out.

    loads: [S, L, E] tokens of each expert. Zeros where nothing can be said: with replicas, whose tokens are split.
    """
    topology, objective = problem.topology, problem.objective
    sizes, nodes = topology.node_size, topology.num_nodes
    smallest, fastest = float(sizes.min()), float(topology.intra_bandwidth.max())
    nothing = np.zeros(loads.shape[:2])
    if problem.has_replicas or topology.num_devices == 1:
        return nothing, nothing
    # A copy from another node is fanned out inside from a device chosen evenly; unmerged ones come by other links.
    passing = (smallest - 1.0) / smallest
    spread = passing if objective.node_dedup else (smallest - 1.0) / topology.num_devices
    at_home = loads.max(axis=2) * (spread / fastest) if steps.source is None else nothing
    if objective.execution == "dispatch_combine":
        return at_home, at_home
    rate = (1.0 if nodes == 1 else passing if objective.node_dedup else 0.0) / fastest
    most = int(problem.slots_per_device.max())
    dispatch, combine = nothing.copy(), nothing.copy()
    for s, block in enumerate(steps.blocks()):
        ids = block.astype(np.int64)
        for layer in range(ids.shape[1]):
            if layer > 0:
                met = _met(ids[:, layer - 1, 0], ids[:, layer], loads.shape[2])
                dispatch[s, layer] = _busiest(met, most, most, alone=most == 1 and nodes == 1)
            if ids.shape[2] > 1:
                met = _met(ids[:, layer, 0], ids[:, layer, 1:], loads.shape[2])
                combine[s, layer] = _busiest(met, most - 1, 0, alone=most == 1 and nodes == 1)
    dispatch, combine = dispatch * rate, combine * rate
    dispatch[:, 0] = at_home[:, 0]
    return dispatch, combine


def _met(owner: IntArray, chosen: IntArray, experts: int) -> IntArray:
    """[E, E] tokens by the expert that leads them and each expert chosen [T, j]."""
    pairs = owner[:, None] * experts + chosen
    return np.bincount(pairs.ravel(), minlength=experts * experts).reshape(experts, experts)


def _busiest(met: IntArray, beside: int, own: int, alone: bool) -> float:
    """Copies received by the device of some expert, when the leads of `beside` experts may stand there.

    alone: one expert a device on one node, where an owner's device also sends one copy for each expert chosen, those of
    `own` experts aside that may stand beside it.
    """
    experts = len(met)
    there = np.sort(met, axis=0)[experts - beside :].sum(axis=0)
    busiest = float((met.sum(axis=0) - there).max())
    if alone:
        spared = np.sort(met, axis=1)[:, experts - own :].sum(axis=1)
        busiest = max(busiest, float((met.sum(axis=1) - spared).max()))
    return busiest
