"""Among equal plans, the one whose devices carry alike over all layers.

A layer's time is that of its busiest device, whichever it is: where devices are alike, exchanging what two of them hold
in one layer alone changes no step's time. Solvers name devices by heaviest first, so that one device would carry the
hottest experts of every layer, which engines that overlap layers, links and cooling feel. Here devices are renamed
layer by layer until the sums over layers of load, and of the tokens that are sent to a device, are level.

A renaming moves nothing that a problem fixes: nodes are exchanged as wholes and devices inside a node, both only with
their likes (rates, slots of the layer, pinned and forbidden experts, failures to tolerate), and with a plan in force
fewest moves come first.

L layers, G devices, N nodes, F figures that are to be level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from .._types import BoolArray, FloatArray, IntArray
from ..placement.bounds import device_loads
from ..placement.cost import slot_shares
from ..placement.degraded import failure_mask
from ..placement.plan import EMPTY, Plan, equal_shares
from ..placement.problem import Problem
from .base import Solution

SAMPLE_TOKENS = 4096
"""Tokens of the sample on which the share of tokens sent to a device is measured, at most."""
LEVEL = 1.0005
"""Largest sum over the mean at which devices are level: there is nothing to rename."""
SWEEPS = 20
"""Over the layers, at most; some five are what it takes."""


def level_devices(problem: Problem, solution: Solution) -> Solution:
    """The solution with devices renamed by layer, its value and bound unchanged; itself where names matter to them or
    nothing is more level."""
    if not solution.separable or not names_are_free(problem):
        return solution
    table = solution.physical_to_logical
    shares = equal_shares(table, problem.model.experts) if solution.shares is None else solution.shares
    plan = Plan(problem.model, problem.topology, table, problem.slot_device, shares)
    figures, moves = _figures(problem, plan), _moves(problem, plan)
    layer_kinds, node_kinds = _kinds(problem)
    order = level_order(figures, layer_kinds, problem.topology.node_of, node_kinds, moves)
    if (order == np.arange(problem.num_devices)).all():
        return solution
    source = _slot_sources(problem, order)
    own = problem.own_slots
    renamed = np.where(own, np.take_along_axis(table, source, axis=1), EMPTY)
    if solution.shares is None:
        return replace(solution, physical_to_logical=renamed)
    taken = np.where(own, np.take_along_axis(shares, source, axis=1), 0.0)
    return replace(solution, physical_to_logical=renamed, shares=taken)


def names_are_free(problem: Problem) -> bool:
    """Whether a layer's time is the same when like devices exchange what they hold in it.

    Not where tokens stay with their experts from layer to layer, come from ranks that are known, or go to a replica by
    the rank that they come from; not where online planners take devices in order.
    """
    objective, sample = problem.objective, problem.statistics.sample
    if objective.execution != "dispatch_combine" or objective.online:
        return False
    if sample is not None and sample.source is not None:
        return False
    if objective.replica_choice == "share" or not problem.has_replicas:
        return True
    if sample is not None:
        return False
    # Counts have no traffic, but steps divided anew give what does not divide to devices in order.
    return objective.replica_choice == "nearest"


def _figures(problem: Problem, plan: Plan) -> FloatArray:
    """[L, F, G] load of each device and, with a token sample, how many tokens are sent to it, in parts of the mean over
    devices, layers together."""
    load, devices = problem.statistics.total_load, problem.num_devices
    shares = slot_shares(plan, load, problem.objective)
    figures = [device_loads(load, plan.physical_to_logical, shares, plan.slot_device, devices)]
    sample = problem.statistics.sample
    if sample is not None and sample.num_tokens:
        ids = sample.expert_ids[:: -(-sample.num_tokens // SAMPLE_TOKENS)]
        sent = np.empty((len(load), devices))
        for layer, share in enumerate(plan.device_share):
            away = np.ones((len(ids), devices))
            for choice in range(ids.shape[2]):
                away *= 1.0 - share[ids[:, layer, choice]]
            sent[layer] = len(ids) - away.sum(axis=0)
        figures.append(sent)
    result = np.stack(figures, axis=1)
    total = result.sum(axis=(0, 2))[None, :, None] / devices
    return np.asarray(result / np.where(total > 0, total, 1.0))


def _moves(problem: Problem, plan: Plan) -> IntArray | None:
    """[L, G, G] experts that device b would have to be sent, were it to hold what the plan puts on a."""
    if problem.current is None:
        return None
    return _sent(plan.holds.astype(np.float64), problem.current.holds.astype(np.float64))


def _sent(new: FloatArray, present: FloatArray) -> IntArray:
    """[L, G, G] experts that a device has in `new` [L, E, G], and another has not in `present`."""
    common = np.matmul(new.transpose(0, 2, 1), present)
    return np.asarray(np.rint(new.sum(axis=1)[:, :, None] - common), dtype=np.int64)


def _kinds(problem: Problem) -> tuple[IntArray, IntArray]:
    """([L, G] kinds of devices, those of one kind being alike in all that a problem says of them; [N] kinds of
    nodes)."""
    # Loading takes a second, which importing the package must not.
    from .search.starts import allowed_devices

    topology, layers = problem.topology, problem.model.layers
    mask = failure_mask(problem.tolerates, problem.num_devices)
    runs = [np.arange(start, start + size) for start, size in zip(topology.node_start, topology.node_size, strict=True)]
    number_of = {
        device: i for i, device in enumerate(dict.fromkeys(d for node in topology.nodes for d in node.devices))
    }
    features = np.array(
        [
            (number_of[device], _first_alike(mask, [[g] for g in run.tolist()], place))
            for node, run in zip(topology.nodes, runs, strict=True)
            for place, device in enumerate(node.devices)
        ]
    )
    allowed = allowed_devices(problem) if problem.pinned or problem.forbidden_devices else None
    kinds = np.zeros((layers, problem.num_devices), dtype=np.int64)
    for layer, slots in enumerate(problem.layer_slots):
        rows = [features, slots[:, None]] + ([] if allowed is None else [allowed[layer].T.astype(np.int64)])
        kinds[layer] = np.unique(np.concatenate(rows, axis=1), axis=0, return_inverse=True)[1].ravel()
    numbers: dict[tuple[object, int], int] = {}
    node_kinds = [
        numbers.setdefault((node, _first_alike(mask, [run.tolist() for run in runs], n)), len(numbers))
        for n, node in enumerate(topology.nodes)
    ]
    return kinds, np.array(node_kinds)


def _first_alike(mask: BoolArray, blocks: Sequence[Sequence[int]], which: int) -> int:
    """The first block of devices of that size with which this one can change places, the set of failures [F, G] staying
    the same; itself if there is none."""
    failures = {row.tobytes() for row in mask}
    mine = list(blocks[which])
    for other in range(which):
        theirs = list(blocks[other])
        if len(mine) == len(theirs):
            order = np.arange(mask.shape[1])
            order[mine], order[theirs] = theirs, mine
            if {row.tobytes() for row in np.ascontiguousarray(mask[:, order])} == failures:
                return other
    return which


def _slot_sources(problem: Problem, order: IntArray) -> IntArray:
    """[L, P] the slot whose content each slot takes, where device g takes what `order` [L, G] says stood on another."""
    start = np.cumsum(problem.slots_per_device) - problem.slots_per_device
    place = np.arange(problem.num_slots) - start[problem.slot_device]
    # Empty slots of a layer may point beyond the other device's run.
    return np.asarray(np.minimum(start[order[:, problem.slot_device]] + place, problem.num_slots - 1))


def renamed_tables(
    load: FloatArray, table: IntArray, nodes: int, devices: int, present: IntArray | None = None
) -> IntArray:
    """[L, P] slot tables of engines that cut them into equal runs, a device each, their devices renamed: fewest experts
    that are sent first, where there is a table in force, then level loads.

    Args:
        load: [L, E] of experts, of which replicas take equal parts.
        table: [L, P]
        nodes: that must stay together, each of as many devices.
        devices: G
        present: [L, P] the table in force; what is no expert there is an empty slot.
    """
    layers, experts = load.shape
    shares = equal_shares(table, experts)
    slot_device = np.repeat(np.arange(devices), table.shape[1] // devices)
    figures = device_loads(load, table, shares, slot_device, devices)[:, None]
    figures = figures / max(float(figures.sum()) / devices, np.finfo(float).tiny)
    moves = None
    if present is not None:
        holds = np.zeros((2, layers, experts, devices))
        for one, each in zip(holds, (table, present), strict=True):
            rows, slots = np.nonzero((each >= 0) & (each < experts))
            one[rows, each[rows, slots], slot_device[slots]] = 1.0
        moves = _sent(*holds)
    kinds = np.zeros((layers, devices), dtype=np.int64)
    order = level_order(figures, kinds, np.arange(devices) // (devices // nodes), np.zeros(nodes, np.int64), moves)
    runs = table.reshape(layers, devices, -1)
    return np.take_along_axis(runs, order[:, :, None], axis=1).reshape(table.shape)


# Levelling.


def level_order(
    figures: FloatArray, kinds: IntArray, node_of: IntArray, node_kinds: IntArray, moves: IntArray | None = None
) -> IntArray:
    """[L, G] the device whose content each device takes over, for sums over layers that are level.

    Args:
        figures: [L, F, G] what each device carries in each layer.
        kinds: [L, G] devices of one kind, in one node, may be exchanged in that layer.
        node_of: [G] nodes, each a run of devices.
        node_kinds: [N] nodes of one kind, whose devices have the same kinds in order, may be exchanged as wholes.
        moves: [L, G, G] what it costs that device b takes the content of a; the least of it comes before level sums.
    """
    layers, _, devices = figures.shape
    order = np.tile(np.arange(devices), (layers, 1))
    sums = figures.sum(axis=0)
    if moves is None and (layers == 1 or (sums.max(axis=1) <= LEVEL * sums.mean(axis=1)).all()):
        return order
    start = np.flatnonzero(np.diff(node_of, prepend=-1))
    if len(set(node_kinds.tolist())) < len(node_kinds):
        order = _expanded(_level_nodes(figures, kinds, start, node_kinds, moves), start, devices)
    inside = np.unique(
        np.stack([np.broadcast_to(node_of, kinds.shape), kinds]).reshape(2, -1), axis=1, return_inverse=True
    )[1]
    rows = np.arange(layers)[:, None]
    there = np.take_along_axis(figures, order[:, None], axis=2)
    within = _level(there, inside.reshape(kinds.shape), None if moves is None else moves[rows, order])
    result = np.take_along_axis(order, within, axis=1)
    return result if _prefers(figures, moves, result) else np.tile(np.arange(devices), (layers, 1))


def _level_nodes(
    figures: FloatArray, kinds: IntArray, start: IntArray, node_kinds: IntArray, moves: IntArray | None
) -> IntArray:
    """[L, N] the node whose content each node takes over."""
    layers, nodes, devices = len(figures), len(start), figures.shape[2]
    runs = [np.arange(begin, end) for begin, end in zip(start, [*start[1:], devices], strict=True)]
    alike = np.zeros((layers, nodes), dtype=np.int64)
    cost = None if moves is None else np.zeros((layers, nodes, nodes), dtype=np.int64)
    for layer in range(layers):
        known: dict[tuple[int, ...], int] = {}
        for n, run in enumerate(runs):
            alike[layer, n] = known.setdefault((int(node_kinds[n]), *kinds[layer, run].tolist()), len(known))
        if moves is None or cost is None:
            continue
        for a, left in enumerate(runs):
            for b in np.flatnonzero(alike[layer] == alike[layer, a]):
                block = moves[layer][np.ix_(left, runs[b])]
                barred = kinds[layer, left][:, None] != kinds[layer, runs[b]]
                cost[layer, a, b] = block[linear_sum_assignment(block + barred * (1 + block.sum()))].sum()
    return _level(np.add.reduceat(figures, start, axis=2), alike, cost)


def _expanded(nodes: IntArray, start: IntArray, devices: int) -> IntArray:
    """[L, G] devices of nodes [L, N], in their order."""
    sizes = np.diff(np.append(start, devices))
    offset = np.arange(devices) - np.repeat(start, sizes)
    return np.asarray(start[np.repeat(nodes, sizes, axis=1)] + offset)


def _level(figures: FloatArray, kinds: IntArray, moves: IntArray | None) -> IntArray:
    """[L, n] whose content each name takes over: sums of squares over names of the sums over layers [L, F, n] fall
    with each layer that is assigned anew, the others staying."""
    layers, _, names = figures.shape
    order = np.tile(np.arange(names), (layers, 1))
    # Layers that differ most go first, while there is most to even out.
    by_spread = np.argsort(-np.ptp(figures, axis=2).max(axis=1), kind="stable")
    classes = [[np.flatnonzero(row == kind) for kind in np.flatnonzero(np.bincount(row) > 1)] for row in kinds]
    sums = np.zeros(figures.shape[1:])
    for sweep in range(SWEEPS):
        changed = False
        for layer in by_spread:
            mine = figures[layer]
            rest = sums - mine[:, order[layer]] if sweep else sums
            for members in classes[layer]:
                was = order[layer, members]
                new = _assigned(rest[:, members], mine[:, members], None if moves is None else moves[layer], members)
                if sweep and not _lowers(rest[:, members], mine, moves, layer, members, was, new):
                    continue
                changed |= not np.array_equal(was, new)
                order[layer, members] = new
            sums = rest + mine[:, order[layer]]
        if sweep and not changed:
            break
    return order


def _assigned(rest: FloatArray, mine: FloatArray, moves: IntArray | None, members: IntArray) -> IntArray:
    """[m] which of the members each takes the content of; rest, mine: [F, m] sums of other layers, and this one's."""
    if len(rest) == 1 and moves is None:
        result = np.empty_like(members)
        # Heaviest content to the least loaded name is the least sum of products.
        result[np.argsort(rest[0], kind="stable")] = members[np.argsort(-mine[0], kind="stable")]
        return result
    cost = 2.0 * rest.T @ mine
    if moves is not None:
        far = 1.0 + len(members) * 2.0 * float(np.ptp(cost))
        cost = cost + far * moves[np.ix_(members, members)].T
    return np.asarray(members[linear_sum_assignment(cost)[1]])


