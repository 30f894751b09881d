"""Mt-KaHyPar: a layer's experts are vertices, every token's set of experts a hyperedge, the cost its connectivity.

That cost is the number of devices a token needs, less one: co-activation exactly, load not at all, or as vertex
weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .equal import equal_parts
from .routing import Routing

IntArray = npt.NDArray[np.int64]
MOST_EDGES = 20_000


@cache
def _library() -> tuple[Any, Any]:
    import mtkahypar

    library = mtkahypar.initialize(2)
    return mtkahypar, library


def _partition(
    edges: list[list[int]], counts: list[int], weights: list[int], parts: int, imbalance: float, seed: int
) -> IntArray:
    mtkahypar, library = _library()
    mtkahypar.set_seed(seed)
    context = library.context_from_preset(mtkahypar.PresetType.QUALITY)
    context.set_partitioning_parameters(parts, imbalance, mtkahypar.Objective.KM1)
    context.logging = False
    graph = library.create_hypergraph(context, len(weights), len(edges), edges, weights, counts)
    done = graph.partition(context)
    return np.array([done.block_id(v) for v in range(len(weights))], dtype=np.int64)


def mt_kahypar(routing: Routing) -> dict[str, IntArray]:
    """Settings: parts of equal size; parts of equal load, then of equal size; nodes first; the chain of all layers."""
    unit = [1] * routing.experts
    plans = {
        "equal": _per_layer(routing, lambda layer: (unit, 0.0)),
        "loads": _per_layer(routing, lambda layer: ((routing.load[layer] + 1).astype(int).tolist(), 0.05)),
    }
    if len(set(routing.node_of.tolist())) > 1:
        plans["nodes first"] = _nodes_first(routing)
    plans["chain"] = _chain(routing)
    return plans


def _per_layer(routing: Routing, weights: Any) -> IntArray:
    rows = []
    for layer in range(routing.layers):
        edges, counts = _thinned(*routing.hyperedges([layer]))
        given, imbalance = weights(layer)
        part = _partition(edges, counts, given, routing.devices, imbalance, routing.seed)
        rows.append(equal_parts(part, routing.coactivation[layer], routing.slots))
    return np.stack(rows)


def _nodes_first(routing: Routing) -> IntArray:
    nodes = int(routing.node_of.max()) + 1
    sizes = np.bincount(routing.node_of, weights=routing.slots).astype(np.int64)
    rows = np.empty((routing.layers, routing.experts), dtype=np.int64)
    for layer in range(routing.layers):
        edges, counts = _thinned(*routing.hyperedges([layer]))
        coarse = equal_parts(
            _partition(edges, counts, [1] * routing.experts, nodes, 0.0, routing.seed),
            routing.coactivation[layer],
            sizes,
        )
        for node in range(nodes):
            mine, devices = np.flatnonzero(coarse == node), np.flatnonzero(routing.node_of == node)
            new = {int(e): i for i, e in enumerate(mine)}
            inside = [[new[e] for e in edge if e in new] for edge in edges]
            kept = [(edge, count) for edge, count in zip(inside, counts, strict=True) if len(edge) > 1]
            if len(devices) == 1 or not kept:
                rows[layer, mine] = np.repeat(devices, routing.slots[devices])
                continue
            part = _partition(
                [e for e, _ in kept], [c for _, c in kept], [1] * len(mine), len(devices), 0.0, routing.seed
            )
            fine = equal_parts(part, routing.coactivation[layer][np.ix_(mine, mine)], routing.slots[devices])
            rows[layer, mine] = devices[fine]
    return rows


def _chain(routing: Routing) -> IntArray:
    """All layers in one hypergraph: a token's experts of two neighbouring layers are one hyperedge."""
    edges: list[list[int]] = []
    counts: list[int] = []
    for layer in range(routing.layers - 1):
        pair, many = _thinned(*routing.hyperedges([layer, layer + 1]), most=MOST_EDGES // 8)
        edges += [[v + layer * routing.experts for v in edge] for edge in pair]
        counts += many
    size = routing.layers * routing.experts
    part = _partition(edges, counts, [1] * size, routing.devices, 0.03, routing.seed)
    rows = part.reshape(routing.layers, routing.experts)
    return np.stack([equal_parts(row, routing.coactivation[layer], routing.slots) for layer, row in enumerate(rows)])


def _thinned(edges: list[list[int]], counts: list[int], most: int = MOST_EDGES) -> tuple[list[list[int]], list[int]]:
    """The commonest hyperedges: the tail is nearly all sets that a single token chose."""
    if len(edges) <= most:
        return edges, counts
    kept = np.argsort(-np.asarray(counts), kind="stable")[:most]
    return [edges[i] for i in kept], [counts[i] for i in kept]
