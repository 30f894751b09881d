"""Devices renamed layer by layer so that tokens find their next experts near: what each device holds stays together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...placement.problem import Problem
from ..moetuner import pair_cost
from .race import Start
from .scenario import Scenario

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SWEEPS = 8
TOKENS = 8192
"""Tokens whose ways are counted: a sum over links settles long before."""


def can_align(problem: Problem, allowed: npt.NDArray[np.bool_]) -> bool:
    """Whether any two devices, and any two nodes, can be exchanged without changing what is asked."""
    even = bool((problem.layer_slots == problem.layer_slots[:, :1]).all())
    alike = problem.topology.is_uniform and even
    return bool(alike and allowed.all() and not problem.tolerates and problem.max_moves is None)


def aligned(problem: Problem, scenario: Scenario, start: Start, whole_nodes: bool) -> Start:
    """The start with each layer's devices renamed, in sweeps over layers, for the least sum of transfers.

    Needs devices that can be exchanged, see `can_align`. With its neighbours fixed a layer's best renaming is a linear
    assignment. whole_nodes: devices of a node stay together, so that whatever an execution without transitions paid for
    the start it still pays.
    """
    tables, shares = start
    node_of, cost = problem.topology.node_of, pair_cost(problem.topology)
    onward = _onward(scenario, shares)
    layers, devices = len(tables), problem.num_devices
    place = np.tile(np.arange(devices), (layers, 1))
    for sweep in range(SWEEPS):
        before = place.copy()
        for layer in range(layers):
            price = np.zeros((devices, devices))
            if layer > 0:
                price += onward[layer - 1].T @ cost[place[layer - 1]]
            # The first sweep goes on from where it is; what follows has no place yet.
            if sweep and layer < layers - 1:
                price += onward[layer] @ cost[place[layer + 1]]
            place[layer] = _renamed(price, node_of) if whole_nodes else _assigned(price)
        if sweep and (place == before).all():
            break
    return _moved(problem, tables, shares, place)


def _onward(scenario: Scenario, shares: Sequence[FloatArray]) -> FloatArray:
    """[L-1, G, G] tokens whose owner in a layer is one device and that need the other in the next."""
    ids = scenario.walked_ids
    ids = ids[:: max(1, len(ids) // TOKENS)]
    result = []
    for layer in range(len(shares) - 1):
        owner = shares[layer][ids[:, layer, 0]]
        absent = np.ones(owner.shape)
        for choice in ids[:, layer + 1].T:
            absent *= 1.0 - shares[layer + 1][choice]
        result.append(owner.T @ (1.0 - absent))
    return np.asarray(result)


def _assigned(price: FloatArray) -> IntArray:
    """[G] the device each device's content goes to, of price [content, device]."""
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(price)[1])


def _renamed(price: FloatArray, node_of: IntArray) -> IntArray:
    """`_assigned` with the content of a node kept in one node: nodes by the cheapest renaming inside each pair."""
    members = [np.flatnonzero(node_of == node) for node in range(int(node_of.max()) + 1)]
    inside = [[_assigned(price[np.ix_(mine, theirs)]) for theirs in members] for mine in members]
    total = np.array(
        [
            [price[mine, theirs[chosen]].sum() for theirs, chosen in zip(members, row, strict=True)]
            for mine, row in zip(members, inside, strict=True)
        ]
    )
    place = np.empty(len(node_of), dtype=np.int64)
    for node, target in enumerate(_assigned(total)):
        place[members[node]] = members[target][inside[node][target]]
    return place


def _moved(problem: Problem, tables: Sequence[IntArray], shares: Sequence[FloatArray], place: IntArray) -> Start:
    """Slot tables and shares with every device's content where `place` [L, G] says."""
    moved = [np.empty_like(table) for table in tables]
    split = [np.empty_like(share) for share in shares]
    for layer, target in enumerate(place):
        slots = problem.num_devices, -1
        moved[layer].reshape(slots)[target] = tables[layer].reshape(slots)
        split[layer][:, target] = shares[layer]
    return moved, split
