"""Search: exact increments, constraints kept, deterministic, and never above brute force on small instances."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from annealed import annealed
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import make_trace

import moeplace as mp
from moeplace.placement.bounds import step_seconds_bound
from moeplace.placement.evaluate import evaluate_on
from moeplace.solvers.base import Budget
from moeplace.solvers.search.annealer import Annealer, CoolingSchedule
from moeplace.solvers.search.scenario import rates_for, scenario_from

pytestmark = pytest.mark.slow

MODEL = mp.ModelSpec(layers=3, experts=8, top_k=2, hidden_size=512, ffn_size=256)
FAST = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e11, "intra_bandwidth": 1e9}
SLOW = {"compute": 4e11, "memory": 1e12, "memory_bandwidth": 7e10, "intra_bandwidth": 3e8}
CLUSTERS = {
    "even": [{"devices": [FAST, FAST]}, {"devices": [FAST, FAST]}],
    "node": [{"devices": [FAST, FAST, FAST, FAST]}],
    "mixed": [{"devices": [FAST, SLOW, FAST], "inter_bandwidth": 2e8}, {"devices": [SLOW]}],
}


def cluster(name: str) -> mp.Topology:
    return mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 4e8, **node} for node in CLUSTERS[name]]})


def problem(trace: mp.RoutingTrace, topology: str = "even", slots: int = 8, **objective: Any) -> mp.Problem:
    statistics = mp.RoutingStatistics.from_trace(trace)
    return mp.Problem(MODEL, cluster(topology), statistics, mp.Objective(**objective), slots=slots)


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.parametrize("topology", ["even", "mixed"])
@pytest.mark.parametrize(("slots", "split"), [(8, "equal"), (11, "equal"), (11, "free")])
@pytest.mark.parametrize("node_dedup", [True, False])
def test_the_kernels_price_placements_as_evaluation_does(
    execution: str, topology: str, slots: int, split: str, node_dedup: bool
) -> None:
    """After hundreds of accepted increments, step costs must equal a replay of the final placement from nothing."""
    given_problem = problem(
        make_trace(seed=1), topology, slots, execution=execution, split=split, node_dedup=node_dedup
    )
    scenario = scenario_from(given_problem, "decode", 8, 6, seed=0)
    result = annealed(given_problem, scenario, share_moves=split == "free")
    # Context-coherent, the even layers walked before the odd ones beside them.
    walked_last = slice(None) if execution == "dispatch_combine" else slice(1, None, 2)
    np.testing.assert_allclose(result.costs[:, walked_last], result.repriced[:, walked_last], rtol=1e-9)
    assert scenario.steps is not None
    replayed = evaluate_on(result.plan, scenario.steps, MODEL, given_problem.topology, given_problem.objective)
    from moeplace.placement.cost import all_to_all_latency

    latency = all_to_all_latency(given_problem.topology, node_dedup)
    layer_seconds = replayed.dispatch + replayed.compute + replayed.combine - 2 * latency
    if execution == "context_coherent":
        # A layer's figure holds the next layer's dispatch, which its placement decides too.
        layer_seconds[:, :-1] += replayed.dispatch[:, 1:] - latency
    np.testing.assert_allclose(result.repriced, layer_seconds, rtol=1e-5)


def test_without_a_batch_steps_of_both_kinds_are_solved_for_and_priced_as_evaluated() -> None:
    given_problem = problem(make_trace(seed=2, sequences=40, length=50))
    scenario = scenario_from(given_problem, None, None, 6, seed=0)
    assert scenario.steps is not None
    assert scenario.steps.tokens.tolist() == [256] * 6 + [4096] * 6
    plan = mp.solve(given_problem, "search", steps=6, proposals=50, seed=0)
    replayed = evaluate_on(plan, scenario.steps, MODEL, given_problem.topology, given_problem.objective)
    assert plan.certificate is not None
    assert plan.certificate.value == pytest.approx(replayed.mean_seconds, rel=1e-9)
    told = mp.solve(given_problem, "search", step_tokens=8, steps=6, proposals=50, seed=0)
    assert told.certificate != plan.certificate, "a size alone is of decode steps"


def test_a_long_scenario_is_walked_thinly_but_its_loads_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace(seed=2, sequences=40, length=50)
    given_problem = problem(trace, execution="context_coherent")
    whole = scenario_from(given_problem, "prefill", 100, None, seed=0)
    monkeypatch.setattr("moeplace.solvers.search.scenario.WALKED_TOKENS", 500)
    thin = scenario_from(given_problem, "prefill", 100, None, seed=0)
    assert whole.steps is not None
    assert whole.num_steps == thin.num_steps == 20, "all of the sample, once"
    assert whole.walked is None
    assert thin.walked is not None
    assert len(thin.walked) == 500
    assert np.bincount(thin.walked // 100).tolist() == [25] * 20, "every step the same part"
    assert thin.tokens_each == 4.0
    for layer in range(3):
        np.testing.assert_array_equal(thin.layer(layer).counts, whole.layer(layer).counts)
        assert set(map(tuple, thin.layer(layer).experts)) <= set(map(tuple, whole.layer(layer).experts))
    np.testing.assert_allclose(
        rates_for(given_problem, thin).per_copy, 4.0 * rates_for(given_problem, whole).per_copy, rtol=1e-12
    )
    beginning = thin.beginning
    assert beginning.num_steps == 5
    np.testing.assert_array_equal(beginning.loads, whole.loads[:5])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["dispatch_combine", "context_coherent"]))
def test_search_finds_the_brute_force_optimum_of_small_instances(seed: int, execution: str) -> None:
    trace = make_trace(seed, sequences=4, length=12, layers=2, experts=4)
    model = MODEL.replace(layers=2, experts=4, moe_layers=(0, 1))
    topology = mp.Topology.from_dict({"nodes": [{"inter_bandwidth": 4e8, "devices": [FAST, SLOW]}]})
    small = mp.Problem(model, topology, mp.RoutingStatistics.from_trace(trace), mp.Objective(execution=execution))
    plan = mp.solve(small, "search", step_tokens=8, steps=4, proposals=600, seed=seed)
    scenario = scenario_from(small, "decode", 8, 4, seed)
    assert scenario.steps is not None
    values = []
    for first, second in itertools.product(itertools.combinations(range(4), 2), repeat=2):
        table = np.array([[*row, *(e for e in range(4) if e not in row)] for row in (first, second)])
        candidate = mp.Plan(model, topology, table, small.slot_device)
        values.append(evaluate_on(candidate, scenario.steps, model, topology, small.objective).step_seconds.mean())
    assert plan.certificate is not None
    assert plan.certificate.value == pytest.approx(min(values), rel=1e-9)
    assert plan.certificate.bound is not None
    assert plan.certificate.bound <= min(values) * (1 + 1e-12)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["even", "node", "mixed"]),
    st.sampled_from(["dispatch_combine", "context_coherent"]),
    st.booleans(),
    st.integers(8, 12),
)
def test_no_random_plan_beats_the_step_bound(seed: int, topology: str, execution: str, dedup: bool, slots: int) -> None:
    trace = make_trace(seed % 7, sequences=4, length=10)
    bounded = problem(trace, topology, slots, execution=execution, node_dedup=dedup)
    steps = trace.decode_steps(concurrency=6, steps=5, seed=seed)
    rng = np.random.default_rng(seed)
    if seed % 2:
        steps = replace(steps, source=rng.integers(4, size=len(steps.expert_ids)))
    bound = step_seconds_bound(steps, bounded)
    spare = rng.integers(8, size=(3, slots - 8))
    table = np.stack([rng.permutation(np.concatenate([np.arange(8), row])) for row in spare])
    plan = mp.Plan(MODEL, bounded.topology, table, bounded.slot_device)
    assert (mp.evaluate(plan, steps, bounded).step_seconds >= bound * (1 - 1e-5)).all()


def test_the_same_seed_gives_the_same_plan_and_another_may_not(toy_trace: mp.RoutingTrace) -> None:
    first, again = (
        mp.solve(problem(toy_trace, slots=10), "search", step_tokens=8, proposals=300, seed=5) for _ in range(2)
    )
    np.testing.assert_array_equal(first.physical_to_logical, again.physical_to_logical)
    np.testing.assert_array_equal(first.shares, again.shares)


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.parametrize("risk", ["mean", "cvar:0.8", "worst_workload", "regret"])
def test_every_risk_is_improved_on_the_start(toy_trace: mp.RoutingTrace, execution: str, risk: str) -> None:
    given_problem = problem(toy_trace, "mixed", 10, execution=execution, risk=risk)
    plan = mp.solve(given_problem, "search", step_tokens=8, steps=12, proposals=600)
    assert plan.certificate is not None
    values = [value for _, value, _ in plan.provenance.history]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]
    assert risk in plan.certificate.objective


def test_pinned_and_forbidden_devices_are_respected(toy_trace: mp.RoutingTrace) -> None:
    statistics = mp.RoutingStatistics.from_trace(toy_trace)
    pinned = mp.Problem(
        MODEL,
        cluster("even"),
        statistics,
        slots=10,
        pinned={(0, 3): 2, (2, 7): 0},
        forbidden={(1, e): [1] for e in range(4)},
    )
    plan = mp.solve(pinned, "search", step_tokens=8, proposals=300)
    assert plan.device_share[0, 3, 2] == 1.0
    assert plan.device_share[2, 7, 0] == 1.0
    assert plan.device_share[1, :4, 1].sum() == 0.0
    impossible = mp.Problem(MODEL, cluster("even"), statistics, pinned={(0, e): 0 for e in range(4)})
    with pytest.raises(mp.SolveError, match="pinned or forbidden"):
        mp.solve(impossible, "search", step_tokens=8, proposals=10)


def test_no_expert_stands_twice_on_a_device_and_too_many_slots_are_refused(toy_trace: mp.RoutingTrace) -> None:
    plan = mp.solve(problem(toy_trace, slots=20), "search", step_tokens=8, proposals=500)
    for row in plan.physical_to_logical:
        pairs = list(zip(row.tolist(), plan.slot_device.tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
    with pytest.raises(mp.SolveError, match="33 slots a layer, but only 32 replicas fit"):
        mp.solve(problem(toy_trace, slots=33), "search", step_tokens=8, proposals=10)


def test_counts_alone_balance_load_and_say_so() -> None:
    rng = np.random.default_rng(0)
    counts = {name: rng.gamma(0.5, size=(3, 8)) for name in ("decode", "prefill")}
    statistics = mp.RoutingStatistics.from_counts(counts)
    mean = mp.Problem(MODEL, cluster("node"), statistics, slots=12)
    plan = mp.solve(mean, "search", proposals=2000)
    assert plan.certificate is not None
    assert "load max/mean" in plan.certificate.objective
    assert plan.certificate.value <= 1.15 * (plan.bound or 0.0)
    worst = mp.Problem(MODEL, cluster("node"), statistics, mp.Objective(risk="worst_workload"), slots=12)
    robust = mp.solve(worst, "search", proposals=2000)
    assert robust.certificate is not None
    assert robust.certificate.value >= plan.certificate.value - 1e-9


class Clock(Budget):
    """A budget whose time passes only when told."""

    now = 0.0

    @property
    def elapsed(self) -> float:
        return self.now


@pytest.mark.parametrize("per_proposal", [1e-5, 1e-3, 0.02])
def test_rounds_are_dealt_so_that_a_cooling_ends_with_the_time(per_proposal: float) -> None:
    """However fast the machine: each round takes its proposals' time, and half a second passes between rounds."""
    clock = Clock(seconds=20.0)
    schedule = CoolingSchedule(clock, proposals=1000, rounds=12)
    for round_ in range(12):
        assert not clock.spent
        with schedule.timing():
            clock.now += schedule.proposals(round_) * per_proposal
        clock.now += 0.5
    assert 18.0 <= clock.now <= 20.6


