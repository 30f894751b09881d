"""The load bound holds for every placement, replicas, shares and unequal devices included, and is tight where it can
be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.bounds import (
    device_load_certificate,
    device_loads,
    least_device_load,
    load_imbalance_bound,
    sampling_noise,
    window_balance,
)


def balanced_load(load: np.ndarray, held: list[set[int]]) -> float:
    """Least largest device load over all shares, for a placement: by Hall's condition over all sets of experts."""
    best = 0.0
    for size in range(1, len(load) + 1):
        for experts in itertools.combinations(range(len(load)), size):
            devices = sum(bool(device & set(experts)) for device in held)
            best = max(best, float(load[list(experts)].sum()) / devices if devices else np.inf)
    return best


def best_of_all(load: np.ndarray, slots: list[int]) -> float:
    """The least largest device load over every placement and all shares."""
    best = np.inf
    contents = [itertools.combinations_with_replacement(range(len(load)), size) for size in slots]
    for chosen in itertools.product(*contents):
        held = [set(experts) for experts in chosen]
        if len(set().union(*held)) == len(load):
            best = min(best, balanced_load(load, held))
    return best


@st.composite
def instances(draw: st.DrawFn) -> tuple[np.ndarray, list[int]]:
    experts = draw(st.integers(2, 5))
    slots = draw(st.lists(st.integers(0, 3), min_size=2, max_size=3))
    while sum(slots) < experts:
        slots[slots.index(min(slots))] += 1
    load = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, 30, 31]), min_size=experts, max_size=experts))
    return np.array(load, dtype=np.float64), slots


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(instances())
def test_no_placement_with_any_shares_is_below_the_bound(instance: tuple[np.ndarray, list[int]]) -> None:
    load, slots = instance
    bound = least_device_load(load[None], np.array(slots))[0]
    assert bound <= best_of_all(load, slots) * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize(
    ("load", "slots", "least"),
    [
        ([10, 1, 1, 1], [2, 2], 11),  # the heaviest takes the lightest beside it
        ([5, 5, 5, 1, 1, 1], [3, 3], 11),  # two of the three heavy ones share a device
        ([6, 6, 6, 0], [3, 3], 9),  # replicas make it even
        ([9, 3, 3], [2, 2], 7.5),
        ([12, 1, 1], [4, 0, 0], 14),  # devices without slots carry nothing
        ([4, 4, 4, 4], [1, 3], 12),  # one slot cannot reach the mean
        ([8, 8, 8, 8, 8], [2, 2, 2], 16),  # one spare slot leaves four whole experts on three devices
    ],
)
def test_bound_is_met_where_an_argument_is_exact(load: list[float], slots: list[int], least: float) -> None:
    loads = np.array(load, dtype=np.float64)
    assert best_of_all(loads, slots) == pytest.approx(least)
    assert least_device_load(loads[None], np.array(slots))[0] == pytest.approx(least)


