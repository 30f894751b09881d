"""MoETuner: even clusters of experts first, then the clusters to devices so that no device pair's traffic sticks out.

From top to bottom: the solver; its first program, a layer's experts in clusters of even load; its second, which cluster
of each layer goes to which device, by an integer program or by the cheapest path through all permutations.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from .._types import BoolArray, FloatArray, IntArray
from ..placement.cost import dispatch_bytes
from ..placement.errors import InputError, SolveError, UnsupportedError, nearest
from ..placement.plan import RELATIVE_TOLERANCE, Certificate, Stop
from ..placement.problem import Problem
from ..placement.topology import Topology
from .base import Budget, Feature, Needs, Solution, fill_slots
from .chain import cheapest_path
from .mip.program import Program, ProgramBuilder, check_backend, forbidden_names, renaming, solve_program

SCALE = 1e6
"""Size of both programs' objectives, so that solver tolerances are small beside them: a layer's load in the first,
every layer's largest flow over the slowest link in the second."""
METHODS = ("auto", "ilp", "chain")
CHAIN_AUTO = 720
CHAIN_LIMIT = 5040
"""Permutations of a layer's clusters up to which the chain is taken unasked, and at all (7 devices: seconds a
layer)."""
MAX_LINKS = 1_000_000
"""Link variables beyond which the second program takes more than 2 GB."""


class MoeTuner:
    """The two integer programs of Go and Mahajan, "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert
    Placement and Token Routing" (arXiv 2502.06643). The first parts each layer's experts into one cluster a device,
    minimising the sum of abs(cluster load - target); the second puts clusters on devices, minimising the largest
    transfer between two devices, summed over layers. Targets are equal, or in proportion to the devices' compute.
    """

    name = "moetuner"
    supports = frozenset({Feature.UNEVEN_SLOTS})
    needs = frozenset({Needs.TRANSITIONS})

    def solve(
        self,
        problem: Problem,
        budget: Budget,
        *,
        backend: str = "portfolio",
        tolerance: float = 0.025,
        program2: str = "auto",
        warm_start: bool = True,
    ) -> Solution:
        """Places the experts; see `Solver` for the contract.

        Args:
            problem, budget: As of every solver. The first program gets half of the time limit.
            backend: A name of `mip.BACKENDS`.
            tolerance: Relative gap at which each program may stop, the paper's by default (see `cluster_layer` for the
                first).
            program2: "ilp", "chain" (exact, few devices) or "auto".
            warm_start: Begin from greedy solutions, so that there is always a plan.

        Returns:
            The plan, with a certificate of the second program.

        The certificate speaks of the second program: its value and bound hold among plans with these clusters, and
        its text says how far from their targets the clusters are, and have to be. Clusters of other loads may allow
        less traffic: nothing is proven about the two together.

        Raises:
            InputError: an unknown backend or program2, or a tolerance outside [0, 1).
            UnsupportedError: no transitions, or too large a program. SolveError: no placement in time (without
                warm_start).
        """
        check_backend(backend)
        check_method(program2)
        if not (math.isfinite(tolerance) and 0.0 <= tolerance < 1.0):
            raise InputError(f"tolerance ({tolerance}) must be at least 0 and below 1 (0.025 stops within 2.5 %)")
        transitions, load = problem.statistics.total_transitions, problem.statistics.total_load
        clusters = _clusters(problem, load, budget, backend, tolerance, warm_start)
        cluster_of = np.stack([layer.cluster_of for layer in clusters])
        task = _task(problem, transitions, cluster_of)
        interrupted = any(layer.stop == "interrupted" for layer in clusters)
        mapped = map_clusters(
            task,
            Budget(seconds=1e-9, seed=budget.seed) if interrupted and warm_start else budget,
            method=program2,
            backend=backend,
            tolerance=tolerance,
            warm_start=warm_start,
        )
        budget.report(mapped.seconds, mapped.bound)
        device_of = np.take_along_axis(mapped.device_of, cluster_of, axis=1)
        stops = [mapped.stop, *(layer.stop for layer in clusters)]
        return Solution(
            fill_slots(device_of),
            Certificate(_objective(clusters, float(load.sum())), mapped.seconds, mapped.bound),
            stop=next((stop for stop in ("interrupted", "time limit") if stop in stops), "finished"),
        )


