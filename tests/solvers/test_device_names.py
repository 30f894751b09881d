"""Devices renamed by layer: the same value in every step, level sums, fewest moves, and nothing that a problem fixes
changed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from small_clusters import topology as cluster
from traces import make_trace

import moeplace as mp
from moeplace.compat.windows import VllmPolicy
from moeplace.placement.plan import EMPTY
from moeplace.solvers.base import Budget
from moeplace.solvers.device_names import level_devices, level_order, names_are_free
from moeplace.solvers.search import Search

LAYERS, EXPERTS = 3, 8
MODEL = mp.ModelSpec(layers=LAYERS, experts=EXPERTS, top_k=2, hidden_size=256, ffn_size=512)
TRACE = make_trace(0, layers=LAYERS, experts=EXPERTS)
STEPS = make_trace(1, layers=LAYERS, experts=EXPERTS).decode_steps(24, steps=6, seed=0)


def problem(kind: str, **fields: Any) -> mp.Problem:
    objective = mp.Objective(**{name: fields.pop(name) for name in [*fields] if name in mp.Objective.model_fields})
    return mp.Problem(MODEL, cluster(kind), mp.RoutingStatistics.from_trace(TRACE), objective, **fields)


def random_solution(asked: mp.Problem, rng: np.random.Generator) -> mp.Solution:
    """Any placement within the problem's slots, pinned and forbidden devices, heaviest first on low devices."""
    hottest = np.argsort(-asked.statistics.total_load, axis=1)
    rows = []
    for layer in range(LAYERS):
        while True:
            count = len(asked.layer_slot_device(layer))
            row = np.concatenate([hottest[layer], hottest[layer][: count - EXPERTS]])
            if rng.random() < 0.9:
                row = rng.permutation(row)
            held: dict[int, set[int]] = {}
            for expert, device in zip(row.tolist(), asked.layer_slot_device(layer).tolist(), strict=True):
                held.setdefault(expert, set()).add(device)
            if all(held[e] == {g} for (at, e), g in asked.pinned.items() if at == layer) and not any(
                held[e] & set(gs) for (at, e), gs in asked.forbidden.items() if at == layer
            ):
                rows.append(row)
                break
    table = asked.slot_table(rows)
    return mp.Solution(table, mp.device_load_certificate(asked, table), separable=True)


def plan_of(asked: mp.Problem, table: np.ndarray) -> mp.Plan:
    return mp.Plan(MODEL, asked.topology, table, asked.slot_device)


def allowed_renamings(asked: mp.Problem, layer: int) -> list[tuple[int, ...]]:
    """By definition: permutations that keep nodes together and every property of devices, tried one by one."""
    topology = asked.topology
    devices = [device for node in topology.nodes for device in node.devices]
    failures = {frozenset(failure.devices) for failure in asked.tolerates}
    result = []
    for order in itertools.permutations(range(asked.num_devices)):
        nodes = [
            {int(topology.node_of[order[g]]) for g in range(asked.num_devices) if topology.node_of[g] == n}
            for n in range(topology.num_nodes)
        ]
        if any(len(of) != 1 for of in nodes):
            continue
        if any(
            topology.nodes[n].inter_bandwidth != topology.nodes[min(of)].inter_bandwidth for n, of in enumerate(nodes)
        ):
            continue
        slots = asked.layer_slots[layer]
        if any(devices[g] != devices[order[g]] or slots[g] != slots[order[g]] for g in range(len(order))):
            continue
        place = {order[g]: g for g in range(len(order))}
        if {frozenset(place[g] for g in failure) for failure in failures} != failures:
            continue
        result.append(order)
    return result


def contents(asked: mp.Problem, table: np.ndarray, layer: int) -> list[list[int]]:
    row = table[layer]
    return [[int(e) for e in row[asked.slot_device == g] if e != EMPTY] for g in range(asked.num_devices)]


def peak(asked: mp.Problem, plan: mp.Plan) -> float:
    loads = mp.device_loads(
        asked.statistics.total_load, plan.physical_to_logical, plan.shares, plan.slot_device, asked.num_devices
    )
    return float(loads.sum(axis=0).max())


