"""Homes of experts that are copied by the step: what copies cost, and placements that need few."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.bounds import step_seconds_bound
from moeplace.placement.online import plan_online
from moeplace.placement.steps import Steps

pytestmark = pytest.mark.slow

MODEL = mp.ModelSpec(layers=2, experts=12, top_k=2, hidden_size=256, ffn_size=128)
CLUSTER = mp.Topology.preset("h100-hgx", devices_per_node=4)


def skewed_trace(seed: int = 0) -> mp.RoutingTrace:
    """Sequences of 256 tokens, each of which mostly chooses from one of three groups of four neighbouring experts."""
    rng = np.random.default_rng(seed)
    tokens = 36 * 256
    hot = (np.arange(tokens) // 256 % 3)[:, None, None]
    draws = rng.exponential(size=(tokens, 2, 12)) / (1 + 7 * (np.arange(12) // 4 == hot))
    ids = np.argsort(draws, axis=2)[..., :2]
    return mp.RoutingTrace.from_arrays(ids, num_experts=12, sequence=np.arange(tokens) // 256)


@pytest.fixture(scope="module")
def trace() -> mp.RoutingTrace:
    return skewed_trace()


@pytest.fixture(scope="module")
def problem(trace: mp.RoutingTrace) -> mp.Problem:
    return mp.Problem(MODEL, CLUSTER, trace, mp.Objective(online=1, online_slack=0.1))


def without(problem: mp.Problem) -> mp.Problem:
    return dataclasses.replace(problem, objective=mp.Objective())


@pytest.mark.parametrize("sources", [False, True])
def test_steps_are_priced_with_the_planners_copies(trace: mp.RoutingTrace, problem: mp.Problem, sources: bool) -> None:
    steps: Steps = trace.prefill_steps(512, 3)
    if sources:
        steps = dataclasses.replace(steps, source=np.random.default_rng(0).integers(4, size=len(steps.expert_ids)))
    plan = mp.solve(without(problem), "contiguous")
    priced, plain = mp.evaluate(plan, steps, problem), mp.evaluate(plan, steps, without(problem))
    homes = np.arange(12) // 3
    for s, ids in enumerate(steps.blocks()):
        for layer in range(2):
            counts = np.zeros((4, 12), dtype=np.int64)
            source = np.zeros(len(ids), dtype=int) if steps.source is None else steps.source[steps.step_of == s]
            np.add.at(counts, (np.repeat(source, 2), ids[:, layer].ravel()), 1)
            expected = plan_online(counts, homes, 1, slack=0.1)
            np.testing.assert_array_equal(priced.device_tokens[s, layer], expected.loads[0])
            # A copy that serves nobody is none.
            assert priced.copied[s, layer] == expected.copies[0]
    assert priced.copied.sum() > 0
    assert not plain.copied.any()
    assert "experts_copied" in priced.summary()
    assert "experts_copied" not in plain.summary()
    assert (priced.device_tokens.max(axis=2) <= plain.device_tokens.max(axis=2)).all()
    # Weights are bytes on links inside a node, once out and once in.
    crossed = priced.device_bytes.sum() - plain.device_bytes.sum()
    assert crossed > priced.copied.sum() * MODEL.bytes_per_expert
    assert (priced.step_seconds >= step_seconds_bound(steps, problem)).all()


def test_bounds_hold_whatever_is_copied(trace: mp.RoutingTrace, problem: mp.Problem) -> None:
    steps = trace.prefill_steps(512, 4)
    rng = np.random.default_rng(1)
    for slots in (1, 3):
        asked = dataclasses.replace(problem, objective=mp.Objective(online=slots, online_slack=0.0))
        for _ in range(5):
            table = np.stack([rng.permutation(12) for _ in range(2)])
            plan = mp.Plan(MODEL, CLUSTER, table, asked.slot_device)
            assert (mp.evaluate(plan, steps, asked).step_seconds >= step_seconds_bound(steps, asked) * (1 - 1e-9)).all()


@pytest.mark.slow
def test_search_finds_homes_that_need_fewer_copies(trace: mp.RoutingTrace, problem: mp.Problem) -> None:
    # A step is one sequence: hot experts of one time stand apart, which total loads do not tell.
    steps = skewed_trace(1).prefill_steps(256, 20, seed=1)
    arguments = {"batch": "prefill", "step_tokens": 256, "proposals": 2000}
    plan = mp.solve(problem, "search", **arguments)
    assert "1 experts a device copied by the step" in plan.certificate.objective
    again = mp.solve(problem, **arguments)
    np.testing.assert_array_equal(plan.physical_to_logical, again.physical_to_logical)
    copied = {
        name: mp.evaluate(made, steps, problem).summary()["experts_copied"]
        for name, made in (
            ("online", plan),
            ("eplb", mp.solve(without(problem), "eplb")),
            ("contiguous", mp.solve(without(problem), "contiguous")),
        )
    }
    assert copied["online"] <= 0.5 * copied["eplb"]
    assert copied["online"] <= 0.5 * copied["contiguous"]


def test_pinned_experts_stay_where_they_must(trace: mp.RoutingTrace, problem: mp.Problem) -> None:
    pinned = {(0, 0): 2, (1, 5): 0}
    plan = mp.solve(dataclasses.replace(problem, pinned=pinned), "search", proposals=300, step_tokens=256)
    for (layer, expert), device in pinned.items():
        assert plan.holds[layer, expert, device]


def test_what_does_not_go_together_is_refused(trace: mp.RoutingTrace, problem: mp.Problem) -> None:
    with pytest.raises(ValueError, match="divides tokens among homes and copies by itself"):
        mp.Objective(online=1, replica_choice="nearest")
    with pytest.raises(ValueError, match="dispatch_combine"):
        mp.Objective(online=1, execution="context_coherent")
    for wrong in ({"online": -1}, {"online": 1.5}, {"online_slack": -0.1}, {"online_slack": float("inf")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            mp.Objective(**wrong)
    with pytest.raises(mp.InputError, match="one home"):
        dataclasses.replace(problem, slots=16)
    with pytest.raises(mp.UnsupportedError, match="copies no experts for one step"):
        dataclasses.replace(problem, engine="vllm")
    assert dataclasses.replace(problem, engine="moeplace").objective.online == 1
    with pytest.raises(mp.UnsupportedError, match="experts copied for one step; these do: search"):
        mp.solve(problem, "eplb")
    counts = mp.RoutingStatistics.from_counts(np.ones((2, 2, 12)))
    of_counts = mp.Problem(MODEL, CLUSTER, counts, mp.Objective(online=1))
    with pytest.raises(mp.UnsupportedError, match="record tokens"):
        mp.solve(of_counts, "search")
    current = mp.solve(without(problem), "contiguous")
    limited = dataclasses.replace(problem, current=current, max_moved_bytes=1e6)
    with pytest.raises(mp.UnsupportedError, match="leave one of them out"):
        mp.solve(limited, "search", proposals=10)