def _clusters(
    problem: Problem, load: FloatArray, budget: Budget, backend: str, tolerance: float, warm_start: bool
) -> list[LayerClusters]:
    """The first program, layer by layer; each takes an even part of what the first half of the budget has left."""
    sizes = problem.slots_per_device
    compute = np.where(sizes > 0, problem.topology.compute, 0.0)
    half = None if budget.left is None else budget.elapsed + budget.left / 2
    clusters: list[LayerClusters] = []
    for layer, name in enumerate(problem.model.moe_layers):
        # After Ctrl-C what is left gets its start.
        interrupted = warm_start and any(done.stop == "interrupted" for done in clusters)
        budget.report(None, None, f"clustering the experts of layer {name}")
        clusters.append(
            cluster_layer(
                load[layer],
                sizes,
                load[layer].sum() * compute / compute.sum(),
                budget,
                backend=backend,
                tolerance=tolerance,
                seconds=0.0
                if interrupted
                else None
                if half is None
                else max(0.0, half - budget.elapsed) / (len(load) - layer),
                warm_start=warm_start,
            )
        )
    return clusters


def _task(problem: Problem, transitions: FloatArray, cluster_of: IntArray) -> MappingTask:
    """The second program's traffic, in bytes of a million tokens."""
    topology, devices = problem.topology, problem.num_devices
    member = np.zeros((*cluster_of.shape, devices))
    np.put_along_axis(member, cluster_of[:, :, None], 1.0, axis=2)
    tokens = float(transitions.sum(axis=(1, 2)).max(initial=0.0)) / problem.model.top_k
    scale = 1e6 * dispatch_bytes(problem.model, problem.objective) / tokens if tokens > 0 else 0.0
    same = list(zip(problem.slots_per_device.tolist(), topology.compute.tolist(), strict=True))
    kinds = np.array([same.index(kind) for kind in same], dtype=np.int64)
    return MappingTask(
        traffic=scale * np.einsum("lic,lij,ljd->lcd", member[:-1], transitions, member[1:], optimize=True),
        cost=pair_cost(topology),
        kinds=kinds,
        nodes=topology.node_of if topology.is_uniform and not kinds.any() else None,
    )


def _objective(clusters: list[LayerClusters], load: float) -> str:
    misses, bound = (
        sum(values) / load if load else 0.0 for values in zip(*((c.deviation, c.bound) for c in clusters), strict=True)
    )
    return (
        "largest device-pair transfer, summed over layers, seconds per million tokens, given these clusters "
        f"(their loads miss even targets by {misses:.3%} of all load, any clusters by {bound:.3%} or more)"
    )


@dataclass(frozen=True)
class LayerClusters:
    """A layer's clusters. cluster_of: [E]. deviation: sum of abs(cluster load - target), in tokens. bound: no clusters
    of these sizes deviate less.
    """

    cluster_of: IntArray
    deviation: float
    bound: float
    stop: Stop


def cluster_layer(
    load: FloatArray,
    sizes: IntArray,
    targets: FloatArray,
    budget: Budget,
    *,
    backend: str = "portfolio",
    tolerance: float = 0.0,
    seconds: float | None = None,
    warm_start: bool = True,
) -> LayerClusters:
    """Minimises sum_c abs(load of cluster c - targets[c]) with sizes[c] experts in cluster c.

    load: [E]. sizes, targets: [G], sizes summing to E. tolerance: relative gap to stop at, or the same fraction of
    the mean target as an absolute gap, whichever is met first: the best deviation is often nearly 0, where a relative
    gap never closes.

    Raises:
        SolveError: no clusters found in time (without warm_start).
    """
    total = float(load.sum())
    packed = _packed(load, sizes, targets)
    if total == 0.0 or np.count_nonzero(sizes) == 1:
        deviation = _deviation(load, packed, targets)
        return LayerClusters(packed, deviation, deviation, "finished")
    scale, used = SCALE / total, np.flatnonzero(sizes)
    experts, clusters = len(load), len(used)
    # Names of clusters that are alike are taken in order of load.
    order = np.argsort(-load, kind="stable")
    kinds = list(zip(sizes.tolist(), targets.tolist(), strict=True))
    upper, place = np.ones((experts, clusters)), np.cumsum(sizes > 0) - 1
    for rank, c in forbidden_names(experts, kinds):
        if sizes[c]:
            upper[order[rank], place[c]] = 0.0
    builder = ProgramBuilder("moetuner_clusters")
    inside = builder.add_variables((experts, clusters), upper=upper, integral=True)
    aims = scale * targets[used]
    misses = builder.add_variables((clusters,), upper=np.maximum(aims, SCALE), cost=1.0)
    builder.add_rows(inside, 1.0, 1.0, 1.0)
    builder.add_rows(inside.T, 1.0, sizes[used], sizes[used])
    columns = np.concatenate([inside.T, misses[:, None]], axis=1)
    builder.add_rows(columns, np.append(scale * load, -1.0), upper=aims)
    builder.add_rows(columns, np.append(scale * load, 1.0), lower=aims)
    # A cluster without experts misses its whole target, whatever the others do.
    lost = float(targets[sizes == 0].sum())
    builder.constant = scale * lost
    program = builder.build()
    start = None
    if warm_start:
        named = renaming(packed[order], kinds)[packed]
        start = np.zeros(program.variables)
        start[inside] = named[:, None] == used
        loads = np.bincount(named, weights=load, minlength=len(sizes))
        start[misses] = scale * np.abs(loads - targets)[used]
    result = solve_program(
        program,
        budget,
        backend=backend,
        seconds=seconds,
        relative_gap=tolerance,
        absolute_gap=tolerance * SCALE / clusters,
        start=start,
    )
    cluster_of = used[result.solution(program)[inside].argmax(axis=1)]
    deviation = _deviation(load, cluster_of, targets)
    bound = max(lost, result.bound / scale)
    return LayerClusters(cluster_of, deviation, min(bound, deviation), result.stop)


