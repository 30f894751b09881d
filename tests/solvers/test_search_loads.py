"""Search on counts alone: against brute force and EPLB, on workloads it has not seen, and within every limit given."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.bounds import device_loads
from moeplace.solvers.eplb import rebalance
from moeplace.solvers.search.count_search import level_layer
from moeplace.solvers.search.moves import MoveRules

RATES = {"compute": 1e12, "memory": 1e12, "memory_bandwidth": 1e11, "intra_bandwidth": 1e9}


def cluster(*nodes: int, compute: tuple[float, ...] = ()) -> mp.Topology:
    rates = iter(compute or (1e12,) * sum(nodes))
    return mp.Topology.from_dict(
        {
            "nodes": [
                {"inter_bandwidth": 4e8, "devices": [RATES | {"compute": next(rates)} for _ in range(size)]}
                for size in nodes
            ]
        }
    )


def problem(
    counts: Any,
    topology: mp.Topology,
    slots: int,
    groups: int = 1,
    split: str = "equal",
    risk: str = "mean",
    **more: Any,
) -> mp.Problem:
    statistics = mp.RoutingStatistics.from_counts(counts)
    model = mp.ModelSpec(
        layers=statistics.num_layers,
        experts=statistics.experts,
        top_k=2,
        hidden_size=64,
        ffn_size=64,
        groups=groups,
    )
    return mp.Problem(model, topology, statistics, mp.Objective(risk=risk, split=split), slots=slots, **more)


def peaks(plan: mp.Plan, load: np.ndarray) -> np.ndarray:
    """[L] largest device load over the mean, devices being alike."""
    loads = device_loads(load, plan.physical_to_logical, plan.shares, plan.slot_device, plan.topology.num_devices)
    return np.asarray(loads.max(axis=1) / loads.mean(axis=1))


def value_of(plan: mp.Plan) -> float:
    assert plan.certificate is not None
    return plan.certificate.value


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.sampled_from([6, 8]))
def test_tiny_vector_balancing_is_solved_as_brute_force_does_or_nearly(seed: int, windows: int, slots: int) -> None:
    """6 experts on 2 devices, without replicas and with two; every window counts the same."""
    load = np.random.default_rng(seed).gamma(1.0, size=(windows, 1, 6))
    load /= load.sum(axis=2, keepdims=True)
    given_problem = problem({"all": load}, cluster(2), slots)
    plan = mp.solve(given_problem, "search", seed=seed, proposals=24_000)
    values = []
    for first, second in itertools.product(itertools.combinations(range(6), slots // 2), repeat=2):
        table = np.array([[*first, *second]])
        if len(set(table[0])) == 6:
            candidate = mp.Plan(given_problem.model, given_problem.topology, table, given_problem.slot_device)
            values.append(np.mean([peaks(candidate, window)[0] for window in load]))
    assert min(values) - 1e-9 <= value_of(plan) <= min(values) * 1.03
    assert plan.bound is not None
    assert plan.bound <= min(values) + 1e-9


@settings(max_examples=8, deadline=None)
@given(
    st.integers(0, 10_000), st.floats(0.3, 3.0), st.sampled_from([(2, 16, 16), (4, 16, 20), (4, 32, 36), (8, 32, 40)])
)
def test_no_plan_is_worse_than_eplbs_on_what_both_were_fitted_to(
    seed: int, shape: float, size: tuple[int, int, int]
) -> None:
    devices, experts, slots = size
    load = np.random.default_rng(seed).gamma(shape, size=(3, experts)) + 1e-3
    plan = mp.solve(problem(load, cluster(devices), slots), "search", seed=seed)
    table = rebalance(load, slots, 1, 1, devices)
    eplb = mp.Plan(plan.model, plan.topology, table, plan.slot_device)
    assert value_of(plan) <= peaks(eplb, load).mean() * 1.001


def test_all_workloads_are_balanced_at_once_and_so_is_any_mixture_of_them() -> None:
    """EPLB balances their mean only; a workload between those recorded is one that neither has seen."""
    rng = np.random.default_rng(1)
    counts = {name: rng.gamma(1.0, size=(4, 64)) for name in ("code", "chat", "translation")}
    unseen = sum(weight * load for weight, load in zip((0.6, 0.1, 0.3), counts.values(), strict=True))
    plan = mp.solve(problem(counts, cluster(4, 4), 72, risk="worst_workload"), "search")
    table = rebalance(np.mean(list(counts.values()), axis=0), 72, 1, 1, 8)
    eplb = mp.Plan(plan.model, plan.topology, table, plan.slot_device)
    worst = max(peaks(plan, load).mean() for load in counts.values())
    assert value_of(plan) == pytest.approx(worst)
    assert worst - 1 < 0.2 * (max(peaks(eplb, load).mean() for load in counts.values()) - 1)
    assert peaks(plan, unseen).mean() - 1 < 0.5 * (peaks(eplb, unseen).mean() - 1)


def test_regret_measures_each_workload_against_its_own_best() -> None:
    """One expert carries most of workload b, which no plan can balance: only what sharing a plan costs counts."""
    rng = np.random.default_rng(2)
    counts = {name: rng.gamma(1.0, size=(2, 16)) for name in "ab"}
    counts["b"][:, 3] = 40.0
    plan = mp.solve(problem(counts, cluster(4), 16, risk="regret"), "search")
    alone = {name: value_of(mp.solve(problem(load, cluster(4), 16), "search")) for name, load in counts.items()}
    losses = [peaks(plan, load).mean() - alone[name] for name, load in counts.items()]
    assert alone["b"] > 2.0
    assert value_of(plan) == pytest.approx(max(losses), abs=0.01)
    assert max(losses) < 0.05


def test_the_tail_of_windows_is_lowered_by_cvar() -> None:
    rng = np.random.default_rng(3)
    often, seldom = rng.gamma(3.0, size=(2, 1, 2, 24))
    load = np.concatenate([often] * 18 + [seldom] * 2) * rng.uniform(0.9, 1.1, size=(20, 2, 24))
    load /= load.sum(axis=2, keepdims=True)
    mean = mp.solve(problem({"": load}, cluster(8), 24), "search")
    tail = mp.solve(problem({"": load}, cluster(8), 24, risk="cvar:0.9"), "search")

    def slowest(plan: mp.Plan) -> float:
        return float(np.sort([peaks(plan, window).mean() for window in load])[-2:].mean())

    assert value_of(tail) == pytest.approx(slowest(tail))
    assert slowest(tail) < slowest(mean)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(4, 32, 36), (4, 32, 40), (8, 64, 72), (3, 16, 19)]))
def test_free_shares_balance_exactly_with_a_slot_a_device_to_spare(seed: int, size: tuple[int, int, int]) -> None:
    devices, experts, slots = size
    load = np.random.default_rng(seed).gamma(1.0, size=(2, experts))
    given_problem = problem(load, cluster(devices), slots, split="free")
    plan = mp.solve(given_problem, "search", proposals=12)
    anywhere = MoveRules(np.ones((experts, devices), bool), True)
    for row in load:
        assert level_layer(row, given_problem.slots_per_device, given_problem.topology.compute, anywhere) is not None
    assert value_of(plan) == pytest.approx(1.0, abs=1e-9)
    assert (plan.holds.sum(axis=(1, 2)) == slots).all()


def test_faster_devices_get_more() -> None:
    load = np.random.default_rng(4).gamma(1.0, size=(2, 32))
    topology = cluster(2, 2, compute=(1e12, 1e12, 2e12, 2e12))
    for split in ("equal", "free"):
        plan = mp.solve(problem(load, topology, 40, split=split), "search")
        loads = device_loads(load, plan.physical_to_logical, plan.shares, plan.slot_device, 4)
        assert loads[:, 2:] / loads.sum(axis=1, keepdims=True) == pytest.approx(1 / 3, abs=0.005), split


@pytest.mark.parametrize("split", ["equal", "free"])
def test_every_limit_is_kept(split: str) -> None:
    """Pinned, forbidden, failures to tolerate, uneven slots, and never twice on a device."""
    counts = {name: np.random.default_rng(5).gamma(1.0, size=(2, 8)) for name in "ab"}
    topology = cluster(2, 2)
    failures = mp.single_failures(topology, ("device",))
    plan = mp.solve(
        problem(
            counts, topology, 17, split=split, risk="worst_workload", forbidden={(0, 1): [0, 3]}, tolerates=failures
        ),
        "search",
        proposals=3000,
    )
    assert plan.holds.sum(axis=(1, 2)).tolist() == [17, 17]
    assert plan.holds.sum(axis=1).tolist() == [[5, 4, 4, 4]] * 2
    assert not plan.holds[0, 1, [0, 3]].any()
    assert mp.survives(plan, failures).all()
    pinned = mp.solve(problem(counts, topology, 10, split=split, pinned={(1, 2): 3}), "search", proposals=3000)
    assert np.flatnonzero(pinned.holds[1, 2]).tolist() == [3]


def away(plan: mp.Plan, load: np.ndarray, groups: int) -> np.ndarray:
    """[L] share of the load served off its group's node, for the best choice of one node a group of two nodes."""
    node = np.add.reduceat(plan.device_share, [0, plan.topology.num_devices // 2], axis=2)
    by_group = (node * load[:, :, None]).reshape(len(load), groups, -1, 2).sum(axis=2)
    choices = [c for c in itertools.product((0, 1), repeat=groups) if sum(c) == groups // 2]
    at_home = [by_group[:, np.arange(groups), choice].sum(axis=1) for choice in choices]
    return np.asarray(1.0 - np.max(at_home, axis=0) / load.sum(axis=1))


def test_groups_stay_at_home_as_far_as_asked_and_balance_gains_by_what_may_leave() -> None:
    load = np.random.default_rng(6).gamma(1.0, size=(3, 32))
    load[:, :8] *= 4.0
    values = []
    for most in (0.0, 0.05, 0.2, 1.0):
        plan = mp.solve(problem(load, cluster(2, 2), 36, groups=4), "search", off_home=most)
        assert (away(plan, load, 4) <= most + 1e-9).all()
        assert plan.certificate is not None
        assert f"at most {most:g} of a layer's load off" in plan.certificate.objective
        values.append(value_of(plan))
    assert all(tight >= loose - 1e-3 for tight, loose in itertools.pairwise(values))
    assert values[0] > 1.1
    assert values[-1] < 1.01


def test_homes_that_cannot_be_are_refused(toy_trace: mp.RoutingTrace) -> None:
    load = np.ones((1, 8))
    with pytest.raises(mp.InputError, match=r"off_home \(1.5\) must be a share"):
        mp.solve(problem(load, cluster(2, 2), 8, groups=2), "search", off_home=1.5)
    with pytest.raises(mp.UnsupportedError, match="several expert groups and nodes, given 1 and 2"):
        mp.solve(problem(load, cluster(2, 2), 8), "search", off_home=0.1)
    with pytest.raises(mp.InputError, match=r"2 groups of 4 experts do not fit the nodes.*\[1, 0\]"):
        mp.solve(problem(load, cluster(3, 1), 8, groups=2), "search", off_home=0.1)
    forbidden = {(0, 0): [0, 1], (0, 4): [0, 1]}
    with pytest.raises(mp.InputError, match=r"expert [04] may not stand on its group's home node"):
        mp.solve(problem(load, cluster(2, 2), 8, groups=2, forbidden=forbidden), "search", off_home=0.1)
    sampled = mp.RoutingStatistics.from_trace(toy_trace)
    model = mp.ModelSpec(
        layers=sampled.num_layers, experts=sampled.experts, top_k=2, hidden_size=64, ffn_size=64, groups=2
    )
    with pytest.raises(mp.UnsupportedError, match="on which the traffic itself is priced"):
        mp.solve(mp.Problem(model, cluster(2, 2), sampled), "search", off_home=0.1)


def test_little_effort_pays() -> None:
    rng = np.random.default_rng(5)
    share = rng.gamma(0.6, size=(4, 24)) * rng.gamma(4.0, size=(20, 4, 24))
    asked = problem(rng.poisson(400 * share), cluster(8), 32)
    start, little, more = (value_of(mp.solve(asked, "search", proposals=number)) for number in (1, 600, 6000))
    # From a temperature that long coolings begin at, so few proposals end where they began.
    assert little < start - 1e-3
    assert more <= little


def test_the_same_seed_balances_the_same_way() -> None:
    counts = {name: np.random.default_rng(7).gamma(1.0, size=(3, 32)) for name in "ab"}
    first, again = (
        mp.solve(problem(counts, cluster(4), 36, risk="worst_workload", split="free"), "search", proposals=6000, seed=1)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.physical_to_logical, again.physical_to_logical)
    np.testing.assert_array_equal(first.shares, again.shares)


def test_a_plan_close_enough_to_its_bound_ends_the_search() -> None:
    load = np.random.default_rng(8).gamma(2.0, size=(2, 64))
    plan = mp.solve(problem(load, cluster(4), 72), "search", seconds=30)
    assert plan.bound is not None
    assert value_of(plan) <= plan.bound * 1.001
    assert plan.provenance is not None
    assert plan.provenance.stop == "finished"
    assert plan.provenance.seconds < 15


def thin_windows(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """8 busy windows [8, 1, 64], and 56 of four token-expert pairs each."""
    busy = rng.poisson(rng.gamma(1.0, size=64) * rng.uniform(0.95, 1.05, size=(8, 1, 64)) * 1e5)
    thin = [np.bincount(rng.integers(64, size=4), minlength=64)[None] for _ in range(56)]
    return busy.astype(np.float64), np.array(thin, dtype=np.float64)


def test_windows_count_by_their_tokens() -> None:
    """Ten windows of two pairs each are no reason to leave the one that is busy out of balance."""
    load = np.concatenate([[[[3e6, 1e6, 1e6, 3e6]]], [[[1, 1, 0, 0]]] * 5, [[[1, 0, 1, 0]]] * 5])
    plan = mp.solve(problem({"": load}, cluster(2), 4), "search")
    assert peaks(plan, load[0]) == pytest.approx(1.0)
    busy, thin = thin_windows(np.random.default_rng(0))
    load = np.concatenate([busy, thin])

    def by_tokens(plan: mp.Plan) -> float:
        return float(sum(peaks(plan, window)[0] * window.sum() for window in load) / load.sum())

    every, alone = (mp.solve(problem({"": part}, cluster(8), 72), "search") for part in (load, busy))
    eplb = mp.solve(problem({"": load}, cluster(8), 72), "eplb")
    assert value_of(every) == pytest.approx(by_tokens(every))
    assert by_tokens(every) - 1 < 1.3 * (by_tokens(alone) - 1)
    assert by_tokens(every) < by_tokens(eplb)


@pytest.mark.parametrize("risk", ["mean", "cvar:0.5", "cvar:0.99", "worst_workload", "regret"])
@pytest.mark.parametrize("limit", [None, 1e12])
def test_what_is_empty_counts_nowhere(risk: str, limit: float | None) -> None:
    """Windows without a token, and layers of a window without any, change neither plan nor figures."""
    rng = np.random.default_rng(4)
    counts = {name: rng.gamma(0.5, size=(4, 2, 12)) * 100 for name in "ab"}
    counts["a"][1:, 1] = 0.0
    empty = {
        "a": np.concatenate([np.zeros((9, 2, 12)), counts["a"]]),
        "b": np.concatenate([counts["b"], np.zeros((3, 2, 12))]),
    }
    start = mp.solve(problem(counts, cluster(4), 12), "contiguous")
    more: dict[str, Any] = {} if limit is None else {"current": start, "max_moved_bytes": limit}
    plan, padded = (
        mp.solve(problem(given, cluster(4), 12, risk=risk, **more), "search", proposals=12_000)
        for given in (counts, empty)
    )
    assert np.array_equal(plan.physical_to_logical, padded.physical_to_logical)
    assert value_of(plan) == pytest.approx(value_of(padded))
    assert padded.bound is not None
    if risk != "regret":
        assert value_of(padded) >= padded.bound >= 1.0


@pytest.mark.parametrize("solver", ["search", "eplb", "contiguous"])
def test_no_balance_is_below_one_even_of_nothing(solver: str) -> None:
    load = np.random.default_rng(5).gamma(1.0, size=(3, 2, 8))
    load[:, 1] = 0.0
    for given_load in (load, np.zeros((3, 2, 8))):
        plan = mp.solve(problem({"": given_load}, cluster(2), 8), solver)
        assert plan.bound is not None
        assert value_of(plan) >= plan.bound >= 1.0
    alone = mp.solve(problem({"": load[:, :1]}, cluster(2), 8), solver)
    both = mp.solve(problem({"": load}, cluster(2), 8), solver)
    assert value_of(both) == pytest.approx(value_of(alone), rel=1e-3)


@pytest.mark.parametrize("risk", ["mean", "cvar:0.9", "worst_workload"])
def test_a_gap_that_is_chance_is_told_from_one_that_is_not(risk: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(16) * 4, 2)
    thin = np.stack([rng.multinomial(400, chances) for _ in range(60)]).astype(float)
    plan = mp.solve(problem(thin, cluster(4), 20, risk=risk), "search", proposals=20_000)
    certificate = plan.certificate
    assert certificate is not None
    assert certificate.noise is not None
    assert certificate.gap is not None
    assert certificate.noise_gap is not None
    assert certificate.gap > 0.05
    # Windows of 400 draws from one mean: all of it is chance, which the bound of each window by itself does not know.
    assert certificate.noise_gap > 0.85 * certificate.gap
    assert "of the gap" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert mp.Plan.load(tmp_path / "plan.json").certificate == certificate
    # Windows of as many tokens that really differ: nothing of their gap is chance.
    apart = np.stack([np.roll(np.arange(1, 17), 5 * i) for i in range(6)])[:, None, :] * np.ones((6, 2, 1)) * 1e6
    plan = mp.solve(problem(apart, cluster(4), 16, risk=risk), "search", proposals=20_000)
    assert plan.certificate is not None
    assert plan.certificate.gap is not None
    assert plan.certificate.noise == pytest.approx(0.0, abs=2e-3)
    assert plan.certificate.gap > 0.02


def test_noise_of_loads_that_are_no_counts_is_not_told() -> None:
    halves = np.random.default_rng(0).random((3, 1, 8))
    plan = mp.solve(problem(halves, cluster(2), 8), "search", proposals=1_000)
    assert plan.certificate is not None
    assert plan.certificate.noise is None
    assert "noise" not in str(plan)
