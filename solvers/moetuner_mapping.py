"""MoETuner's second program: which cluster of each layer goes to which device."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from .._types import BoolArray, FloatArray, IntArray
from ..placement.errors import InputError, SolveError, UnsupportedError, nearest
from ..placement.plan import RELATIVE_TOLERANCE
from ..placement.topology import Topology
from .base import Budget
from .chain import cheapest_path
from .ilp import solve_ilp
from .moetuner_program import mapping_program

METHODS = ("auto", "ilp", "chain")
CHAIN_AUTO = 720
CHAIN_LIMIT = 5040
"""Permutations of a layer's clusters up to which the chain is taken unasked, and at all (7 devices: seconds a layer)."""


@dataclass(frozen=True)
class MappingTask:
    """traffic: [L-1, G, G] bytes from cluster to cluster of the next layer. cost: [G, G] seconds a byte from device to
    device, 0 on the diagonal. kinds: [G] a cluster may go where the device of its own index has the same kind.
    nodes: [G] node of each device where devices and nodes can be exchanged freely, else None.
    """

    traffic: FloatArray
    cost: FloatArray
    kinds: IntArray
    nodes: IntArray | None

    @property
    def allowed(self) -> BoolArray:
        """[G, G] whether a cluster may stand on a device."""
        return np.asarray(self.kinds[:, None] == self.kinds[None, :])

    def seconds(self, device_of: IntArray) -> float:
        """The objective of [L, G] the device of each cluster: the largest device-pair transfer, summed over layers."""
        transfers = self.traffic * self.cost[device_of[:-1, :, None], device_of[1:, None, :]]
        return float(transfers.max(axis=(1, 2)).sum()) if len(transfers) else 0.0

    def floors(self) -> FloatArray:
        """[L-1] a lower bound of each layer's largest transfer.

        A cluster's G flows go to G different devices; at best the heaviest takes the fastest way, and so on down.
        """
        return np.maximum(
            _floor(self.traffic, self.cost, self.allowed), _floor(self.traffic.mT, self.cost.T, self.allowed)
        )


@dataclass(frozen=True)
class ClusterMap:
    """device_of: [L, G] device of each cluster. seconds: its objective. bound: no other is below it."""

    device_of: IntArray
    seconds: float
    bound: float
    finished: bool


def pair_cost(topology: Topology) -> FloatArray:
    """[G, G] seconds a byte takes from device to device: the slower of their links inside a node, the smaller of
    their nodes' bandwidths, shared evenly by the devices of the node, between nodes.
    """
    uplink = (topology.inter_bandwidth / topology.node_size)[topology.node_of]
    same = topology.node_of[:, None] == topology.node_of[None, :]
    inside, between = (np.minimum(rate[:, None], rate[None, :]) for rate in (topology.intra_bandwidth, uplink))
    return np.where(np.eye(len(uplink), dtype=bool), 0.0, 1.0 / np.where(same, inside, between))


def map_clusters(
    task: MappingTask,
    budget: Budget,
    *,
    method: str = "auto",
    backend: str = "highs",
    tolerance: float = 0.0,
    warm_start: bool = True,
) -> ClusterMap:
    """Minimises `task.seconds`. method: "ilp", the paper's integer program, "chain", the exact cheapest path through
    the permutations of every layer, or "auto": chain up to 720 permutations (6 devices), else ilp.

    Raises:
        InputError: unknown method. UnsupportedError: too many permutations, or too large a program.
        SolveError: nothing found in time (without warm_start).
    """
    check_method(method)
    count = math.prod(math.factorial(n) for n in Counter(task.kinds.tolist()).values())
    if method == "chain" and count > CHAIN_LIMIT:
        raise UnsupportedError(
            f"program2='chain' compares every pair of {count:,} permutations of {len(task.kinds)} clusters a layer, "
            f"{CHAIN_LIMIT:,} at most; use program2='ilp'"
        )
    start = _start(task) if warm_start else None
    try:
        if method == "chain" or (method == "auto" and count <= CHAIN_AUTO):
            return _by_chain(task, budget)
        return _by_ilp(task, budget, backend, tolerance, start)
    except SolveError:
        if start is None or not budget.spent:
            raise
        seconds = task.seconds(start)
        return ClusterMap(start, seconds, min(float(task.floors().sum()), seconds), False)


