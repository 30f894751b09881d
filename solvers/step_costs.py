"""Mean predicted seconds of many placements of a layer at once, exactly as replaying the steps gives them.

What a device costs depends on the set of experts it holds, and few sets make up many placements: tokens are counted
once a set, then looked up. Shapes: S steps, T tokens, R placements, M distinct sets, E experts, G (H) devices, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..placement.cost import (
    Flows,
    all_to_all_latency,
    combine_bytes,
    compute_seconds,
    dispatch_bytes,
    transfer_seconds,
)
from ..placement.flows import flows_between, flows_from_even_sources
from ..placement.problem import Problem
from ..placement.steps import Steps
from .placements import PlacementSpace, device_sets

if TYPE_CHECKING:
    from .step_pairs import SetTraffic

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
SetArray = npt.NDArray[np.bool_]

BLOCK_VALUES = 1 << 19
"""Floats a working array may hold: small enough for the cache, large enough to keep the interpreter out of the way."""


class StepCosts:
    """Prices the placements of a layer, up to renaming, and their neighbourhood, on steps."""

    def __init__(self, problem: Problem, steps: Steps, space: PlacementSpace) -> None:
        self._steps, self._model = steps, problem.model
        self._topology, self._objective = problem.topology, problem.objective
        self._latency = all_to_all_latency(problem.topology, problem.objective.node_dedup)
        self._load = steps.loads().astype(np.float64)
        starts = np.concatenate([[0], np.cumsum(problem.topology.node_size)[:-1]])
        self._held = device_sets(space.representatives, problem.num_devices)
        self._relabellings = space.relabellings
        self._sets, self._set_of = _distinct(self._held)
        node_held = np.logical_or.reduceat(self._held, starts, axis=1)
        self._node_sets, self._node_set_of = _distinct(node_held)
        self._all_sets, self._all_set_of = _distinct(np.concatenate([self._held, node_held], axis=1))

    @property
    def coherent(self) -> bool:
        return self._objective.execution == "context_coherent"

    def unary(self, layer: int) -> FloatArray:
        """[R] seconds of the layer that depend on its own placement alone: with combine where tokens return to their
        home, without the dispatch from the layer before where they do not."""
        ids, load = self._steps.expert_ids[:, layer], self._load[:, layer]
        sets = self._sets.T.astype(np.float64)
        tokens, touched = load @ sets, (load > 0) @ sets
        from_home = not self.coherent or layer == 0
        home = self._home_tables(ids) if from_home else None
        result = np.empty(len(self._held))
        for block in self._blocks():
            of = self._set_of[block]
            seconds = compute_seconds(tokens[:, of], touched[:, of], self._model, self._topology).max(axis=-1)
            if home is not None:
                flows = self._home_flows(*home, block)
                seconds += self._dispatched(flows)
                if not self.coherent:
                    seconds += self._combined(flows)
            result[block] = seconds.mean(axis=0)
        if self.coherent and self._steps.top_k > 1:
            # Outputs of a token's other experts, to its owner. A link's larger direction is the same both ways.
            back = combine_bytes(self._model, self._objective) / dispatch_bytes(self._model, self._objective)
            result += self._latency + back * self._traffic.within(self._owned(ids[:, 0], ids[:, 1:]))
        return result

    def cheapest_before(self, layer: int, reached: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        """For each placement [R] of layer + 1, the least of reached[a] [R] plus the seconds of the dispatch from the owners
        of the layer before under placement a, over all a and renamings: (that least, a, the renaming)."""
        before, after = self._steps.expert_ids[:, layer], self._steps.expert_ids[:, layer + 1]
        least, state, name = self._traffic.cheapest_before(reached, self._owned(before[:, 0], after))
        return least + self._latency, state, name

    def _home_tables(self, ids: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray]:
        """Tokens that need a device or a node holding the set: [S, M], or [S, H, M] by home where homes are known."""
        homes, devices = self._steps.source, self._held.shape[1]
        if homes is None:
            return (
                self._count(None, 1, ids, self._sets)[:, 0],
                self._count(None, 1, ids, self._node_sets)[:, 0],
            )
        return self._count(homes, devices, ids, self._sets), self._count(homes, devices, ids, self._node_sets)

    def _home_flows(self, reached: FloatArray, node_reached: FloatArray, block: slice) -> Flows:
        of, node_of = self._set_of[block], self._node_set_of[block]
        if self._steps.source is None:
            return flows_from_even_sources(
                reached[:, of], node_reached[:, node_of], self._topology, self._objective.node_dedup
            )
        return self._between(reached[:, :, of].transpose(0, 2, 1, 3), node_reached[:, :, node_of].transpose(0, 2, 1, 3))

    @cached_property
    def _traffic(self) -> SetTraffic:
        # Compiled kernels: loading them takes a second, which solvers of other problems do without.
        from .step_pairs import Links, SetTraffic

        topology, out = self._topology, dispatch_bytes(self._model, self._objective)
        first = np.concatenate([[0], np.cumsum(topology.node_size)])
        dedup = self._objective.node_dedup
        links = Links(out / topology.intra_bandwidth, out / topology.inter_bandwidth, topology.node_of, first, dedup)
        set_of, node_set_of = np.split(self._all_set_of, [topology.num_devices], axis=1)
        return SetTraffic(set_of, node_set_of, self._all_sets, self._relabellings, links)

    def _owned(self, first: npt.NDArray[Any], ids: npt.NDArray[Any]) -> FloatArray:
        """[S, E, M] tokens by their highest-weight expert `first` [T] that also chose, in `ids`, one of each set."""
        return self._count(first, self._steps.num_experts, ids, self._all_sets)

    def _count(self, key: npt.NDArray[Any] | None, keys: int, ids: npt.NDArray[Any], sets: SetArray) -> FloatArray:
        """[S, K, M] tokens of each step and key that chose an expert of the set. ids: [T, k]; sets: [M, E]."""
        chosen = np.zeros((len(ids), sets.shape[1]), dtype=np.float32)
        np.put_along_axis(chosen, ids.astype(np.int64), np.float32(1), axis=1)
        keyed = np.ones((len(ids), 1), np.float32) if key is None else np.eye(keys, dtype=np.float32)[key]
        members = sets.T.astype(np.float32)
        result = np.empty((self._steps.num_steps, keys, len(sets)))
        for s, (start, end) in enumerate(zip(self._steps.offsets[:-1], self._steps.offsets[1:], strict=True)):
            hit = (chosen[start:end] @ members > 0).astype(np.float32)
            result[s] = keyed[start:end].T @ hit
        return result

    def _between(self, pairs: FloatArray, node_pairs: FloatArray) -> Flows:
        return flows_between(pairs, node_pairs, self._topology, self._objective.node_dedup)

    def _dispatched(self, flows: Flows) -> FloatArray:
        return transfer_seconds(flows, dispatch_bytes(self._model, self._objective), self._topology, self._latency)

    def _combined(self, flows: Flows) -> FloatArray:
        return transfer_seconds(flows, combine_bytes(self._model, self._objective), self._topology, self._latency)

    def _blocks(self) -> Iterator[slice]:
        devices = self._held.shape[1]
        width = max(1, BLOCK_VALUES // (self._steps.num_steps * devices * devices))
        for first in range(0, len(self._held), width):
            yield slice(first, first + width)


def _distinct(sets: SetArray) -> tuple[SetArray, IntArray]:
    """The distinct sets [M, E] among [R, X, E], and which of them each is [R, X]."""
    flat = sets.reshape(-1, sets.shape[2])
    _, first, inverse = np.unique(np.packbits(flat, axis=1), axis=0, return_index=True, return_inverse=True)
    return flat[first], inverse.reshape(sets.shape[:2]).astype(np.int64)
