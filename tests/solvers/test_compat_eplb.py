"""The stand-in for DeepSeek's EPLB: its maps, its constraints, and never a heavier device than the published plan."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations, permutations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeplace.compat.eplb import largest_load, lighten, published_placement, rebalance_experts
from moeplace.placement.errors import InputError
from moeplace.solvers.eplb import rebalance
from moeplace.solvers.table_packing import ENOUGH

pytestmark = pytest.mark.slow

README_LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)
README_ARGUMENTS = (16, 4, 2, 8)
README_DEVICE_LOADS = np.array(
    [
        [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
        [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
    ]
)
TOLERANCE = 1 + 1e-12


def device_loads(load: np.ndarray, table: np.ndarray, devices: int) -> np.ndarray:
    """[L, G], one slot at a time."""
    loads = np.zeros((len(load), devices))
    width = table.shape[1] // devices
    for layer, row in enumerate(table.tolist()):
        for slot, expert in enumerate(row):
            loads[layer, slot // width] += load[layer, expert] / row.count(expert)
    return loads


@st.composite
def instances(draw: st.DrawFn, most_experts: int = 24) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Loads and (replicas, groups, nodes, GPUs), of the hierarchical form or the global one."""
    nodes = draw(st.integers(1, 4))
    groups = draw(st.integers(1, 8))
    size = draw(st.integers(1, max(1, most_experts // groups)))
    devices = nodes * draw(st.integers(1, 4))
    width = -(-groups * size // devices) + draw(st.integers(0, 3))
    layers = draw(st.integers(1, 4))
    few = st.integers(0, 4).map(float)
    many = st.floats(0, 1e6, width=32, allow_subnormal=False)
    values = st.lists(
        draw(st.sampled_from([few, many])), min_size=layers * groups * size, max_size=layers * groups * size
    )
    load = np.array(draw(values)).reshape(layers, groups * size)
    return load, (devices * width, groups, nodes, devices)


@pytest.mark.slow
def test_the_published_example_is_reproduced_and_no_worse() -> None:
    published = published_placement(README_LOAD, *README_ARGUMENTS)
    ours = rebalance_experts(README_LOAD, *README_ARGUMENTS)[0]
    np.testing.assert_allclose(
        np.sort(device_loads(README_LOAD, published, 8), axis=1), np.sort(README_DEVICE_LOADS, axis=1)
    )
    heaviest = device_loads(README_LOAD, ours, 8).max(axis=1)
    assert (heaviest <= README_DEVICE_LOADS.max(axis=1) * TOLERANCE).all()


@pytest.mark.parametrize("dtype", ["int64", "float32", "float64", "bfloat16", "bool"])
def test_tensors_give_tensors_of_the_published_shapes(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(README_LOAD).to(getattr(torch, dtype))
    kept = weight.clone()
    maps = rebalance_experts(weight, *README_ARGUMENTS)
    assert [each.dtype for each in maps] == [torch.int64] * 3
    assert [tuple(each.shape) for each in maps] == [(2, 16), (2, 12, int(maps[2].max())), (2, 12)]
    assert torch.equal(weight, kept)
    arrays = rebalance_experts(weight.double().numpy(), *README_ARGUMENTS)
    assert [(type(each), each.dtype) for each in arrays] == [(np.ndarray, np.dtype(np.int64))] * 3


def test_a_tensor_that_is_a_view_or_wants_gradients_is_read() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.from_numpy(README_LOAD).double().T.contiguous().T.requires_grad_()
    expected = rebalance_experts(README_LOAD, *README_ARGUMENTS)
    for given_map, wanted in zip(rebalance_experts(weight, *README_ARGUMENTS), expected, strict=True):
        np.testing.assert_array_equal(given_map.numpy(), wanted)


@settings(max_examples=100, deadline=None)
@given(instances())
def test_maps_invert_each_other_and_groups_stay_on_nodes(
    instance: tuple[np.ndarray, tuple[int, int, int, int]],
) -> None:
    load, arguments = instance
    replicas, groups, nodes, _ = arguments
    table, positions, counts = rebalance_experts(load, *arguments)
    layers, experts = load.shape
    assert table.shape == (layers, replicas)
    assert positions.shape == (layers, experts, counts.max())
    for layer in range(layers):
        for expert in range(experts):
            slots = np.flatnonzero(table[layer] == expert).tolist()
            assert slots
            assert counts[layer, expert] == len(slots)
            assert positions[layer, expert].tolist() == slots + [-1] * (counts.max() - len(slots))
    if groups % nodes == 0:
        by_node = table.reshape(layers, nodes, -1) // (experts // groups)
        for layer in range(layers):
            held = [set(by_node[layer, node].tolist()) for node in range(nodes)]
            assert all(len(each) == groups // nodes for each in held)
            assert set().union(*held) == set(range(groups))


@settings(max_examples=100, deadline=None)
@given(instances())
@example((np.array([[0.0, 0.0, 2.0, 0.0, 3.0, 4.0]]), (9, 2, 1, 3)))
def test_no_layer_is_worse_than_published_in_either_precision(
    instance: tuple[np.ndarray, tuple[int, int, int, int]],
) -> None:
    load, arguments = instance
    replicas, groups, nodes, devices = arguments
    ours = device_loads(load, rebalance_experts(load, *arguments)[0], devices).max(axis=1)
    for table in (published_placement(load, *arguments), rebalance(load, replicas, groups, nodes, devices)):
        assert (ours <= device_loads(load, table, devices).max(axis=1) * TOLERANCE).all()


def naive_published(load: list[np.float32], replicas: int, groups: int, nodes: int, devices: int) -> list[np.float32]:
    """Device loads of one layer by the published rules, in single precision, one item at a time."""

    def pack(weights: list[np.float32], packs: int) -> list[list[int]]:
        held: list[list[int]] = [[] for _ in range(packs)]
        carried = [np.float32(0)] * packs
        for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
            room = [p for p in range(packs) if len(held[p]) < len(weights) // packs]
            lightest = min(room, key=lambda p: carried[p])
            held[lightest].append(item)
            carried[lightest] += weights[item]
        return held

    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    totals = [np.float32(sum(load[g * size : (g + 1) * size])) for g in range(groups)]
    packed = pack(totals, nodes) if groups > nodes else [[g] for g in range(groups)]
    result = []
    for members in packed:
        experts = [load[g * size + i] for g in members for i in range(size)]
        held, counts = list(range(len(experts))), [1] * len(experts)
        while len(held) < replicas // nodes:
            chosen = max(range(len(experts)), key=lambda e: experts[e] / np.float32(counts[e]))
            held.append(chosen)
            counts[chosen] += 1
        shares = [experts[e] / np.float32(counts[e]) for e in held]
        result += [np.float32(sum(float(shares[i]) for i in each)) for each in pack(shares, devices // nodes)]
    return result


@settings(max_examples=100, deadline=None)
@given(instances())
def test_the_start_is_the_published_plan_down_to_its_ties(
    instance: tuple[np.ndarray, tuple[int, int, int, int]],
) -> None:
    load, arguments = instance
    load = np.floor(load)  # sums of groups are then exact, in whatever order
    table = published_placement(load, *arguments)
    for layer, loads in enumerate(device_loads(load, table, arguments[3])):
        expected = naive_published(list(load[layer].astype(np.float32)), *arguments)
        np.testing.assert_allclose(np.sort(loads), np.sort(expected), rtol=1e-5)


def test_the_published_order_of_equal_groups_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    # Groups 0 and 2, and 1 and 3, weigh the same, yet hold other experts: which pairs up decides the load.
    load = np.array([[6.0, 0, 2, 2, 3, 3, 4, 0]])
    from_tensor = published_placement(torch.from_numpy(load), 12, 4, 2, 4)
    from_array = published_placement(load, 12, 4, 2, 4)
    np.testing.assert_array_equal(from_tensor, from_array)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=6, max_size=6))
def test_swaps_alone_end_where_no_swap_with_the_heaviest_device_helps(loads: list[int]) -> None:
    load = np.array([loads], dtype=np.float64)
    table = lighten(load, np.arange(6)[None, :], 1, 3)
    best = largest_load(load, table, 3)[0]
    for first, second in permutations(range(6), 2):
        other = table.copy()
        other[0, [first, second]] = other[0, [second, first]]
        assert largest_load(load, other, 3)[0] >= best * (1 - 1e-8)


def brute_force(load: np.ndarray, replicas: int, devices: int) -> float:
    experts = load.shape[1]
    tables = (np.array([t]) for t in product(range(experts), repeat=replicas) if len(set(t)) == experts)
    return min(float(largest_load(load, table, devices)[0]) for table in tables)


def test_small_instances_come_close_to_the_optimum() -> None:
    ratios = []
    for seed in range(8):
        load = np.random.default_rng(seed).integers(1, 50, (1, 4)).astype(np.float64)
        found = largest_load(load, rebalance_experts(load, 6, 1, 1, 3)[0], 3)[0]
        ratios.append(found / brute_force(load, 6, 3))
    assert max(ratios) < 1.2
    assert np.mean(np.array(ratios) < 1 + 1e-9) >= 0.5


def test_a_slot_changes_hands_where_swaps_do_not_help() -> None:
    # Two slots each: 12 alone makes any swap useless, and expert 3 has a replica it does not need.
    load = np.array([[12.0, 2, 2, 2]])
    start = np.array([[0, 1, 2, 3, 3, 3]])
    table = lighten(load, start, 1, 3)
    assert largest_load(load, start, 3)[0] == 14
    assert np.bincount(table[0]).tolist() != [1, 1, 1, 3]
    assert largest_load(load, table, 3)[0] <= 8


def test_three_devices_are_divided_anew_where_exchanges_help_no_more() -> None:
    load = np.random.default_rng(3).integers(1, 200, (40, 9)).astype(np.float64)
    ours = largest_load(load, rebalance_experts(load, 9, 1, 1, 3)[0], 3)
    halves = [
        (third, half)
        for third in combinations(range(9), 3)
        for half in combinations(sorted(set(range(9)) - set(third)), 3)
    ]
    sums = np.array([(load[:, list(a)].sum(axis=1), load[:, list(b)].sum(axis=1)) for a, b in halves])
    rest = load.sum(axis=1) - sums.sum(axis=1)
    optimum = np.maximum(sums.max(axis=1), rest).min(axis=0)
    enough = load.sum(axis=1) / 3 * (1 + ENOUGH)
    assert (ours <= np.maximum(optimum, enough) * (1 + 1e-6)).all()


def test_a_few_small_devices_are_as_level_as_many_large_ones() -> None:
    load = np.random.default_rng(5).gamma(1.0, 1000.0, (24, 32))
    table = rebalance_experts(load, 40, 1, 1, 8)[0]
    assert (largest_load(load, table, 8) / (load.sum(axis=1) / 8)).mean() < 1.0006


@pytest.mark.slow
def test_groups_change_nodes_where_that_evens_them() -> None:
    # Heaviest first makes 9 + 6 + 5 and 8 + 7 + 1.
    load = np.array([[9.0, 8, 7, 6, 5, 1]])
    ours = device_loads(load, rebalance_experts(load, 6, 6, 2, 2)[0], 2).max()
    theirs = device_loads(load, published_placement(load, 6, 6, 2, 2), 2).max()
    assert (ours, theirs) == (18, 20)


@pytest.mark.parametrize("load", [np.zeros((3, 8)), np.ones((3, 8)), np.eye(3, 8), np.full((3, 8), 1e30)])
def test_loads_of_zero_or_one_value_are_served(load: np.ndarray) -> None:
    table, _, counts = rebalance_experts(load, 16, 4, 2, 8)
    assert (np.sort(table, axis=1)[:, -1] == 7).all()
    assert (counts.sum(axis=1) == 16).all()


GOOD: dict[str, Any] = {"weight": README_LOAD, "num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": [[1, 2]]}, "weight: list; expected a torch tensor or NumPy array"),
        ({"weight": README_LOAD[0]}, r"weight: shape \[12\]; expected \[L, E\]"),
        ({"weight": README_LOAD[:0]}, r"weight: shape \[0, 12\]"),
        ({"weight": README_LOAD.astype(str)}, "weight: dtype <U21; expected real loads"),
        ({"weight": README_LOAD - 5}, r"weight\[0, 7\] is -1.0; expected a finite load"),
        ({"weight": np.where(README_LOAD == 183, np.nan, README_LOAD)}, r"weight\[0, 10\] is nan"),
        ({"weight": README_LOAD * 2.0**900}, r"weight\[0, 0\] is 7.6.*e\+272; expected a finite load .* in float32"),
        ({"weight": np.full((1, 12), 1e38)}, "loads of layer 0 add up beyond float32"),
        ({"num_replicas": 8}, "num_replicas: 8; expected at least one for each of 12 experts"),
        ({"num_replicas": 17}, r"num_replicas: 17; expected a multiple of num_gpus \(8\)"),
        ({"num_replicas": 16.0}, "num_replicas: 16.0; expected a whole number"),
        ({"num_groups": 8}, "num_groups: 8; expected to divide the 12 experts"),
        ({"num_nodes": 0}, "num_nodes: 0; expected a whole number of at least 1"),
        ({"num_nodes": True}, "num_nodes: True; expected a whole number"),
        ({"num_gpus": 1}, r"num_gpus: 1; expected a multiple of num_nodes \(2\)"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rebalance_experts(**(GOOD | change))


def test_groups_that_do_not_divide_over_nodes_are_balanced_globally() -> None:
    table, _, _ = rebalance_experts(README_LOAD, 16, 4, 3, 8)
    globally, _, _ = rebalance_experts(README_LOAD, 16, 1, 1, 8)
    np.testing.assert_array_equal(table, globally)


@pytest.mark.slow
def test_arrays_are_served_without_torch() -> None:
    script = (
        "import sys, numpy as np; from moeplace.compat.eplb import rebalance_experts\n"
        "rebalance_experts(np.ones((2, 8)), 16, 4, 2, 8); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
