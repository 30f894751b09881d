"""METIS: pairs of experts chosen together, or by one token in neighbouring layers, are weighted edges."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .equal import equal_parts
from .routing import Routing

IntArray = npt.NDArray[np.int64]


def metis(routing: Routing) -> dict[str, IntArray]:
    """Settings: each layer alone on co-activation; all layers as one chain on transitions."""
    alone = np.stack(
        [
            equal_parts(
                _partition(routing.coactivation[layer], np.ones(routing.experts), routing),
                routing.coactivation[layer],
                routing.slots,
            )
            for layer in range(routing.layers)
        ]
    )
    return {"layers": alone, "chain": _chain(routing)}


def _partition(weights: npt.NDArray[np.float64], vertices: npt.NDArray[np.float64], routing: Routing) -> IntArray:
    import pymetis

    scaled = np.ceil(weights / max(weights.max(), 1.0) * 10_000).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum((scaled > 0).sum(axis=1))])
    rows, columns = np.nonzero(scaled)
    options = pymetis.Options(seed=routing.seed, ufactor=10, niter=50, ncuts=10)
    _, part = pymetis.part_graph(
        routing.devices,
        xadj=starts.tolist(),
        adjncy=columns.tolist(),
        eweights=scaled[rows, columns].tolist(),
        vweights=vertices.astype(int).tolist(),
        recursive=False,
        options=options,
    )
    return np.asarray(part, dtype=np.int64)


def _chain(routing: Routing) -> IntArray:
    experts, layers = routing.experts, routing.layers
    weights = np.zeros((layers * experts, layers * experts))
    for layer in range(layers - 1):
        here, after = (slice(i * experts, (i + 1) * experts) for i in (layer, layer + 1))
        weights[here, after] = routing.transitions[layer]
        weights[after, here] = routing.transitions[layer].T
    rows = _partition(weights, np.ones(layers * experts), routing).reshape(layers, experts)
    return np.stack([equal_parts(row, routing.coactivation[layer], routing.slots) for layer, row in enumerate(rows)])
