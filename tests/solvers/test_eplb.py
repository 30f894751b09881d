"""DeepSeek's EPLB: the published example's loads, its rules step by step, and the cases it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.solvers.eplb import rebalance

README_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    dtype=np.float64,
)
README_DEVICE_LOADS = [
    [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
    [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
]


def device_loads(load: np.ndarray, table: np.ndarray, devices: int) -> np.ndarray:
    """[L, G] with equal shares and equal slots."""
    counts = np.stack([np.bincount(row, minlength=load.shape[1]) for row in table])
    return np.take_along_axis(load / counts, table, axis=1).reshape(len(load), devices, -1).sum(axis=2)


def naive_pack(weights: list[float], capacity: list[int]) -> list[list[int]]:
    """Heaviest first, to the lightest pack with room."""
    packs: list[list[int]] = [[] for _ in capacity]
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        room = [g for g in range(len(packs)) if len(packs[g]) < capacity[g]]
        packs[min(room, key=lambda g: sum(weights[i] for i in packs[g]))].append(item)
    return packs


def naive_global(load: list[float], slots: list[int]) -> list[list[int]]:
    """The experts on each device of one layer."""
    counts = [1] * len(load)
    held = list(range(len(load)))
    while len(held) < sum(slots):
        chosen = max(range(len(load)), key=lambda e: load[e] / counts[e])
        counts[chosen] += 1
        held.append(chosen)
    packs = naive_pack([load[e] / counts[e] for e in held], slots)
    return [[held[i] for i in pack] for pack in packs]


def naive_hierarchical(load: list[float], slots: int, groups: int, nodes: int, devices: int) -> list[list[int]]:
    size = len(load) // groups
    group_load = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    result = []
    for members in naive_pack(group_load, [groups // nodes] * nodes):
        experts = [g * size + i for g in members for i in range(size)]
        per_device = [slots // devices] * (devices // nodes)
        result += [[experts[i] for i in device] for device in naive_global([load[e] for e in experts], per_device)]
    return result


def test_published_example_gives_the_published_device_loads() -> None:
    table = rebalance(README_LOAD, slots=16, groups=4, nodes=2, devices=8)
    np.testing.assert_allclose(device_loads(README_LOAD, table, 8), README_DEVICE_LOADS)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([(8, 8, 1, 1, 4), (8, 12, 4, 2, 4), (12, 16, 4, 2, 8), (12, 12, 6, 3, 3), (9, 14, 2, 3, 2)]),
    st.integers(0, 2**32 - 1),
)
def test_all_layers_at_once_equal_the_rules_one_layer_at_a_time(
    sizes: tuple[int, int, int, int, int], seed: int
) -> None:
    experts, slots, groups, nodes, devices = sizes
    # Loads in general position: ties are broken anyhow, and loads then differ in later steps.
    load = np.random.default_rng(seed).random((3, experts)) ** 3
    table = rebalance(load, slots, groups, nodes, devices)
    for row, weights in zip(table, load.tolist(), strict=True):
        if groups % nodes or nodes == 1:
            expected = naive_global(weights, [slots // devices] * devices)
        else:
            expected = naive_hierarchical(weights, slots, groups, nodes, devices)
        assert [sorted(part) for part in row.reshape(devices, -1).tolist()] == [sorted(part) for part in expected]


def deepseek_shaped(load: np.ndarray, nodes: int = 4, slots: int = 288, **fields: object) -> mp.Problem:
    layers, experts = load.shape
    return mp.Problem(
        model=mp.ModelSpec(
            layers=layers, experts=experts, top_k=8, hidden_size=7168, ffn_size=2048, groups=8, expert_dtype="fp8"
        ),
        topology=mp.Topology.preset("h200-hgx", nodes=nodes),
        statistics=mp.RoutingStatistics.from_counts(load),
        slots=slots,
        **fields,  # type: ignore[arg-type]
    )


def skewed(layers: int = 4, experts: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(sigma=0.8, size=(layers, experts)) * 1000


def test_hierarchical_keeps_every_group_on_one_node() -> None:
    problem = deepseek_shaped(skewed())
    plan = mp.solve(problem, "eplb")
    node = problem.topology.node_of[plan.slot_device]
    for row in plan.physical_to_logical:
        nodes_of_group = [set(node[row // 32 == group]) for group in range(8)]
        assert all(len(nodes) == 1 for nodes in nodes_of_group)
        assert (np.bincount([*map(min, nodes_of_group)]) == 2).all()
    assert plan.certificate is not None
    freer = mp.solve(problem, "eplb", hierarchical=False)
    assert freer.certificate is not None
    assert freer.certificate.value < plan.certificate.value
    assert freer.bound == plan.bound


def test_uneven_slots_and_nodes_are_balanced_globally() -> None:
    load = skewed(layers=2, experts=30)
    device = mp.Topology.preset("h200-hgx").nodes[0].devices[0]
    topology = mp.Topology(nodes=tuple(mp.Node(devices=(device,) * size, inter_bandwidth=1e11) for size in (3, 1)))
    problem = mp.Problem(
        model=mp.ModelSpec(layers=2, experts=30, top_k=2, hidden_size=64, ffn_size=64, groups=2),
        topology=topology,
        statistics=mp.RoutingStatistics.from_counts(load),
        slots=35,
    )
    plan = mp.solve(problem, "eplb")
    assert np.bincount(plan.slot_device).tolist() == [9, 9, 9, 8]
    for row, weights in zip(plan.physical_to_logical, load.tolist(), strict=True):
        parts = np.split(row, np.cumsum([9, 9, 9]))
        expected = naive_global(weights, [9, 9, 9, 8])
        assert [sorted(part.tolist()) for part in parts] == [sorted(part) for part in expected]
    with pytest.raises(mp.UnsupportedError, match=r"nodes of one size.*\[3, 1\].*hierarchical=False"):
        mp.solve(problem, "eplb", hierarchical=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slots": 290}, r"equal slots a device"),
        ({"nodes": 3, "slots": 264}, r"groups \(8\) to divide over nodes \(3\)"),
    ],
)
def test_the_hierarchical_form_says_what_it_lacks(changes: dict[str, int], reason: str) -> None:
    problem = deepseek_shaped(skewed(), **changes)
    with pytest.raises(mp.UnsupportedError, match=reason):
        mp.solve(problem, "eplb", hierarchical=True)
    assert mp.solve(problem, "eplb").num_slots == changes["slots"]


def test_the_function_refuses_what_does_not_divide() -> None:
    with pytest.raises(mp.UnsupportedError, match="17 slots on 8 devices of 2 nodes"):
        rebalance(README_LOAD, slots=17, groups=4, nodes=2, devices=8)
    assert rebalance(README_LOAD, slots=17, groups=1, nodes=1, devices=8).shape == (2, 17)


def test_a_layer_without_tokens_still_places_every_expert() -> None:
    load = skewed()
    load[1] = 0
    plan = mp.solve(deepseek_shaped(load), "eplb")
    assert (plan.replicas >= 1).all()


def test_deepseek_counts_balance_as_published(shared_data: Path) -> None:
    counts = np.load(shared_data / "deepseek_v3_counts.npz", allow_pickle=False)
    load = counts["decode_in1000out1000"][3:].astype(np.float64)
    hierarchical, free = (
        mp.solve(deepseek_shaped(load), "eplb", hierarchical=choice).certificate for choice in (None, False)
    )
    assert hierarchical is not None
    assert free is not None
    assert hierarchical.value == pytest.approx(1.317, abs=5e-4)
    assert free.value == pytest.approx(1.007, abs=5e-4)
