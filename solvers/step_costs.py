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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._types import BoolArray, FloatArray, IntArray
from ..placement.cost import (
    Flows,
    all_to_all_latency,
    combine_bytes,
    compute_seconds,
    dispatch_bytes,
    flows_between,
    flows_from_even_sources,
    transfer_seconds,
)
from ..placement.problem import Problem
from ..placement.steps import Steps
from .jit import kernel

# Every placement of one layer's experts, up to the relabelling of devices that are alike.


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
        # A device that may be relabelled is not empty, so that relabelling never leaves a placement as it was.
        return self.count // math.prod(math.factorial(len(alike)) for alike in self._alike)

    @cached_property
    def _alike(self) -> list[list[int]]:
        """Devices in classes of interchangeable ones; an empty device stands alone."""
        classes: dict[Hashable, list[int]] = {}
        for device, (size, kind) in enumerate(zip(self.slots, self.kind, strict=True)):
            classes.setdefault((size, kind) if size else ("empty", device), []).append(device)
        return list(classes.values())

    @cached_property
    def relabellings(self) -> IntArray:
        """[H, G] relabellings[h, g] is the device that device g becomes; the first changes nothing."""
        result = []
        for images in itertools.product(*(itertools.permutations(alike) for alike in self._alike)):
            row = np.empty(len(self.slots), dtype=np.int64)
            for alike, image in zip(self._alike, images, strict=True):
                row[alike] = image
            result.append(row)
        return np.array(result)

    @cached_property
    def representatives(self) -> IntArray:
        """[R, E] device of each expert: of the placements that relabelling turns into each other, the one whose
        interchangeable devices stand in the order of their first experts."""
        opens_after = np.full(len(self.slots), -1)
        for alike in self._alike:
            opens_after[alike[1:]] = alike[:-1]
        full = np.array(self.slots)
        room = full[None].astype(np.int16)
        placed = np.empty((1, 0), dtype=np.int16)
        for _ in range(sum(self.slots)):
            opened = (opens_after < 0) | (room[:, opens_after] < full[opens_after])
            parent, device = np.nonzero((room > 0) & opened)
            placed = np.column_stack([placed[parent], device.astype(np.int16)])
            room = room[parent]
            room[np.arange(len(room)), device] -= 1
        return placed.astype(np.int64)


def device_sets(device_of: IntArray, devices: int) -> BoolArray:
    """[R, G, E] which experts stand on each device, from [R, E] the device of each expert."""
    return np.asarray(device_of[:, None, :] == np.arange(devices)[:, None])


# What placements of a layer, and pairs of them in neighbouring layers, put on links when tokens have owners. What a
# link carries is a sum over pairs of expert sets, one before and one after: tokens whose owner is in the one and that
# need the other. So tokens are counted once a pair of sets, and a pair of placements costs a few additions of step
# vectors. Most pairs need not even that: a maximum over links of mean loads is at most the mean of the maximum, so
# pairs which that cheap figure already puts above the best are passed over. The minimum stays exact. Shapes: S steps,
# U sets before, M sets after, R (A) placements before, B after, G devices, N nodes.


class Links(NamedTuple):
    """Seconds a copy takes on each device's links [G] and each node's [N]; node_of: [G]; first: [N+1] the run of devices
    of each node; dedup: one copy a (token, node) between nodes."""

    per_copy: FloatArray
    per_node_copy: FloatArray
    node_of: IntArray
    first: IntArray
    dedup: bool


@kernel
def _traffic(count: Any, left: Any, node_left: Any, right: Any, node_right: Any, links: Any, worst: Any) -> None:
    """[S] seconds of the busiest link. count: [U, M, S], its last row counting every owner. left, right: [G] sets of the
    devices before and after; node_left, node_right: [N]."""
    steps = worst.shape[0]
    everyone = count.shape[0] - 1
    worst[:] = 0.0
    nodes = node_left.shape[0]
    for n in range(nodes):
        first, last = links.first[n], links.first[n + 1]
        size = float(last - first)
        inside = node_left[n]
        for g in range(first, last):
            mine, needed = left[g], right[g]
            for s in range(steps):
                near, far = count[inside, needed, s], 0.0
                if links.dedup:
                    far = (count[everyone, needed, s] - near) * ((size - 1.0) / size)
                received = near - count[mine, needed, s] + far
                sent = 0.0
                for h in range(first, last):
                    if h != g:
                        sent += count[mine, right[h], s]
                        if links.dedup:
                            sent += (count[everyone, right[h], s] - count[inside, right[h], s]) / size
                worst[s] = max(worst[s], max(sent, received) * links.per_copy[g])
        if nodes == 1:
            continue
        for s in range(steps):
            sent, received = 0.0, 0.0
            if links.dedup:
                received = count[everyone, node_right[n], s] - count[inside, node_right[n], s]
                for m in range(nodes):
                    if m != n:
                        sent += count[inside, node_right[m], s]
            else:
                for g in range(right.shape[0]):
                    if first <= g < last:
                        received += count[everyone, right[g], s] - count[inside, right[g], s]
                    else:
                        sent += count[inside, right[g], s]
            worst[s] = max(worst[s], max(sent, received) * links.per_node_copy[n])


