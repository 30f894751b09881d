"""Slots of layers under one budget of memory: what they cost in KV cache, what they bring, and which are advised."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import CLUSTER, run, toy_model, toy_trace_folder

import moeplace as mp
from moeplace.solvers.slot_budget import _Costs, _dealt, _mixes

MODEL = mp.ModelSpec(layers=3, experts=16, top_k=2, hidden_size=1024, ffn_size=1024)
QUICK = {"proposals": 60}


def uneven(**fields: Any) -> mp.Problem:
    """Counts of which the first layer's are far from alike, and the others' alike; steps bound by arithmetic."""
    rng = np.random.default_rng(0)
    popularity = np.ones((3, 16))
    popularity[0] = rng.permutation(np.concatenate([[24.0, 12.0], np.ones(14)]))
    topology = mp.Topology.preset("h100-sxm", devices_per_node=4)
    slow = tuple(
        node.replace(devices=tuple(d.replace(compute=1e12, memory=3e9) for d in node.devices))
        for node in topology.nodes
    )
    counts = mp.RoutingStatistics.from_counts(np.round(1000 * popularity)[None], top_k=2)
    return mp.Problem(MODEL, topology.replace(nodes=slow), counts, batches=mp.Batch("prefill", tokens=4096), **fields)


def test_redundant_experts_go_to_the_layer_that_is_uneven_and_each_costs_its_bytes_of_cache() -> None:
    asked = uneven()
    front = mp.slot_front(asked, options=QUICK, token_bytes=1000.0)
    best = front.recommended
    assert best.slots[0] > max(best.slots[1:])
    assert best.throughput > max(1.0, front.recommended_even.throughput)
    left = 3e9 - 3 * 4 * MODEL.bytes_per_expert
    assert front.cache_bytes == pytest.approx(left)
    for point in (*front.points, *front.even):
        held = point.device_slots.sum(axis=0) - 3 * 4
        assert point.redundant == sum(point.slots) - 48
        assert point.memory == held.max() * MODEL.bytes_per_expert
        assert held.max() - held.min() <= 1
        assert point.cache_lost == pytest.approx(point.memory / left)
        assert point.cache_tokens_lost == pytest.approx(4 * point.memory / 1000)
        assert point.throughput == pytest.approx((1 - point.cache_lost) / (1 - point.saved))
    memory, times = zip(*((point.memory, point.step_seconds) for point in front.points), strict=True)
    assert list(memory) == sorted(memory)
    assert list(times) == sorted(times, reverse=True)
    plan = mp.solve(front.problem_with(best), "search", **QUICK)
    assert plan.slots_per_device.tolist() == best.device_slots.tolist()


def test_a_budget_holds_for_every_point() -> None:
    budget = 2.5 * MODEL.bytes_per_expert
    front = mp.slot_front(uneven(), memory_budget=budget, options=QUICK)
    assert max(point.memory for point in (*front.points, *front.even)) <= budget
    assert front.recommended.redundant > 0


def test_engines_with_one_number_for_all_layers_get_the_best_such_number() -> None:
    front = mp.slot_front(uneven(engine="vllm"), options=QUICK)
    assert all(point.even and len(set(point.device_slots.ravel().tolist())) == 1 for point in front.points)
    assert front.recommended is front.recommended_even
    assert front.recommended.throughput == max(point.throughput for point in front.even)


def test_other_work_makes_what_is_saved_of_a_whole_step_smaller() -> None:
    alone, whole = (mp.slot_front(uneven(), options=QUICK, other_ms={"prefill": ms}) for ms in (0.0, 50.0))
    assert whole.other_seconds == pytest.approx(0.05)
    mixed = [max(front.points, key=lambda point: point.saved) for front in (alone, whole)]
    assert mixed[1].saved < mixed[0].saved


def test_mixes_of_layers_are_the_best_of_all_for_every_budget() -> None:
    asked = uneven()
    rng = np.random.default_rng(3)
    known = [0, 2, 4, 8]
    costs = _Costs(known, np.cumsum(-rng.random((4, 3)), axis=0) + 4, 0.0)
    budget = 4 * MODEL.bytes_per_expert
    for rows in _mixes(costs, budget, asked):
        spent = sum(known[row] for row in rows)
        least = min(
            sum(costs.seconds[row, layer] for layer, row in enumerate(other))
            for other in itertools.product(range(4), repeat=3)
            if sum(known[row] for row in other) <= spent
        )
        assert sum(costs.seconds[row, layer] for layer, row in enumerate(rows)) == pytest.approx(least)
    assert _dealt([2, 2, 3], asked).sum(axis=0).tolist() == [14, 14, 14, 13]


def test_a_solve_may_choose_its_slots_and_says_so_where_they_are_named_elsewhere() -> None:
    plan = mp.solve(uneven(), "search", slots="auto", memory_budget=3 * MODEL.bytes_per_expert, **QUICK)
    assert plan.filled[0].sum() > 16
    assert (plan.device_memory - 12 * MODEL.bytes_per_expert).max() <= 3 * MODEL.bytes_per_expert
    with pytest.raises(mp.InputError, match=r'solve\(problem, slots="auto"\)'):
        uneven(slots="auto")
    with pytest.raises(mp.InputError, match="leave slots"):
        mp.slot_front(uneven(slots=20))
    with pytest.raises(mp.InputError, match='slots="auto"'):
        mp.solve(uneven(), memory_budget=1e9)
    with pytest.raises(mp.UnsupportedError, match="one slot"):
        mp.slot_front(uneven(engine="permute"))


def test_tokens_of_known_models_have_their_cache_and_others_none() -> None:
    front = mp.slot_front(uneven(), options=QUICK)
    assert front.token_bytes is None
    assert all(point.cache_tokens_lost is None for point in front.points)


def test_the_command_shows_the_front_and_solves_for_the_advised_slots(tmp_path: Path) -> None:
    trace = toy_trace_folder(tmp_path / "trace", toy_model(hidden_size=1024, ffn_size=1024))
    file = tmp_path / "plan.json"
    arguments = ["solve", trace, *CLUSTER, "--batch", "prefill:64", "--solver", "eplb", "--no-store", "-o", file]
    asked = [*arguments, "--slots", "auto", "--memory-budget", "40MB", "--cache-token-bytes", "16kB"]
    data = run(*asked, "--json").data
    front = data["slot_front"]
    assert data["layer_slots"] == front["recommended"]["slots"]
    assert front["memory_budget"] == 4e7
    assert front["cache_token_bytes"] == 16e3
    shown = run(*asked).out
    assert "slots against KV cache" in shown
    assert "* recommended" in shown
    assert run(*arguments, "--memory-budget", "40MB").code == 2
    refused = run("compare", trace, *CLUSTER, "--slots", "auto")
    assert refused.code != 0
    assert "moeplace solve does" in refused.err
