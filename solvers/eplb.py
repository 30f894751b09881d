"""DeepSeek's expert-parallel load balancer (EPLB), written from its published description.

Source: github.com/deepseek-ai/EPLB. The two-step greedy: give each spare slot to the expert with the highest load a
replica, then place replicas, heaviest first, on the least loaded device that has a free slot.
"""

from __future__ import annotations

import numpy as np

from .._types import IntArray
from ..placement.bounds import device_load_certificate
from ..placement.errors import UnsupportedError
from ..placement.layer_slots import alike_layers, even_slots
from ..placement.packing import Weights, pack, replicate
from ..placement.plan import replica_counts
from ..placement.problem import Problem
from .base import Budget, Feature, Needs, Solution


class Eplb:
    """Balances average load, replicas sharing equally.

    Option `hierarchical`: True places expert groups on nodes first, so that group-limited routing stays in a node;
    False is the global form; None takes the hierarchical one where groups divide over nodes, and slots and devices over
    equal nodes, else the global one. As published, two replicas of an expert may share a device.
    """

    name = "eplb"
    supports = frozenset({Feature.REPLICAS, Feature.UNEVEN_SLOTS, Feature.LAYER_SLOTS})
    needs: frozenset[Needs] = frozenset()

    def solve(self, problem: Problem, budget: Budget, *, hierarchical: bool | None = None) -> Solution:
        obstacle = _obstacle(problem)
        if hierarchical and obstacle:
            raise UnsupportedError(f"eplb's hierarchical form needs {obstacle}; hierarchical=False balances globally")
        globally = hierarchical is False or obstacle is not None
        load, topology = problem.statistics.total_load, problem.topology
        rows: dict[int, IntArray] = {}
        for slots, layers in alike_layers(problem.layer_slots):
            if globally:
                tables = _rebalance_globally(load[layers], slots)
            else:
                groups, total = problem.model.groups, int(slots.sum())
                tables = rebalance(load[layers], total, groups, topology.num_nodes, topology.num_devices)
            rows |= dict(zip(layers.tolist(), tables, strict=True))
        table = problem.slot_table([rows[layer] for layer in range(problem.model.layers)])
        certificate = device_load_certificate(problem, table)
        budget.report(certificate.value, certificate.bound)
        return Solution(table, certificate)


def rebalance(load: Weights, slots: int, groups: int, nodes: int, devices: int) -> IntArray:
    """[L, P] slot table for expert loads [L, E]; slot i stands on device i // (slots / devices).

    Hierarchical when groups divide over several nodes, else global, as published. In the global form slots need not
    divide over devices: the first slots % devices devices get one more. Computes in the precision of `load`; the
    published code computes in float32, which breaks ties its own way.

    Raises:
        UnsupportedError: groups divide over nodes, but slots or devices do not; groups=1, nodes=1 balances globally.
    """
    layers, experts = load.shape
    if nodes == 1 or groups % nodes:
        return _rebalance_globally(load, even_slots(slots, devices))
    if experts % groups or slots % devices or devices % nodes:
        raise UnsupportedError(
            f"eplb: hierarchical placement of {experts} experts in {groups} groups and {slots} slots on {devices} "
            f"devices of {nodes} nodes needs each to divide evenly; groups=1, nodes=1 balances globally"
        )
    group_size = experts // groups
    node_of_group, rank_in_node = pack(
        load.reshape(layers, groups, group_size).sum(axis=2), np.full(nodes, groups // nodes)
    )
    # Experts in the order of their nodes: member[l, i] is the expert at place i of the concatenated nodes.
    place = (node_of_group * (groups // nodes) + rank_in_node)[:, :, None] * group_size + np.arange(group_size)
    member = np.argsort(place.reshape(layers, experts), axis=1)
    in_node = np.take_along_axis(load, member, axis=1).reshape(layers * nodes, experts // nodes)
    local = _rebalance_globally(in_node, even_slots(slots // nodes, devices // nodes)).reshape(layers, nodes, -1)
    local = local + (np.arange(nodes) * (experts // nodes))[:, None]
    return np.take_along_axis(member, local.reshape(layers, slots), axis=1)


def _obstacle(problem: Problem) -> str | None:
    """What keeps the hierarchical form from serving the problem."""
    groups, nodes = problem.model.groups, problem.topology.num_nodes
    if groups % nodes:
        return f"expert groups ({groups}) to divide over nodes ({nodes})"
    if len(set(problem.topology.node_size.tolist())) > 1:
        return f"nodes of one size, these have {problem.topology.node_size.tolist()} devices"
    for slots in problem.layer_slots[problem.layer_slots.min(axis=1) < problem.layer_slots.max(axis=1)][:1]:
        return f"equal slots a device, these have {slots.tolist()}"
    return None


def _rebalance_globally(load: Weights, slots_per_device: IntArray) -> IntArray:
    """[L, P] replicate, then pack."""
    expert = replicate(load, int(slots_per_device.sum()))
    replicas = replica_counts(expert, load.shape[1]).astype(load.dtype)
    device, rank = pack(np.take_along_axis(load / replicas, expert, axis=1), slots_per_device)
    first_slot = np.cumsum(slots_per_device) - slots_per_device
    table = np.empty_like(expert)
    np.put_along_axis(table, first_slot[device] + rank, expert, axis=1)
    return table
