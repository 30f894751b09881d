"""Seconds from counts: the cost model's arithmetic, on arrays with any leading axes (steps, layers).

    compute_g  = max(tokens_g * flops_per_token / rate_g,  experts_hit_g * bytes_per_expert / memory_bandwidth_g)
    transfer   = latency + max(max_n inter_n / inter_bandwidth_n,  max_g intra_g / intra_bandwidth_g)
    layer time = dispatch transfer + max_g compute_g + combine transfer

inter_n and intra_g are the larger of bytes sent and bytes received. Prefill is bound by tokens, small-batch decode by
the distinct experts whose weights must be read: both terms are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .model import DTYPE_BYTES, ModelSpec
from .objective import Objective
from .topology import Topology

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Flows:
    """Copies of token activations that cross links, as the larger of sent and received.

    intra: [..., G] copies over each device's links inside its node. inter: [..., N] over each node's links.
    """

    intra: FloatArray
    inter: FloatArray


def compute_seconds(tokens: FloatArray, experts_hit: FloatArray, model: ModelSpec, topology: Topology) -> FloatArray:
    """[..., G] seconds of expert work. tokens: [..., G] token-expert pairs; experts_hit: [..., G] weights to read."""
    arithmetic = tokens * (model.flops_per_token / topology.compute)
    reading = experts_hit * (model.bytes_per_expert / topology.memory_bandwidth)
    return np.asarray(np.maximum(arithmetic, reading))


def transfer_seconds(flows: Flows, bytes_per_copy: float, topology: Topology, latency: float) -> FloatArray:
    """[...] seconds of one all-to-all: latency and the slower of its busiest node link and busiest device link."""
    intra = (flows.intra / topology.intra_bandwidth).max(axis=-1)
    inter = (flows.inter / topology.inter_bandwidth).max(axis=-1)
    return np.asarray(latency + bytes_per_copy * np.maximum(intra, inter))


def all_to_all_latency(topology: Topology, node_dedup: bool) -> float:
    """Seconds an all-to-all takes for its messages alone: one to every peer in the node, and one to every other
    node (or to every device of other nodes when copies are not merged by node). Zero on a single device."""
    if topology.num_devices == 1:
        return 0.0
    largest = int(topology.node_size.max())
    remote = topology.num_nodes - 1 if node_dedup else topology.num_devices - largest
    return topology.intra_latency * (largest - 1) + topology.inter_latency * remote


def dispatch_bytes(model: ModelSpec, objective: Objective) -> float:
    """Bytes of one token's activation on its way to an expert."""
    return model.hidden_size * DTYPE_BYTES[objective.dispatch_dtype]


def combine_bytes(model: ModelSpec, objective: Objective) -> float:
    """Bytes of one expert output on its way back."""
    return model.hidden_size * DTYPE_BYTES[objective.combine_dtype]
