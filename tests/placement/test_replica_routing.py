"""Replicas taken near the token's source rank: priced exactly, searched for, and never below the bound."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, get_args

import numpy as np
import pytest
from annealed import annealed
from hypothesis import given, settings
from hypothesis import strategies as st
from least_loads import least_largest_load
from naive_cost import replicated_step_seconds
from small_clusters import topology
from traces import make_trace

import moeplace as mp
from moeplace.placement import replay
from moeplace.placement.bounds import least_leaving, step_seconds_bound
from moeplace.placement.cost import Transfers, all_to_all_latency
from moeplace.placement.division import Division
from moeplace.placement.replay import device_traffic, routed_share
from moeplace.solvers.search.scenario import deal_sources, scenario_from
from moeplace.solvers.search.starts import near_layer

pytestmark = pytest.mark.slow


@st.composite
def replicated_cases(draw: st.DrawFn, divided: bool = True) -> tuple[mp.Plan, mp.Steps, mp.Problem]:
    """A plan with replicas, at most one an expert and device, with equal or free shares, on random steps.

    divided: whether steps may be divided anew among replicas."""
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
    choice, division = draw(
        st.sampled_from(
            [("share", "local"), ("nearest", "local"), *(("balanced", rule) for rule in get_args(Division) if divided)]
        )
    )
    objective = mp.Objective(
        replica_choice=choice,
        division=division,
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
@given(replicated_cases(divided=False))
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


@pytest.mark.parametrize("known", [True, False])
def test_how_many_ranks_are_counted_at_once_changes_nothing(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, devices, experts = np.random.default_rng(0), 8, 8
    cluster = mp.Topology.preset("h100-sxm", nodes=2, devices_per_node=4)
    ids = rng.random((60, 3, experts)).argsort(axis=2)[:, :, :3].astype(np.uint8)
    source = rng.integers(devices, size=60) if known else None
    steps = mp.Steps(ids, np.array([0, 25, 60]), experts, (0, 1, 2), source=source)
    model = mp.ModelSpec(layers=3, experts=experts, top_k=3, hidden_size=64, ffn_size=32)
    objective = mp.Objective(replica_choice="nearest")
    statistics = mp.RoutingStatistics.from_counts(rng.integers(1, 50, (3, experts)))
    problem = mp.Problem(model, cluster, statistics, objective, slots=16)
    plan = mp.solve(problem, "eplb")
    together = mp.evaluate(plan, steps, problem)
    monkeypatch.setattr(replay, "BLOCK_VALUES", 3 * plan.device_share.size)
    by_threes = mp.evaluate(plan, steps, problem)
    for name in ("step_seconds", "device_tokens", "reached", "node_reached", "crossing", "node_crossing", "local"):
        np.testing.assert_allclose(getattr(by_threes, name), getattr(together, name), rtol=1e-12)


@settings(max_examples=100, deadline=None)
@given(replicated_cases())
def test_no_plan_beats_the_step_bound(case: tuple[mp.Plan, mp.Steps, mp.Problem]) -> None:
    plan, steps, problem = case
    bound = step_seconds_bound(steps, problem)
    assert (mp.evaluate(plan, steps, problem).step_seconds >= bound * (1 - 1e-5)).all()


@pytest.mark.parametrize(("cluster", "per_device"), [("even", (1, 1, 2, 1)), ("node", (2, 1, 2))])
@pytest.mark.parametrize("rule", ["share", "nearest", "balanced"])
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
        transfer = Transfers.of(model, problem.topology, objective).decode
        bound = least_leaving(judged, problem, transfer)[:, 0]
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
    with pytest.raises(mp.InputError, match='replica_choice \\("balanced"\\) needs tokens with a source rank'):
        mp.Objective(execution="context_coherent", replica_choice="balanced")


def test_only_balanced_divides() -> None:
    with pytest.raises(mp.InputError, match='division \\("lp"\\) says how replica_choice "balanced" divides'):
        mp.Objective(division="lp")


def test_dividing_each_step_reaches_the_set_bound_at_nearly_nearests_traffic(toy_trace: mp.RoutingTrace) -> None:
    """The largest load is the least possible of each step; "local" crosses less than "lp"."""
    steps = dataclasses.replace(toy_trace.decode_steps(64, 12), source=np.tile(np.arange(64) % 3, 12))
    given_problem = searched(toy_trace, "node", 12)
    plan = mp.solve(given_problem, "eplb")
    found = {
        rule: mp.evaluate(plan, steps, dataclasses.replace(given_problem, objective=mp.Objective(**rules)))
        for rule, rules in {
            "nearest": {"replica_choice": "nearest"},
            "local": {"replica_choice": "balanced"},
            "lp": {"replica_choice": "balanced", "division": "lp"},
        }.items()
    }
    for layer in range(3):
        least = least_largest_load(steps.loads()[:, layer], plan.holds[layer])
        for rule in ("local", "lp"):
            assert (found[rule].device_tokens[:, layer].max(axis=1) == least).all()
    crossing = {rule: float(judged.crossing.sum()) for rule, judged in found.items()}
    assert crossing["local"] < 0.97 * crossing["lp"]
    assert crossing["local"] < 1.05 * crossing["nearest"]


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
    result = annealed(given_problem, scenario, share_moves=split == "free")
    assert scenario.steps is not None
    replayed = mp.evaluate(result.plan, scenario.steps, given_problem)
    latency = all_to_all_latency(given_problem.topology, node_dedup)
    expected = replayed.dispatch + replayed.compute + replayed.combine - 2 * latency
    np.testing.assert_allclose(result.costs, expected, rtol=1e-5)


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
