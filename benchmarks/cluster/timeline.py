"""When ranks finish a step of MoE layers in dispatch_combine, event after event, as the runtime runs it.

Where `mp.evaluate` adds up the longest of each part, here a rank returns its rows as soon as its own experts are done,
while others still compute; node-aware dispatch takes its two hops one after the other; and replicas serve the tokens
that the runtime has them serve. T tokens of a step, K experts a token, G ranks, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import moeplace as mp
from moeplace.placement.cost import all_to_all_latency, compute_seconds
from moeplace.runtime.moe.experts import ReplicaChoice
from moeplace.runtime.moe.layer_placement import BalancedReplicas, LayerPlacement

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class LayerDemand:
    """One step of one layer. hit: [T, G] tokens that a rank serves. home: [T]. pairs, experts: [G] token-expert pairs
    of a rank, and experts that have any."""

    hit: FloatArray
    home: IntArray
    pairs: FloatArray
    experts: FloatArray


def demands(plan: mp.Plan, steps: mp.Steps, balanced: bool = False) -> list[list[LayerDemand]]:
    """[step][layer], by the runtime's own choice of replicas. Steps must say where tokens live."""
    assert steps.source is not None
    ranks = plan.topology.num_devices
    found: list[list[LayerDemand]] = [[] for _ in range(steps.num_steps)]
    for row, layer in enumerate(plan.moe_layers):
        placement = LayerPlacement.of(plan, layer)
        cpu, counts = torch.device("cpu"), torch.empty(0)
        choices: list[ReplicaChoice | BalancedReplicas] = [
            BalancedReplicas(placement, rank, cpu, lambda mine: counts)  # noqa: B023 (of the step at hand)
            if balanced
            else ReplicaChoice(placement, rank, cpu)
            for rank in range(ranks)
        ]
        for step in range(steps.num_steps):
            span = slice(steps.offsets[step], steps.offsets[step + 1])
            home = steps.source[span]
            ids = torch.from_numpy(steps.expert_ids[span, row].astype(np.int64))
            slot = np.empty(ids.shape, dtype=np.int64)
            cells = (home[:, None] * placement.experts + ids.numpy()).ravel()
            counts = torch.from_numpy(np.bincount(cells, minlength=ranks * placement.experts).reshape(ranks, -1))
            for rank, choice in enumerate(choices):
                mine = np.flatnonzero(home == rank)
                slot[mine] = choice.slots(ids[mine]).numpy()
            device = placement.device[slot]
            hit = np.zeros((len(ids), ranks))
            np.put_along_axis(hit, device, 1.0, axis=1)
            pairs = np.bincount(device.ravel(), minlength=ranks).astype(float)
            experts = np.bincount(placement.device[np.unique(slot)], minlength=ranks).astype(float)
            found[step].append(LayerDemand(hit, home, pairs, experts))
    return found


class Timeline:
    """copy_seconds: what a rank does for a copy beside links, there and back. row_bytes: of a copy, each way."""

    def __init__(self, model: mp.ModelSpec, topology: mp.Topology, copy_seconds: float, row_bytes: float) -> None:
        self._model, self._topology = model, topology
        self._copy_seconds, self._row_bytes = copy_seconds, row_bytes

    def seconds(self, layers: Sequence[LayerDemand], staged: bool) -> float:
        """Of a step. staged: node-aware dispatch on nodes of several ranks."""
        return sum(self._staged(layer) if staged else self._flat(layer) for layer in layers)

    def _flat(self, layer: LayerDemand) -> float:
        ranks = self._topology.num_devices
        copies = np.eye(ranks)[layer.home].T @ layer.hit
        latency = all_to_all_latency(self._topology, node_dedup=False)
        done = latency + self._arrival(copies, np.zeros(ranks)) + self._computed(layer)
        return latency + self._arrival(copies.T, done) + self._handled(copies)

    def _staged(self, layer: LayerDemand) -> float:
        """First to the rank of equal place on each node, then inside; back the same way."""
        topology, node_of = self._topology, self._topology.node_of
        ranks, nodes = topology.num_devices, topology.num_nodes
        size = ranks // nodes
        place = layer.home % size
        between, inside = np.zeros((ranks, ranks)), np.zeros((ranks, ranks))
        for node in range(nodes):
            members = np.flatnonzero(node_of == node)
            hit = layer.hit[:, members]
            arrives = hit.any(axis=1)
            np.add.at(between, (layer.home[arrives], members[place[arrives]]), 1.0)
            inside[np.ix_(members, members)] = np.eye(size)[place].T @ hit
        latency, idle = all_to_all_latency(topology, node_dedup=True), np.zeros(ranks)
        done = latency + self._arrival(between, idle) + self._arrival(inside, idle) + self._computed(layer)
        # On the way back ranks of a node wait for each other first, then those of equal place.
        ready = np.empty(ranks)
        for node in range(nodes):
            own = node_of == node
            ready[own] = self._arrival(np.where(own, inside.T, 0.0), np.where(own, done, 0.0))
        return latency + self._arrival(between.T, ready) + self._handled(between + inside)

    def _computed(self, layer: LayerDemand) -> FloatArray:
        return compute_seconds(layer.pairs, layer.experts, self._model, self._topology)

    def _handled(self, copies: FloatArray) -> float:
        return self._copy_seconds * float(copies.sum()) / self._topology.num_devices

    def _arrival(self, copies: FloatArray, ready: FloatArray) -> float:
        """When the last of copies [from, to] is there, if ranks send as soon as they are ready."""
        topology, node_of = self._topology, self._topology.node_of
        same = node_of[:, None] == node_of
        inner = np.where(same, copies * (1.0 - np.eye(len(ready))), 0.0)
        outer = np.where(same, 0.0, copies)
        rank = np.arange(len(ready))
        last = float(ready.max())
        for device, bandwidth in enumerate(topology.intra_bandwidth):
            for rows in (np.where(rank == device, inner.sum(axis=1), 0.0), inner[:, device]):
                last = max(last, _carried(rows * self._row_bytes / bandwidth, ready))
        for node, bandwidth in enumerate(topology.inter_bandwidth):
            for rows in (np.where(node_of == node, outer.sum(axis=1), 0.0), outer[:, node_of == node].sum(axis=1)):
                last = max(last, _carried(rows * self._row_bytes / bandwidth, ready))
        return last


def _carried(seconds: FloatArray, ready: FloatArray) -> float:
    """When a link that takes rows as they come has carried all of them. seconds, ready: [from]."""
    clock = 0.0
    for rank in np.argsort(ready, kind="stable"):
        if seconds[rank] > 0.0:
            clock = max(clock, float(ready[rank])) + float(seconds[rank])
    return clock
