"""Small traces with real structure."""

from __future__ import annotations

import numpy as np

import moeplace as mp


def make_trace(
    seed: int, sequences: int = 12, length: int = 40, layers: int = 3, experts: int = 8, top_k: int = 2
) -> mp.RoutingTrace:
    """Routing drawn from a Markov chain over experts, so that transitions and co-activation are not uniform."""
    rng = np.random.default_rng(seed)
    follow = rng.dirichlet(np.full(experts, 0.3), size=(layers, experts))
    tokens = sequences * length
    ids = np.empty((tokens, layers, top_k), dtype=np.int64)
    for t in range(tokens):
        favourite = int(rng.integers(experts))
        for layer in range(layers):
            chosen = rng.choice(experts, size=top_k, replace=False, p=0.9 * follow[layer, favourite] + 0.1 / experts)
            ids[t, layer] = chosen
            favourite = int(chosen[0])
    sequence = np.repeat(np.arange(sequences), length)
    return mp.RoutingTrace.from_arrays(
        ids, num_experts=experts, sequence=sequence, workload=np.where(sequence % 2 == 0, "chat", "code")
    )