def _deviation(load: FloatArray, cluster_of: IntArray, targets: FloatArray) -> float:
    cluster_load = np.bincount(cluster_of, weights=load, minlength=len(targets))
    return float(np.abs(cluster_load - targets).sum())


def _packed(load: FloatArray, sizes: IntArray, targets: FloatArray) -> IntArray:
    """[E] clusters by descending load, each expert to the cluster furthest below its target that has room."""
    room, missing = sizes.copy(), targets.astype(np.float64).copy()
    cluster_of = np.empty(len(load), dtype=np.int64)
    for i in np.argsort(-load, kind="stable"):
        c = int(np.where(room > 0, missing, -np.inf).argmax())
        cluster_of[i] = c
        room[c] -= 1
        missing[c] -= load[i]
    return cluster_of


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
    stop: Stop


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
    backend: str = "portfolio",
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
        return ClusterMap(start, seconds, min(float(task.floors().sum()), seconds), "time limit")


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
    return ClusterMap(states[chosen], seconds, seconds, "finished")


def _by_ilp(task: MappingTask, budget: Budget, backend: str, tolerance: float, start: IntArray | None) -> ClusterMap:
    floors = task.floors()
    floor = float(floors.sum())
    if start is not None:
        seconds = task.seconds(start)
        budget.report(seconds, min(floor, seconds), "greedy mapping")
        if seconds - floor <= max(tolerance, RELATIVE_TOLERANCE) * seconds:
            return ClusterMap(start, seconds, min(floor, seconds), "finished")
    elif not (task.traffic.any() and task.cost.any()):
        return ClusterMap(np.tile(np.arange(len(task.kinds)), (len(task.traffic) + 1, 1)), 0.0, 0.0, "finished")
    program = mapping_program(task.traffic, task.cost, task.allowed, floors, task.nodes)
    unit = program.unit

    def tell(value: float, bound: float | None) -> None:
        budget.report(value * unit, max(floor, (bound or 0.0) * unit))

    result = solve_program(
        program.program,
        budget,
        backend=backend,
        relative_gap=tolerance,
        start=None if start is None else program.start(start),
        report=tell,
    )
    device_of = program.mapping(result.solution(program.program))
    seconds = task.seconds(device_of)
    return ClusterMap(device_of, seconds, min(max(floor, result.bound * unit), seconds), result.stop)


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


