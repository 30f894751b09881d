"""Who sends how much to whom: the traffic matrix behind the link totals of `flows`.

H indexes the sending device, G the receiving one, N nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .._types import FloatArray, IntArray
from .cost import combine_bytes, dispatch_bytes
from .model import ModelSpec
from .objective import Objective
from .plan import Plan
from .replay import nearest_counts
from .steps import Steps
from .topology import Topology

ShareArray = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Traffic:
    """Expected copies of activations a step from each device (row) to each other (column), over all layers.

    dispatch: [G, G] copies to experts. combine: [G, G] copies of outputs back, None where nothing returns. The
    diagonals are zero. With node de-duplication a copy for another node counts once into the node and again where it
    is fanned out, as it travels.
    """

    dispatch: FloatArray
    combine: FloatArray | None

    def bytes_between(self, model: ModelSpec, objective: Objective) -> FloatArray:
        """[G, G] bytes a step, both ways of the exchange together."""
        total = self.dispatch * dispatch_bytes(model, objective)
        return total if self.combine is None else total + self.combine * combine_bytes(model, objective)


def device_traffic(plan: Plan, steps: Steps, topology: Topology, objective: Objective) -> Traffic:
    """Traffic of a plan, mean over the steps. Its row and column sums are the flows that `evaluate` prices."""
    share = plan.device_share.astype(np.float32)
    nodes = np.eye(topology.num_nodes, dtype=np.float32)[topology.node_of]
    coherent = objective.execution == "context_coherent"
    out, back = _Pairs.none(topology), _Pairs.none(topology)
    for start, ids in _blocks(steps):
        source = None if steps.source is None else steps.source[start : start + len(ids)]
        if objective.replica_choice == "nearest":
            bounds = np.array([0, len(ids)])
            counts = nearest_counts(plan, ids.transpose(1, 0, 2), bounds, source, topology)
            out += _Pairs(counts.pairs.sum(axis=(0, 1)), counts.node_pairs.sum(axis=(0, 1)))
            continue
        home = holder = _homes(source, len(ids), topology)
        for layer in range(steps.num_layers):
            share_EG = share[layer]
            out += _pairs(holder if coherent else home, ids[:, layer], share_EG, nodes)
            if coherent:
                holder = share_EG[ids[:, layer, 0]]
                if steps.top_k > 1:
                    back += _pairs(holder, ids[:, layer, 1:], share_EG, nodes)
    dispatch = _routes(out, topology, objective.node_dedup) / steps.num_steps
    if not coherent:
        return Traffic(dispatch, dispatch.T)
    if steps.top_k == 1:
        return Traffic(dispatch, None)
    return Traffic(dispatch, _routes(back, topology, objective.node_dedup).T / steps.num_steps)


@dataclass(frozen=True)
class _Pairs:
    """Tokens held by one device that must reach another [H, G], or a node [H, N]."""

    devices: FloatArray
    nodes: FloatArray

    @classmethod
    def none(cls, topology: Topology) -> _Pairs:
        devices = topology.num_devices
        return cls(np.zeros((devices, devices)), np.zeros((devices, topology.num_nodes)))

    def __add__(self, other: _Pairs) -> _Pairs:
        return _Pairs(self.devices + other.devices, self.nodes + other.nodes)


def _blocks(steps: Steps, tokens: int = 1 << 16) -> list[tuple[int, npt.NDArray[np.unsignedinteger]]]:
    ids = steps.expert_ids
    return [(start, ids[start : start + tokens]) for start in range(0, len(ids), tokens)]


def _homes(source: IntArray | None, tokens: int, topology: Topology) -> ShareArray:
    """[T, H] where tokens are before the first layer: their source rank, or every device evenly."""
    devices = topology.num_devices
    if source is None:
        return np.full((tokens, devices), 1.0 / devices, dtype=np.float32)
    return np.eye(devices, dtype=np.float32)[source]


def _pairs(holder: ShareArray, ids: npt.NDArray[np.unsignedinteger], share: ShareArray, nodes: ShareArray) -> _Pairs:
    """Tokens of holders [T, H] that need a device or node for any of their experts [T, k]; share: [E, G]."""
    return _Pairs(*(_meeting(holder, _hit(ids, where)) for where in (share, share @ nodes)))


def _hit(ids: npt.NDArray[np.unsignedinteger], share: ShareArray) -> ShareArray:
    """[T, G] chance that any of the experts is served there."""
    missed = np.ones((len(ids), share.shape[1]), dtype=np.float32)
    for rank in range(ids.shape[1]):
        missed *= np.float32(1.0) - share[ids[:, rank]]
    return np.subtract(np.float32(1.0), missed)


def _meeting(holder: ShareArray, hit: ShareArray) -> FloatArray:
    return np.asarray(holder.T @ hit, dtype=np.float64)


def _routes(pairs: _Pairs, topology: Topology, dedup: bool) -> FloatArray:
    """[H, G] copies as they travel, from who needs what."""
    node_of, size = topology.node_of, topology.node_size
    same_node = node_of[:, None] == node_of[None, :]
    direct = np.where(same_node, pairs.devices, 0.0)
    if dedup:
        entering = np.where(same_node, 0.0, (pairs.nodes / size)[:, node_of])
        arriving = np.where(same_node, 0.0, pairs.devices).sum(axis=0) / size[node_of]
        result = direct + entering + np.where(same_node, arriving[None, :], 0.0)
    else:
        result = np.array(pairs.devices)
    np.fill_diagonal(result, 0.0)
    return result
