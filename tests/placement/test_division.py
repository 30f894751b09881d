"""Divisions of a step's tokens among replicas: against linear programs, exhaustive search and set arguments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from least_loads import least_largest_load
from scipy.optimize import linprog

import moeplace as mp
from moeplace.placement import division
from moeplace.placement.bounds import device_load_certificate, window_balance
from moeplace.placement.cost import slot_shares, window_seconds
from moeplace.placement.division import divide, source_division

pytestmark = pytest.mark.slow

ONE_NODE = np.zeros(32, dtype=np.int64)


def drawn(seed: int, devices: int, experts: int, steps: int = 3, most: int = 40) -> tuple:
    """(tokens by source [S, H, E], hosts [E, G])"""
    rng = np.random.default_rng(seed)
    hosts = np.zeros((experts, devices), dtype=bool)
    hosts[np.arange(experts), rng.integers(devices, size=experts)] = True
    hosts |= rng.random(hosts.shape) < rng.choice([0.0, 0.1, 0.3])
    skew = rng.dirichlet(np.full(experts, 0.5))
    by_source = rng.poisson(most * skew, size=(steps, devices, experts))
    return by_source.astype(np.int64), hosts


def linear_optimum(counts: np.ndarray, hosts: np.ndarray) -> float:
    experts, devices = hosts.shape
    pairs = np.argwhere(hosts)
    equal = np.zeros((experts, len(pairs) + 1))
    equal[pairs[:, 0], np.arange(len(pairs))] = 1
    upper = np.zeros((devices, len(pairs) + 1))
    upper[pairs[:, 1], np.arange(len(pairs))] = 1
    upper[:, -1] = -1
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1
    return float(linprog(cost, A_ub=upper, b_ub=np.zeros(devices), A_eq=equal, b_eq=counts).fun)


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from(["local", "lp", "waterfill"]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_divisions_place_every_token_on_a_replica(
    seed: int, devices: int, experts: int, rule: str, known: bool
) -> None:
    by_source, hosts = drawn(seed, devices, experts)
    counts = by_source.sum(axis=1)
    sources = by_source if known else None
    node_of = np.arange(devices) // 2
    divided = divide(counts, hosts, node_of, rule, sources)
    assert divided.dtype == np.int64
    assert (divided >= 0).all()
    assert (divided.sum(axis=2) == counts).all()
    assert not divided[:, ~hosts].any()
    parts = source_division(divided, counts, hosts, node_of, rule, sources)
    tokens = by_source if known else np.repeat(counts[:, None] / devices, devices, axis=1)
    assert np.allclose(parts.sum(axis=3), tokens)
    assert (parts >= 0).all()
    if rule != "waterfill":
        assert np.allclose(parts.sum(axis=1), divided)
        largest = divided.sum(axis=1).max(axis=1)
        assert (largest == least_largest_load(counts, hosts)).all()
    if rule == "local" and known:
        assert (parts == np.round(parts)).all()


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_the_largest_load_is_the_linear_programs_rounded_up(seed: int, devices: int, experts: int) -> None:
    by_source, hosts = drawn(seed, devices, experts)
    counts = by_source.sum(axis=1)
    expected = [int(np.ceil(linear_optimum(row, hosts) - 1e-7)) for row in counts]
    assert least_largest_load(counts, hosts).tolist() == expected


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_no_whole_division_is_more_level(seed: int) -> None:
    by_source, hosts = drawn(seed, 3, 3, steps=1, most=3)
    counts = by_source.sum(axis=1)[0]
    ways = []
    for count, row in zip(counts, hosts, strict=True):
        mine = [part for part in itertools.product(range(count + 1), repeat=3) if sum(part) == count]
        ways.append([part for part in mine if not np.array(part)[~row].any()])
    least = min(np.sum(choice, axis=0).max() for choice in itertools.product(*ways))
    assert least_largest_load(counts[None], hosts)[0] == least


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_local_keeps_nearly_as_many_tokens_at_home_as_any_division_under_the_target(seed: int) -> None:
    by_source, hosts = drawn(seed, 4, 7, steps=1)
    counts = by_source.sum(axis=1)
    target = least_largest_load(counts, hosts)[0]
    pairs = np.argwhere(hosts)
    count, wide = len(pairs), np.zeros((4 + len(pairs), 2 * len(pairs)))
    # Variables: tokens of a pair, and of these the ones at home, at most as many as live there.
    for number, (_, g) in enumerate(pairs):
        wide[g, number] = 1
        wide[4 + number, [number, count + number]] = -1, 1
    equal = np.zeros((7, 2 * count))
    equal[pairs[:, 0], np.arange(count)] = 1
    limits = [(0, None)] * count + [(0, by_source[0, g, e]) for e, g in pairs]
    upper = np.concatenate([np.full(4, target), np.zeros(count)])
    best = -linprog(np.r_[np.zeros(count), -np.ones(count)], wide, upper, equal, counts[0], bounds=limits).fun
    divided = divide(counts, hosts, ONE_NODE[:4], "local", by_source)
    parts = source_division(divided, counts, hosts, ONE_NODE[:4], "local", by_source)
    home = sum(parts[0, g, e, g] for e, g in pairs)
    assert home <= best + 1e-6
    assert home >= 0.9 * best - 2


@given(st.integers(0, 10**6), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_many_devices_are_filled_to_within_a_proven_distance(seed: int, devices: int) -> None:
    """The way of more devices, on few, where the least is known."""
    by_source, hosts = drawn(seed, devices, 3 * devices)
    counts = by_source.sum(axis=1)
    least = least_largest_load(counts, hosts)
    divided = division._filled(counts, hosts)
    load = divided.sum(axis=1)
    assert (divided.sum(axis=2) == counts).all()
    assert not divided[:, ~hosts].any()
    proven = np.array([division._proven(row, hosts, of) for row, of in zip(counts, load, strict=True)])
    assert (proven <= least).all()
    assert (load.max(axis=1) >= least).all()
    assert (load.max(axis=1) <= least + 2 + 0.01 * least).all()
    kept, node_of, living = divided.copy(), np.arange(devices) // 2, by_source.transpose(0, 2, 1).copy()
    division._keep_near(kept, hosts, node_of, living)
    assert (kept.sum(axis=2) == counts).all()
    assert (kept >= 0).all()
    assert not kept[:, ~hosts].any()
    assert (kept.sum(axis=1).max(axis=1) <= load.max(axis=1)).all()
    assert (np.minimum(kept, living).sum(axis=(1, 2)) >= np.minimum(divided, living).sum(axis=(1, 2))).all()
    on_node, at_home = (np.add.reduceat(of, np.arange(0, devices, 2), axis=2) for of in (kept, living))
    before = np.add.reduceat(divided, np.arange(0, devices, 2), axis=2)
    assert (np.minimum(on_node, at_home).sum(axis=(1, 2)) >= np.minimum(before, at_home).sum(axis=(1, 2))).all()


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_what_a_device_has_no_room_for_stays_on_the_node_first(seed: int) -> None:
    """Two nodes of two devices: nearly as many tokens are served on their node as under any division of the same
    largest load that keeps as many on their device."""
    by_source, hosts = drawn(seed, 4, 7, steps=1)
    counts, node_of = by_source.sum(axis=1), np.arange(4) // 2
    divided = divide(counts, hosts, node_of, "local", by_source)[0]
    home = np.minimum(divided, by_source[0].T * hosts)
    near = np.minimum(divided.reshape(7, 2, 2).sum(axis=2), by_source[0].T.reshape(7, 2, 2).sum(axis=2)).sum()
    pairs = np.argwhere(hosts)
    # Variables: what pairs compute; and of each expert's tokens on each node, those served on it.
    count, target = len(pairs), int(least_largest_load(counts, hosts)[0])
    upper, right = np.zeros((4 + 14, count + 14)), np.r_[np.full(4, target), np.zeros(14)]
    for number, (e, g) in enumerate(pairs):
        upper[g, number] = 1
        upper[4 + 2 * e + g // 2, number] = -1
    upper[4:, count:] = np.eye(14)
    equal = np.zeros((7, count + 14))
    equal[pairs[:, 0], np.arange(count)] = 1
    limits = [(home[e, g], None) for e, g in pairs]
    limits += [(0, tokens) for tokens in by_source[0].T.reshape(7, 2, 2).sum(axis=2).ravel()]
    best = -linprog(np.r_[np.zeros(count), -np.ones(14)], upper, right, equal, counts[0], bounds=limits).fun
    assert near <= best + 1e-6
    assert near >= 0.9 * best - 2


def test_32_devices_end_within_a_percent_of_the_bound() -> None:
    rng = np.random.default_rng(0)
    hosts = np.zeros((256, 32), dtype=bool)
    hosts[np.arange(256), rng.permutation(256) % 32] = True
    counts = np.sort(rng.multinomial(32_768, rng.dirichlet(np.full(256, 2.0)), size=4), axis=1)[:, ::-1]
    hosts[np.arange(32), (np.arange(32) * 7 + 3) % 32] = True
    for rule in ("local", "lp"):
        load = divide(counts, hosts, ONE_NODE[:32], rule).sum(axis=1)
        assert (load.max(axis=1) <= 1.01 * least_largest_load(counts, hosts)).all()


def test_waterfill_deals_by_what_devices_lack() -> None:
    """One expert of everyone beside fixed loads of 0, 10 and 30 tokens: a mean of 30 lacks 30, 20 and 0."""
    hosts = np.array([[True, False, False], [False, True, False], [False, False, True], [True, True, True]])
    counts = np.array([[0, 10, 30, 50]])
    assert divide(counts, hosts, ONE_NODE[:3], "waterfill")[0, 3].tolist() == [30, 20, 0]
    by_source = np.zeros((1, 3, 4), dtype=np.int64)
    by_source[0, 2] = counts
    parts = source_division(
        divide(counts, hosts, ONE_NODE[:3], "waterfill", by_source), counts, hosts, ONE_NODE[:3], "waterfill", by_source
    )
    assert parts[0, 2, 3].tolist() == pytest.approx([50 * 27 / 45, 50 * 18 / 45, 0.0])


def test_windows_of_counts_are_divided_like_steps() -> None:
    """Two experts of 6 and 2 tokens, the first on both devices: 4 and 4, where equal shares give 3 and 5."""
    model = mp.ModelSpec(layers=1, experts=2, top_k=1, hidden_size=64, ffn_size=32)
    cluster = mp.Topology.preset("h100-hgx", nodes=1, devices_per_node=2)
    load = np.array([[6.0, 2.0]])
    windows = mp.RoutingStatistics.from_counts(load)
    plan = mp.Plan(model, cluster, np.array([[0, 0, 1]]), np.array([0, 1, 1]))
    divided, shared = mp.Objective(replica_choice="balanced"), mp.Objective()
    assert slot_shares(plan, load, divided)[0] == pytest.approx([4 / 6, 2 / 6, 1.0], abs=1e-5)
    assert window_balance(plan, load[None], divided) == pytest.approx(1.0, abs=1e-5)
    assert window_balance(plan, load[None], shared) == pytest.approx(5 / 4)
    problem = mp.Problem(model, cluster, windows, divided, device_slots=[1, 2])
    assert device_load_certificate(problem, plan.physical_to_logical).value == pytest.approx(1.0, abs=1e-5)
    given = [mp.Problem(model, cluster, windows, objective, device_slots=[1, 2]) for objective in (divided, shared)]
    fast, slow = (window_seconds(plan, load[None] * 1e5, each, 100_000)[0] for each in given)
    assert fast < slow


def test_what_cannot_be_divided_is_named() -> None:
    hosts = np.array([[True, False], [False, False]])
    with pytest.raises(mp.InputError, match="expert 1 has no replica"):
        divide(np.array([[1, 2]]), hosts, ONE_NODE[:2])
    hosts[1] = True
    with pytest.raises(mp.InputError, match="at least 0, one is -2"):
        divide(np.array([[1, -2]]), hosts, ONE_NODE[:2])
    with pytest.raises(mp.InputError, match="does not sum"):
        divide(np.array([[1, 2]]), hosts, ONE_NODE[:2], by_source=np.ones((1, 2, 2), dtype=np.int64))
    with pytest.raises(mp.InputError, match=r"counts \[1, 3\]"):
        divide(np.array([[1, 2, 3]]), hosts, ONE_NODE[:2])