def unequal_topology() -> mp.Topology:
    fast = {"compute": 2e14, "memory": 8e10, "memory_bandwidth": 2e12, "intra_bandwidth": 3e11}
    slow = fast | {"compute": 5e13}
    return mp.Topology.from_dict(
        {"nodes": [{"devices": [fast, slow], "inter_bandwidth": 5e10}, {"devices": [slow], "inter_bandwidth": 2e10}]}
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(2, 4), min_size=3, max_size=3), st.booleans())
def test_certificate_is_valid_on_unequal_devices_with_replicas(seed: int, slots: list[int], weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    load = rng.integers(0, 50, size=(3, 5)).astype(np.float64)
    load[1] = 0
    problem = mp.Problem(
        model=mp.ModelSpec(layers=3, experts=5, top_k=1, hidden_size=8, ffn_size=8),
        topology=unequal_topology(),
        statistics=mp.RoutingStatistics.from_counts(load),
        device_slots=slots,
    )
    extra = rng.integers(5, size=(3, sum(slots) - 5))
    table = rng.permuted(np.hstack([np.tile(np.arange(5), (3, 1)), extra]), axis=1)
    shares = None
    if weighted:
        raw = rng.random(table.shape) + 0.01
        sums = np.stack([np.bincount(row, weights=weight) for row, weight in zip(table, raw, strict=True)])
        shares = raw / np.take_along_axis(sums, table, axis=1)
    certificate = device_load_certificate(problem, table, shares)
    assert certificate.bound is not None
    assert certificate.gap is not None
    assert 1.0 <= certificate.bound <= certificate.value
    assert load_imbalance_bound(problem)[1] == 1.0  # a layer without tokens is balanced


def test_value_is_the_mean_over_layers_of_the_largest_device_load() -> None:
    load = np.array([[3.0, 1.0, 2.0, 2.0], [1.0, 1.0, 0.0, 6.0]])
    table = np.array([[0, 1, 2, 3], [0, 3, 1, 2]])
    loads = device_loads(load, table, np.ones((2, 4)), np.array([0, 0, 1, 1]), 2)
    np.testing.assert_array_equal(loads, [[4, 4], [7, 1]])
    problem = mp.Problem(
        model=mp.ModelSpec(layers=2, experts=4, top_k=1, hidden_size=8, ffn_size=8),
        topology=mp.Topology.preset("h100-hgx", devices_per_node=2),
        statistics=mp.RoutingStatistics.from_counts(load),
    )
    certificate = device_load_certificate(problem, table)
    assert certificate.value == pytest.approx((1.0 + 7 / 4) / 2)
    assert certificate.bound == pytest.approx((1.0 + 6 / 4) / 2)


def test_no_balance_of_windows_is_below_one_and_idle_windows_count_nowhere() -> None:
    model = mp.ModelSpec(layers=1, experts=4, top_k=1, hidden_size=8, ffn_size=8)
    topology = mp.Topology.preset("h100-hgx", devices_per_node=2)
    busy, thin = [[3e6, 1e6, 1e6, 3e6]], [[1.0, 0.0, 1.0, 0.0]]
    load = np.array([busy, *[thin] * 10, *[np.zeros((1, 4))] * 5])
    even = mp.Plan(model, topology, np.array([[0, 1, 2, 3]]), slot_device=np.array([0, 0, 1, 1]))
    uneven = mp.Plan(model, topology, np.array([[0, 3, 1, 2]]), slot_device=np.array([0, 0, 1, 1]))
    assert window_balance(even, load, mp.Objective()) == pytest.approx(1.0)
    # One busy window of 8 million tokens, not the ten of two that this plan divides evenly.
    assert window_balance(uneven, load, mp.Objective()) == pytest.approx(1.5, abs=1e-4)
    train, judged = mp.RoutingStatistics.from_counts(load).split(held_out=0.25)
    assert (len(train.load), len(judged.load)) == (8, 3)


def test_sampling_noise_is_what_windows_of_so_many_tokens_cost_an_even_plan() -> None:
    model = mp.ModelSpec(layers=2, experts=8, top_k=1, hidden_size=8, ffn_size=8)
    topology = mp.Topology.preset("h100-hgx", devices_per_node=4)
    plan = mp.Plan(model, topology, np.tile(np.arange(8), (2, 1)), slot_device=np.repeat(np.arange(4), 2))
    noises = []
    for tokens in (100, 10_000):
        load = np.random.default_rng(1).multinomial(tokens, np.ones(8) / 8, (200, 2)).astype(float)
        noise = sampling_noise(plan, load, mp.Objective())
        assert noise is not None
        assert noise == pytest.approx(window_balance(plan, load, mp.Objective()) - 1.0, rel=0.2)
        noises.append(noise)
    # A hundred times the tokens, a tenth of the noise.
    assert noises[0] / noises[1] == pytest.approx(10.0, rel=0.25)
    assert sampling_noise(plan, np.full((3, 2, 8), 0.5), mp.Objective()) is None
