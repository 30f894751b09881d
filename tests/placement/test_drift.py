"""Drift of count windows: false alarms at the stated rate, true changes found, prices that agree with replayed
steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import moeplace as mp
from moeplace.placement.bounds import window_seconds_bound
from moeplace.placement.cost import window_seconds, window_times
from moeplace.placement.decide import decide_on_counts
from moeplace.placement.drift import can_tell, drift

pytestmark = pytest.mark.slow

TOPOLOGY = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=2)


def windows(rng: np.random.Generator, count: int, skew: np.ndarray, autocorrelation: float = 0.0) -> np.ndarray:
    """[count, L, E] counts whose mean follows `skew` [L, E], with a slow random walk around it where wanted."""
    level = np.zeros(skew.shape)
    result = []
    for _ in range(count):
        level = autocorrelation * level + rng.normal(0, 0.1, skew.shape)
        chances = skew * np.exp(level if autocorrelation else 0 * level)
        result.append([rng.multinomial(400, row / row.sum()) for row in chances])
    return np.array(result, dtype=np.float64)


@pytest.mark.parametrize(("autocorrelation", "length"), [(0.0, 32), (0.5, 80), (0.8, 128)])
@pytest.mark.long
def test_false_alarms_come_at_the_stated_rate(autocorrelation: float, length: int) -> None:
    rng = np.random.default_rng(3)
    alpha, runs, alarms = 0.05, 150, 0
    for seed in range(runs):
        stream = windows(rng, length, rng.dirichlet(np.ones(8), size=2), autocorrelation)
        cut = len(stream) // 2
        alarms += drift(stream[:cut], stream[cut:], block=1, permutations=199, seed=seed, alpha=alpha).p <= alpha
    # 7.5 expected; binomial standard deviation 2.7. Taken for independent, correlated windows make more than 60.
    assert alarms <= 7.5 + 3 * 2.7


def test_a_change_is_found_and_where_it_is() -> None:
    rng = np.random.default_rng(0)
    skew = rng.dirichlet(np.ones(8), size=3)
    changed = skew.copy()
    changed[1] = changed[1, ::-1]
    found = drift(windows(rng, 40, skew), windows(rng, 16, changed), block=2, alpha=0.001)
    assert found.p <= 0.001
    assert found.layer == 1
    assert found.layer_divergence > 2 * found.divergence


def test_more_traffic_of_the_same_kind_is_no_drift() -> None:
    rng = np.random.default_rng(1)
    skew = rng.dirichlet(np.ones(8), size=3)
    same = windows(rng, 56, skew)
    assert drift(same[:40], 7 * same[40:], block=2, permutations=999).p > 0.01


def test_when_it_changed_is_told_and_a_change_long_ago_is_as_certain() -> None:
    rng = np.random.default_rng(2)
    skew = rng.dirichlet(np.ones(8), size=3)
    changed = np.roll(skew, 1, axis=1)
    for after in (6, 20, 40):
        stream = np.concatenate([windows(rng, 80 - after, skew), windows(rng, after, changed)])
        found = drift(stream[:32], stream[32:], block=2)
        assert found.p <= 0.001
        assert found.since == after


def test_one_odd_window_is_no_change() -> None:
    rng = np.random.default_rng(4)
    skew = rng.dirichlet(np.ones(8), size=3)
    load = windows(rng, 64, skew)
    load[-5] = windows(rng, 1, np.roll(skew, 1, axis=1))[0]
    assert drift(load[:32], load[32:], block=1).p > 0.001


def test_too_few_windows_to_tell_are_refused() -> None:
    load = np.ones((8, 2, 4))
    with pytest.raises(mp.InputError, match="8 windows before and 4 since cannot tell"):
        drift(load, load[:4], block=4, alpha=0.001)
    with pytest.raises(mp.InputError, match="of one model"):
        drift(load, np.ones((8, 2, 5)))
    assert not can_tell(16, 16, 4, 0.001)
    assert can_tell(32, 24, 4, 0.001)


def model(layers: int = 3, experts: int = 16, top_k: int = 2) -> mp.ModelSpec:
    return mp.ModelSpec(layers=layers, experts=experts, top_k=top_k, hidden_size=1024, ffn_size=512)


def problem_for(load: np.ndarray, **changes: object) -> mp.Problem:
    spec = model()
    return mp.Problem(spec, TOPOLOGY, mp.RoutingStatistics.from_counts(load, top_k=2), **changes)  # type: ignore[arg-type]


def test_the_price_of_a_window_agrees_with_replayed_steps_of_independent_tokens() -> None:
    rng = np.random.default_rng(5)
    spec = model(top_k=1)
    chances = rng.dirichlet(np.full(16, 0.8), size=3)
    ids = np.stack([rng.choice(16, size=60_000, p=row) for row in chances], axis=1)[:, :, None]
    trace = mp.RoutingTrace.from_arrays(ids, 16, sequence=np.arange(60_000))
    statistics = mp.RoutingStatistics.from_trace(trace)
    problem = mp.Problem(spec, TOPOLOGY, statistics, slots=20)
    for solver in ("contiguous", "eplb"):
        plan = mp.solve(mp.Problem(spec, TOPOLOGY, statistics, slots=20 if solver == "eplb" else None), solver)
        steps = trace.decode_steps(300, 200)
        evaluation = mp.evaluate(plan, steps, problem)
        replayed = evaluation.step_seconds.mean()
        load = steps.loads().sum(axis=0, keepdims=True).astype(np.float64)
        # Steps vary around their mean, and the slowest device of each is slower than the mean's slowest.
        assert float(window_seconds(plan, load, problem, 300)[0]) == pytest.approx(replayed, rel=0.08)
        ideal = window_times(plan, load, problem, 300).ideal
        assert float(ideal[0]) == pytest.approx(evaluation.ideal.mean(), rel=0.03)


def test_even_loads_on_even_plans_take_what_the_ideal_takes() -> None:
    load = np.ones((1, 3, 16))
    problem = problem_for(load)
    times = window_times(mp.solve(problem, "contiguous"), load, problem, 4096)
    assert times.ideal == pytest.approx(times.seconds)
    # Tokens drawn from uneven loads, replayed one by one, say the same.
    uneven = load + 5 * (np.arange(16) < 4)
    plan = mp.solve(problem, "contiguous")
    times = window_times(plan, uneven, problem, 65_536)
    model = problem.model
    steps = mp.sample_steps(uneven, model.top_k, model.moe_layers, step_tokens=65_536, steps=2)
    assert float((times.ideal / times.seconds)[0]) == pytest.approx(
        mp.evaluate(plan, steps, problem).ideal_share, rel=0.01
    )
    assert times.ideal < 0.9 * times.seconds


@pytest.mark.parametrize("engine", [None, "sglang", "vllm"])
@pytest.mark.parametrize("nodes", [1, 2])
def test_no_plan_is_below_the_bound_of_windows(nodes: int, engine: str | None) -> None:
    rng = np.random.default_rng(7)
    topology = mp.Topology.preset("h100-sxm", nodes=nodes, devices_per_node=4 // nodes)
    load = rng.gamma(0.5, 100.0, size=(6, 3, 16)).round()
    load[2, 1] = 0
    spec = mp.ModelSpec(layers=3, experts=16, top_k=2, hidden_size=2048, ffn_size=1024)
    statistics = mp.RoutingStatistics.from_counts(load, top_k=2)
    for slots, solvers in ((16, ("contiguous", "random", "search")), (24, ("eplb", "search"))):
        problem = mp.Problem(spec, topology, statistics, slots=slots, engine=engine)
        for tokens in (8, 512, 16_384):
            asked = replace(problem, batches=(mp.Batch("decode", tokens=tokens),))
            bound = window_seconds_bound(load, problem, tokens)
            assert (bound > 0).all()
            for solver in solvers:
                options = {"proposals": 300} if solver == "search" else {}
                plan = mp.solve(asked, solver, **options)
                assert (bound <= window_seconds(plan, load, problem, tokens) * (1 + 1e-9)).all()


def test_even_loads_on_one_node_are_bounded_within_a_tenth() -> None:
    topology = mp.Topology.preset("h100-hgx", devices_per_node=4)
    load = np.ones((1, 3, 16))
    problem = replace(problem_for(load), topology=topology)
    seconds = window_seconds(mp.solve(problem, "contiguous"), load, problem, 16_384)
    assert window_seconds_bound(load, problem, 16_384) == pytest.approx(seconds, rel=0.1)


def test_what_counts_cannot_price_is_refused() -> None:
    load = np.ones((4, 3, 16))
    problem = problem_for(load)
    plan = mp.solve(problem, "contiguous")
    with pytest.raises(mp.UnsupportedError, match="transitions"):
        window_seconds(plan, load, problem_for(load, objective=mp.Objective(execution="context_coherent")), 10)
    with pytest.raises(mp.InputError, match="expected .windows, 3, 16"):
        window_seconds(plan, load[:, :2], problem, 10)
    with pytest.raises(mp.InputError, match="step_tokens"):
        window_seconds(plan, load, problem, 0)


def test_a_plan_for_todays_counts_is_applied_and_one_that_gains_nothing_is_not() -> None:
    rng = np.random.default_rng(2)
    skew = rng.dirichlet(np.full(16, 0.3), size=3)
    load = windows(rng, 48, skew)
    problem = problem_for(load[:24])
    today, better = mp.solve(problem, "contiguous"), mp.solve(problem, "eplb")
    decision = decide_on_counts(today, [better], load[24:], problem, step_tokens=4096)
    assert (decision.action, decision.chosen) == ("apply", 0)
    assert decision.verdicts[0].gain_low > 0
    again = decide_on_counts(better, [better], load[24:], problem, step_tokens=4096)
    assert again.action == "keep"
    brief = decide_on_counts(today, [better], load[24:], problem, step_tokens=4096, horizon_steps=1)
    assert brief.action == "keep"
    assert "not paid back" in brief.reason
    with pytest.raises(mp.InputError, match="make 2 blocks of 4"):
        decide_on_counts(today, [better], load[:11], problem, step_tokens=4096)


def test_windows_without_tokens_are_no_change_and_decide_nothing() -> None:
    """A night without traffic: neither drift, nor fast windows that speak for a plan."""
    rng = np.random.default_rng(8)
    skew = rng.gamma(2.0, size=(3, 16))
    night = np.zeros((16, 3, 16))
    before, after = windows(rng, 24, skew), windows(rng, 16, skew)
    since = np.concatenate([after[:8], night, after[8:]])
    assert drift(before, since, block=2, alpha=0.01).p > 0.01
    plain, padded = (drift(before, windows_since, block=2, seed=1) for windows_since in (after, since))
    assert replace(padded, since=plain.since) == plain
    assert padded.since - plain.since in (0, len(night))
    partly = after.copy()
    partly[8:, 1] = 0.0
    assert drift(before, partly, block=2, alpha=0.01).p > 0.01
    moved = np.concatenate([after, night, windows(rng, 8, skew[:, ::-1]), night])
    assert drift(before, moved, block=2).since == 8 + len(night)

    load = np.concatenate([before, after])
    problem = problem_for(load)
    current, candidate = (mp.solve(problem, name) for name in ("contiguous", "eplb"))
    for risk in ("mean", "cvar:0.9", "worst_workload", "regret"):
        asked = problem_for(load, objective=mp.Objective(risk=risk))
        plain, padded = (
            decide_on_counts(current, [candidate], given, asked, step_tokens=300)
            for given in (load, np.concatenate([night, load, night]))
        )
        assert (plain.action, plain.reason) == (padded.action, padded.reason)
        for name in ("current", "candidate", "gain_low", "gain_high"):
            assert getattr(plain.verdicts[0], name) == pytest.approx(getattr(padded.verdicts[0], name))
    thin = np.concatenate([load[:4], (rng.random((40, 3, 16)) < 0.02).astype(float)])
    busy = decide_on_counts(current, [candidate], load[:4], problem, step_tokens=300, block=1)
    weighed = decide_on_counts(current, [candidate], thin, problem, step_tokens=300, block=1)
    assert weighed.verdicts[0].current == pytest.approx(busy.verdicts[0].current, rel=0.02)


def test_counts_of_several_workloads_are_decided_on_by_the_worst_of_them() -> None:
    one, other = np.array([8.0, 8, 1, 1, 1, 1, 1, 1]), np.array([1.0, 1, 1, 1, 1, 8, 1, 8])
    load = {name: np.tile(share * 500, (16, 1, 1)) for name, share in (("chat", one), ("code", other))}
    statistics = mp.RoutingStatistics.from_counts(load, top_k=2)
    model = mp.ModelSpec(layers=1, experts=8, top_k=2, hidden_size=4096, ffn_size=4096)
    cluster = mp.Topology.preset("h100-hgx", nodes=1, devices_per_node=4)
    problem = mp.Problem(model, cluster, statistics, mp.Objective(risk="worst_workload"))
    plan = mp.solve(problem, "contiguous")
    decision = mp.decide(plan, [plan], statistics, problem, concurrency=4096)
    by_workload = window_seconds(plan, statistics.load, problem, 4096).reshape(2, 16).mean(axis=1)
    assert decision.verdicts[0].current == pytest.approx(by_workload.max())
    assert by_workload.max() > by_workload.mean() * 1.001
    with pytest.raises(mp.InputError, match="top 1"):
        mp.decide(plan, [plan], mp.RoutingStatistics.from_counts(load, top_k=1), problem)
