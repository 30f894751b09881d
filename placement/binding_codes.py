"""Which term of the cost model a layer waits for, as one small number a step, layer and phase.

Compute: device g doing arithmetic is g, reading weights G + g. Transfers: the links of device g inside its node are g,
those of node n are G + n; latency, where it is longer than what the busiest link takes, is -1; nothing to wait for -2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .cost import Flows
from .model import ModelSpec
from .topology import Topology

CodeArray = npt.NDArray[np.int16]
FloatArray = npt.NDArray[np.float64]

LATENCY, NOTHING = -1, -2
"""No link: latency alone, or a phase that does not take place."""


def compute_binding(tokens: FloatArray, seconds: FloatArray, model: ModelSpec, topology: Topology) -> CodeArray:
    """[...] codes of the slowest device and its slower term. tokens: [..., G] pairs; seconds: [..., G] of both terms."""
    slowest = seconds.argmax(axis=-1)
    worked = np.take_along_axis(tokens, slowest[..., None], axis=-1)[..., 0]
    arithmetic = worked * model.flops_per_token / topology.compute[slowest]
    reads = arithmetic < np.take_along_axis(seconds, slowest[..., None], axis=-1)[..., 0]
    return np.asarray(slowest + np.where(reads, seconds.shape[-1], 0), dtype=np.int16)


def transfer_binding(flows: Flows, bytes_per_copy: float, topology: Topology, latency: float) -> CodeArray:
    """[...] codes of the busiest link, or of latency."""
    links = np.concatenate([flows.intra / topology.intra_bandwidth, flows.inter / topology.inter_bandwidth], axis=-1)
    waits = links.max(axis=-1) * bytes_per_copy < latency
    busy = np.where(links.max(axis=-1) > 0, links.argmax(axis=-1), NOTHING)
    return np.asarray(np.where(waits, LATENCY, busy), dtype=np.int16)
