"""Where a search may begin: balanced, grouped, swept for transitions, and the plan in force."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..._types import BoolArray, FloatArray, IntArray
from ...placement.degraded import failure_mask
from ...placement.errors import InputError, SolveError, UnsupportedError
from ...placement.packing import deal, pack, replicate
from ...placement.plan import Plan
from ...placement.problem import Problem
from ..base import Budget, fill_slots
from ..exflow import assignment_sweeps
from ..mip.program import Program, ProgramBuilder, solve_program
from ..moetuner import pair_cost
from .annealer import Start
from .moves import MoveRules
from .scenario import Scenario


def balanced_layer(load: FloatArray, slots_per_device: IntArray, speed: FloatArray, allowed: BoolArray) -> IntArray:
    """[P] expert of each slot (slots ordered by device), no expert twice on a device.

    load: [E]. speed: [G] relative compute rates. allowed: [E, G].

    Raises:
        SolveError: the pinned and forbidden devices leave no placement that this finds.
    """
    return balanced_layers(load[None], slots_per_device[None], speed, allowed[None])[0]


def balanced_layers(load: FloatArray, layer_slots: IntArray, speed: FloatArray, allowed: BoolArray) -> list[IntArray]:
    """As `balanced_layer`, of layers with load [L, E], layer_slots [L, G] and allowed [L, E, G]."""
    tables: list[IntArray] = [np.zeros(0, dtype=np.int64)] * len(load)
    for slots in np.unique(layer_slots, axis=0):
        layers = np.flatnonzero((layer_slots == slots).all(axis=1))
        for layer, table in zip(layers, _balanced(load[layers], slots, speed, allowed[layers]), strict=True):
            tables[layer] = table
    return tables


def _balanced(load: FloatArray, slots: IntArray, speed: FloatArray, allowed: BoolArray) -> list[IntArray]:
    """`balanced_layers` of layers with the same slots [G]."""
    choices, total = allowed.sum(axis=2), int(slots.sum())
    if total > int(choices.sum(axis=1).min()):
        raise SolveError(
            f"{total} slots a layer, but only {int(choices.sum(axis=1).min())} replicas fit without standing twice on "
            "a device"
        )
    copies = np.sort(replicate(load, total, choices), axis=1)
    count = np.stack([np.bincount(row, minlength=load.shape[1]) for row in copies])
    weight = load / count
    orders = [row[np.lexsort((row, -weight[layer][row], choices[layer][row]))] for layer, row in enumerate(copies)]
    order = np.stack(orders)
    devices = deal(np.take_along_axis(weight, order, axis=1), order, slots, speed, allowed)
    tables = []
    for layer, device in enumerate(devices):
        holds = np.zeros(allowed.shape[1:], dtype=bool)
        if (device >= 0).all():
            holds[order[layer], device] = True
        else:
            _deal_with_detours(order[layer], weight[layer], slots, speed, allowed[layer], holds)
        tables.append(np.nonzero(holds.T)[1].astype(np.int64))
    return tables


def _deal_with_detours(
    order: IntArray, weight: FloatArray, slots: IntArray, speed: FloatArray, allowed: BoolArray, holds: BoolArray
) -> None:
    """Deals replicas into `holds` [E, G], moving others on where no device is left for one."""
    free, loaded = slots.copy(), np.zeros(len(slots))
    for expert in order:
        possible = allowed[expert] & ~holds[expert] & (free > 0)
        if not possible.any():
            _make_way(expert, allowed, holds, free, loaded, weight, speed)
            continue
        device = int(np.argmin(np.where(possible, (loaded + weight[expert] / speed), np.inf)))
        holds[expert, device] = True
        free[device] -= 1
        loaded[device] += weight[expert] / speed[device]


def even_shares(problem: Problem, tables: Sequence[IntArray]) -> list[FloatArray]:
    """[E, G] a layer, equal shares of the experts in its own slots [P_l]."""
    return [even_layer_share(problem, layer, table) for layer, table in enumerate(tables)]


def even_layer_share(problem: Problem, layer: int, table: IntArray) -> FloatArray:
    """[E, G] equal shares of the experts in a layer's own slots [P_l]."""
    share = np.zeros((problem.model.experts, problem.num_devices))
    share[table, problem.layer_slot_device(layer)] = 1.0
    return np.asarray(share / share.sum(axis=1, keepdims=True))


