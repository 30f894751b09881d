"""Small problems with transitions, and what is true of them by trying every placement."""

from __future__ import annotations

import itertools

import numpy as np

import moeplace as mp
from moeplace.solvers.base import Solution


def statistics_of(transitions: np.ndarray, load: np.ndarray | None = None, top_k: int = 1) -> mp.RoutingStatistics:
    """Statistics with transitions [L-1, E, E], and the loads they imply."""
    layers, experts = len(transitions) + 1, transitions.shape[1]
    if load is None:
        load = np.concatenate([transitions.sum(axis=2), transitions[-1:].sum(axis=1)])
    return mp.RoutingStatistics(
        experts=experts,
        moe_layers=tuple(range(layers)),
        load=np.asarray(load, dtype=float)[None],
        window_workload=np.zeros(1, np.int64),
        transitions=np.asarray(transitions, dtype=float)[None],
        top_k=top_k,
    )


def topology_of(nodes: list[list[float]], inter_bandwidth: float = 2e9) -> mp.Topology:
    """Nodes of devices given by their compute in Tflop/s; intra-node bandwidth grows with it."""
    return mp.Topology(
        nodes=tuple(
            mp.Node(
                devices=tuple(
                    mp.Device(compute=c * 1e12, memory=1e12, memory_bandwidth=1e12, intra_bandwidth=c * 1e10)
                    for c in node
                ),
                inter_bandwidth=inter_bandwidth * len(node),
            )
            for node in nodes
        )
    )


def problem_of(transitions: np.ndarray, topology: mp.Topology, top_k: int = 1, **fields: object) -> mp.Problem:
    statistics = fields.pop("statistics", None) or statistics_of(transitions, top_k=top_k)
    model = mp.ModelSpec(
        layers=len(transitions) + 1, experts=transitions.shape[1], top_k=top_k, hidden_size=256, ffn_size=16
    )
    return mp.Problem(model, topology, statistics, **fields)  # type: ignore[arg-type]


def random_transitions(
    seed: int, layers: int, experts: int, tokens: int = 300, sharpness: float = 0.3, empty: int | None = None
) -> np.ndarray:
    """Transitions of tokens walking a random Markov chain over experts; layer `empty` gets no tokens."""
    rng = np.random.default_rng(seed)
    result = np.zeros((layers - 1, experts, experts))
    here = rng.integers(experts, size=tokens)
    for layer in range(layers - 1):
        follow = rng.dirichlet(np.full(experts, sharpness), size=experts).cumsum(axis=1)
        after = np.minimum((follow[here] < rng.random((tokens, 1))).sum(axis=1), experts - 1)
        np.add.at(result[layer], (here, after), 1.0)
        here = after
    if empty is not None:
        result[max(0, empty - 1) : empty + 1] = 0
    return result


def layer_placements(slots: np.ndarray) -> np.ndarray:
    """[S, E] device of each expert: every placement of one layer."""
    placements = set(itertools.permutations(np.repeat(np.arange(len(slots)), slots).tolist()))
    return np.array(sorted(placements))


def devices_of(problem: mp.Problem, solution: Solution) -> np.ndarray:
    """[L, E] device of each expert, checked to give every device its slots."""
    table = solution.physical_to_logical
    assert table.shape == (problem.model.layers, problem.num_slots)
    device_of = np.full((problem.model.layers, problem.model.experts), -1)
    for layer, row in enumerate(table):
        assert sorted(row) == list(range(problem.model.experts))
        device_of[layer, row] = problem.slot_device
    return device_of


def crossing_share(transitions: np.ndarray, device_of: np.ndarray) -> float:
    crossed = 0.0
    for layer, i, j in np.argwhere(transitions > 0):
        if device_of[layer, i] != device_of[layer + 1, j]:
            crossed += transitions[layer, i, j]
    total = transitions.sum()
    return float(crossed / total) if total else 0.0


def fewest_crossings(transitions: np.ndarray, slots: np.ndarray) -> float:
    """The smallest crossing share of any placement: layer by layer, the best way to each placement of the layer."""
    placements = layer_placements(slots)
    apart = (placements[:, None, :, None] != placements[None, :, None, :]).astype(float)
    reached = np.zeros(len(placements))
    for matrix in transitions:
        reached = (reached[:, None] + np.einsum("stij,ij->st", apart, matrix)).min(axis=0)
    total = transitions.sum()
    return float(reached.min() / total) if total else 0.0
