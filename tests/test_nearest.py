"""Replicas taken near the token's home: priced exactly, searched for, and never below the bound."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cost import replicated_step_seconds
from test_cost import topology

import moeplace as mp
from moeplace.placement.nearest import nearest_share
from moeplace.placement.step_bound import step_seconds_bound
from moeplace.placement.traffic import device_traffic


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
    served = np.stack([nearest_share(share, topology("even"), home)[0] for home in range(4)])
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
    with pytest.raises(mp.InputError, match="needs tokens with a home device"):
        mp.Objective(execution="context_coherent", replica_choice="nearest")