def _make_way(
    expert: int,
    allowed: BoolArray,
    holds: BoolArray,
    free: IntArray,
    loaded: FloatArray,
    weight: FloatArray,
    speed: FloatArray,
) -> None:
    """Puts `expert` on a full device by moving experts on, device by device, to one with a free slot: the shortest
    way."""
    came: dict[int, tuple[int, int]] = {
        int(device): (-1, expert) for device in np.flatnonzero(allowed[expert] & ~holds[expert])
    }
    queue = list(came)
    for device in queue:
        if free[device] > 0:
            free[device] -= 1
            while device >= 0:
                before, moved = came[device]
                holds[moved, device] = True
                loaded[device] += weight[moved] / speed[device]
                if before >= 0:
                    holds[moved, before] = False
                    loaded[before] -= weight[moved] / speed[before]
                device = before
            return
        for target in range(len(free)):
            movable = np.flatnonzero(holds[:, device] & ~holds[:, target] & allowed[:, target])
            if target not in came and len(movable):
                came[target] = device, int(movable[0])
                queue.append(target)
    raise SolveError(f"no device is left for expert {expert}: too many experts are pinned or forbidden")


# For engines that take the nearest replica: the hottest experts in every node.


def near_layer(load: FloatArray, slots_per_device: IntArray, speed: FloatArray, node_of: IntArray) -> IntArray:
    """[P] expert of each slot (slots ordered by device), no expert twice on a device.

    load: [E]. speed: [G] relative compute rates. node_of: [G], every node a run of devices. Spare slots give the
    hottest experts a replica in each node; each node is then balanced by itself.

    Raises:
        SolveError: slots so many that dealing a node's experts to its devices ends in a corner.
    """
    node_slots = np.bincount(node_of, weights=slots_per_device).astype(np.int64)
    node_speed = np.bincount(node_of, weights=speed).astype(np.float64)
    holds = _experts_of_nodes(load, node_slots, node_speed)
    part = load / holds.sum(axis=0)
    tables = []
    for node, mask in enumerate(holds):
        experts, devices = np.flatnonzero(mask), node_of == node
        anywhere = np.ones((len(experts), int(devices.sum())), dtype=bool)
        local = balanced_layer(part[experts], slots_per_device[devices], speed[devices], anywhere)
        tables.append(experts[local])
    return np.concatenate(tables)