@kernel
def _mean_tables(mean: Any, before: Any, after: Any, links: Any, devices: Any, nodes: Any) -> None:
    """Seconds of one link in the mean step, for every way to stand at it before and after.

    before, after: (device, node) ways, see `Ways`. devices: [Y, X] and nodes: [Y', X'], filled where both ways are of
    the same device or node.
    """
    everyone = mean.shape[0] - 1
    ways, node_ways = before
    ends, node_ends = after
    for y in range(len(ends)):
        g, needed = ends[y, 0], ends[y, 1]
        n = links.node_of[g]
        size = float(links.first[n + 1] - links.first[n])
        for x in range(len(ways)):
            if ways[x, 0] != g:
                continue
            mine, inside = ways[x, 1], ways[x, 2]
            received, sent = mean[inside, needed] - mean[mine, needed], 0.0
            if links.dedup:
                received += (mean[everyone, needed] - mean[inside, needed]) * ((size - 1.0) / size)
            for i in range(2, ends.shape[1]):
                other = ends[y, i]
                if other >= 0:
                    sent += mean[mine, other]
                    if links.dedup:
                        sent += (mean[everyone, other] - mean[inside, other]) / size
            devices[y, x] = max(sent, received) * links.per_copy[g]
    for y in range(len(node_ends)):
        n = node_ends[y, 0]
        for x in range(len(node_ways)):
            if node_ways[x, 0] != n:
                continue
            inside, received, sent = node_ways[x, 1], 0.0, 0.0
            for i in range(1, node_ends.shape[1]):
                needed = node_ends[y, i]
                if needed >= 0:
                    received += mean[everyone, needed] - mean[inside, needed]
                elif needed < -1:
                    sent += mean[inside, -2 - needed]
            nodes[y, x] = max(sent, received) * links.per_node_copy[n]


@kernel
def _cheapest(
    reached: Any,
    count: Any,
    before: Any,
    after: Any,
    way: Any,
    node_way: Any,
    end: Any,
    node_end: Any,
    tables: Any,
    links: Any,
    best: Any,
    state: Any,
    name: Any,
) -> None:
    left, node_left = before
    right, node_right = after
    table, node_table = tables
    befores, names = len(reached), len(right)
    devices, nodes, steps = left.shape[1], node_left.shape[1], count.shape[2]
    floor, busiest = np.empty((names, befores)), np.empty(steps)
    for b in range(right.shape[1]):
        least, at_h, at_a = np.inf, 0, 0
        for h in range(names):
            for a in range(befores):
                typical = 0.0
                for g in range(devices):
                    typical = max(typical, table[end[h, b, g], way[a, g]])
                if nodes > 1:
                    for n in range(nodes):
                        typical = max(typical, node_table[node_end[h, b, n], node_way[a, n]])
                floor[h, a] = reached[a] + typical
                if floor[h, a] < least:
                    least, at_h, at_a = floor[h, a], h, a
        best[b] = np.inf
        if least == np.inf:
            continue
        # The likeliest first: what it costs rules out most others.
        _traffic(count, left[at_a], node_left[at_a], right[at_h, b], node_right[at_h, b], links, busiest)
        best[b], state[b], name[b] = reached[at_a] + busiest.mean(), at_a, at_h
        for h in range(names):
            for a in range(befores):
                if floor[h, a] >= best[b]:
                    continue
                _traffic(count, left[a], node_left[a], right[h, b], node_right[h, b], links, busiest)
                value = reached[a] + busiest.mean()
                if value < best[b]:
                    best[b], state[b], name[b] = value, a, h


@kernel
def _within(count: Any, left: Any, node_left: Any, links: Any, result: Any) -> None:
    busiest = np.empty(count.shape[2])
    for a in range(len(result)):
        _traffic(count, left[a], node_left[a], left[a], node_left[a], links, busiest)
        result[a] = busiest.mean()


