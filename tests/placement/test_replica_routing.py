"""Replicas taken near the token's source rank: priced exactly, searched for, and never below the bound."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cost import replicated_step_seconds
from small_clusters import topology
from traces import make_trace

import moeplace as mp
from moeplace.placement.bounds import least_leaving, step_seconds_bound
from moeplace.placement.cost import all_to_all_latency
from moeplace.placement.replay import device_traffic, routed_share
from moeplace.solvers.search.annealer import Annealer
from moeplace.solvers.search.kernel_types import MoveRules
from moeplace.solvers.search.scenario import deal_sources, mean_risks, rates_for, scenario_from
from moeplace.solvers.search.starts import near_layer


@st.composite
def replicated_cases(draw: st.DrawFn) -> tuple[mp.Plan, mp.Steps, mp.Problem]:
    """A plan with replicas, at most one an expert and device, with equal or free shares, on random steps."""
    cluster = topology(draw(st.sampled_from(["single", "node", "even", "mixed"])))
    layers, experts, top_k = draw(st.integers(1, 2)), draw(st.integers(4, 6)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.integers(1, 5, size=draw(st.integers(1, 3)))
    ids = rng.random((int(sizes.sum()), layers, experts)).argsort(axis=2)[:, :, :top_k].astype(np.uint8)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    source = rng.integers(cluster.num_devices, size=len(ids)) if draw(st.booleans()) else None
    steps = mp.Steps(ids, offsets, experts, tuple(range(layers)), source=source)
    model = mp.ModelSpec(layers=layers, experts=experts, top_k=top_k, hidden_size=64, ffn_size=32)
    held = rng.random((experts, cluster.num_devices)) < draw(st.sampled_from([0.0, 0.3, 0.7]))
    held[np.arange(experts), rng.integers(cluster.num_devices, size=experts)] = True
    table = np.nonzero(held.T)[1]
    shares = np.array([1.0 / held[e].sum() for e in table])
    if draw(st.booleans()):
        weights = rng.random(len(table)) + 0.01
        shares = weights / np.bincount(table, weights=weights, minlength=experts)[table]
    objective = mp.Objective(
        replica_choice=draw(st.sampled_from(["share", "nearest"])),
        split="free",
        node_dedup=draw(st.booleans()),
        dispatch_dtype=draw(st.sampled_from(["bf16", "fp8"])),
    )
    statistics = mp.RoutingStatistics.from_counts(np.ones((layers, experts)))
    problem = mp.Problem(model, cluster, statistics, objective, device_slots=held.sum(axis=0).tolist())
    plan = mp.Plan(model, cluster, np.tile(table, (layers, 1)), problem.slot_device, np.tile(shares, (layers, 1)))
    return plan, steps, problem


@settings(max_examples=120, deadline=None)
@given(replicated_cases())
def test_replay_with_replicas_equals_the_expectation_token_by_token(
    case: tuple[mp.Plan, mp.Steps, mp.Problem],
) -> None:
    plan, steps, problem = case
    predicted = mp.evaluate(plan, steps, problem).step_seconds
    np.testing.assert_allclose(predicted, replicated_step_seconds(plan, steps, problem), rtol=2e-5)


@settings(max_examples=40, deadline=None)
@given(replicated_cases())
def test_unknown_homes_cost_one_token_the_average_over_all_homes(case: tuple[mp.Plan, mp.Steps, mp.Problem]) -> None:
    plan, steps, problem = case
    one = dataclasses.replace(steps, expert_ids=steps.expert_ids[:1], offsets=np.array([0, 1]), source=None)
    spread = mp.evaluate(plan, one, problem)
    each = [
        mp.evaluate(plan, dataclasses.replace(one, source=np.array([rank])), problem)
        for rank in range(problem.num_devices)
    ]
    for name in ("crossing", "node_crossing", "reached", "node_reached", "device_tokens", "local"):
        mean = np.mean([getattr(evaluation, name) for evaluation in each], axis=0)
        np.testing.assert_allclose(getattr(spread, name), mean, rtol=1e-5, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(replicated_cases())
def test_no_plan_beats_the_step_bound(case: tuple[mp.Plan, mp.Steps, mp.Problem]) -> None:
    plan, steps, problem = case
    bound = step_seconds_bound(steps, problem)
    assert (mp.evaluate(plan, steps, problem).step_seconds >= bound * (1 - 1e-5)).all()


@pytest.mark.parametrize(("cluster", "per_device"), [("even", (1, 1, 2, 1)), ("node", (2, 1, 2))])
@pytest.mark.parametrize("rule", ["share", "nearest"])
def test_no_placement_of_a_small_instance_lets_fewer_copies_leave_than_the_bound(
    cluster: str, per_device: tuple[int, ...], rule: str
) -> None:
    """All placements of four experts with a spare slot, homes known and not; the bound holds and sometimes bites."""
    rng = np.random.default_rng(5)
    model = mp.ModelSpec(layers=1, experts=4, top_k=2, hidden_size=64, ffn_size=32)
    statistics = mp.RoutingStatistics.from_counts(np.ones((1, 4)))
    objective = mp.Objective(replica_choice=rule)
    problem = mp.Problem(model, topology(cluster), statistics, objective, device_slots=per_device)
    ids = np.stack([rng.permutation(4)[:2] for _ in range(12)])[:, None].astype(np.uint8)
    steps = mp.Steps(ids, np.array([0, 6, 12]), 4, (0,))
    for judged in (steps, dataclasses.replace(steps, source=rng.integers(len(per_device), size=12))):
        least, seconds = np.full(2, np.inf), np.full(2, np.inf)
        for row in itertools.product(range(4), repeat=sum(per_device)):
            held = list(zip(problem.slot_device.tolist(), row, strict=True))
            # Two slots of a device may change places without a difference.
            if set(row) != set(range(4)) or held != sorted(set(held)):
                continue
            found = mp.evaluate(mp.Plan(model, problem.topology, np.array([row]), problem.slot_device), judged, problem)
            leaving = found.node_crossing if problem.topology.num_nodes > 1 else found.crossing
            least = np.minimum(least, leaving[:, 0])
            seconds = np.minimum(seconds, found.step_seconds)
        bound = least_leaving(judged, problem)[:, 0]
        assert bound.max() > 0.0
        assert (bound <= least * (1 + 1e-6)).all()
        assert (step_seconds_bound(judged, problem) <= seconds * (1 + 1e-6)).all()


@settings(max_examples=30, deadline=None)
@given(replicated_cases())
def test_the_traffic_matrix_adds_up_to_the_crossing_copies(case: tuple[mp.Plan, mp.Steps, mp.Problem]) -> None:
    plan, steps, problem = case
    flat = problem.objective.replace(node_dedup=False)
    judged = mp.evaluate(plan, steps, dataclasses.replace(problem, objective=flat))
    traffic = device_traffic(plan, steps, problem.topology, flat)
    np.testing.assert_allclose(traffic.dispatch.sum(), judged.crossing.sum() / steps.num_steps, rtol=1e-4, atol=1e-6)


def test_the_rule_is_home_device_then_home_node_then_anywhere() -> None:
    """Four devices on two nodes; experts 0: one replica, 1: on devices 0 and 2, 2: on 2 and 3, 3: on 0, 1 and 2."""
    share = np.array([[[0, 0, 0, 1], [0.5, 0, 0.5, 0], [0, 0, 0.5, 0.5], [0.2, 0.3, 0.5, 0]]])
    served = np.stack([routed_share(share, topology("even"), home)[0] for home in range(4)])
    np.testing.assert_allclose(served[:, 0], [[0, 0, 0, 1]] * 4)
    np.testing.assert_allclose(served[:, 1], [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(served[:, 2], [[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(served[:, 3], [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])


def test_a_replica_in_each_node_saves_what_crosses() -> None:
    """Two experts on both nodes: nothing crosses under nearest, half of the tokens do under share."""
    cluster = topology("even")
    model = mp.ModelSpec(layers=1, experts=2, top_k=1, hidden_size=64, ffn_size=32)
    statistics = mp.RoutingStatistics.from_counts(np.ones((1, 2)))
    steps = mp.Steps(np.array([[[0]], [[1]]], np.uint8), np.array([0, 2]), 2, (0,))
    crossing = {}
    for rule in ("share", "nearest"):
        problem = mp.Problem(model, cluster, statistics, mp.Objective(replica_choice=rule), slots=4)
        plan = mp.Plan(model, cluster, np.array([[0, 1, 0, 1]]), problem.slot_device)
        crossing[rule] = float(mp.evaluate(plan, steps, problem).node_crossing.sum())
    assert crossing == {"share": pytest.approx(1.0), "nearest": 0.0}


def test_tokens_without_a_home_have_no_nearest_replica() -> None:
    with pytest.raises(mp.InputError, match="needs tokens with a source rank"):
        mp.Objective(execution="context_coherent", replica_choice="nearest")


def searched(trace: mp.RoutingTrace, cluster: str, slots: int, **objective: Any) -> mp.Problem:
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=256)
    statistics = mp.RoutingStatistics.from_trace(trace)
    return mp.Problem(model, topology(cluster), statistics, mp.Objective(**objective), slots=slots)


@pytest.mark.parametrize("cluster", ["even", "mixed"])
@pytest.mark.parametrize(
    ("rule", "slots", "split"),
    [("nearest", 8, "equal"), ("nearest", 11, "equal"), ("nearest", 14, "free"), ("share", 11, "free")],
)
@pytest.mark.parametrize("node_dedup", [True, False])
def test_the_kernels_price_known_homes_as_evaluation_does(
    cluster: str, rule: str, slots: int, split: str, node_dedup: bool
) -> None:
    """After hundreds of accepted increments, step costs must equal a replay of the final placement from nothing."""
    trace = make_trace(seed=1)
    given_problem = searched(trace, cluster, slots, replica_choice=rule, split=split, node_dedup=node_dedup)
    drawn = scenario_from(given_problem, "decode", 8, 6, seed=0)
    assert drawn.steps is not None
    scenario = dataclasses.replace(drawn, steps=deal_sources(drawn.steps, 4, seed=2))
    moves = [MoveRules(np.ones((8, 4), dtype=bool), split == "free")] * 3
    annealer = Annealer(given_problem, scenario, rates_for(given_problem, scenario), moves, seed=3)
    table = mp.solve(given_problem, "search", step_tokens=8, steps=2, proposals=1).physical_to_logical
    shares = []
    for row in table:
        share = np.zeros((8, 4))
        share[row, given_problem.slot_device] = 1.0
        shares.append(share / share.sum(axis=1, keepdims=True))
    risks = mean_risks(scenario)
    annealer.start(list(table), shares, risks)
    annealer.run(risks, proposals=400, hot=1.0, cold=0.5)
    final = np.stack([state.now.cost for state in annealer.states], axis=1)
    annealer.close()
    plan = mp.Plan(
        given_problem.model,
        given_problem.topology,
        np.stack([state.now.slot_expert for state in annealer.states]),
        given_problem.slot_device,
        np.stack([state.now.share[state.now.slot_expert, given_problem.slot_device] for state in annealer.states]),
    )
    assert scenario.steps is not None
    replayed = mp.evaluate(plan, scenario.steps, given_problem)
    latency = all_to_all_latency(given_problem.topology, node_dedup)
    expected = replayed.dispatch + replayed.compute + replayed.combine - 2 * latency
    np.testing.assert_allclose(final, expected, rtol=1e-5)


def test_the_first_placement_stands_the_hottest_experts_in_every_node() -> None:
    node_of, slots = np.array([0, 0, 1, 1]), np.array([3, 3, 3, 2])
    table = near_layer(np.array([5.0, 9, 1, 2, 8, 1, 1, 3]), slots, np.ones(4), node_of)
    slot_node = node_of[np.repeat(np.arange(4), slots)]
    both = {e for e in range(8) if len(set(slot_node[table == e])) == 2}
    assert both == {0, 1, 4}
    assert set(table) == set(range(8))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_first_placement_fills_clusters_of_any_shape(seed: int) -> None:
    rng = np.random.default_rng(seed)
    node_of = np.repeat(np.arange(rng.integers(1, 5)), 2)
    experts = int(rng.integers(4, 12))
    fewest = experts // len(node_of) + 1
    slots = rng.integers(fewest, max(fewest + 1, experts - 1), size=len(node_of))
    table = near_layer(rng.random(experts), slots, rng.random(len(node_of)) + 0.5, node_of)
    device = np.repeat(np.arange(len(slots)), slots)
    assert set(table) == set(range(experts))
    assert len(set(zip(table, device, strict=True))) == len(table)


def test_search_lets_fewer_copies_cross_when_engines_take_the_nearest_replica(toy_trace: mp.RoutingTrace) -> None:
    """Judged as the engine runs, on steps not solved on; the bound stays below what was found."""
    found = {}
    train, held = toy_trace.split()
    steps = held.decode_steps(16, 20)
    for rule in ("share", "nearest"):
        given_problem = searched(train, "even", 12, replica_choice=rule)
        plan = mp.solve(given_problem, "search", step_tokens=16, steps=20, proposals=2000)
        near = dataclasses.replace(given_problem, objective=mp.Objective(replica_choice="nearest"))
        found[rule] = mp.evaluate(plan, steps, near).summary()
        assert plan.certificate is not None
        assert plan.certificate.bound is not None
        assert plan.certificate.bound <= plan.certificate.value
    assert found["nearest"]["cross_node_fraction"] < found["share"]["cross_node_fraction"]
    assert found["nearest"]["step_seconds_mean"] < found["share"]["step_seconds_mean"]
