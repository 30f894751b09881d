"""A first placement for group-limited routing: whole expert groups on nodes, balanced inside, as tokens choose few
groups and then need few nodes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...placement.problem import Problem
from .starts import balanced_layer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def groups_on_nodes(problem: Problem, load: FloatArray) -> list[IntArray] | None:
    """[P_l] experts of each layer's own slots, for loads [L, E]; None where groups do not fill nodes evenly."""
    groups, nodes = problem.model.groups, problem.topology.num_nodes
    room = problem.layer_slots @ np.eye(nodes, dtype=np.int64)[problem.topology.node_of]
    if nodes == 1 or groups % nodes or room.min() < problem.model.experts // nodes:
        return None
    return [_layer(problem, row, slots, groups // nodes) for row, slots in zip(load, problem.layer_slots, strict=True)]


def _layer(problem: Problem, load: FloatArray, slots: IntArray, groups_a_node: int) -> IntArray:
    groups, nodes = problem.model.groups, problem.topology.num_nodes
    speed = problem.topology.compute / problem.topology.compute.mean()
    weight = load.reshape(groups, -1).sum(axis=1)
    node_of_group = np.full(groups, -1)
    carried, filled = np.zeros(nodes), np.zeros(nodes, dtype=np.int64)
    for group in np.argsort(-weight, kind="stable"):
        node = int(np.argmin(np.where(filled < groups_a_node, carried, np.inf)))
        node_of_group[group] = node
        carried[node] += weight[group]
        filled[node] += 1
    node_of_expert = np.repeat(node_of_group, len(load) // groups)
    slot_device = np.repeat(np.arange(len(slots)), slots)
    table = np.empty(len(slot_device), dtype=np.int64)
    for node in range(nodes):
        mine, devices = np.flatnonzero(node_of_expert == node), np.flatnonzero(problem.topology.node_of == node)
        everywhere = np.ones((len(mine), len(devices)), dtype=bool)
        inside = balanced_layer(load[mine], slots[devices], speed[devices], everywhere)
        table[np.isin(slot_device, devices)] = mine[inside]
    return table
