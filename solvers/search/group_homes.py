"""Home nodes of expert groups, for routing that keeps a token's experts within few groups.

Counts do not say which experts a token chose together. But with every group whole on one node a token visits at most
as many nodes as groups, and a share x of a layer's load served elsewhere adds at most x * k nodes a token on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...placement.errors import InputError, UnsupportedError
from ...placement.problem import Problem
from .layout import Moves
from .starts import balanced_layer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GroupHomes:
    """stray: [L, E, G] an expert's part of its layer's load on devices off its home node, else 0. most: what share of
    a layer's load may be served off its group's home. tables: slot tables [P_l] with none."""

    stray: FloatArray
    most: float
    tables: tuple[IntArray, ...]


def homes_of(problem: Problem, loads: FloatArray, moves: Sequence[Moves], most: float) -> GroupHomes:
    """Homes that even out the nodes' loads, and a start with every group at home. loads: [S, L, E].

    Raises:
        UnsupportedError: one group or node only, or failures to tolerate, which a replica elsewhere is needed for.
        InputError: `most` is no share, or the groups' experts do not fit the nodes' slots.
    """
    model, topology = problem.model, problem.topology
    if not 0.0 <= most <= 1.0:
        raise InputError(f"off_home ({most}) must be a share of the load, from 0 to 1")
    if model.groups < 2 or topology.num_nodes < 2:
        raise UnsupportedError(
            f"off_home needs several expert groups and nodes, given {model.groups} and {topology.num_nodes}"
        )
    if problem.tolerates:
        raise UnsupportedError("off_home keeps groups on one node; it does not go with failures to tolerate")
    mean = loads.mean(axis=0)
    stray = np.zeros((model.layers, model.experts, problem.num_devices))
    tables = []
    for layer in range(model.layers):
        slots = problem.layer_slots[layer]
        node_of_group = _assigned(problem, loads[:, layer], slots)
        home = np.repeat(node_of_group, model.experts // model.groups)
        away = topology.node_of[None, :] != home[:, None]
        stray[layer] = np.where(away, mean[layer][:, None], 0.0)
        tables.append(_at_home(problem, mean[layer], slots, home, moves[layer]))
    return GroupHomes(stray, most, tuple(tables))


def _assigned(problem: Problem, loads: FloatArray, slots: IntArray) -> IntArray:
    """[groups] the node of each: heaviest first to the lightest node, then moves and swaps while they even nodes out.

    loads: [S, E]. slots: [G]. Nodes are compared by their compute rate.
    """
    topology, groups = problem.topology, problem.model.groups
    size = problem.model.experts // groups
    room = np.bincount(topology.node_of, weights=slots).astype(np.int64) // size
    if room.sum() < groups:
        raise InputError(
            f"off_home: {groups} groups of {size} experts do not fit the nodes, whose slots hold {room.tolist()} whole groups"
        )
    speed = np.bincount(topology.node_of, weights=topology.compute)
    by_group = loads.reshape(len(loads), groups, size).sum(axis=2)
    node = np.full(groups, -1, dtype=np.int64)
    carried = np.zeros((len(loads), len(room)))
    for group in np.argsort(-by_group.sum(axis=0), kind="stable"):
        after = (carried + by_group[:, [group]]) / speed
        taken = np.bincount(node[node >= 0], minlength=len(room))
        node[group] = int(np.where(taken < room, after.sum(axis=0), np.inf).argmin())
        carried[:, node[group]] += by_group[:, group]

    def value(assigned: IntArray) -> float:
        total = np.zeros((len(loads), len(room)))
        np.add.at(total.T, assigned, by_group.T)
        return float((total / speed).max(axis=1).sum())

    best, improved = value(node), True
    while improved:
        improved = False
        for a in range(groups):
            for b in range(a):
                if node[a] == node[b]:
                    continue
                other = node.copy()
                other[a], other[b] = node[b], node[a]
                swapped = value(other)
                if swapped < best * (1 - 1e-12):
                    node, best, improved = other, swapped, True
    return node


def _at_home(problem: Problem, load: FloatArray, slots: IntArray, home: IntArray, moves: Moves) -> IntArray:
    """[P_l] a balanced table with every expert's replicas on its home node."""
    topology = problem.topology
    tables = []
    for node in range(topology.num_nodes):
        devices, members = np.flatnonzero(topology.node_of == node), np.flatnonzero(home == node)
        speed = topology.compute[devices] / topology.compute.mean()
        allowed = moves.allowed[np.ix_(members, devices)]
        if not allowed.any(axis=1).all():
            raise InputError(
                f"off_home: expert {members[~allowed.any(axis=1)][0]} may not stand on its group's home node {node}; "
                "pin whole groups, or do without off_home"
            )
        tables.append(members[balanced_layer(load[members], slots[devices], speed, allowed)])
    return np.concatenate(tables)