def _lowers(
    rest: FloatArray,
    mine: FloatArray,
    moves: IntArray | None,
    layer: int,
    members: IntArray,
    was: IntArray,
    new: IntArray,
) -> bool:
    """Whether members that take new are better off than with what they have, by more than rounding."""
    if moves is not None:
        before, after = int(moves[layer, was, members].sum()), int(moves[layer, new, members].sum())
        if before != after:
            return after < before
    squares = [float(((rest + mine[:, taken]) ** 2).sum()) for taken in (was, new)]
    return squares[1] < squares[0] * (1.0 - 1e-12)


def _prefers(figures: FloatArray, moves: IntArray | None, order: IntArray) -> bool:
    """Whether the names of `order` [L, G] have fewer moves than those given, or as many and a lower largest sum."""
    if moves is not None:
        names = np.arange(order.shape[1])
        saved = int(
            moves[:, names, names].sum()
            - np.take_along_axis(moves, order[:, None], axis=1).trace(axis1=1, axis2=2).sum()
        )
        if saved:
            return saved > 0
    before = figures.sum(axis=0).max(axis=1)
    after = np.take_along_axis(figures, order[:, None], axis=2).sum(axis=0).max(axis=1)
    return bool(after.sum() < before.sum() * (1.0 - 1e-9))