CASES: dict[str, dict[str, Any]] = {
    "one node": {"kind": "node"},
    "replicas": {"kind": "node", "slots": 12},
    "two nodes": {"kind": "even", "slots": 12},
    "two nodes, flat copies": {"kind": "even", "node_dedup": False, "prefill_dispatch": "all_to_all"},
    "unlike devices": {"kind": "mixed", "slots": 12},
    "devices with slots of their own": {"kind": "even", "device_slots": [4, 4, 3, 2]},
    "layers with slots of their own": {"kind": "even", "device_slots": [[4, 4, 3, 2], [2, 2, 2, 2], [2, 3, 3, 2]]},
    "pinned and forbidden": {"kind": "even", "pinned": {(0, 3): 1}, "forbidden": {(1, 2): [0, 1], (2, 0): [3]}},
    "cvar": {"kind": "even", "slots": 10, "risk": "cvar:0.5"},
}


@pytest.mark.parametrize("name", CASES)
def test_every_step_takes_as_long_and_sums_are_near_the_most_level_of_all_renamings(name: str) -> None:
    fields = dict(CASES[name])
    asked = problem(fields.pop("kind"), **fields)
    rng = np.random.default_rng(len(name))
    pins = bool(asked.pinned or asked.forbidden)
    for _ in range(4):
        solution = random_solution(asked, rng)
        plan = plan_of(asked, solution.physical_to_logical)
        named = level_devices(asked, solution)
        after = plan_of(asked, named.physical_to_logical)
        assert named.certificate is solution.certificate
        np.testing.assert_allclose(
            mp.evaluate(after, STEPS, asked).step_seconds, mp.evaluate(plan, STEPS, asked).step_seconds, rtol=1e-12
        )
        assert peak(asked, after) <= peak(asked, plan) * (1 + 1e-9) or pins
        sums, loads = (
            [],
            mp.device_loads(
                asked.statistics.total_load, plan.physical_to_logical, plan.shares, plan.slot_device, asked.num_devices
            ),
        )
        orders = [allowed_renamings(asked, layer) for layer in range(LAYERS)]
        for layer in range(LAYERS):
            was = contents(asked, plan.physical_to_logical, layer)
            now = contents(asked, after.physical_to_logical, layer)
            assert now in [[was[g] for g in order] for order in orders[layer]]
        for (at, expert), device in asked.pinned.items():
            assert np.flatnonzero(after.holds[at, expert]).tolist() == [device]
        for (at, expert), barred in asked.forbidden.items():
            assert not after.holds[at, expert, list(barred)].any()
        if not pins:
            sums = [
                sum(loads[la, list(o)] for la, o in enumerate(chosen)).max() for chosen in itertools.product(*orders)
            ]
            # A heuristic on three layers: most of what can be levelled.
            assert peak(asked, after) - min(sums) <= 0.5 * (max(sums) - min(sums)) + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["devices", "nodes", "one"])
def test_failures_are_survived_as_before(lost: str) -> None:
    topology = cluster("even")
    failures = {
        "devices": mp.single_failures(topology, ["device"]),
        "nodes": mp.single_failures(topology),
        "one": mp.single_failures(topology)[:1],
    }[lost]
    asked = problem("even", slots=16, tolerates=failures)
    solution = Search().solve(asked, Budget(), proposals=60, steps=3)
    after = plan_of(asked, level_devices(asked, solution).physical_to_logical)
    assert mp.survives(after, failures).all()
    np.testing.assert_allclose(
        mp.evaluate(after, STEPS, asked).step_seconds,
        mp.evaluate(plan_of(asked, solution.physical_to_logical), STEPS, asked).step_seconds,
        rtol=1e-12,
    )


def skewed(layers: int = 12) -> mp.Problem:
    """Counts of which one expert a layer takes more than a device's part."""
    rng = np.random.default_rng(0)
    load = rng.gamma(0.3, size=(2, layers, 16))
    load[:, :, 3] += load.sum(axis=2) / 2
    model = mp.ModelSpec(layers=layers, experts=16, top_k=2, hidden_size=64, ffn_size=64)
    topology = mp.Topology.preset("h100-sxm", nodes=2, devices_per_node=2)
    return mp.Problem(model, topology, mp.RoutingStatistics.from_counts(np.round(1000 * load), top_k=2))


