"""The baselines place as engines do without a plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp


def problem_of(experts: int, devices: int, layers: int = 3, **fields: object) -> mp.Problem:
    load = np.random.default_rng(0).integers(1, 100, size=(layers, experts)).astype(np.float64)
    return mp.Problem(
        model=mp.ModelSpec(layers=layers, experts=experts, top_k=1, hidden_size=64, ffn_size=64),
        topology=mp.Topology.preset("gb200-nvl72", devices_per_node=devices),
        statistics=mp.RoutingStatistics.from_counts(load),
        **fields,  # type: ignore[arg-type]
    )


def parts(plan: mp.Plan, layer: int = 0) -> list[list[int]]:
    """Experts on each device."""
    return [plan.physical_to_logical[layer, plan.slot_device == g].tolist() for g in range(plan.topology.num_devices)]


def test_contiguous_gives_blocks_in_index_order() -> None:
    assert parts(mp.solve(problem_of(8, 4), "contiguous")) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert parts(mp.solve(problem_of(7, 3), "contiguous")) == [[0, 1, 2], [3, 4], [5, 6]]
    assert parts(mp.solve(problem_of(4, 3, slots=6), "contiguous")) == [[0, 1], [2, 3], [0, 1]]


def test_round_robin_puts_expert_e_on_device_e_mod_g() -> None:
    plan = mp.solve(problem_of(10, 4), "round_robin")
    assert plan.device_share.argmax(axis=2).tolist() == [[e % 4 for e in range(10)]] * 3
    assert parts(plan) == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]


def test_round_robin_passes_full_devices_over() -> None:
    assert parts(mp.solve(problem_of(7, 3, device_slots=[4, 1, 2]), "round_robin")) == [[0, 3, 5, 6], [1], [2, 4]]
    assert parts(mp.solve(problem_of(4, 3, device_slots=[0, 3, 1]), "round_robin")) == [[], [0, 2, 3], [1]]


@pytest.mark.parametrize("name", ["round_robin", "random"])
@settings(max_examples=60, deadline=None)
@given(experts=st.integers(2, 12), slots=st.lists(st.integers(0, 6), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_spare_slots_repeat_no_expert_on_a_device(name: str, experts: int, slots: list[int], seed: int) -> None:
    # No device has more slots than half the experts, so that there is always another expert to give.
    slots = [min(size, experts // 2) for size in slots]
    while sum(slots) < experts:
        slots.append(experts // 2)
    plan = mp.solve(problem_of(experts, len(slots), device_slots=slots), name, seed=seed)
    assert [len(part) for part in parts(plan)] == slots
    for layer in range(3):
        assert all(len(set(part)) == len(part) for part in parts(plan, layer))


def test_random_draws_each_layer_anew_from_the_seed() -> None:
    problem = problem_of(16, 4, slots=20)
    one, same, other = (mp.solve(problem, "random", seed=seed).physical_to_logical for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert (one[0] != one[1]).any()


def test_random_reaches_every_device_evenly() -> None:
    problem = problem_of(8, 4, layers=2000)
    share = mp.solve(problem, "random").device_share.mean(axis=0)
    assert np.abs(share - 0.25).max() < 0.05


@pytest.mark.parametrize("name", ["contiguous", "round_robin", "random"])
def test_baselines_say_how_even_they_are_and_how_even_any_plan_could_be(name: str) -> None:
    plan = mp.solve(problem_of(8, 4), name)
    assert plan.certificate is not None
    assert plan.bound is not None
    assert "load max/mean" in plan.certificate.objective
    assert 1.0 <= plan.bound <= plan.certificate.value
