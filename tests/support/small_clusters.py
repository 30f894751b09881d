"""Small clusters of every shape that a cost depends on."""

from __future__ import annotations

import moeplace as mp

FAST = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e11, "intra_bandwidth": 1e10}
SLOW = {"compute": 4e11, "memory": 1e12, "memory_bandwidth": 7e10, "intra_bandwidth": 3e9}


def topology(kind: str) -> mp.Topology:
    """Small clusters: one node, two even nodes, and nodes of unequal size with unequal devices and links."""
    nodes = {
        "single": [{"devices": [FAST]}],
        "node": [{"devices": [FAST, FAST, FAST]}],
        "even": [{"devices": [FAST, FAST]}, {"devices": [FAST, FAST]}],
        "mixed": [{"devices": [FAST, SLOW, FAST], "inter_bandwidth": 4e8}, {"devices": [SLOW]}],
    }[kind]
    return mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 1e9, **node} for node in nodes]})