class SetTraffic:
    """Prices what travels from tokens' owners, for placements [R] and renamings of devices [H, G].

    device_sets: [R, G] which of M sets of experts each device holds; node_sets: [R, N] for nodes; sets: [M, E] all sets.
    Tokens come as owned [S, E, M]: of each step, by the expert whose device owns them, those that need each set.
    """

    def __init__(
        self, device_sets: IntArray, node_sets: IntArray, sets: BoolArray, renamings: IntArray, links: Links
    ) -> None:
        self._links = links
        # A last row counts every owner.
        self._owners = np.concatenate([sets, np.ones((1, sets.shape[1]), dtype=bool)]).astype(np.float64)
        self._left, self._node_left = (np.ascontiguousarray(of) for of in (device_sets, node_sets))
        self._right = np.ascontiguousarray(device_sets[:, np.argsort(renamings, axis=1)].transpose(1, 0, 2))
        # Renamings stay inside nodes.
        self._node_right = np.ascontiguousarray(np.broadcast_to(node_sets, (len(renamings), *node_sets.shape)))
        self._ways, self._way = _unique(self._ways_before())
        self._node_ways, self._node_way = _unique(_numbered(node_sets[..., None]))
        self._ends, self._end = _unique(self._ways_after())
        self._node_ends, self._node_end = _unique(self._node_ways_after())

    def _ways_before(self) -> IntArray:
        """[R, G, 3] device, its set, its node's set."""
        inside = self._node_left[:, self._links.node_of]
        return _numbered(np.stack([self._left, inside], axis=-1))

    def _ways_after(self) -> IntArray:
        """[H, R, G, 2 + C] device, its set, the sets of its node's other devices in order, padded with -1."""
        node_of, first = self._links.node_of, self._links.first
        most = int(np.diff(first).max())
        others = np.full((*self._right.shape, most - 1), -1, dtype=np.int64)
        for g, n in enumerate(node_of):
            members = [h for h in range(first[n], first[n + 1]) if h != g]
            others[..., g, : len(members)] = np.sort(self._right[..., members], axis=-1)
        return _numbered(np.concatenate([self._right[..., None], others], axis=-1))

    def _node_ways_after(self) -> IntArray:
        """[H, R, N, 1 + D] node, and each set that copies go to: inside the node as it is, outside as -2 - set."""
        first, nodes = self._links.first, self._node_right.shape[2]
        holders = self._node_right if self._links.dedup else self._right
        result = np.full((*self._node_right.shape, holders.shape[2]), -1, dtype=np.int64)
        for n in range(nodes):
            inside = [n] if self._links.dedup else list(range(first[n], first[n + 1]))
            outside = [i for i in range(holders.shape[2]) if i not in inside]
            result[..., n, : len(inside)] = np.sort(holders[..., inside], axis=-1)
            result[..., n, len(inside) :] = -2 - np.sort(holders[..., outside], axis=-1)
        return _numbered(result)

    def within(self, owned: FloatArray) -> FloatArray:
        """[R] mean seconds when the owners stand under the same placement as the experts needed."""
        result = np.empty(len(self._left))
        _within(self._counted(owned), self._left, self._node_left, self._links, result)
        return result

    def cheapest_before(self, reached: FloatArray, owned: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        """For each placement of a layer, the least of reached[a] [R] plus the mean seconds from placement a of the layer
        before, over all a and renamings: ([R] that least, [R] a, [R] the renaming)."""
        count = self._counted(owned)
        ways, ends = (self._ways, self._node_ways), (self._ends, self._node_ends)
        tables = np.zeros((len(ends[0]), len(ways[0]))), np.zeros((len(ends[1]), len(ways[1])))
        _mean_tables(count.mean(axis=2), ways, ends, self._links, *tables)
        best = np.zeros(len(reached))
        state, name = np.zeros((2, len(reached)), dtype=np.int64)
        _cheapest(
            reached,
            count,
            (self._left, self._node_left),
            (self._right, self._node_right),
            self._way,
            self._node_way,
            self._end,
            self._node_end,
            tables,
            self._links,
            best,
            state,
            name,
        )
        return best, state, name

    def _counted(self, owned: FloatArray) -> FloatArray:
        """[U, M, S] the same by sets of owners; steps last, so that additions run over them."""
        steps, experts, sets = owned.shape
        by_owner = np.ascontiguousarray(owned.transpose(1, 2, 0)).reshape(experts, sets * steps)
        return (self._owners @ by_owner).reshape(len(self._owners), sets, steps)


def _numbered(values: IntArray) -> IntArray:
    """[..., X, 1 + D] each entry's place X before its values [..., X, D]."""
    places = np.broadcast_to(np.arange(values.shape[-2])[:, None], (*values.shape[:-1], 1))
    return np.concatenate([places, values], axis=-1)


def _unique(rows: IntArray) -> tuple[IntArray, IntArray]:
    """The distinct rows [Y, D] among [..., D], and which of them each is [...]."""
    distinct, which = np.unique(rows.reshape(-1, rows.shape[-1]), axis=0, return_inverse=True)
    return distinct, which.reshape(rows.shape[:-1]).astype(np.int64)


SetArray = BoolArray

BLOCK_VALUES = 1 << 19
"""Floats a working array may hold: small enough for the cache, large enough to keep the interpreter out of the way."""


class StepCosts:
    """Prices the placements of a layer, up to renaming, and their neighbourhood, on steps."""

    def __init__(self, problem: Problem, steps: Steps, space: PlacementSpace) -> None:
        self._steps, self._model = steps, problem.model
        self._topology, self._objective = problem.topology, problem.objective
        self._latency = all_to_all_latency(problem.topology, problem.objective.node_dedup)
        self._load = steps.loads().astype(np.float64)
        self._held = device_sets(space.representatives, problem.num_devices)
        self._relabellings = space.relabellings
        self._sets, self._set_of = _distinct(self._held)
        node_held = np.logical_or.reduceat(self._held, problem.topology.node_start, axis=1)
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
