"""At most so many bytes moved from the plan in force: a hard limit that search keeps to and makes the most of."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace.placement.migration import migration
from moeplace.solvers.base import Feature
from moeplace.solvers.search.annealer import cheapest_mix
from moeplace.solvers.solve import SOLVERS

pytestmark = pytest.mark.slow

MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=256)
SIZE = MODEL.bytes_per_expert
DEVICE = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e11, "intra_bandwidth": 1e9}
CLUSTER = mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 4e8, "devices": [DEVICE, DEVICE]}] * 2})
SEARCH = {"step_tokens": 8, "steps": 6, "proposals": 400}


def problem(slots: int = 8, seed: int = 1, **objective: Any) -> mp.Problem:
    statistics = mp.RoutingStatistics.from_trace(make_trace(seed=seed))
    return mp.Problem(MODEL, CLUSTER, statistics, mp.Objective(**objective), slots=slots)


def limited(given: mp.Problem, current: mp.Plan, experts: float) -> mp.Problem:
    return replace(given, current=current, max_moved_bytes=experts * SIZE)


def spread(given: mp.Problem, seed: int = 0) -> mp.Plan:
    """Some plan in which no expert stands twice on a device."""
    return mp.solve(given, "search", step_tokens=8, steps=1, proposals=12, seed=seed)


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.parametrize(("slots", "split"), [(8, "equal"), (11, "equal"), (11, "free")])
def test_without_a_byte_to_move_the_plan_in_force_is_the_answer(execution: str, slots: int, split: str) -> None:
    given_problem = problem(slots, execution=execution, split=split)
    current = spread(given_problem)
    plan = mp.solve(limited(given_problem, current, 0), "search", **SEARCH)
    np.testing.assert_array_equal(plan.holds, current.holds)
    if split == "equal":
        np.testing.assert_allclose(plan.device_share, current.device_share)
    assert migration(current, plan).bytes_moved == 0


@settings(max_examples=10, deadline=None)
@given(
    st.integers(0, 6),
    st.integers(0, 20),
    st.sampled_from(["dispatch_combine", "context_coherent"]),
    st.sampled_from([(8, "equal"), (11, "equal"), (11, "free")]),
    st.sampled_from(["mean", "cvar:0.5", "worst_workload"]),
)
def test_the_limit_is_never_exceeded(
    seed: int, experts: int, execution: str, shape: tuple[int, str], risk: str
) -> None:
    given_problem = problem(shape[0], seed, execution=execution, split=shape[1], risk=risk)
    current = spread(given_problem, seed)
    asked = limited(given_problem, current, experts + 0.5)
    plan = mp.solve(asked, "search", seed=seed, step_tokens=8, steps=4, proposals=150)
    assert migration(current, plan).bytes_moved <= asked.max_moved_bytes  # type: ignore[operator]


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
def test_more_to_move_is_better_and_better_than_truncating_a_free_plan(execution: str) -> None:
    given_problem = problem(execution=execution)
    current = mp.solve(given_problem, "contiguous")
    steps = given_problem.statistics.require_sample().decode_steps(8, 6, seed=0)

    def seconds(plan: mp.Plan) -> float:
        return float(mp.evaluate(plan, steps, given_problem).step_seconds.mean())

    free = mp.solve(given_problem, "search", **SEARCH)
    allowed = (0, 2, 4, 8, 24)
    values = [seconds(mp.solve(limited(given_problem, current, n), "search", **SEARCH)) for n in allowed]
    assert values[0] == pytest.approx(seconds(current))
    assert all(after <= before * 1.01 for before, after in itertools.pairwise(values))
    assert values[-1] <= seconds(free) * 1.02
    for most, value in zip(allowed, values, strict=True):
        assert value <= seconds(truncated(current, free, most, seconds)) * (1 + 1e-9)


def truncated(current: mp.Plan, free: mp.Plan, most: int, seconds: Any) -> mp.Plan:
    """Layers of the free plan taken over whole, the one with the largest gain a moved expert first, while they fit."""
    plan = current
    while True:
        options = []
        for layer in range(MODEL.layers):
            table = plan.physical_to_logical.copy()
            table[layer] = free.physical_to_logical[layer]
            taken = mp.Plan(MODEL, CLUSTER, table, plan.slot_device)
            more = migration(current, taken).moves - migration(current, plan).moves
            if more > 0 and migration(current, taken).moves <= most:
                options.append(((seconds(plan) - seconds(taken)) / more, layer, taken))
        if not options or max(options, key=lambda option: option[:2])[0] <= 0:
            return plan
        plan = max(options, key=lambda option: option[:2])[2]


def test_every_other_solver_refuses_the_limit_and_names_search() -> None:
    given_problem = problem()
    asked = limited(given_problem, mp.solve(given_problem, "contiguous"), 2)
    for solver in SOLVERS:
        if Feature.MOVE_LIMIT in solver.supports:
            continue
        with pytest.raises(mp.UnsupportedError, match=r"bytes moved from the current plan; these do: search"):
            mp.solve(asked, solver.name)


def test_a_current_plan_without_a_limit_is_a_start() -> None:
    given_problem = problem(slots=10)
    good = mp.solve(given_problem, "search", step_tokens=8, steps=6, proposals=2000)
    steps = given_problem.statistics.require_sample().decode_steps(8, 6, seed=0)
    again = mp.solve(replace(given_problem, current=good), "search", step_tokens=8, steps=6, proposals=12)
    before, after = (mp.evaluate(plan, steps, given_problem).step_seconds.mean() for plan in (good, again))
    assert after <= before * (1 + 1e-9)


def test_more_slots_than_the_plan_in_force_need_moves_and_the_refusal_says_how_many() -> None:
    current = mp.solve(problem(), "contiguous")
    grown = problem(slots=10)
    with pytest.raises(mp.SolveError, match=r"alone move 6 experts of the current plan \(4\.719e\+06 bytes\)"):
        mp.solve(limited(grown, current, 5), "search", **SEARCH)
    plan = mp.solve(limited(grown, current, 6), "search", **SEARCH)
    assert migration(current, plan).moves == 6


def test_pinned_devices_are_kept_to_within_the_limit() -> None:
    current = mp.solve(problem(), "contiguous")
    pinned = replace(problem(), pinned={(0, 0): 3, (1, 5): 0})
    plan = mp.solve(limited(pinned, current, 8), "search", **SEARCH)
    assert plan.device_share[0, 0, 3] == plan.device_share[1, 5, 0] == 1.0
    assert migration(current, plan).moves <= 8


def test_a_limit_needs_a_plan_of_the_same_model_and_devices() -> None:
    given_problem = problem()
    current = mp.solve(given_problem, "contiguous")
    with pytest.raises(mp.InputError, match="needs Problem.current"):
        replace(given_problem, max_moved_bytes=1e9)
    for limit, words in ((-1.0, "must be at least 0"), (float("nan"), "max_moved_bytes is nan")):
        with pytest.raises(mp.InputError, match=words):
            replace(given_problem, current=current, max_moved_bytes=limit)
    fewer = mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 4e8, "devices": [DEVICE, DEVICE]}]})
    with pytest.raises(mp.InputError, match="for 4 devices, the topology has 2"):
        replace(given_problem, topology=fewer, current=current)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_the_cheapest_mix_is_that_of_all_mixes(sizes: list[int], most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = [np.where(rng.random(size) < 0.3, np.inf, rng.integers(0, 9, size)).astype(float) for size in sizes]
    for value in values:
        value[0] = rng.integers(0, 9)
    chosen, worth = cheapest_mix(values, most)
    best = min(
        sum(value[k] for value, k in zip(values, counts, strict=True))
        for counts in itertools.product(*map(range, sizes))
        if sum(counts) <= most
    )
    assert sum(chosen) <= most
    assert sum(value[k] for value, k in zip(values, chosen, strict=True)) == best
    assert worth >= 0


def test_counts_alone_are_balanced_within_the_limit() -> None:
    counts = mp.RoutingStatistics.from_counts(np.random.default_rng(0).gamma(0.5, size=(3, 8)), top_k=2)
    given_problem = mp.Problem(MODEL, CLUSTER, counts, slots=11)
    current = spread(given_problem)
    values = []
    for experts in (0, 4, 40):
        plan = mp.solve(limited(given_problem, current, experts), "search", proposals=2000)
        assert migration(current, plan).moves <= experts
        assert plan.certificate is not None
        values.append(plan.certificate.value)
    assert values == sorted(values, reverse=True)
