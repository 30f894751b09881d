"""The cost model written out token by token: the oracle beside the vectorised replay."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np

import moeplace as mp
from moeplace.placement.division import divide, source_division

VALUE_BYTES = {"bf16": 2, "fp8": 1}


class Links:
    """Adds up copies on device links inside nodes and on node links, as sent and as received."""

    def __init__(self, topology: mp.Topology, dedup: bool) -> None:
        self.topology, self.dedup = topology, dedup
        self.sent: defaultdict[int, float] = defaultdict(float)
        self.received: defaultdict[int, float] = defaultdict(float)
        self.node_sent: defaultdict[int, float] = defaultdict(float)
        self.node_received: defaultdict[int, float] = defaultdict(float)

    def send(self, home: int, targets: set[int], weight: float, back: bool = False) -> None:
        """One token's copies from `home` to each target device (or, when `back`, from the targets to home)."""
        node = self.topology.node_of
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        node_sent, node_received = (
            (self.node_received, self.node_sent) if back else (self.node_sent, self.node_received)
        )
        for n in {int(node[g]) for g in targets}:
            there = {g for g in targets if node[g] == n}
            if n == node[home]:
                for g in there - {home}:
                    sent[home] += weight
                    received[g] += weight
            elif self.dedup:
                node_sent[int(node[home])] += weight
                node_received[n] += weight
                members = np.flatnonzero(node == n).tolist()
                for entry in members:
                    for g in there - {entry}:
                        sent[entry] += weight / len(members)
                        received[g] += weight / len(members)
            else:
                node_sent[int(node[home])] += weight * len(there)
                node_received[n] += weight * len(there)

    def seconds(self, bytes_per_copy: float) -> float:
        topology = self.topology
        intra = max(
            max(self.sent[g], self.received[g]) / topology.intra_bandwidth[g] for g in range(topology.num_devices)
        )
        inter = max(
            max(self.node_sent[n], self.node_received[n]) / topology.inter_bandwidth[n]
            for n in range(topology.num_nodes)
        )
        remote = topology.num_nodes - 1
        if not self.dedup:
            remote = topology.num_devices - int(max(topology.node_size))
        latency = topology.intra_latency * (int(max(topology.node_size)) - 1) + topology.inter_latency * remote
        return (latency if topology.num_devices > 1 else 0.0) + bytes_per_copy * max(intra, inter)


def step_seconds(plan: mp.Plan, steps: mp.Steps, problem: mp.Problem) -> list[float]:
    """Predicted seconds of each step of a plan without replicas, one token at a time."""
    model, topology, objective = problem.model, problem.topology, problem.objective
    device_of = [{int(e): int(plan.slot_device[p]) for p, e in enumerate(row)} for row in plan.physical_to_logical]
    out = model.hidden_size * VALUE_BYTES[objective.dispatch_dtype]
    back = model.hidden_size * VALUE_BYTES[objective.combine_dtype]
    everywhere = dict.fromkeys(range(topology.num_devices), 1.0 / topology.num_devices)
    result = []
    for s in range(steps.num_steps):
        block = range(int(steps.offsets[s]), int(steps.offsets[s + 1]))
        total = 0.0
        for layer in range(model.layers):
            dispatch, combine = Links(topology, objective.node_dedup), Links(topology, objective.node_dedup)
            work: defaultdict[int, int] = defaultdict(int)
            hit: defaultdict[int, set[int]] = defaultdict(set)
            for t in block:
                experts = [int(e) for e in steps.expert_ids[t, layer]]
                where = [device_of[layer][e] for e in experts]
                for e, g in zip(experts, where, strict=True):
                    work[g] += 1
                    hit[g].add(e)
                start = everywhere if steps.source is None else {int(steps.source[t]): 1.0}
                if objective.execution == "dispatch_combine":
                    for home, weight in start.items():
                        dispatch.send(home, set(where), weight)
                        combine.send(home, set(where), weight, back=True)
                else:
                    if layer:
                        start = {device_of[layer - 1][int(steps.expert_ids[t, layer - 1, 0])]: 1.0}
                    for home, weight in start.items():
                        dispatch.send(home, set(where), weight)
                    combine.send(where[0], set(where[1:]), 1.0, back=True)
            compute = max(
                max(
                    work[g] * model.flops_per_token / topology.compute[g],
                    len(hit[g]) * model.bytes_per_expert / topology.memory_bandwidth[g],
                )
                for g in range(topology.num_devices)
            )
            returns = objective.execution == "dispatch_combine" or model.top_k > 1
            total += dispatch.seconds(out) + compute + (combine.seconds(back) if returns else 0.0)
        result.append(total)
    return result