def test_plans_are_level_over_layers_with_the_value_that_search_has() -> None:
    asked = skewed()
    raw, plan = Search().solve(asked, Budget(), proposals=500), mp.solve(asked, "search", proposals=500)
    assert plan.certificate == raw.certificate

    def sums(table: np.ndarray, shares: np.ndarray) -> np.ndarray:
        loads = mp.device_loads(asked.statistics.total_load, table, shares, asked.slot_device, 4)
        return np.asarray((loads / loads.mean(axis=1, keepdims=True)).sum(axis=0) / 12)

    assert raw.shares is not None
    before, after = sums(raw.physical_to_logical, raw.shares), sums(plan.physical_to_logical, plan.shares)
    assert before.max() > 1.4
    assert after.max() < 1.05


def test_with_a_plan_in_force_fewest_experts_move_and_itself_stays() -> None:
    asked = problem("even", slots=12)
    rng = np.random.default_rng(5)
    for _ in range(5):
        current = plan_of(asked, random_solution(asked, rng).physical_to_logical)
        bound = replace(asked, current=current)
        kept = mp.Solution(current.physical_to_logical, mp.Certificate("nothing", 0.0), separable=True)
        assert level_devices(bound, kept) is kept
        solution = random_solution(asked, rng)
        after = level_devices(bound, solution).physical_to_logical

        moved = (plan_of(asked, after).holds & ~current.holds).sum(axis=(1, 2)).tolist()
        for layer in range(LAYERS):
            was = contents(asked, solution.physical_to_logical, layer)
            held = [set(devices) for devices in contents(asked, current.physical_to_logical, layer)]
            sent = [
                sum(len(set(was[order[g]]) - held[g]) for g in range(4)) for order in allowed_renamings(asked, layer)
            ]
            assert moved[layer] == min(sent)


@pytest.mark.slow
def test_names_stay_where_they_matter() -> None:
    sources = replace(TRACE, source=np.arange(TRACE.num_tokens) % 3)
    known = mp.Problem(MODEL, cluster("node"), sources, slots=12)
    counts = mp.RoutingStatistics.from_counts(np.ones((1, LAYERS, EXPERTS)), top_k=2)
    for asked in (
        known,
        problem("node", execution="context_coherent"),
        problem("node", slots=12, replica_choice="nearest"),
        problem("node", slots=12, replica_choice="balanced"),
        problem("node", online=1),
        replace(problem("node", slots=12, replica_choice="balanced"), statistics=counts),
    ):
        assert not names_are_free(asked)
        solution = random_solution(asked, np.random.default_rng(0))
        assert level_devices(asked, solution) is solution
    for solver in ("contiguous", "eplb"):
        plan = mp.solve(problem("node", slots=12), solver)
        raw = mp.solvers.solver_named(solver).solve(problem("node", slots=12), Budget())
        np.testing.assert_array_equal(plan.physical_to_logical, raw.physical_to_logical)


def test_level_sums_keep_the_names_they_have() -> None:
    figures = np.ones((5, 1, 4))
    order = level_order(figures, np.zeros((5, 4), int), np.zeros(4, int), np.zeros(1, int))
    np.testing.assert_array_equal(order, np.tile(np.arange(4), (5, 1)))


@pytest.mark.slow
def test_a_policy_told_the_map_in_force_sends_fewest_experts() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    load = rng.gamma(0.5, size=(3, 12))
    free = VllmPolicy.rebalance_experts(torch.from_numpy(load), 16, 1, 1, 4).numpy()
    old = np.stack([rng.permutation(np.concatenate([np.arange(12), [0, 1, 2, 3]])) for _ in range(3)])
    new = VllmPolicy.rebalance_experts(torch.from_numpy(load), 16, 1, 1, 4, torch.from_numpy(old)).numpy()

    def sets(row: np.ndarray) -> list[set[int]]:
        return [set(run.tolist()) for run in row.reshape(4, 4)]

    for was, unnamed, now in zip(old, free, new, strict=True):
        held = sets(was)
        moved = [
            sum(len(sets(unnamed)[order[g]] - held[g]) for g in range(4)) for order in itertools.permutations(range(4))
        ]
        assert sum(len(mine - theirs) for mine, theirs in zip(sets(now), held, strict=True)) == min(moved)
        assert sorted(map(sorted, sets(now))) == sorted(map(sorted, sets(unnamed)))
