"""The integer program that puts clusters on devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .._types import BoolArray, FloatArray, IntArray
from ..placement.errors import SolveError, UnsupportedError
from .base import Budget
from .ilp import add_row

if TYPE_CHECKING:
    import pulp


SCALE = 1e6
"""Objective inside the program if every layer's largest flow took the slowest link."""

MAX_LINKS = 200_000
"""Link variables beyond which building the program takes minutes."""


@dataclass(frozen=True)
class Link:
    """Cluster c of a layer on device d, its successor cluster on one of `near`: the transfer then takes `seconds`."""

    layer: int
    cluster: int
    successor: int
    device: int
    near: tuple[int, ...]
    seconds: float

    @property
    def name(self) -> str:
        return f"y_{self.layer}_{self.cluster}_{self.successor}_{self.device}_{self.near[0]}"


@dataclass(frozen=True)
class MappingProgram:
    """The program and its meaning; its objective counts `unit` seconds."""

    model: pulp.LpProblem
    traffic: FloatArray
    cost: FloatArray
    allowed: BoolArray
    floors: FloatArray
    links: tuple[Link, ...]
    nodes: IntArray | None
    unit: float

    def start(self, device_of: IntArray) -> dict[str, float]:
        """A value for every variable from [L, G] the device of each cluster."""
        if self.nodes is not None:
            device_of = _renamed(device_of, self.nodes)
        values = {
            _on(layer, c, d): float(device_of[layer, c] == d)
            for layer in range(len(device_of))
            for c, d in np.argwhere(self.allowed)
        }
        for link in self.links:
            here, there = device_of[link.layer, link.cluster], device_of[link.layer + 1, link.successor]
            values[link.name] = float(here == link.device and there in link.near)
        transfers = self.traffic * self.cost[device_of[:-1, :, None], device_of[1:, None, :]]
        for layer, largest in enumerate(np.maximum(transfers.max(axis=(1, 2)), self.floors)):
            values[_longest(layer)] = float(largest) / self.unit
        return values

    def mapping(self, values: Mapping[str, float]) -> IntArray:
        """[L, G] device of each cluster."""
        held = np.zeros((len(self.traffic) + 1, *self.allowed.shape))
        for layer in range(len(held)):
            for c, d in np.argwhere(self.allowed):
                held[layer, c, d] = values[_on(layer, c, d)]
        return np.asarray(held.argmax(axis=2), dtype=np.int64)


def mapping_program(
    traffic: FloatArray,
    cost: FloatArray,
    allowed: BoolArray,
    floors: FloatArray,
    nodes: IntArray | None,
    budget: Budget,
) -> MappingProgram:
    """Builds the program for traffic [L-1, G, G] (not all zero), seconds a byte [G, G], where clusters may stand
    [G, G], a lower bound of each layer's largest transfer [L-1], and nodes (see `MappingTask`).

    b[l,c,d]: cluster c of layer l is on device d. M[l]: the longest transfer between two devices after layer l.

        minimise    sum_l M[l]
        subject to  sum_d b[l,c,d] = 1,  sum_c b[l,c,d] = 1,  M[l] >= floors[l]
                    M[l] >= transfer of c to its successor c', wherever b puts both

    Only flows that can exceed floors[l] on some link need the last row, which leaves few. It is linearised by y: c is
    on d and c' within reach of d at some speed; devices that the flow reaches within floors[l] are one class, the
    slowest class needs no y. As no more clusters than a class has devices can be within it, sums of y are limited
    too (reformulation-linearisation).

    Raises:
        UnsupportedError: more than MAX_LINKS y. SolveError: the budget was spent half way.
    """
    import pulp

    layers, devices = len(traffic) + 1, len(cost)
    heavy = [w * cost.max() > floor * (1 + 1e-12) for w, floor in zip(traffic, floors, strict=True)]
    _check_size(traffic, cost, floors, heavy)
    unit = float((traffic.max(axis=(1, 2)) * cost.max()).sum()) / SCALE
    model = pulp.LpProblem("moetuner_mapping", pulp.LpMinimize)
    b = [
        {(c, d): model.add_variable(_on(layer, c, d), 0, 1, pulp.LpInteger) for c, d in np.argwhere(allowed).tolist()}
        for layer in range(layers)
    ]
    for on in b:
        for k in range(devices):
            add_row(model, [(v, 1) for (c, _), v in on.items() if c == k], "==", 1)
            add_row(model, [(v, 1) for (_, d), v in on.items() if d == k], "==", 1)
    longest = [model.add_variable(_longest(layer), float(floor) / unit) for layer, floor in enumerate(floors)]
    model.setObjective(pulp.LpAffineExpression([(m, 1) for m in longest]))
    links: list[Link] = []
    for layer, pairs in enumerate(heavy):
        y: dict[Link, pulp.LpVariable] = {}
        for c, successor in np.argwhere(pairs).tolist():
            if budget.spent:
                raise SolveError(
                    f"the time limit of {budget.seconds} s passed while MoETuner's second program was being built; "
                    "allow more seconds, or use a warm start"
                )
            row = [(longest[layer], -1.0)]
            for d in np.flatnonzero(allowed[c]).tolist():
                classes, slowest = _classes(layer, c, successor, d, traffic, cost, allowed, float(floors[layer]))
                row.append((b[layer][c, d], slowest / unit))
                for link in classes:
                    y[link] = model.add_variable(link.name, 0, 1)
                    row.append((y[link], (link.seconds - slowest) / unit))
                    add_row(model, [(y[link], 1), *((b[layer + 1][successor, e], -1) for e in link.near)], "<=", 0)
                if classes:
                    add_row(model, [*((y[link], 1) for link in classes), (b[layer][c, d], -1)], "<=", 0)
            add_row(model, row, "<=", 0)
        _limit_sums(model, b[layer], y, allowed)
        links += y
    if nodes is not None:
        place = np.arange(devices) - np.searchsorted(nodes, nodes)
        for (c, d), variable in b[0].items():
            if nodes[d] + place[d] > c:
                variable.upBound = 0
    return MappingProgram(model, traffic, cost, allowed, floors, tuple(links), nodes, unit)