def check_method(name: str) -> None:
    """Refuses an unknown method; the nearest is named."""
    if name not in METHODS:
        raise InputError(f"program2 {name!r} is unknown; {nearest(name, METHODS)}")


def _by_chain(task: MappingTask, budget: Budget) -> ClusterMap:
    states = _states(task.kinds)

    def transfer(layer: int) -> FloatArray:
        if budget.spent:
            raise SolveError(
                f"the time limit of {budget.seconds} s passed in MoETuner's second program; allow more seconds"
            )
        largest = np.zeros((len(states), len(states)))
        for (c, successor), traffic in np.ndenumerate(task.traffic[layer]):
            if traffic > 0:
                here, there = states[:, c], states[:, successor]
                np.maximum(largest, traffic * task.cost[here[:, None], there[None, :]], out=largest)
        return largest

    chosen, _ = cheapest_path([np.zeros(len(states))] * (len(task.traffic) + 1), transfer)
    seconds = task.seconds(states[chosen])
    return ClusterMap(states[chosen], seconds, seconds, True)


def _by_ilp(task: MappingTask, budget: Budget, backend: str, tolerance: float, start: IntArray | None) -> ClusterMap:
    floors = task.floors()
    floor = float(floors.sum())
    if start is not None:
        seconds = task.seconds(start)
        budget.report(seconds, min(floor, seconds), "greedy mapping")
        if seconds - floor <= max(tolerance, RELATIVE_TOLERANCE) * seconds:
            return ClusterMap(start, seconds, min(floor, seconds), True)
    elif not (task.traffic.any() and task.cost.any()):
        return ClusterMap(np.tile(np.arange(len(task.kinds)), (len(task.traffic) + 1, 1)), 0.0, 0.0, True)
    program = mapping_program(task.traffic, task.cost, task.allowed, floors, task.nodes, budget)
    unit = program.unit

    def tell(value: float, bound: float | None) -> None:
        budget.report(value * unit, max(floor, (bound or 0.0) * unit))

    result = solve_ilp(
        program.model,
        budget,
        backend=backend,
        relative_gap=tolerance,
        start=None if start is None else program.start(start),
        report=tell,
    )
    device_of = program.mapping(result.values)
    seconds = task.seconds(device_of)
    bound = max(floor, 0.0 if result.bound is None else result.bound * unit)
    return ClusterMap(device_of, seconds, min(bound, seconds), result.finished)


def _start(task: MappingTask) -> IntArray:
    """[L, G] the better of clusters staying in place and each layer's assignment by summed cost after the last."""
    from scipy.optimize import linear_sum_assignment

    stay = np.tile(np.arange(len(task.kinds)), (len(task.traffic) + 1, 1))
    follow = stay.copy()
    for layer, traffic in enumerate(task.traffic):
        # [c', d'] summed cost of the flows into cluster c' if it stood on d'.
        cost = traffic.T @ task.cost[follow[layer]]
        forbidden = (cost.max() + 1.0) * len(task.kinds)
        rows, columns = linear_sum_assignment(np.where(task.allowed, cost, forbidden))
        follow[layer + 1, rows] = columns
    return min(stay, follow, key=task.seconds)


def _floor(traffic: FloatArray, cost: FloatArray, allowed: BoolArray) -> FloatArray:
    fastest_first = np.sort(cost, axis=1)
    floors = np.zeros(len(traffic))
    for layer, heaviest_first in enumerate(-np.sort(-traffic, axis=2)):
        largest = (heaviest_first[:, None, :] * fastest_first[None, :, :]).max(axis=2)
        floors[layer] = np.where(allowed, largest, np.inf).min(axis=1).max()
    return floors


def _states(kinds: IntArray) -> IntArray:
    """[S, G] every way to put clusters on devices of their kind: the device of each cluster."""
    alike = [np.flatnonzero(kinds == kind) for kind in np.unique(kinds)]
    states = []
    for orders in product(*(permutations(members.tolist()) for members in alike)):
        state = np.empty(len(kinds), dtype=np.int64)
        for members, order in zip(alike, orders, strict=True):
            state[members] = order
        states.append(state)
    return np.array(states)
