"""Where a search may begin: balanced, grouped, swept for transitions, and the plan in force."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt

from ...placement.errors import SolveError
from ...placement.failures import failure_mask
from ...placement.problem import Problem
from ..base import Budget, fill_slots
from ..exflow import assignment_sweeps
from .current_start import from_current
from .group_start import groups_on_nodes
from .near_start import near_layer
from .race import Start
from .starts import balanced_layer, even_shares
from .tolerant_start import tolerant_layer

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def allowed_devices(problem: Problem) -> npt.NDArray[np.bool_]:
    """[L, E, G] where each expert may stand, from pinned and forbidden devices.

    A pinned expert keeps its pinned device and gets no replica elsewhere.
    """
    mask = np.ones((problem.model.layers, problem.model.experts, problem.num_devices), dtype=bool)
    for (layer, expert), devices in problem.forbidden.items():
        mask[layer, expert, list(devices)] = False
    for (layer, expert), device in problem.pinned.items():
        mask[layer, expert] = False
        mask[layer, expert, device] = True
    return mask


def first_placements(problem: Problem, allowed: npt.NDArray[np.bool_], budget: Budget) -> list[Start]:
    """First placements; the plan in force alone where moves from it are limited."""
    given: list[Start] = []
    if problem.current is not None:
        failures = failure_mask(problem.tolerates, problem.num_devices)
        given.append(from_current(problem, problem.current, allowed, failures))
        if problem.max_moves is not None:
            return given
    made = made_placements(problem, allowed, budget)
    starts: list[Start] = [(tables, even_shares(problem, tables)) for tables in made]
    if problem.objective.split == "free" and problem.has_replicas:
        starts.append((made[0], _one_serves(problem, made[0])))
    return starts + given


def made_placements(problem: Problem, allowed: npt.NDArray[np.bool_], budget: Budget) -> list[list[IntArray]]:
    """[P_l] experts of each layer's own slots: balanced, groups on nodes, and where transitions count, swept for them."""
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
    tables = [
        balanced_layer(layer_load, slots, speed, mask)
        for layer_load, slots, mask in zip(total, problem.layer_slots, allowed, strict=True)
    ]
    starts = [tables]
    if statistics.sample is not None and allowed.all():
        grouped = groups_on_nodes(problem, total)
        starts += [grouped] if grouped is not None else []
    near = problem.objective.replica_choice == "nearest" and problem.has_replicas and problem.topology.num_nodes > 1
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
    """[E, G] a layer: one replica of each expert serves all its tokens, heaviest first to the least loaded device, and the
    others stand by. Where weights are read rather than computed with, every replica that serves costs as much again."""
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
