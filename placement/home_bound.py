"""A lower bound of the copies that must leave their node, whichever replica serves a token.

A token leaves its home node for every expert that has no replica there. Slots are few: of all (expert, node) pairs at most
as many as there are slots can be served in the node, and every expert takes at least one. The best choice keeps each
expert where most of its tokens live, and spends what is left on the largest of the remaining pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .problem import Problem
from .steps import Steps

FloatArray = npt.NDArray[np.float64]


def least_leaving(steps: Steps, problem: Problem) -> FloatArray:
    """[S, L] copies that leave their node in one dispatch, summed over nodes; on one node, their device.

    Holds for dispatch_combine, for replicas chosen by share or near the token, for homes known or spread evenly.
    """
    topology = problem.topology
    node_of = topology.node_of if topology.num_nodes > 1 else np.arange(topology.num_devices)
    wanted = _wanted(steps, node_of, topology.num_devices)
    away = wanted.sum(axis=3) - wanted.max(axis=3)
    spare = problem.layer_slots.sum(axis=1) - problem.model.experts
    rest = np.sort(np.sort(wanted, axis=3)[..., :-1].reshape(*away.shape[:2], -1), axis=2)
    kept = np.empty(away.shape[:2])
    for layer, count in enumerate(np.minimum(spare, rest.shape[2]).tolist()):
        kept[:, layer] = rest[:, layer, rest.shape[2] - count :].sum(axis=1)
    # One copy carries a token's experts of one target together: no more than it has slots.
    carried = min(problem.model.top_k, int(_most_slots(problem, node_of)))
    return np.asarray(np.maximum(away.sum(axis=2) - kept, 0.0) / carried)


def _wanted(steps: Steps, node_of: npt.NDArray[np.int64], devices: int) -> FloatArray:
    """[S, L, E, N] tokens of each node's homes that choose each expert."""
    nodes = int(node_of.max()) + 1
    if steps.source is None:
        return np.asarray(steps.loads()[..., None] * (np.bincount(node_of, minlength=nodes) / devices))
    result = np.empty((steps.num_steps, steps.num_layers, steps.num_experts, nodes))
    home = node_of[steps.source]
    base = np.arange(steps.num_layers)[None, :, None] * steps.num_experts
    for s, (start, end) in enumerate(zip(steps.offsets[:-1], steps.offsets[1:], strict=True)):
        cells = (steps.expert_ids[start:end] + base) * nodes + home[start:end, None, None]
        counts = np.bincount(cells.ravel(), minlength=result[0].size)
        result[s] = counts.reshape(result.shape[1:])
    return result


def _most_slots(problem: Problem, node_of: npt.NDArray[np.int64]) -> int:
    """Experts that one copy may be for: slots of the largest node, or device where copies are not merged by node."""
    merged = problem.objective.node_dedup or problem.topology.num_nodes == 1
    slots = problem.slots_per_device
    return int(np.bincount(node_of, weights=slots).max()) if merged else int(slots.max())
