"""Mean predicted seconds of many placements of a layer at once, exactly as replaying the steps gives them.

What a device costs depends on the set of experts it holds, and few sets make up many placements: tokens are counted
once a set, then looked up. Shapes: S steps, T tokens, R placements, M distinct sets, E experts, G (H) devices, N nodes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._types import BoolArray, FloatArray, IntArray
from ..placement.cost import (
    Flows,
    TransferCost,
    Transfers,
    compute_seconds,
    flows_between,
    flows_from_even_sources,
)
from ..placement.problem import Problem
from ..placement.steps import Steps

if TYPE_CHECKING:
    from .set_traffic import SetTraffic

BLOCK_VALUES = 1 << 19
"""Floats a working array may hold: small enough for the cache, large enough to keep the interpreter out of the way."""


@dataclass(frozen=True)
class PlacementSpace:
    """The placements of E experts on devices with `slots` [G] slots, E in all, one expert a slot.

    kind: what tells devices apart, one entry a device: two may be swapped throughout when slots and kind agree.
    """

    slots: tuple[int, ...]
    kind: tuple[Hashable, ...]

    @property
    def count(self) -> int:
        """How many placements there are, devices told apart: a multinomial coefficient."""
        left, result = sum(self.slots), 1
        for size in self.slots:
            result *= math.comb(left, size)
            left -= size
        return result

    @property
    def count_representatives(self) -> int:
        # A device that may be renamed is not empty, so that renaming never leaves a placement as it was.
        return self.count // math.prod(math.factorial(len(alike)) for alike in self._alike)

    @cached_property
    def _alike(self) -> list[list[int]]:
        """Devices in classes of interchangeable ones; an empty device stands alone."""
        classes: dict[Hashable, list[int]] = {}
        for device, (size, kind) in enumerate(zip(self.slots, self.kind, strict=True)):
            classes.setdefault((size, kind) if size else ("empty", device), []).append(device)
        return list(classes.values())

    @cached_property
    def renamings(self) -> IntArray:
        """[H, G] renamings[h, g] is the device that device g becomes; the first changes nothing."""
        result = []
        for images in itertools.product(*(itertools.permutations(alike) for alike in self._alike)):
            row = np.empty(len(self.slots), dtype=np.int64)
            for alike, image in zip(self._alike, images, strict=True):
                row[alike] = image
            result.append(row)
        return np.array(result)

    @cached_property
    def representatives(self) -> IntArray:
        """[R, E] device of each expert, one placement of those that renaming turns into each other.

        It is the one whose interchangeable devices stand in the order of their first experts.
        """
        opens_after = np.full(len(self.slots), -1)
        for alike in self._alike:
            opens_after[alike[1:]] = alike[:-1]
        full = np.array(self.slots)
        free = full[None].astype(np.int16)
        placed = np.empty((1, 0), dtype=np.int16)
        for _ in range(sum(self.slots)):
            opened = (opens_after < 0) | (free[:, opens_after] < full[opens_after])
            parent, device = np.nonzero((free > 0) & opened)
            placed = np.column_stack([placed[parent], device.astype(np.int16)])
            free = free[parent]
            free[np.arange(len(free)), device] -= 1
        return placed.astype(np.int64)


def device_sets(device_of: IntArray, devices: int) -> BoolArray:
    """[R, G, E] which experts stand on each device, from [R, E] the device of each expert."""
    return np.asarray(device_of[:, None, :] == np.arange(devices)[:, None])


class StepCosts:
    """Prices the placements of a layer, up to renaming, and their neighbourhood, on steps."""

    def __init__(self, problem: Problem, steps: Steps, space: PlacementSpace) -> None:
        self._steps, self._model, self._weight = steps, problem.model, steps.step_weight
        self._topology, self._objective = problem.topology, problem.objective
        transfers = Transfers.of(problem.model, problem.topology, problem.objective)
        self._transfers, self._waits = transfers.of_steps(steps), transfers.waits(steps)
        self._load = steps.loads().astype(np.float64)
        self._on_device = device_sets(space.representatives, problem.num_devices)
        self._renamings = space.renamings
        self._sets, self._set_of = _distinct(self._on_device)
        on_node = np.logical_or.reduceat(self._on_device, problem.topology.node_start, axis=1)
        self._node_sets, self._node_set_of = _distinct(on_node)
        self._all_sets, self._all_set_of = _distinct(np.concatenate([self._on_device, on_node], axis=1))

    @property
    def coherent(self) -> bool:
        return self._objective.execution == "context_coherent"

    def unary(self, layer: int) -> FloatArray:
        """[R] seconds of the layer that depend on its own placement alone.

        With combine where tokens return to their source rank, without the dispatch from the layer before where they do
        not.
        """
        ids, load = self._steps.expert_ids[:, layer], self._load[:, layer]
        sets = self._sets.T.astype(np.float64)
        tokens, touched = load @ sets, (load > 0) @ sets
        from_source = not self.coherent or layer == 0
        reached = [self._source_tables(ids, transfer.pairs) for transfer, _ in self._transfers] if from_source else None
        result = np.empty(len(self._on_device))
        for block in self._blocks():
            of = self._set_of[block]
            seconds = compute_seconds(tokens[:, of], touched[:, of], self._model, self._topology).max(axis=-1)
            if reached is not None:
                seconds += self._from_sources(reached, block)
            result[block] = self._weight @ seconds
        if self.coherent and self._steps.top_k > 1:
            # Outputs of a token's other experts, to its owner. A link's larger direction is the same both ways.
            back = self._links.back * self._traffic.within(self._owned(ids[:, 0], ids[:, 1:]))
            result += self._links.fixed[1] + back
        return result

    def cheapest_before(self, layer: int, reached: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        """The cheapest way to each placement of layer + 1 from those of `layer`, whose cost is reached [R].

        Returns:
            ([R] the least of reached[a] plus the seconds of the dispatch from the owners under placement a, over all a
            and renamings; [R] that a; [R] the renaming).
        """
        before, after = self._steps.expert_ids[:, layer], self._steps.expert_ids[:, layer + 1]
        least, state, name = self._traffic.cheapest_before(reached, self._owned(before[:, 0], after))
        return least + self._links.fixed[0], state, name

    @property
    def _links(self) -> TransferCost:
        """Where tokens stay with their experts all steps' transfers are of one kind."""
        return self._transfers[0][0]

    def _from_sources(self, reached: list[tuple[FloatArray, FloatArray]], block: slice) -> FloatArray:
        """[S, B] seconds of what goes out from tokens' source ranks, and returns there unless they stay."""
        out, back = self._waits
        result = np.zeros((self._steps.num_steps, len(self._set_of[block])))
        result += (out if self.coherent else out + back)[:, None]
        for (transfer, of_kind), tables in zip(self._transfers, reached, strict=True):
            busiest = transfer.links(self._source_flows(*tables, block, transfer.dedup)).max(axis=-1)
            seconds = busiest * (1.0 if self.coherent else 1.0 + transfer.back)
            result += np.where(of_kind[:, None], seconds, 0.0)
        return result

    def _source_tables(self, ids: npt.NDArray[Any], pairs: bool) -> tuple[FloatArray, FloatArray]:
        """Tokens, or `pairs` of them and their experts, for a device or a node holding the set: [S, M], or [S, G, M] by
        source rank where that is known."""
        source, devices = self._steps.source, self._on_device.shape[1]
        if source is None:
            return (
                self._count(None, 1, ids, self._sets, pairs)[:, 0],
                self._count(None, 1, ids, self._node_sets, pairs)[:, 0],
            )
        return (
            self._count(source, devices, ids, self._sets, pairs),
            self._count(source, devices, ids, self._node_sets, pairs),
        )

    def _source_flows(self, reached: FloatArray, node_reached: FloatArray, block: slice, dedup: bool) -> Flows:
        of, node_of = self._set_of[block], self._node_set_of[block]
        if self._steps.source is None:
            return flows_from_even_sources(reached[:, of], node_reached[:, node_of], self._topology, dedup)
        pairs = reached[:, :, of].transpose(0, 2, 1, 3)
        return flows_between(pairs, node_reached[:, :, node_of].transpose(0, 2, 1, 3), self._topology, dedup)

    @cached_property
    def _traffic(self) -> SetTraffic:
        # Compiled kernels: loading them takes a second, which solvers of other problems do without.
        from .set_traffic import Links, SetTraffic

        topology, cost = self._topology, self._links
        first = np.concatenate([[0], np.cumsum(topology.node_size)])
        links = Links(cost.per_copy, cost.per_node_copy, topology.node_of, first, cost.dedup)
        set_of, node_set_of = np.split(self._all_set_of, [topology.num_devices], axis=1)
        return SetTraffic(set_of, node_set_of, self._all_sets, self._renamings, links)

    def _owned(self, first: npt.NDArray[Any], ids: npt.NDArray[Any]) -> FloatArray:
        """[S, E, M] tokens by their highest-weight expert `first` [T] that also chose, in `ids`, one of each set, times
        what a step counts beside the mean one: seconds on links are in proportion to tokens."""
        counted = self._count(first, self._steps.num_experts, ids, self._all_sets)
        return counted * (self._weight * self._steps.num_steps)[:, None, None]

    def _count(
        self, key: npt.NDArray[Any] | None, keys: int, ids: npt.NDArray[Any], sets: BoolArray, pairs: bool = False
    ) -> FloatArray:
        """[S, K, M] tokens of each step and key that chose an expert of the set, or `pairs` of them and such experts.

        ids: [T, k]; sets: [M, E].
        """
        chosen = np.zeros((len(ids), sets.shape[1]), dtype=np.float32)
        np.put_along_axis(chosen, ids.astype(np.int64), np.float32(1), axis=1)
        keyed = np.ones((len(ids), 1), np.float32) if key is None else np.eye(keys, dtype=np.float32)[key]
        members = sets.T.astype(np.float32)
        result = np.empty((self._steps.num_steps, keys, len(sets)))
        for s, (start, end) in enumerate(zip(self._steps.offsets[:-1], self._steps.offsets[1:], strict=True)):
            counted = chosen[start:end] @ members
            hit = counted if pairs else (counted > 0).astype(np.float32)
            result[s] = keyed[start:end].T @ hit
        return result

    def _blocks(self) -> Iterator[slice]:
        devices = self._on_device.shape[1]
        width = max(1, BLOCK_VALUES // (self._steps.num_steps * devices * devices))
        for first in range(0, len(self._on_device), width):
            yield slice(first, first + width)


def _distinct(sets: BoolArray) -> tuple[BoolArray, IntArray]:
    """The distinct sets [M, E] among [R, X, E], and which of them each is [R, X]."""
    flat = sets.reshape(-1, sets.shape[2])
    _, first, inverse = np.unique(np.packbits(flat, axis=1), axis=0, return_index=True, return_inverse=True)
    return flat[first], inverse.reshape(sets.shape[:2]).astype(np.int64)
