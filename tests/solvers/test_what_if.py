"""Failures and other clusters: what survives, what it costs, and what is ready for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive_cost
import numpy as np
import pytest
from emptied_slots import empty_some
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace.placement.degraded import (
    degraded,
    lost_experts,
    remap_source_ranks,
    repaired,
    single_failures,
    survives,
)
from moeplace.placement.layer_slots import grown_layer_slots, grown_slots, slot_capacity
from moeplace.placement.migration import migration_from
from moeplace.solvers.what_if import Change

FAST = mp.Device(compute=2e14, memory=8e10, memory_bandwidth=2e12, intra_bandwidth=3e9)
SLOW = mp.Device(compute=3e13, memory=4e10, memory_bandwidth=1e12, intra_bandwidth=1e9)
MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=256, ffn_size=512)


def uneven_cluster() -> mp.Topology:
    """Nodes of two, three and one devices, of two kinds."""
    return mp.Topology(
        nodes=(
            mp.Node(devices=(FAST, SLOW), inter_bandwidth=2e9),
            mp.Node(devices=(FAST, FAST, SLOW), inter_bandwidth=3e9),
            mp.Node(devices=(SLOW,), inter_bandwidth=5e8),
        )
    )


def plan_of(topology: mp.Topology, table: Any, devices: Any, shares: Any = None) -> mp.Plan:
    empty = np.empty(0)
    return mp.Plan(MODEL, topology, np.array(table), np.array(devices), empty if shares is None else shares)


def random_plan(rng: np.random.Generator, topology: mp.Topology, slots: int) -> mp.Plan:
    """Every expert somewhere, spare slots at random or empty, random shares."""
    devices = np.sort(rng.integers(topology.num_devices, size=slots))
    table = np.stack(
        [rng.permutation(np.concatenate([np.arange(8), rng.integers(8, size=slots - 8)])) for _ in range(3)]
    )
    empty_some(rng, table)
    weight = rng.random((3, slots)) * (rng.random((3, slots)) < 0.9) + 1e-3
    total = np.stack(
        [np.bincount(row[row >= 0], weights=w[row >= 0], minlength=8) for row, w in zip(table, weight, strict=True)]
    )
    return plan_of(
        topology, table, devices, np.where(table < 0, 0.0, weight / np.take_along_axis(total, table, axis=1))
    )


def problem_of(topology: mp.Topology, slots: int | None = None, **objective: Any) -> mp.Problem:
    statistics = mp.RoutingStatistics.from_trace(make_trace(0))
    return mp.Problem(MODEL, topology, statistics, mp.Objective(**objective), slots=slots)


def test_the_topology_without_devices_keeps_the_others_in_order_with_their_share_of_the_node() -> None:
    left = uneven_cluster().without([1, 2, 5])
    assert left.node_size.tolist() == [1, 2]
    assert left.compute.tolist() == [2e14, 2e14, 3e13]
    assert left.inter_bandwidth.tolist() == [1e9, 2e9]
    assert uneven_cluster().without([]) == uneven_cluster()
    with pytest.raises(mp.InputError, match="device 6 is not in the topology"):
        uneven_cluster().without([6])
    with pytest.raises(mp.InputError, match="nothing is left"):
        uneven_cluster().without(range(6))


def test_a_cluster_is_resized_at_its_end() -> None:
    box = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=4)
    assert box.resized(devices=11).node_size.tolist() == [4, 4, 3]
    assert box.resized(devices=11).inter_bandwidth[2] == pytest.approx(0.75 * box.inter_bandwidth[0])
    assert box.resized(devices=5).node_size.tolist() == [4, 1]
    assert box.resized(nodes=4) == mp.Topology.preset("h100-hgx", nodes=4, devices_per_node=4)
    assert uneven_cluster().resized(nodes=2).node_size.tolist() == [2, 3]
    assert uneven_cluster().resized(devices=8).node_size.tolist() == [2, 3, 1, 1, 1]
    for wrong in ({}, {"devices": 2, "nodes": 1}, {"devices": 0}):
        with pytest.raises(mp.InputError):
            box.resized(**wrong)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(8, 20))
def test_survival_is_what_counting_replicas_by_hand_says(seed: int, slots: int) -> None:
    plan = random_plan(np.random.default_rng(seed), uneven_cluster(), slots)
    failures = single_failures(plan.topology)
    assert len(failures) == 6 + 3
    for failure, survived in zip(failures, survives(plan, failures), strict=True):
        lost = lost_experts(plan, failure)
        for layer, row in enumerate(plan.physical_to_logical):
            left = {int(e) for p, e in enumerate(row) if plan.slot_device[p] not in failure.devices}
            assert set(range(8)) - left == set(np.flatnonzero(lost[layer]).tolist())
        assert survived == (not lost.any())
        if not survived:
            with pytest.raises(mp.InputError, match=f"without {failure.name} no replica is left of expert"):
                degraded(plan, failure)


@settings(max_examples=40)
@given(st.integers(0, 10**6))
def test_surviving_replicas_keep_the_ratio_of_their_shares(seed: int) -> None:
    plan = random_plan(np.random.default_rng(seed), uneven_cluster(), 40)
    for failure in single_failures(plan.topology):
        if lost_experts(plan, failure).any():
            continue
        left = [g for g in range(6) if g not in failure.devices]
        expected = plan.device_share[:, :, left]
        expected = expected / expected.sum(axis=2, keepdims=True)
        after = degraded(plan, failure)
        np.testing.assert_allclose(after.device_share, expected, atol=1e-9)
        assert after.topology == plan.topology.without(failure.devices)


def test_survivors_that_had_no_share_split_the_tokens_equally() -> None:
    topology = mp.Topology.preset("h100-hgx", devices_per_node=3)
    table = np.tile(np.tile(np.arange(8), 3), (3, 1))
    shares = np.repeat([[1.0, 0.0, 0.0]], 3, axis=0).repeat(8, axis=1)
    after = degraded(plan_of(topology, table, np.repeat([0, 1, 2], 8), shares), mp.Failure("device:0", (0,)))
    assert (after.shares == 0.5).all()


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.parametrize("homes", [False, True])
@pytest.mark.parametrize("name", ["node:0", "device:5+node:0"])
def test_the_degraded_step_time_is_that_of_a_replay_by_hand(execution: str, homes: bool, name: str) -> None:
    # Node 0 and the others each hold every expert once, so that what survives has one replica of each.
    topology = uneven_cluster()
    rng = np.random.default_rng(1)
    lasting = [2, 3, 4] if "device:5" in name else [2, 3, 4, 5]
    devices = np.sort(np.concatenate([rng.permutation([0, 1] * 4), np.resize(lasting, 8)]))
    halves = [np.concatenate([rng.permutation(8), rng.permutation(8)]) for _ in range(3)]
    plan = plan_of(topology, halves, devices)
    failure = mp.Failure.named(name, topology)
    steps = make_trace(1).decode_steps(16, steps=5)
    if homes:
        steps = mp.Steps(
            steps.expert_ids, steps.offsets, 8, steps.moe_layers, source=rng.integers(6, size=len(steps.expert_ids))
        )
    problem = problem_of(topology, execution=execution)
    change = Change.losing(failure, topology)
    (outcome,) = mp.what_if(plan, problem, steps, [change], ready=False).outcomes
    assert outcome.survives
    assert outcome.degraded is not None
    left = [g for g in range(6) if g not in failure.devices]
    single = plan_of(change.topology, [row[8:] for row in halves], [left.index(g) for g in devices[8:]])
    after = steps
    if homes:
        assert steps.source is not None
        homeless = iter(range(len(steps.source)))
        source = [left.index(g) if g in left else next(homeless) % len(left) for g in steps.source]
        after = mp.Steps(steps.expert_ids, steps.offsets, 8, steps.moe_layers, source=np.array(source))
    expected = naive_cost.step_seconds(single, after, problem_of(change.topology, execution=execution))
    np.testing.assert_allclose(outcome.degraded.evaluation.step_seconds, expected, rtol=1e-5)
    assert outcome.degraded.migration.moves == 0


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(8, 24), st.integers(0, 4))
def test_a_repair_loads_the_lost_experts_and_moves_nothing_else(seed: int, slots: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, uneven_cluster(), slots)
    failure = single_failures(plan.topology)[int(rng.integers(9))]
    left = [g for g in range(6) if g not in failure.devices]
    present = plan.slots_per_device[:, left]
    total = np.maximum(8, present.sum(axis=1)) + more
    grown = [grown_slots(row, int(count), np.full(len(left), 99)) for row, count in zip(present, total, strict=True)]
    device_slots = np.stack([row for row in grown if row is not None])
    mended = repaired(plan, failure, device_slots, rng.random((3, 8)))
    assert mended.slots_per_device.tolist() == device_slots.tolist()
    held = plan.holds[:, :, left]
    moved = migration_from(held, mended)
    lost = lost_experts(plan, failure)
    loaded = {(int(la), int(e)) for la, e, s in zip(moved.layer, moved.expert, moved.source, strict=True) if s < 0}
    assert loaded == {(int(la), int(e)) for la, e in np.argwhere(lost)}
    assert moved.bytes_reloaded >= lost.sum() * MODEL.bytes_per_expert
    for layer in np.flatnonzero((total == present.sum(axis=1)) | (total == 8)):
        # Without a slot to spare nothing but what was lost is loaded, and once.
        assert (moved.source[moved.layer == layer] < 0).all()
        assert (moved.layer == layer).sum() == lost[layer].sum()


def test_a_repair_gives_up_spare_replicas_only() -> None:
    topology = mp.Topology.preset("h100-hgx", devices_per_node=3)
    table = [[0, 1, 2, 3, 4, 5, 0, 1, 6, 7, 2, 3]] * 3
    plan = plan_of(topology, table, np.repeat([0, 1, 2], 4))
    mended = repaired(plan, mp.Failure("device:1", (1,)), np.array([4, 4]), np.tile(np.arange(8.0), (3, 1)))
    for row in mended.physical_to_logical:
        assert sorted(row.tolist()) == list(range(8))
        assert {6, 7} <= set(row[4:].tolist())


def test_slots_grow_where_there_is_room_and_no_further() -> None:
    assert grown_slots(np.array([3, 1, 2]), 8, np.array([3, 3, 9])).tolist() == [3, 3, 2]  # type: ignore[union-attr]
    assert grown_slots(np.array([3, 1, 2]), 16, np.array([3, 3, 9])) is None
    assert grown_slots(np.array([3, 1]), 2, np.array([3, 3])).tolist() == [3, 1]  # type: ignore[union-attr]
    layer_bytes = MODEL.bytes_per_expert * MODEL.layers
    small = FAST.replace(memory=2.5 * layer_bytes)
    cluster = mp.Topology(nodes=(mp.Node(devices=(small, FAST), inter_bandwidth=1e9),))
    assert slot_capacity(MODEL, cluster).tolist() == [2, 8]


def test_tokens_of_lost_ranks_are_dealt_in_turn_and_others_stay() -> None:
    ids = np.zeros((6, 3, 2), dtype=np.uint8)
    ids[:, :, 1] = 1
    steps = mp.Steps(ids, np.array([0, 6]), 8, (0, 1, 2), source=np.array([0, 1, 2, 1, 3, 1]))
    after = remap_source_ranks(steps, np.array([0, 2, 3]))
    assert after.source is not None
    assert after.source.tolist() == [0, 0, 1, 1, 2, 2]
    assert remap_source_ranks(steps, np.array([0, 1, 2, 3, -1])).source is None


def test_a_cluster_that_survivors_do_not_fit_on_says_so() -> None:
    layer_bytes = MODEL.bytes_per_expert * MODEL.layers
    small = FAST.replace(memory=3.5 * layer_bytes)
    topology = mp.Topology(nodes=(mp.Node(devices=(small,) * 3, inter_bandwidth=1e9),))
    problem = problem_of(topology)
    plan = mp.solve(problem, "contiguous")
    result = mp.what_if(plan, problem, make_trace(1).decode_steps(8, steps=4), solver="contiguous")
    assert [outcome.change.name for outcome in result.outcomes] == ["device:0", "device:1", "device:2"]
    for outcome in result.outcomes:
        assert outcome.ready is None
        assert outcome.reason == "does not fit: 8 slots a layer are needed, 2 devices hold 6"


@pytest.mark.slow
def test_ready_plans_use_survivors_slots_and_count_what_moves_and_what_is_loaded() -> None:
    topology = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=2)
    problem = problem_of(topology, slots=8)
    plan = mp.solve(problem, "contiguous")
    steps = make_trace(1).decode_steps(8, steps=4)
    result = mp.what_if(plan, problem, steps, seconds=None, options={"proposals": 100, "steps": 4})
    assert len(result.outcomes) == 6
    np.testing.assert_array_equal(result.before.step_seconds, mp.evaluate(plan, steps, problem).step_seconds)
    for outcome in result.outcomes:
        assert not outcome.survives
        assert outcome.degraded is None
        assert outcome.ready is not None
        assert outcome.repaired is not None
        assert outcome.extra_slots == (2 if outcome.change.name.startswith("device") else 4)
        ready, moved = outcome.ready.plan, outcome.ready.migration
        assert ready.num_slots == 8
        assert ready.topology == outcome.change.topology
        targets = moved.moves * MODEL.bytes_per_expert
        assert moved.bytes_moved + moved.bytes_reloaded == targets
        assert moved.bytes_reloaded == outcome.lost.sum() * MODEL.bytes_per_expert
        chosen = steps.loads().sum(axis=0)
        assert outcome.lost_load == pytest.approx(chosen[outcome.lost].sum() / chosen.sum())


def test_ready_plans_of_layers_with_their_own_slots_keep_each_layers_number() -> None:
    topology = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=2)
    problem = problem_of(topology)
    plan = mp.solve(replace(problem, slots=[8, 16, 12]), "eplb")
    steps = make_trace(1).decode_steps(8, steps=4)
    changes = [
        Change.losing(mp.Failure("device:3", (3,)), topology),
        Change.resizing("6 devices", topology, topology.resized(devices=6)),
        Change.resizing("8 to 10 slots", topology, topology, slots=[8, 9, 10]),
    ]
    lost, grown, fewer = mp.what_if(plan, problem, steps, changes, solver="eplb").outcomes
    assert lost.ready is not None
    assert lost.repaired is not None or lost.degraded is not None
    # The three devices left hold 6, 12 and 9: two more slots where not every expert fits.
    assert lost.ready.plan.slots_per_device.sum(axis=1).tolist() == [8, 12, 9]
    assert lost.extra_slots == 2
    assert grown.ready is not None
    assert grown.ready.plan.slots_per_device.sum(axis=1).tolist() == [8, 16, 12]
    assert fewer.ready is not None
    assert fewer.ready.plan.slots_per_device.sum(axis=1).tolist() == [8, 9, 10]


def test_layers_with_their_own_slots_fit_where_the_widest_in_every_layer_would_not() -> None:
    memory = 5.5 * MODEL.bytes_per_expert
    device = FAST.replace(memory=memory)
    cluster = mp.Topology(nodes=(mp.Node(devices=(device,) * 6, inter_bandwidth=1e9),))
    wanted = np.array([8, 14, 8])
    grown = grown_layer_slots(np.zeros((3, 6), dtype=np.int64), wanted, MODEL, cluster)
    assert grown is not None
    assert grown.sum(axis=1).tolist() == wanted.tolist()
    assert (grown.sum(axis=0) <= 5).all()
    assert grown_layer_slots(np.zeros((3, 6), dtype=np.int64), np.array([8, 15, 8]), MODEL, cluster) is None


def test_more_devices_more_slots_and_another_cluster() -> None:
    topology = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=2)
    problem = problem_of(topology)
    plan = mp.solve(problem, "contiguous")
    other = mp.Topology.preset("h100-hgx", devices_per_node=4)
    changes = [
        Change.resizing("6 devices", topology, topology.resized(devices=6), slots=12),
        Change.resizing("12 slots", topology, topology, slots=12),
        Change.moving("h100", other),
    ]
    steps = make_trace(1).decode_steps(8, steps=4)
    grown, roomier, moved = mp.what_if(plan, problem, steps, changes, solver="eplb").outcomes
    assert all(outcome.ready is not None and outcome.reason == "" for outcome in (grown, roomier, moved))
    assert grown.ready is not None
    assert roomier.ready is not None
    assert moved.ready is not None
    assert grown.ready.plan.topology.num_devices == 6
    assert grown.survives
    assert grown.degraded is None
    assert grown.ready.migration.bytes_reloaded == 0
    assert roomier.extra_slots == 4
    assert roomier.ready.plan.num_slots == 12
    assert moved.lost.all()
    assert moved.ready.migration.bytes_moved == 0
    assert moved.ready.migration.bytes_reloaded == 8 * 3 * MODEL.bytes_per_expert


def test_an_interrupt_keeps_what_is_finished() -> None:
    topology = mp.Topology.preset("a100-pcie", devices_per_node=4)
    problem = problem_of(topology)
    plan = mp.solve(problem, "contiguous")
    seen: list[str] = []

    def stop_at_third(news: mp.Progress) -> None:
        seen.append(news.message)
        if news.done == 2:
            raise KeyboardInterrupt

    result = mp.what_if(
        plan, problem, make_trace(1).decode_steps(8, steps=4), solver="round_robin", progress=stop_at_third
    )
    assert result.interrupted
    assert [outcome.change.name for outcome in result.outcomes] == ["device:0", "device:1"]
    assert seen == ["device:0", "device:1", "device:2"]


@pytest.mark.slow
def test_ready_plans_move_no_more_than_allowed_beside_what_is_loaded() -> None:
    topology = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=2)
    problem = problem_of(topology)
    plan = mp.solve(problem, "contiguous")
    limit = 2 * MODEL.bytes_per_expert
    result = mp.what_if(
        plan,
        problem,
        make_trace(1).decode_steps(8, steps=4),
        seconds=None,
        max_moved_bytes=limit,
        options={"proposals": 200, "steps": 4},
    )
    for outcome in result.outcomes:
        assert outcome.ready is not None
        assert outcome.ready.migration.bytes_moved <= limit
        assert outcome.ready.migration.bytes_reloaded >= outcome.lost.sum() * MODEL.bytes_per_expert
