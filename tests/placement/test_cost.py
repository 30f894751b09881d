"""The cost model against a token-by-token oracle, and the figures an evaluation reports."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_cost import step_seconds
from small_clusters import FAST, topology

import moeplace as mp
from moeplace.placement.evaluate import evaluate_on


@st.composite
def cases(draw: st.DrawFn) -> tuple[mp.Plan, mp.Steps, mp.Problem]:
    cluster = topology(draw(st.sampled_from(["single", "node", "even", "mixed"])))
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(4, 6))
    top_k = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = rng.integers(1, 7, size=draw(st.integers(1, 3)))
    ids = rng.random((int(sizes.sum()), layers, experts)).argsort(axis=2)[:, :, :top_k]
    model = mp.ModelSpec(layers=layers, experts=experts, top_k=top_k, hidden_size=64, ffn_size=32)
    trace = mp.RoutingTrace.from_arrays(ids, experts)
    source = rng.integers(cluster.num_devices, size=len(ids)) if draw(st.booleans()) else None
    steps = mp.Steps(
        trace.expert_ids, np.concatenate([[0], np.cumsum(sizes)]), experts, trace.moe_layers, source=source
    )
    objective = mp.Objective(
        execution=draw(st.sampled_from(["dispatch_combine", "context_coherent"])),
        node_dedup=draw(st.booleans()),
        dispatch_dtype=draw(st.sampled_from(["bf16", "fp8"])),
    )
    problem = mp.Problem(model, cluster, mp.RoutingStatistics.from_counts(np.ones((layers, experts))), objective)
    table = np.stack([rng.permutation(experts) for _ in range(layers)])
    return mp.Plan(model, cluster, table, problem.slot_device), steps, problem


@settings(max_examples=150, deadline=None)
@given(cases())
def test_replay_equals_the_formulas_applied_token_by_token(case: tuple[mp.Plan, mp.Steps, mp.Problem]) -> None:
    plan, steps, problem = case
    predicted = mp.evaluate(plan, steps, problem).step_seconds
    np.testing.assert_allclose(predicted, step_seconds(plan, steps, problem), rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_even_spread_equals_the_average_over_all_source_ranks(case: tuple[mp.Plan, mp.Steps, mp.Problem]) -> None:
    """With one token a step, an unknown source must cost the traffic averaged over the devices it may come from."""
    plan, steps, problem = case
    one = dataclasses.replace(steps, expert_ids=steps.expert_ids[:1], offsets=np.array([0, 1]), source=None)
    spread = mp.evaluate(plan, one, problem)
    crossing = [
        mp.evaluate(plan, dataclasses.replace(one, source=np.array([rank])), problem).crossing
        for rank in range(problem.num_devices)
    ]
    np.testing.assert_allclose(spread.crossing, np.mean(crossing, axis=0), rtol=1e-5)


def replicated(seed: int) -> tuple[mp.Plan, mp.Steps, mp.Problem]:
    rng = np.random.default_rng(seed)
    model = mp.ModelSpec(layers=2, experts=4, top_k=2, hidden_size=64, ffn_size=32)
    ids = rng.random((3, 2, 4)).argsort(axis=2)[:, :, :2]
    trace = mp.RoutingTrace.from_arrays(ids, 4)
    steps = mp.Steps(trace.expert_ids, np.array([0, 3]), 4, trace.moe_layers)
    problem = mp.Problem(model, topology("even"), mp.RoutingStatistics.from_counts(np.ones((2, 4))), slots=8)
    table = np.stack([np.concatenate([rng.permutation(4), rng.permutation(4)]) for _ in range(2)])
    return mp.Plan(model, problem.topology, table, problem.slot_device), steps, problem


@pytest.mark.parametrize("seed", range(5))
def test_counts_with_replicas_are_the_expectation_over_every_replica_choice(seed: int) -> None:
    """Enumerates which replica each token-expert pair draws (two equal ones here) in one layer at a time."""
    plan, steps, problem = replicated(seed)
    evaluation = mp.evaluate(plan, steps, problem)
    for layer in range(2):
        pairs = [(t, int(e)) for t in range(3) for e in steps.expert_ids[t, layer]]
        slots = [np.flatnonzero(plan.physical_to_logical[layer] == e) for _, e in pairs]
        work, reached = np.zeros(4), 0.0
        choices = list(itertools.product(*slots))
        for choice in choices:
            devices = plan.slot_device[list(choice)]
            work += np.bincount(devices, minlength=4)
            reached += len({(t, int(g)) for (t, _), g in zip(pairs, devices, strict=True)})
        np.testing.assert_allclose(evaluation.device_tokens[0, layer], work / len(choices), rtol=1e-6)
        np.testing.assert_allclose(evaluation.reached[0, layer], reached / len(choices), rtol=1e-6)


def test_step_time_does_not_depend_on_how_steps_are_blocked(
    toy_trace: mp.RoutingTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=64, ffn_size=32)
    problem = mp.Problem(model, topology("even"), mp.RoutingStatistics.from_counts(np.ones((3, 8))))
    plan = mp.solve(problem, "contiguous")
    steps = toy_trace.decode_steps(concurrency=8, steps=10)
    whole = mp.evaluate(plan, steps, problem)
    monkeypatch.setattr("moeplace.placement.replay.BLOCK_VALUES", 1)
    blocked = mp.evaluate(plan, steps, problem)
    np.testing.assert_array_equal(whole.step_seconds, blocked.step_seconds)
    assert whole.summary() == blocked.summary()


def test_summary_of_a_hand_made_case() -> None:
    """Two devices in two nodes, one layer pair, two tokens: every figure can be counted by hand."""
    model = mp.ModelSpec(layers=2, experts=4, top_k=2, hidden_size=10, ffn_size=10)
    cluster = mp.Topology.from_dict({"nodes": [{"count": 2, "inter_bandwidth": 1e9, "devices": [FAST]}]})
    problem = mp.Problem(model, cluster, mp.RoutingStatistics.from_counts(np.ones((2, 4))))
    plan = mp.Plan(model, cluster, np.array([[0, 1, 2, 3]] * 2), problem.slot_device)
    trace = mp.RoutingTrace.from_arrays(np.array([[[0, 1], [0, 2]], [[2, 3], [3, 2]]]), 4)
    summary = mp.evaluate(plan, mp.Steps(trace.expert_ids, np.array([0, 2]), 4, (0, 1)), problem).summary()
    assert summary["devices_per_token"] == pytest.approx((1 + 2 + 1 + 1) / 4)
    assert summary["nodes_per_token"] == summary["devices_per_token"]
    assert summary["cross_device_fraction"] == pytest.approx(5 * 0.5 / 8)
    assert summary["local_transitions"] == pytest.approx((0.5 + 1.0) / 2)
    assert summary["load_max_mean"] == pytest.approx((1.0 + 1.5) / 2)
    assert summary["device_memory_max"] == 2 * 2 * model.bytes_per_expert


def test_seconds_add_up_and_risks_order(gpt_oss: mp.RoutingTrace) -> None:
    _, held = gpt_oss.split()
    model = mp.ModelSpec(layers=24, experts=32, top_k=4, hidden_size=2880, ffn_size=2880)
    cluster = mp.Topology.preset("a100-pcie", nodes=2, devices_per_node=4)
    statistics = mp.RoutingStatistics.from_counts(np.ones((24, 32)))
    steps = held.decode_steps(128, 50)
    for execution in ("dispatch_combine", "context_coherent"):
        objective = mp.Objective(execution=execution)
        plan = mp.solve(mp.Problem(model, cluster, statistics, objective), "contiguous")
        mean, tail, worst = (
            evaluate_on(plan, steps, model, cluster, objective.replace(risk=risk)).risk()
            for risk in ("mean", "cvar:0.9", "worst_workload")
        )
        assert mean < tail
        assert mean <= worst


def test_contiguous_placement_of_gpt_oss_has_the_published_imbalance(gpt_oss: mp.RoutingTrace) -> None:
    """Measured independently on this recording: 1.46 per-step load max/mean, 12 % of transitions local."""
    model = mp.ModelSpec(layers=24, experts=32, top_k=4, hidden_size=2880, ffn_size=2880)
    cluster = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=4)
    problem = mp.Problem(model, cluster, mp.RoutingStatistics.from_counts(np.ones((24, 32))))
    summary = mp.evaluate(mp.solve(problem, "contiguous"), gpt_oss.decode_steps(128, 200), problem).summary()
    assert summary["load_max_mean"] == pytest.approx(1.46, abs=0.03)
    assert summary["local_transitions"] == pytest.approx(0.12, abs=0.01)
    assert summary["devices_per_token"] == pytest.approx(3.6, abs=0.05)


def test_regret_needs_the_best_of_each_workload_and_measures_against_it() -> None:
    from moeplace.placement.objective import risk_value

    seconds, workload = np.array([1.0, 3.0, 2.0, 2.0]), np.array([0, 0, 1, 1])
    objective = mp.Objective(risk="regret")
    with pytest.raises(mp.InputError, match="regret"):
        risk_value(seconds, workload, objective)
    assert risk_value(seconds, workload, objective, best=np.array([1.9, 1.0])) == pytest.approx(1.0)


def test_evaluation_refuses_steps_or_plans_of_another_model_or_cluster(toy_trace: mp.RoutingTrace) -> None:
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=64, ffn_size=32)
    problem = mp.Problem(model, topology("even"), mp.RoutingStatistics.from_counts(np.ones((3, 8))))
    plan = mp.solve(problem, "contiguous")
    steps = toy_trace.decode_steps(concurrency=4, steps=2)
    with pytest.raises(mp.InputError, match="4 devices"):
        mp.evaluate(plan, steps, dataclasses.replace(problem, topology=topology("node")))
    with pytest.raises(mp.InputError, match="steps are of another model"):
        mp.evaluate(plan, dataclasses.replace(steps, moe_layers=(3, 4, 5)), problem)
    with pytest.raises(mp.InputError, match="rank 7"):
        mp.evaluate(plan, dataclasses.replace(steps, source=np.full(len(steps.expert_ids), 7)), problem)