def test_a_token_may_live_where_its_experts_stand() -> None:
    """One device holds all that a token needs and is its home: nothing travels, and no bound may say otherwise."""
    trace = mp.RoutingTrace.from_arrays(np.tile([[0, 1]], (6, 3, 1)), 8)
    steps = replace(trace.decode_steps(concurrency=6, steps=1), source=np.zeros(6, np.int64))
    pinned = mp.Problem(MODEL, cluster("node"), mp.RoutingStatistics.from_counts(np.ones((3, 8))))
    plan = mp.solve(pinned, "contiguous")
    assert (mp.evaluate(plan, steps, pinned).step_seconds >= step_seconds_bound(steps, pinned)).all()


@pytest.mark.parametrize("execution", ["dispatch_combine", "context_coherent"])
@pytest.mark.parametrize("rounds", [1, 5])
def test_ctrl_c_at_any_time_gives_the_best_plan_so_far(
    monkeypatch: pytest.MonkeyPatch, toy_trace: mp.RoutingTrace, execution: str, rounds: int
) -> None:
    given_problem = problem(toy_trace, execution=execution)
    walk, begun = Annealer.run, []

    def interrupted(self: Annealer, *arguments: Any, **named: Any) -> None:
        begun.append(1)
        if len(begun) == rounds + 1:
            raise KeyboardInterrupt
        walk(self, *arguments, **named)

    monkeypatch.setattr(Annealer, "run", interrupted)
    plan = mp.solve(given_problem, "search", step_tokens=8, steps=4, proposals=240)
    assert plan.provenance.stop == "interrupted"
    start = mp.solve(given_problem, "eplb")
    steps = scenario_from(given_problem, "decode", 8, 4, seed=0).steps
    assert steps is not None
    mine, theirs = (mp.evaluate(p, steps, given_problem).step_seconds.mean() for p in (plan, start))
    assert plan.certificate is not None
    np.testing.assert_allclose(plan.certificate.value, mine, rtol=1e-9)
    assert mine <= theirs * (1 + 1e-9)


def test_a_bad_option_is_refused(toy_trace: mp.RoutingTrace) -> None:
    with pytest.raises(mp.InputError, match="option batch is 'train', it takes 'decode' or 'prefill'"):
        mp.solve(problem(toy_trace), "search", batch="train")
    with pytest.raises(mp.InputError, match=r"steps \(0\)"):
        mp.solve(problem(toy_trace), "search", steps=0)
