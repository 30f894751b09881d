"""Shares for a fixed placement: the program against brute force and duality, and never worse than what was given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace.solvers.shares import layer_shares, optimal_shares

MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=256)
# Weights are read in no time: what a device computes is all that counts.
QUICK = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e18, "intra_bandwidth": 1e15}
SLOW = {**QUICK, "compute": 4e11}


def problem_of(slots: int = 11, bandwidth: float = 1e18) -> mp.Problem:
    devices = [{**device, "memory_bandwidth": bandwidth} for device in (QUICK, SLOW, QUICK, QUICK)]
    topology = mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 1e15, "devices": devices}]})
    statistics = mp.RoutingStatistics.from_trace(make_trace(seed=1))
    return mp.Problem(MODEL, topology, statistics, mp.Objective(split="free"), slots=slots)


def slowest(loads: np.ndarray, table: np.ndarray, shares: np.ndarray, problem: mp.Problem) -> np.ndarray:
    """[S] seconds of the slowest device's arithmetic."""
    work = np.stack([loads[:, table[p]] * shares[p] for p in range(len(table))], axis=1)
    carried = np.stack([work[:, problem.slot_device == g].sum(axis=1) for g in range(problem.num_devices)], axis=1)
    return (carried * MODEL.flops_per_token / problem.topology.compute).max(axis=1)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_no_shares_beat_the_program_and_its_prices_prove_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = problem_of()
    table = mp.solve(problem, "round_robin").physical_to_logical[0]
    loads = rng.integers(0, 30, size=(4, 8)).astype(float)
    counts = np.bincount(table, minlength=8)
    found = layer_shares(loads, table, 1.0 / counts[table], problem.slot_device, problem)
    np.testing.assert_allclose(np.bincount(table, weights=found.shares), 1.0)
    assert slowest(loads, table, found.shares, problem).mean() == pytest.approx(found.seconds, rel=1e-6)
    for _ in range(50):
        drawn = rng.gamma(0.5, size=len(table)) + 1e-9
        drawn /= np.bincount(table, weights=drawn)[table]
        assert slowest(loads, table, drawn, problem).mean() >= found.seconds * (1 - 1e-7)
    assert found.price.sum() == pytest.approx(1.0)


def test_one_step_equals_the_best_of_a_fine_grid_and_prices_name_the_devices_waited_for() -> None:
    problem = problem_of(slots=9)
    table = np.array([0, 1, 2, 3, 4, 5, 6, 0, 7])
    loads = np.array([[40.0, 3, 5, 2, 6, 1, 2, 4]])
    found = layer_shares(loads, table, np.ones(9) / np.bincount(table)[table], problem.slot_device, problem)
    values = []
    for share in np.linspace(0, 1, 2001):
        shares = np.ones(9)
        shares[0], shares[7] = share, 1 - share
        values.append(slowest(loads, table, shares, problem).mean())
    assert found.seconds == pytest.approx(min(values), rel=1e-3)
    work = [
        sum(loads[0, table[p]] * found.shares[p] for p in np.flatnonzero(problem.slot_device == g)) for g in range(4)
    ]
    seconds = np.array(work) * MODEL.flops_per_token / problem.topology.compute
    waited = np.isclose(seconds, seconds.max(), rtol=1e-6)
    assert found.price[~waited].sum() == pytest.approx(0.0)


@pytest.mark.parametrize("bandwidth", [1e18, 1e10])
@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
def test_shares_of_a_plan_never_get_worse_and_improve_where_arithmetic_counts(execution: str, bandwidth: float) -> None:
    problem = problem_of(12, bandwidth)
    problem = replace(problem, objective=problem.objective.replace(execution=execution))
    plan = mp.solve(problem, "round_robin")
    steps = make_trace(seed=2).decode_steps(concurrency=6, steps=5)
    found = optimal_shares(plan, steps, problem)
    before, after = (mp.evaluate(each, steps, problem).step_seconds.mean() for each in (plan, found.plan))
    assert after <= before
    if bandwidth == 1e18:
        assert after < 0.98 * before
    np.testing.assert_array_equal(found.plan.physical_to_logical, plan.physical_to_logical)
    np.testing.assert_allclose(found.price.sum(axis=1), 1.0)


def test_a_searched_plan_has_the_shares_of_its_program() -> None:
    problem = problem_of()
    plan = mp.solve(problem, "search", step_tokens=8, steps=6, proposals=300)
    assert plan.certificate is not None
    steps = problem.statistics.require_sample().decode_steps(8, 6, seed=0)
    polished = optimal_shares(plan, steps, problem).plan
    seconds = mp.evaluate(polished, steps, problem).step_seconds.mean()
    assert seconds == pytest.approx(plan.certificate.value, rel=1e-4)


def test_a_plan_of_free_shares_keeps_its_placement_or_is_fitted_to_equal_ones() -> None:
    problem = problem_of()
    free = mp.solve(problem, "search", step_tokens=8, steps=6, proposals=300)
    equal = replace(problem, objective=mp.Objective(), current=free)
    kept = mp.solve(replace(equal, max_moved_bytes=0), "search", step_tokens=8, steps=6, proposals=300)
    fitted = mp.solve(equal, "search", step_tokens=8, steps=6, proposals=300)
    assert kept.has_equal_shares
    np.testing.assert_array_equal(kept.holds, free.holds)
    assert fitted.has_equal_shares
    steps = problem.statistics.require_sample().decode_steps(8, 6, seed=0)
    seconds = [mp.evaluate(plan, steps, problem).step_seconds.mean() for plan in (fitted, kept)]
    assert seconds[0] <= seconds[1]
