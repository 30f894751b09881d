"""What placements of a layer, and pairs of them in neighbouring layers, put on links when tokens have owners.

What a link carries is a sum over pairs of expert sets, one before and one after: tokens whose owner is in the one and
that need the other. So tokens are counted once a pair of sets, and a pair of placements costs a few additions of step
vectors. Most pairs need not even that: a maximum over links of mean loads is at most the mean of the maximum, so pairs
which that cheap figure already puts above the best are passed over. The minimum stays exact.

Shapes: S steps, U sets before, M sets after, R (A) placements before, B after, G devices, N nodes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from .._types import BoolArray, FloatArray, IntArray
from ..placement.jit import kernel


class Links(NamedTuple):
    """What a copy costs on the links of devices and nodes."""

    per_copy: FloatArray
    """[G] seconds on each device's links."""
    per_node_copy: FloatArray
    """[N] seconds on each node's."""
    node_of: IntArray
    """[G]"""
    first: IntArray
    """[N+1] the run of devices of each node."""
    dedup: bool
    """One copy a (token, node) between nodes."""


class SetTraffic:
    """Prices what travels from tokens' owners, for placements [R] and renamings of devices [H, G].

    device_sets: [R, G] which of M sets of experts each device holds; node_sets: [R, N] for nodes; sets: [M, E] all
    sets. Tokens come as owned [S, E, M]: of each step, by the expert whose device owns them, those that need each set.
    """

    def __init__(
        self, device_sets: IntArray, node_sets: IntArray, sets: BoolArray, renamings: IntArray, links: Links
    ) -> None:
        self._links = links
        # A last row counts every owner.
        # So narrow a product is the slower for threads: sparse ones take none.
        self._owners = csr_array(np.concatenate([sets, np.ones((1, sets.shape[1]), dtype=bool)]).astype(np.float64))
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
        _within(self._by_owner_sets(owned), self._left, self._node_left, self._links, result)
        return result

    def cheapest_before(self, reached: FloatArray, owned: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
        """The cheapest way to each placement of a layer from those of the layer before, whose cost is reached [R].

        Returns:
            ([R] the least of reached[a] plus the mean seconds from placement a, over all a and renamings; [R] that a;
            [R] the renaming).
        """
        count = self._by_owner_sets(owned)
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

    def _by_owner_sets(self, owned: FloatArray) -> FloatArray:
        """[U, M, S] tokens by sets of owners; steps last, so that additions run over them."""
        steps, experts, sets = owned.shape
        by_owner = np.ascontiguousarray(owned.transpose(1, 2, 0)).reshape(experts, sets * steps)
        return np.asarray(self._owners @ by_owner).reshape(-1, sets, steps)


def _numbered(values: IntArray) -> IntArray:
    """[..., X, 1 + D] each entry's place X before its values [..., X, D]."""
    places = np.broadcast_to(np.arange(values.shape[-2])[:, None], (*values.shape[:-1], 1))
    return np.concatenate([places, values], axis=-1)


def _unique(rows: IntArray) -> tuple[IntArray, IntArray]:
    """The distinct rows [Y, D] among [..., D], and which of them each is [...]."""
    distinct, which = np.unique(rows.reshape(-1, rows.shape[-1]), axis=0, return_inverse=True)
    return distinct, which.reshape(rows.shape[:-1]).astype(np.int64)


@kernel
def _traffic(count: Any, left: Any, node_left: Any, right: Any, node_right: Any, links: Any, worst: Any) -> None:
    """Fills worst [S] with the seconds of the busiest link.

    count: [U, M, S], its last row counting every owner. left, right: [G] sets of the devices before and after;
    node_left, node_right: [N].
    """
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