def _experts_of_nodes(load: FloatArray, slots: IntArray, speed: FloatArray) -> BoolArray:
    """[N, E] which experts stand in each node, at most one replica in each; slots, speed: [N]."""
    nodes, experts = len(slots), len(load)
    free = np.minimum(slots, experts)
    hottest = np.argsort(-load, kind="stable")
    replicas = np.ones(experts, dtype=np.int64)
    spare = int(free.sum()) - experts
    full = min(experts, spare // max(1, nodes - 1))
    replicas[hottest[:full]] = nodes
    if full < experts:
        replicas[hottest[full]] += spare - full * (nodes - 1)
    holds, loaded = np.zeros((nodes, experts), dtype=bool), np.zeros(nodes)
    for expert in hottest:
        part = load[expert] / replicas[expert]
        order = np.argsort(np.where(free > 0, loaded + part / speed, np.inf), kind="stable")
        chosen = order[: min(int(replicas[expert]), int((free > 0).sum()))]
        holds[chosen, expert] = True
        free[chosen] -= 1
        loaded[chosen] += part / speed[chosen]
    for node in np.flatnonzero(free > 0):
        # A smaller node was full before its turn; the hottest experts it lacks take what is left here.
        lacking = hottest[~holds[node, hottest]]
        holds[node, lacking[: free[node]]] = True
    return holds


# Home nodes of expert groups, for routing that keeps a token's experts within few groups. Counts do not say which
# experts a token chose together. But with every group whole on one node a token visits at most as many nodes as
# groups, and a share x of a layer's load served elsewhere adds at most x * k nodes a token on average.


@dataclass(frozen=True)
class GroupHomes:
    """stray: [L, E, G] an expert's part of its layer's load on devices off its home node, else 0. most: what share of
    a layer's load may be served off its group's home. tables: slot tables [P_l] with none."""

    stray: FloatArray
    most: float
    tables: tuple[IntArray, ...]


def homes_of(problem: Problem, loads: FloatArray, moves: Sequence[MoveRules], most: float) -> GroupHomes:
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
    fitting = np.bincount(topology.node_of, weights=slots).astype(np.int64) // size
    if fitting.sum() < groups:
        raise InputError(
            f"off_home: {groups} groups of {size} experts do not fit the nodes, whose slots hold {fitting.tolist()} "
            "whole groups"
        )
    speed = np.bincount(topology.node_of, weights=topology.compute)
    by_group = loads.reshape(len(loads), groups, size).sum(axis=2)
    node = np.full(groups, -1, dtype=np.int64)
    carried = np.zeros((len(loads), len(fitting)))
    for group in np.argsort(-by_group.sum(axis=0), kind="stable"):
        after = (carried + by_group[:, [group]]) / speed
        taken = np.bincount(node[node >= 0], minlength=len(fitting))
        node[group] = int(np.where(taken < fitting, after.sum(axis=0), np.inf).argmin())
        carried[:, node[group]] += by_group[:, group]

    def value(assigned: IntArray) -> float:
        total = np.zeros((len(loads), len(fitting)))
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


def _at_home(problem: Problem, load: FloatArray, slots: IntArray, home: IntArray, moves: MoveRules) -> IntArray:
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


# For group-limited routing: whole expert groups on nodes, balanced inside, as tokens choose few groups and then need
# few nodes.


def groups_on_nodes(problem: Problem, load: FloatArray) -> list[IntArray] | None:
    """[P_l] experts of each layer's own slots, for loads [L, E]; None where groups do not fill nodes evenly."""
    topology, groups, experts = problem.topology, problem.model.groups, problem.model.experts
    nodes = topology.num_nodes
    node_slots = problem.layer_slots @ np.eye(nodes, dtype=np.int64)[topology.node_of]
    if nodes == 1 or groups % nodes or node_slots.min() < experts // nodes:
        return None
    weight = load.reshape(len(load), groups, -1).sum(axis=2)
    node_of_group, _ = pack(weight, np.full(nodes, groups // nodes))
    speed = topology.compute / topology.compute.mean()
    tables = []
    for row, slots, node_of_expert in zip(
        load, problem.layer_slots, np.repeat(node_of_group, experts // groups, axis=1), strict=True
    ):
        slot_device = np.repeat(np.arange(len(slots)), slots)
        table = np.empty(len(slot_device), dtype=np.int64)
        for node in range(nodes):
            mine, devices = np.flatnonzero(node_of_expert == node), np.flatnonzero(topology.node_of == node)
            everywhere = np.ones((len(mine), len(devices)), dtype=bool)
            inside = balanced_layer(row[mine], slots[devices], speed[devices], everywhere)
            table[np.isin(slot_device, devices)] = mine[inside]
        tables.append(table)
    return tables


# Devices renamed layer by layer so that tokens find their next experts near: what each device holds stays together.


SWEEPS = 8
TOKENS = 8192
"""Tokens whose ways are counted: a sum over links settles long before."""


def can_align(problem: Problem, allowed: BoolArray) -> bool:
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
            place[layer] = _renamed(price, node_of) if whole_nodes else _assignment(price)
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


def _assignment(price: FloatArray) -> IntArray:
    """[G] the device each device's content goes to, of price [content, device]."""
    from scipy.optimize import linear_sum_assignment

    return np.asarray(linear_sum_assignment(price)[1])


def _renamed(price: FloatArray, node_of: IntArray) -> IntArray:
    """`_assignment` with the content of a node kept in one node: nodes by the cheapest renaming inside each pair."""
    members = [np.flatnonzero(node_of == node) for node in range(int(node_of.max()) + 1)]
    inside = [[_assignment(price[np.ix_(mine, theirs)]) for theirs in members] for mine in members]
    total = np.array(
        [
            [price[mine, theirs[chosen]].sum() for theirs, chosen in zip(members, row, strict=True)]
            for mine, row in zip(members, inside, strict=True)
        ]
    )
    place = np.empty(len(node_of), dtype=np.int64)
    for node, target in enumerate(_assignment(total)):
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


def allowed_devices(problem: Problem) -> BoolArray:
    """[L, E, G] where each expert may stand, from pinned and forbidden devices.

    A pinned expert keeps its pinned device and gets no replica elsewhere.
    """
    mask = np.ones((problem.model.layers, problem.model.experts, problem.num_devices), dtype=bool)
    for (layer, expert), devices in problem.forbidden_devices.items():
        mask[layer, expert, list(devices)] = False
    for (layer, expert), device in problem.pinned.items():
        mask[layer, expert] = False
        mask[layer, expert, device] = True
    return mask


def first_placements(problem: Problem, allowed: BoolArray, budget: Budget) -> list[Start]:
    """First placements; the plan in force alone where moves from it are limited."""
    if problem.current is not None and problem.max_moves is not None:
        failures = failure_mask(problem.tolerates, problem.num_devices)
        return [from_current(problem, problem.current, allowed, failures)]
    current = current_placement(problem, allowed)
    made = made_placements(problem, allowed, budget)
    starts: list[Start] = [(tables, even_shares(problem, tables)) for tables in made]
    if problem.objective.split == "free" and problem.has_replicas:
        starts.append((made[0], _one_serves(problem, made[0])))
    return starts + ([] if current is None else [current])


def current_placement(problem: Problem, allowed: BoolArray, exact: bool = False) -> Start | None:
    """The plan in force, or the nearest placement that fits the problem. exact: itself or none."""
    if problem.current is None:
        return None
    failures = failure_mask(problem.tolerates, problem.num_devices)
    if exact and not fits(problem, problem.current, allowed, failures):
        return None
    # Where nothing near it is found, other starts have to do: only a limit of moves needs it.
    with contextlib.suppress(SolveError):
        return from_current(problem, problem.current, allowed, failures)
    return None


def made_placements(problem: Problem, allowed: BoolArray, budget: Budget) -> list[list[IntArray]]:
    """[P_l] experts of each layer's own slots: balanced, groups on nodes, and where transitions count, swept for
    them."""
    statistics, speed = problem.statistics, problem.topology.compute / problem.topology.compute.mean()
    load = statistics.workload_load
    # Workloads weigh the same whatever was recorded of them, as they do under a risk that compares them.
    if problem.objective.risk in ("worst_workload", "regret"):
        load = load / np.maximum(load.sum(axis=2, keepdims=True), 1e-300)
    total = load.sum(axis=0)
    failures = failure_mask(problem.tolerates, problem.num_devices)
    if len(failures):
        return [
            [
                tolerant_layer(layer_load, slots, mask, failures)
                for layer_load, slots, mask in zip(total, problem.layer_slots, allowed, strict=True)
            ]
        ]
    starts = [balanced_layers(total, problem.layer_slots, speed, allowed)]
    if statistics.sample is not None and allowed.all():
        grouped = groups_on_nodes(problem, total)
        starts += [grouped] if grouped is not None else []
    chosen = problem.objective.replica_choice != "share" and problem.objective.division == "local"
    near = chosen and problem.has_replicas and problem.topology.num_nodes > 1
    if near and allowed.all():
        node_of = problem.topology.node_of
        # Where slots are so many that dealing ends in a corner, the balanced start has to do.
        with contextlib.suppress(SolveError):
            starts.append(
                [
                    near_layer(layer_load, slots, speed, node_of)
                    for layer_load, slots in zip(total, problem.layer_slots, strict=True)
                ]
            )
    coherent = problem.objective.execution == "context_coherent" and problem.layers_alike
    if coherent and allowed.all() and not problem.has_replicas and statistics.transitions is not None:
        # A tenth of the time is plenty: sweeps converge in a second at 64 experts.
        brief = Budget(None if budget.left is None else budget.left / 10, budget.seed)
        swept = assignment_sweeps(statistics.total_transitions, problem.slots_per_device, brief)
        starts.append(list(fill_slots(swept)))
        if problem.topology.num_nodes > 1:
            starts.append(list(fill_slots(_nodes_first(problem, statistics.total_transitions, brief))))
    return starts


def _nodes_first(problem: Problem, transitions: FloatArray, budget: Budget) -> IntArray:
    """[L, E] devices swept in two stages, nodes and then the devices inside each, so that slow links count most."""
    slots, node_of = problem.slots_per_device, problem.topology.node_of
    nodes = assignment_sweeps(transitions, np.bincount(node_of, weights=slots).astype(np.int64), budget)
    device_of = np.empty_like(nodes)
    for node in range(problem.topology.num_nodes):
        mine = np.stack([np.flatnonzero(row == node) for row in nodes])
        devices = np.flatnonzero(node_of == node)
        inside = np.stack([t[np.ix_(a, b)] for t, a, b in zip(transitions, mine[:-1], mine[1:], strict=True)])
        np.put_along_axis(device_of, mine, devices[assignment_sweeps(inside, slots[devices], budget)], axis=1)
    return device_of


def _one_serves(problem: Problem, tables: list[IntArray]) -> list[FloatArray]:
    """[E, G] a layer: one replica of each expert serves all its tokens, heaviest first to the least loaded device, and
    the others stand by. Where weights are read rather than computed with, every replica that serves costs as much
    again."""
    result = []
    for layer, (table, load) in enumerate(zip(tables, problem.statistics.total_load, strict=True)):
        share = np.zeros((problem.model.experts, problem.num_devices))
        loaded = np.zeros(problem.num_devices)
        holds = np.zeros(share.shape, dtype=bool)
        holds[table, problem.layer_slot_device(layer)] = True
        for expert in np.argsort(-load, kind="stable"):
            device = int(np.argmin(np.where(holds[expert], loaded, np.inf)))
            share[expert, device] = 1.0
            loaded[device] += load[expert] / problem.topology.compute[device]
        result.append(share)
    return result


# The plan in force as a start: itself where it fits the problem, else the nearest placement that does.


def from_current(
    problem: Problem, current: Plan, allowed: BoolArray, failures: BoolArray
) -> tuple[list[IntArray], list[FloatArray]]:
    """Slot tables [P_l] and shares [E, G], one of each a layer, with the fewest experts moved from `current`.

    allowed: [L, E, G]. failures: [F, G], in each of which every expert must keep a replica.

    Raises:
        SolveError: no placement respects the problem's constraints, or none was found in time.
    """
    load = problem.statistics.workload_load.sum(axis=0)
    tables, shares = [], []
    for layer, holds in enumerate(current.holds):
        usable = _layer_fits(problem, layer, holds, allowed[layer], failures)
        if not usable:
            holds = _nearest(holds, problem.layer_slots[layer], allowed[layer], failures, load[layer])
        tables.append(np.concatenate([np.flatnonzero(column) for column in holds.T]).astype(np.int64))
        free = usable and problem.objective.split == "free"
        shares.append(current.device_share[layer].copy() if free else holds / holds.sum(axis=1, keepdims=True))
    return tables, shares


def fits(problem: Problem, current: Plan, allowed: BoolArray, failures: BoolArray) -> bool:
    """Whether a plan in force is itself an answer to the problem: its slots and every constraint kept, no expert twice
    on a device, and equal shares where the objective wants them."""
    if not np.array_equal(current.slots_per_device, problem.layer_slots):
        return False
    even = current.holds / np.maximum(current.holds.sum(axis=2, keepdims=True), 1)
    return all(
        _layer_fits(problem, layer, holds, allowed[layer], failures) for layer, holds in enumerate(current.holds)
    ) and (problem.objective.split == "free" or bool(np.allclose(current.device_share, even)))


def _layer_fits(problem: Problem, layer: int, holds: BoolArray, allowed: BoolArray, failures: BoolArray) -> bool:
    return bool(
        (holds.sum(axis=0) == problem.layer_slots[layer]).all()
        and not (holds & ~allowed).any()
        and not any((holds[:, failure].sum(axis=1) == holds.sum(axis=1)).any() for failure in failures)
    )


def _nearest(
    present: BoolArray, slots: IntArray, allowed: BoolArray, failures: BoolArray, load: FloatArray
) -> BoolArray:
    """[E, G] the placement without an expert twice on a device that holds most of what is held."""
    # Of equally near ones, replicas of what has most load; together these count less than one move.
    weight = 0.5 / slots.sum() * load / max(load.max(), 1e-300)
    program = placement_program("nearest placement", -(present + weight[:, None]), slots, allowed, failures)
    result = solve_program(
        program, Budget(seconds=PROGRAM_SECONDS), backend="highs", start=present.ravel().astype(np.float64)
    )
    if result.stop == "interrupted":
        raise KeyboardInterrupt
    if result.values is None:
        raise SolveError(
            "no placement near the current plan was found that respects slots, pinned and forbidden devices and "
            "failures; loosen them, or leave out Problem.current"
        )
    return np.asarray(result.values.reshape(present.shape) > 0.5)


# Placements in which every expert keeps a replica in each of some failures.

PROGRAM_SECONDS = 30.0
"""For an integer program of one layer; 256 experts on 32 devices take a fraction of a second to a few."""


def tolerant_layer(load: FloatArray, slots_per_device: IntArray, allowed: BoolArray, failures: BoolArray) -> IntArray:
    """[P] expert of each slot (slots ordered by device), no expert twice on a device.

    load: [E]. allowed: [E, G]. failures: [F, G]; no expert may stand only on the devices of one of them.

    Raises:
        SolveError: no such placement exists, or none was found in time; the message says which.
    """
    holds = _dealt(load, slots_per_device, allowed, failures)
    if holds is None:
        holds = _programmed(slots_per_device, allowed, failures)
    return np.concatenate([np.flatnonzero(column) for column in holds.T]).astype(np.int64)


def _dealt(load: FloatArray, slots: IntArray, allowed: BoolArray, failures: BoolArray) -> BoolArray | None:
    """[E, G] by dealing replicas to the devices with most free slots, or None where that ends in a corner."""
    counts = _replicas(load, slots, allowed, failures)
    if counts is None:
        return None
    exposed = failures.any(axis=0)
    weight = load / counts
    holds = np.zeros(allowed.shape, dtype=bool)
    free, loaded = slots.copy(), np.zeros(len(slots))
    for expert in sorted(range(len(load)), key=lambda e: (counts[e] > 1, allowed[e].sum(), -weight[e], e)):
        for _ in range(int(counts[expert])):
            fits = allowed[expert] & ~holds[expert] & (free > 0)
            if counts[expert] == 1:
                fits &= ~exposed
            elif holds[expert].any():
                # Failures that would take all replicas dealt so far: stay clear of them.
                fatal = failures[:, holds[expert]].all(axis=1)
                fits &= ~failures[fatal].any(axis=0)
            if not fits.any():
                return None
            most = fits & (free == free[fits].max())
            device = int(np.argmin(np.where(most, loaded, np.inf)))
            holds[expert, device] = True
            free[device] -= 1
            loaded[device] += weight[expert]
    return holds


def _replicas(load: FloatArray, slots: IntArray, allowed: BoolArray, failures: BoolArray) -> IntArray | None:
    """[E] replicas: one for the lightest where slots are short, else two, and the rest to whoever has most load
    each."""
    experts, total, most = len(load), int(slots.sum()), allowed.sum(axis=1)
    counts = np.full(experts, 2, dtype=np.int64)
    single = max(0, 2 * experts - total)
    safe = np.flatnonzero((allowed & ~failures.any(axis=0)).any(axis=1))
    # Who may stand on one device only has no choice; then the lightest.
    lightest = sorted(safe.tolist(), key=lambda e: (most[e] > 1, load[e], e))
    counts[lightest[:single]] = 1
    if (counts > most).any() or len(lightest) < single:
        return None
    for _ in range(total - int(counts.sum())):
        room = (counts < most) & (counts > 1)
        if not room.any():
            return None
        counts[int(np.argmax(np.where(room, load / counts, -1.0)))] += 1
    return counts


def _programmed(slots: IntArray, allowed: BoolArray, failures: BoolArray) -> BoolArray:
    """[E, G] by an integer program, which also proves that there is none."""
    program = placement_program("placement that tolerates failures", np.zeros(allowed.shape), slots, allowed, failures)
    result = solve_program(program, Budget(seconds=PROGRAM_SECONDS), backend="highs")
    if result.stop == "interrupted":
        raise KeyboardInterrupt
    if result.values is None:
        expected = f"a placement in which every expert keeps a replica in each of {len(failures)} failures"
        if result.infeasible:
            raise SolveError(
                f"{expected} does not exist within these slots and devices; give more slots, or tolerate fewer failures"
            )
        raise SolveError(f"{expected} was not found within {PROGRAM_SECONDS:g} s; give more slots")
    return np.asarray(result.values.reshape(allowed.shape) > 0.5)


def placement_program(name: str, cost: FloatArray, slots: IntArray, allowed: BoolArray, failures: BoolArray) -> Program:
    """One layer's placements without an expert twice on a device, x[e, g], at cost [E, G].

    slots: [G], all filled. allowed: [E, G]. failures: [F, G]; every expert keeps a replica in each.
    """
    builder = ProgramBuilder(name)
    holds = builder.add_variables(allowed.shape, upper=allowed, cost=cost, integral=True)
    builder.add_rows(holds.T, 1.0, slots, slots)
    builder.add_rows(holds, 1.0, 1.0)
    for failure in failures:
        builder.add_rows(holds[:, ~failure], 1.0, 1.0)
    return builder.build()