@dataclass(frozen=True, eq=False)
class MappingProgram:
    """The program and its meaning; its objective counts `unit` seconds.

    Args:
        program: What to solve.
        traffic, cost, allowed, floors, nodes: As given to `mapping_program`.
        unit: See above.
        on: [L, G, G] numbers of the variables that say that a cluster is on a device; -1 where it may not be.
        longest: [L-1] those of each layer's longest transfer.
        links: [links, 4] layer, cluster, successor and device of each link variable; near: [links, G] where the
            successor then is.
        link: [links] their numbers.
    """

    program: Program
    traffic: FloatArray
    cost: FloatArray
    allowed: BoolArray
    floors: FloatArray
    nodes: IntArray | None
    unit: float
    on: IntArray
    longest: IntArray
    links: IntArray
    near: BoolArray
    link: IntArray

    def start(self, device_of: IntArray) -> FloatArray:
        """[variables] values of [L, G] the device of each cluster."""
        if self.nodes is not None:
            device_of = _renamed(device_of, self.nodes)
        values = np.zeros(self.program.variables)
        there = device_of[..., None] == np.arange(len(self.cost))
        values[self.on[:, self.allowed]] = there[:, self.allowed]
        layer, c, successor, device = self.links.T
        reached = self.near[np.arange(len(self.links)), device_of[layer + 1, successor]]
        values[self.link] = (device_of[layer, c] == device) & reached
        transfers = self.traffic * self.cost[device_of[:-1, :, None], device_of[1:, None, :]]
        values[self.longest] = np.maximum(transfers.max(axis=(1, 2)), self.floors) / self.unit
        return values

    def mapping(self, values: FloatArray) -> IntArray:
        """[L, G] device of each cluster."""
        return np.asarray(np.where(self.allowed, values[self.on], -1.0).argmax(axis=2), dtype=np.int64)


def mapping_program(
    traffic: FloatArray, cost: FloatArray, allowed: BoolArray, floors: FloatArray, nodes: IntArray | None
) -> MappingProgram:
    """The program for traffic [L-1, G, G] (not all zero), seconds a byte [G, G], where clusters may stand [G, G], a
    lower bound of each layer's largest transfer [L-1], and nodes (see `MappingTask`).

    b[l,c,d]: cluster c of layer l is on device d. M[l]: the longest transfer between two devices after layer l.

        minimise    sum_l M[l]
        subject to  sum_d b[l,c,d] = 1,  sum_c b[l,c,d] = 1,  M[l] >= floors[l]
                    M[l] >= transfer of c to its successor c', wherever b puts both

    Only flows that can exceed floors[l] on some link need the last row, which leaves few. It is linearised by y: c is
    on d and c' within reach of d at some speed; devices that the flow reaches within floors[l] are one class, the
    slowest class needs no y. As no more clusters than a class has devices can be within it, sums of y are limited
    too (reformulation-linearisation).

    Raises:
        UnsupportedError: more than MAX_LINKS y.
    """
    layers, devices = len(traffic) + 1, len(cost)
    _check_size(traffic, cost, floors)
    most = traffic.max(axis=(1, 2)) * cost.max()
    unit = float(most.sum()) / SCALE
    builder = ProgramBuilder("moetuner_mapping")
    upper = np.ones((layers, devices, devices))
    if nodes is not None:
        # Nodes and their devices are named by the first layer's clusters, in order.
        place = np.arange(devices) - np.searchsorted(nodes, nodes)
        upper[0][nodes + place > np.arange(devices)[:, None]] = 0.0
    on = np.full((layers, devices, devices), -1, dtype=np.int64)
    on[:, allowed] = builder.add_variables((layers, int(allowed.sum())), upper=upper[:, allowed], integral=True)
    layer, row, column = np.nonzero(on >= 0)
    numbers = on[layer, row, column]
    for index in (layer * devices + row, layer * devices + column):
        builder.add_sparse_rows(layers * devices, index, numbers, 1.0, 1.0, 1.0)
    longest = builder.add_variables((layers - 1,), lower=floors / unit, upper=np.maximum(most, floors) / unit, cost=1.0)
    parts = [
        _add_links(
            builder,
            boundary,
            traffic[boundary],
            cost,
            allowed,
            float(floors[boundary]),
            unit,
            on,
            longest[boundary],
        )
        for boundary in range(layers - 1)
    ]
    links, near, link = zip(*parts, strict=True)
    return MappingProgram(
        builder.build(),
        traffic,
        cost,
        allowed,
        floors,
        nodes,
        unit,
        on,
        longest,
        np.concatenate(links),
        np.concatenate(near),
        np.concatenate(link),
    )


