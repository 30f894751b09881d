"""Copies that cross links, from who holds tokens and which devices they must reach.

H indexes the device a token comes from, G the device it must reach, N nodes. Between nodes one copy a (token, node)
travels when `dedup`, and lands on a device of the node chosen evenly, which fans it out inside (as DeepEP does).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .cost import Flows
from .topology import Topology

FloatArray = npt.NDArray[np.float64]


def flows_from_even_sources(reached: FloatArray, node_reached: FloatArray, topology: Topology, dedup: bool) -> Flows:
    """Flows when tokens' homes are spread evenly over all devices.

    reached: [..., G] tokens that must reach each device. node_reached: [..., N] tokens that must reach each node.
    """
    size, node_of, devices = topology.node_size, topology.node_of, topology.num_devices
    in_node = _sum_nodes(reached, topology)
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
    """Flows from a traffic matrix.

    pairs: [..., H, G] tokens held by device h that must reach device g. node_pairs: [..., H, N] tokens held by device
    h that must reach node n.
    """
    node_of, size = topology.node_of, topology.node_size
    same_node = node_of[:, None] == node_of[None, :]
    own = np.eye(topology.num_devices, dtype=bool)
    within = np.where(same_node & ~own, pairs, 0.0)
    intra_sent, intra_received = within.sum(axis=-1), within.sum(axis=-2)
    remote = node_pairs if dedup else _sum_nodes(pairs, topology)
    leaving = np.where(node_of[:, None] == np.arange(topology.num_nodes)[None, :], 0.0, remote)
    sent = _sum_nodes(leaving.sum(axis=-1), topology)
    received = leaving.sum(axis=-2)
    if dedup:
        arriving = np.where(same_node, 0.0, pairs).sum(axis=-2) / size[node_of]
        intra_received = intra_received + arriving * (size[node_of] - 1)
        intra_sent = intra_sent + _sum_nodes(arriving, topology)[..., node_of] - arriving
    return Flows(intra=np.maximum(intra_sent, intra_received), inter=np.maximum(sent, received))


def _sum_nodes(per_device: FloatArray, topology: Topology) -> FloatArray:
    """[..., N] sums over the devices of each node from [..., G]; a node owns a run of devices."""
    starts = np.concatenate([[0], np.cumsum(topology.node_size)[:-1]])
    return np.add.reduceat(per_device, starts, axis=-1)
