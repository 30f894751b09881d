"""Starts of a search: whole groups on nodes, and several starts of which search keeps the better start of every
layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace.solvers.base import Budget
from moeplace.solvers.search.annealer import Annealer, multistart
from moeplace.solvers.search.evaluator import Evaluator
from moeplace.solvers.search.moves import MoveRules
from moeplace.solvers.search.scenario import mean_risks, rates_for, scenario_from
from moeplace.solvers.search.starts import aligned, allowed_devices, can_align, even_shares, groups_on_nodes

MODEL = mp.ModelSpec(layers=3, experts=16, top_k=2, groups=4, hidden_size=512, ffn_size=256)
DEVICE = {"compute": 1e13, "memory": 1e12, "memory_bandwidth": 1e12, "intra_bandwidth": 1e11, "count": 2}
TOPOLOGY = mp.Topology.from_dict({"nodes": [{"devices": [DEVICE], "inter_bandwidth": 1e8, "count": 2}]})


def grouped_trace(tokens: int = 512) -> mp.RoutingTrace:
    """Every token stays in one group; groups 0 and 2, 1 and 3 are as heavy as each other."""
    rng = np.random.default_rng(0)
    group = rng.choice(4, p=[0.35, 0.15, 0.35, 0.15], size=(tokens, 3))
    inside = np.argsort(rng.random((tokens, 3, 4)), axis=2)[:, :, :2]
    return mp.RoutingTrace.from_arrays(
        group[:, :, None] * 4 + inside,
        num_experts=16,
        sequence=np.arange(tokens) % 16,
        position=np.arange(tokens) // 16,
    )


def problem(slots: int) -> mp.Problem:
    return mp.Problem(MODEL, TOPOLOGY, mp.RoutingStatistics.from_trace(grouped_trace()), slots=slots)


def test_whole_groups_stand_on_one_node_and_balance_nodes() -> None:
    given = problem(slots=20)
    tables = groups_on_nodes(given, given.statistics.total_load)
    assert tables is not None
    for table, load in zip(tables, given.statistics.total_load, strict=True):
        node = TOPOLOGY.node_of[given.slot_device]
        homes = [set(node[table // 4 == group].tolist()) for group in range(4)]
        assert all(len(home) == 1 for home in homes)
        assert set(table.tolist()) == set(range(16))
        heavy, light = homes[0] | homes[2], homes[1] | homes[3]
        assert heavy == light == {0, 1}, "each node has a heavy and a light group"
        for device in range(4):
            held = table[given.slot_device == device].tolist()
            assert len(set(held)) == len(held)
        assert load.sum() > 0


def test_no_group_start_where_groups_do_not_fill_nodes() -> None:
    three = mp.Topology.from_dict({"nodes": [{"devices": [DEVICE], "inter_bandwidth": 1e8, "count": 3}]})
    given = mp.Problem(MODEL, three, mp.RoutingStatistics.from_trace(grouped_trace()), slots=18)
    assert groups_on_nodes(given, given.statistics.total_load) is None


def test_a_race_keeps_the_better_start_of_every_layer() -> None:
    """Good in layer 0 only, good in layers 1 and 2 only: the answer of several starts is near the good one
    everywhere."""
    given = problem(slots=16)
    scenario = scenario_from(given, "prefill", 128, 4, seed=0)
    good = groups_on_nodes(given, given.statistics.total_load)
    assert good is not None
    bad = np.arange(16).reshape(4, 4).T.ravel()
    share = [np.eye(4)[given.slot_device[np.argsort(table)]] for table in good]
    spread = np.eye(4)[given.slot_device[np.argsort(bad)]]
    annealer = Annealer(
        given, scenario, rates_for(given, scenario), [MoveRules(np.ones((16, 4), dtype=bool), False)] * 3, 0
    )
    risks = mean_risks(scenario)
    try:
        first = ([good[0], bad, bad], [share[0], spread, spread])
        second = ([bad, good[1], good[2]], [spread, share[1], share[2]])
        annealer.start(good, share, risks)
        wanted = [state.value for state in annealer.states]
        tables, shares = multistart(annealer, [first, second], risks, Budget(None, 0), proposals=20)
        annealer.start(tables, shares, risks)
        assert [state.value for state in annealer.states] <= [value * 1.001 for value in wanted]
    finally:
        annealer.close()


def test_search_keeps_groups_on_nodes_where_links_between_nodes_are_slow() -> None:
    held = grouped_trace(256).prefill_steps(128, 2, 1)
    given = problem(slots=16)
    plan = mp.solve(given, "search", batch="prefill", step_tokens=128, proposals=200)
    assert mp.evaluate(plan, held, given).summary()["nodes_per_token"] < 1.05


def test_renamed_devices_bring_tokens_nearer_and_leave_what_stands_together() -> None:
    trace = grouped_trace(2048)
    given = mp.Problem(
        MODEL, TOPOLOGY, mp.RoutingStatistics.from_trace(trace), mp.Objective(execution="context_coherent")
    )
    scenario = scenario_from(given, "decode", 16, 32, seed=0)
    rng = np.random.default_rng(1)
    tables = [rng.permutation(16) for _ in range(3)]
    start = tables, even_shares(given, tables)
    assert can_align(given, np.ones((3, 16, 4), dtype=bool))
    for whole_nodes in (True, False):
        renamed, shares = aligned(given, scenario, start, whole_nodes)
        for table, new, share, even in zip(tables, renamed, shares, even_shares(given, renamed), strict=True):
            held, now = ({frozenset(run) for run in t.reshape(-1, 4).tolist()} for t in (table, new))
            assert held == now, "devices hold what they held, under other names"
            np.testing.assert_array_equal(share, even)
            if whole_nodes:
                pairs = [
                    {frozenset(map(frozenset, t.reshape(2, 2, 4).tolist()[n])) for n in (0, 1)} for t in (table, new)
                ]
                assert pairs[0] == pairs[1], "devices of a node stay together"
        evaluator = Evaluator(given, scenario)
        assert evaluator.answer(renamed, shares).value <= evaluator.answer(*start).value
    pinned = mp.Problem(
        MODEL, TOPOLOGY, given.statistics, mp.Objective(execution="context_coherent"), pinned={(0, 0): 1}
    )
    assert not can_align(pinned, allowed_devices(pinned))


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.booleans(),
    st.sampled_from(["dispatch_combine", "context_coherent"]),
    st.sampled_from([(8, "equal"), (11, "equal"), (11, "free")]),
    st.sampled_from(["mean", "cvar:0.5", "worst_workload"]),
)
def test_the_answer_is_never_worse_than_the_plan_in_force(
    seed: int, counts: bool, execution: str, shape: tuple[int, str], risk: str
) -> None:
    """The plan in force was searched for at length, the answer with a handful of proposals."""
    trace = make_trace(seed=seed)
    statistics = mp.RoutingStatistics.from_trace(trace)
    if counts:
        statistics = mp.RoutingStatistics.from_counts(statistics.load, top_k=2)
    model = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=256)
    objective = mp.Objective(execution=execution, split=shape[1], risk=risk)  # type: ignore[arg-type]
    asked = mp.Problem(model, mp.Topology.preset("h100-hgx", 2, 2), statistics, objective, slots=shape[0])
    quick: dict[str, Any] = {"step_tokens": 8, "steps": 4, "seed": seed}
    current = mp.solve(asked, "search", proposals=3000, **quick)
    answer = mp.solve(dataclasses.replace(asked, current=current), "search", proposals=5, **quick)
    assert current.certificate is not None
    assert answer.certificate is not None
    assert answer.certificate.objective == current.certificate.objective
    assert answer.certificate.value <= current.certificate.value * (1 + 1e-12)


@pytest.mark.slow
def test_where_only_balance_counts_search_on_tokens_is_as_good_as_on_loads_alone() -> None:
    folder = Path(__file__).parents[2] / "examples" / "data" / "olmoe_small"
    train, held = mp.read_trace(folder).split("sequence", 0.25, 0)
    topology = mp.Topology.preset("h100-hgx", nodes=1, devices_per_node=8)
    # Experts as wide as a released model's, so that step times are those of work.
    model = mp.ModelSpec(layers=8, experts=32, top_k=2, hidden_size=2048, ffn_size=4096)

    def problem(statistics: mp.RoutingStatistics) -> mp.Problem:
        return mp.Problem(model, topology, statistics, slots=40, batches=[mp.Batch("prefill", tokens=4096)])

    tokens = problem(mp.RoutingStatistics.from_trace(train))
    loads = mp.problem_steps(train, tokens, seed=0).loads()
    on_loads = mp.solve(problem(mp.RoutingStatistics.from_counts(loads)), "search", proposals=20_000, seed=0)
    steps = mp.problem_steps(held, tokens, seed=1)
    enough = 1.005 * mp.evaluate(on_loads, steps, tokens).mean_seconds
    for proposals in (100, 4000):
        on_tokens = mp.solve(tokens, "search", proposals=proposals, seed=0)
        assert mp.evaluate(on_tokens, steps, tokens).mean_seconds <= enough