def _check_size(traffic: FloatArray, cost: FloatArray, floors: FloatArray, heavy: list[BoolArray]) -> None:
    speeds = np.concatenate([np.unique(row[row > 0]) for row in cost])
    count = 0
    for weights, floor, pairs in zip(traffic, floors, heavy, strict=True):
        count += int((weights[pairs][:, None] * speeds[None, :] > floor).sum())
    if count > MAX_LINKS:
        raise UnsupportedError(
            f"MoETuner's second program for {len(cost)} devices and {len(traffic) + 1} layers would have {count:,} link "
            f"variables (limit {MAX_LINKS:,}): too large for an integer program; place on fewer devices, or use the "
            "search solver"
        )


def _limit_sums(
    model: pulp.LpProblem,
    on: Mapping[tuple[int, int], pulp.LpVariable],
    y: Mapping[Link, pulp.LpVariable],
    allowed: BoolArray,
) -> None:
    """No more clusters than a class has devices can be in it: seen from the cluster here, and from the one there."""
    from_here: dict[tuple[int, int], list[Link]] = {}
    to_there: dict[int, list[Link]] = {}
    for link in y:
        from_here.setdefault((link.cluster, link.device), []).append(link)
        to_there.setdefault(link.successor, []).append(link)
    for at, mine in from_here.items():
        within = len({e for link in mine for e in link.near})
        add_row(model, [*((y[link], 1) for link in mine), (on[at], -within)], "<=", 0)
    for successor, mine in to_there.items():
        reach = np.zeros(allowed.shape, dtype=bool)
        for link in mine:
            reach[link.device, list(link.near)] = True
        add_row(model, [(y[link], 1) for link in mine], "<=", int(reach[:, allowed[successor]].sum(axis=0).max()))


def _classes(
    layer: int,
    c: int,
    successor: int,
    d: int,
    traffic: FloatArray,
    cost: FloatArray,
    allowed: BoolArray,
    floor: float,
) -> tuple[list[Link], float]:
    """The classes of devices by how long the flow takes to them from d, all but the slowest, and the slowest's time."""
    there = np.flatnonzero(allowed[successor])
    seconds = float(traffic[layer, c, successor]) * cost[d, there]
    # Within the floor every speed is as good as another; M is at least the floor anyway.
    seconds = np.where(seconds <= floor * (1 + 1e-12), 0.0, seconds)
    times = np.unique(seconds)
    links = [
        Link(layer, c, successor, d, tuple(there[seconds == time].tolist()), float(time))
        for time in times[:-1].tolist()
    ]
    return links, float(times[-1])


def _renamed(device_of: IntArray, nodes: IntArray) -> IntArray:
    """Exchanges nodes, and devices in a node, so that the first layer's clusters 0, 1, ... open them in order."""
    size = int((nodes == 0).sum())
    members: dict[int, list[int]] = {}
    for d in device_of[0].tolist():
        members.setdefault(int(nodes[d]), []).append(d)
    new = np.empty(len(nodes), dtype=np.int64)
    for node, mine in enumerate(members.values()):
        new[mine] = node * size + np.arange(size)
    return np.asarray(new[device_of])


def _on(layer: int, cluster: int, device: int) -> str:
    return f"b_{layer}_{cluster}_{device}"


def _longest(layer: int) -> str:
    return f"m_{layer}"