def serving(plan: mp.Plan, layer: int, expert: int, home: int, rule: str) -> dict[int, float]:
    """The chance of each device to serve a token of `home` that chose the expert."""
    row = plan.physical_to_logical[layer]
    holders = {int(plan.slot_device[p]): float(plan.shares[layer, p]) for p in np.flatnonzero(row == expert)}
    holders = {g: share for g, share in holders.items() if share > 0}
    if rule == "nearest":
        node = plan.topology.node_of
        if home in holders:
            return {home: 1.0}
        holders = {g: share for g, share in holders.items() if node[g] == node[home]} or holders
    total = sum(holders.values())
    return {g: share / total for g, share in holders.items()}


def divided_serving(
    plan: mp.Plan, steps: mp.Steps, step: int, layer: int, objective: mp.Objective
) -> tuple[np.ndarray, Callable[[int, int], dict[int, float]]]:
    """([E, G] tokens that devices compute where the step's are divided, as `serving` from an expert and a home)."""
    devices, experts = plan.topology.num_devices, plan.model.experts
    mine = slice(int(steps.offsets[step]), int(steps.offsets[step + 1]))
    by_source = None
    counts = np.bincount(steps.expert_ids[mine, layer].ravel(), minlength=experts)[None]
    if steps.source is not None:
        by_source = np.zeros((1, devices, experts), dtype=np.int64)
        for home, chosen in zip(steps.source[mine], steps.expert_ids[mine, layer], strict=True):
            by_source[0, home, chosen] += 1
    hosts = plan.holds[layer]
    whole = divide(counts, hosts, plan.topology.node_of, objective.division, by_source)
    part = source_division(whole, counts, hosts, plan.topology.node_of, objective.division, by_source)[0]

    def served(expert: int, home: int) -> dict[int, float]:
        row = part[home, expert]
        return {int(g): float(row[g] / row.sum()) for g in np.flatnonzero(row)}

    return whole[0], served


def replicated_step_seconds(plan: mp.Plan, steps: mp.Steps, problem: mp.Problem) -> list[float]:
    """`step_seconds` of dispatch_combine for plans with replicas, at most one an expert and device: expected counts
    over every home a token may have and every replica that may serve it."""
    model, topology, objective = problem.model, problem.topology, problem.objective
    everywhere = dict.fromkeys(range(topology.num_devices), 1.0 / topology.num_devices)
    result = []
    for s in range(steps.num_steps):
        total = 0.0
        for layer in range(model.layers):
            links = Links(topology, objective.node_dedup)
            work: defaultdict[int, float] = defaultdict(float)
            idle: defaultdict[tuple[int, int], float] = defaultdict(lambda: 1.0)
            served = whole = None
            if objective.replica_choice == "balanced":
                whole, served = divided_serving(plan, steps, s, layer, objective)
            for t in range(int(steps.offsets[s]), int(steps.offsets[s + 1])):
                experts = [int(e) for e in steps.expert_ids[t, layer]]
                homes = everywhere if steps.source is None else {int(steps.source[t]): 1.0}
                takes: defaultdict[tuple[int, int], float] = defaultdict(float)
                for home, weight in homes.items():
                    chances = [
                        serving(plan, layer, e, home, objective.replica_choice) if served is None else served(e, home)
                        for e in experts
                    ]
                    for e, chance in zip(experts, chances, strict=True):
                        for g, part in chance.items():
                            takes[e, g] += weight * part
                    for drawn in itertools.product(*(chance.items() for chance in chances)):
                        links.send(home, {g for g, _ in drawn}, weight * float(np.prod([part for _, part in drawn])))
                for (e, g), part in takes.items():
                    work[g] += part
                    idle[e, g] *= 1.0 - part
            if whole is not None:
                # Nothing is drawn: a replica that gets any token is read.
                work = defaultdict(float, enumerate(whole.sum(axis=0).tolist()))
                idle = defaultdict(lambda: 1.0, dict.fromkeys(zip(*np.nonzero(whole), strict=True), 0.0))
            read: defaultdict[int, float] = defaultdict(float)
            for (_, g), chance_idle in idle.items():
                read[g] += 1.0 - chance_idle
            total += links.seconds(model.hidden_size * VALUE_BYTES[objective.dispatch_dtype])
            total += links.seconds(model.hidden_size * VALUE_BYTES[objective.combine_dtype])
            total += max(
                max(
                    work[g] * model.flops_per_token / topology.compute[g],
                    read[g] * model.bytes_per_expert / topology.memory_bandwidth[g],
                )
                for g in range(topology.num_devices)
            )
        result.append(total)
    return result