def _check_size(traffic: FloatArray, cost: FloatArray, floors: FloatArray) -> None:
    speeds = np.concatenate([np.unique(row[row > 0]) for row in cost])
    count = 0
    for weights, floor in zip(traffic, floors, strict=True):
        heavy = weights[weights * cost.max() > floor * (1 + 1e-12)]
        count += int((heavy[:, None] * speeds[None, :] > floor).sum())
    if count > MAX_LINKS:
        raise UnsupportedError(
            f"MoETuner's second program for {len(cost)} devices and {len(traffic) + 1} layers would have {count:,} "
            f"link variables (limit {MAX_LINKS:,}): too large for an integer program; place on fewer devices, or use "
            "the search solver"
        )


def _add_links(
    builder: ProgramBuilder,
    layer: int,
    traffic: FloatArray,
    cost: FloatArray,
    allowed: BoolArray,
    floor: float,
    unit: float,
    on: IntArray,
    longest: np.int64,
) -> tuple[IntArray, BoolArray, IntArray]:
    """Adds the link variables y between a layer and the next, with their rows.

    Returns:
        Layer, cluster, successor and device of each y [links, 4]; where the successor then is [links, G]; numbers
        [links].
    """
    devices = len(cost)
    # [F, D]: every flow that may matter, from each device its cluster may be on.
    c, successor = np.nonzero(traffic * cost.max() > floor * (1 + 1e-12))
    flow, device = np.nonzero(allowed[c])
    there = allowed[successor[flow]]
    seconds = traffic[c, successor][flow, None] * cost[device]
    # Within the floor every speed is as good as another; M is at least the floor anyway.
    seconds = np.where(seconds <= floor * (1 + 1e-12), 0.0, seconds)
    slowest = np.where(there, seconds, -np.inf).max(axis=1, initial=-np.inf)
    # A class: the devices that take equally long, all but the slowest; named by the first of them.
    times = np.where(there, seconds, np.inf)
    ordered = np.sort(times, axis=1)
    first = np.concatenate([np.ones((len(flow), 1), bool), ordered[:, 1:] > ordered[:, :-1]], axis=1)
    at, rank = np.nonzero(first & (ordered < slowest[:, None]))
    time = ordered[at, rank]
    near = times[at] == time[:, None]
    y = builder.add_variables((len(at),), implied=True)
    mine, hers, here = c[flow[at]], successor[flow[at]], device[at]

    # M is at least the flow's time: its slowest, less what the class saves that it is in.
    flows, stands = len(c), on[layer, c[flow], device]
    builder.add_sparse_rows(
        flows,
        np.concatenate([np.arange(flows), flow, flow[at]]),
        np.concatenate([np.full(flows, longest), stands, y]),
        np.concatenate([np.full(flows, -1.0), slowest / unit, (time - slowest[at]) / unit]),
        upper=0.0,
    )
    # y only where the successor is in the class, and only where the cluster is on the device.
    which, e = np.nonzero(near)
    builder.add_sparse_rows(
        len(y),
        np.concatenate([np.arange(len(y)), which]),
        np.concatenate([y, on[layer + 1, hers[which], e]]),
        np.concatenate([np.ones(len(y)), np.full(len(which), -1.0)]),
        upper=0.0,
    )
    pairs, pair = np.unique(at, return_inverse=True)
    builder.add_sparse_rows(
        len(pairs),
        np.concatenate([pair, np.arange(len(pairs))]),
        np.concatenate([y, stands[pairs]]),
        np.concatenate([np.ones(len(y)), np.full(len(pairs), -1.0)]),
        upper=0.0,
    )
    # No more successors than a cluster's classes have devices can be in them,
    places, place = np.unique(mine * devices + here, return_inverse=True)
    reach = np.zeros((len(places), devices), dtype=bool)
    np.logical_or.at(reach, place, near)
    builder.add_sparse_rows(
        len(places),
        np.concatenate([place, np.arange(len(places))]),
        np.concatenate([y, on[layer, places // devices, places % devices]]),
        np.concatenate([np.ones(len(y)), -reach.sum(axis=1)]),
        upper=0.0,
    )
    # nor more clusters than can reach the successor's device.
    ends, end = np.unique(hers, return_inverse=True)
    reached = np.zeros((len(ends), devices, devices), dtype=bool)
    np.logical_or.at(reached, (end, here), near)
    limits = np.where(allowed[ends], reached.sum(axis=1), 0).max(axis=1, initial=0)
    builder.add_sparse_rows(len(ends), end, y, 1.0, upper=limits)
    links = np.stack([np.full(len(y), layer), mine, hers, here], axis=1)
    return links, near, y


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
