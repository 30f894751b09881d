"""A first placement of one layer for engines that take the nearest replica: the hottest experts in every node."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .starts import balanced_layer

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def near_layer(load: FloatArray, slots_per_device: IntArray, speed: FloatArray, node_of: IntArray) -> IntArray:
    """[P] expert of each slot (slots ordered by device), no expert twice on a device.

    load: [E]. speed: [G] relative compute rates. node_of: [G], every node a run of devices. Spare slots give the
    hottest experts a replica in each node; each node is then balanced by itself.

    Raises:
        SolveError: slots so many that dealing a node's experts to its devices ends in a corner.
    """
    node_slots = np.bincount(node_of, weights=slots_per_device).astype(np.int64)
    node_speed = np.bincount(node_of, weights=speed).astype(np.float64)
    held = _experts_of_nodes(load, node_slots, node_speed)
    part = load / held.sum(axis=0)
    tables = []
    for node, mask in enumerate(held):
        experts, devices = np.flatnonzero(mask), node_of == node
        anywhere = np.ones((len(experts), int(devices.sum())), dtype=bool)
        local = balanced_layer(part[experts], slots_per_device[devices], speed[devices], anywhere)
        tables.append(experts[local])
    return np.concatenate(tables)


def _experts_of_nodes(load: FloatArray, slots: IntArray, speed: FloatArray) -> BoolArray:
    """[N, E] which experts stand in each node, at most one replica in each; slots, speed: [N]."""
    nodes, experts = len(slots), len(load)
    free = np.minimum(slots, experts)
    hottest = np.argsort(-load, kind="stable")
    replicas = np.ones(experts, dtype=np.int64)
    spare = int(free.sum()) - experts
    full = min(experts, spare // max(1, nodes - 1))
    replicas[hottest[:full]] = nodes
    if full < experts:
        replicas[hottest[full]] += spare - full * (nodes - 1)
    held, loaded = np.zeros((nodes, experts), dtype=bool), np.zeros(nodes)
    for expert in hottest:
        part = load[expert] / replicas[expert]
        order = np.argsort(np.where(free > 0, loaded + part / speed, np.inf), kind="stable")
        chosen = order[: min(int(replicas[expert]), int((free > 0).sum()))]
        held[chosen, expert] = True
        free[chosen] -= 1
        loaded[chosen] += part / speed[chosen]
    for node in np.flatnonzero(free > 0):
        # A smaller node was full before its turn; the hottest experts it lacks take what is left here.
        lacking = hottest[~held[node, hottest]]
        held[node, lacking[: free[node]]] = True
    return held
