"""Greedy balancing of many layers at once, each function against a plain loop over one layer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplace.placement.errors import InputError
from moeplace.placement.packing import add_replicas, deal, pack, replicate, steepest_swap

# Small whole numbers: ties are frequent, and sums are exact whatever their order.
LOADS = st.integers(0, 6).map(float)


@st.composite
def loads(draw: st.DrawFn, most_items: int = 8) -> np.ndarray:
    """[L, n]"""
    layers, items = draw(st.integers(1, 3)), draw(st.integers(1, most_items))
    flat = draw(st.lists(LOADS, min_size=layers * items, max_size=layers * items))
    return np.array(flat).reshape(layers, items)


def naive_replicate(load: list[float], slots: int, most: list[int]) -> list[int]:
    chosen = list(range(len(load)))
    while len(chosen) < slots:
        able = [e for e in range(len(load)) if chosen.count(e) < most[e]]
        chosen.append(max(able, key=lambda e: load[e] / chosen.count(e)))
    return chosen


@settings(max_examples=100, deadline=None)
@given(loads(), st.data())
def test_spare_slots_go_to_whoever_has_most_load_a_replica(load: np.ndarray, data: st.DataObject) -> None:
    layers, experts = load.shape
    most = np.array([data.draw(st.lists(st.integers(1, 4), min_size=experts, max_size=experts)) for _ in range(layers)])
    slots = data.draw(st.integers(experts, int(most.sum(axis=1).min())))
    for row, layer_load, limits in zip(replicate(load, slots, most), load, most, strict=True):
        assert row.tolist() == naive_replicate(layer_load.tolist(), slots, limits.tolist())
    for row, layer_load in zip(replicate(load, slots), load, strict=True):
        assert row.tolist() == naive_replicate(layer_load.tolist(), slots, [slots] * experts)


def test_replicas_are_added_to_those_there_are() -> None:
    # Loads a replica 3, 4, 2: first the second (then 2), then the first.
    assert add_replicas(np.array([[6.0, 4.0, 6.0]]), np.array([[2, 1, 3]]), 2).tolist() == [[1, 0]]


def test_single_precision_is_kept_where_double_would_choose_otherwise() -> None:
    load = np.array([[np.float32(1 / 3), np.float32(1.0)]], dtype=np.float32)
    third = np.float32(1.0) / np.float32(3.0)
    assert third == load[0, 0]
    assert float(load[0, 1]) / 3 < float(load[0, 0])
    # With three replicas the second is exactly as light as the first in float32, and the tie goes to the first.
    assert replicate(load, 5)[0].tolist() == [0, 1, 1, 1, 0]


def test_too_many_or_too_few_slots_are_refused() -> None:
    with pytest.raises(InputError, match=r"3 further replicas .* only 2 more"):
        replicate(np.ones((1, 2)), 5, np.full((1, 2), 2))
    with pytest.raises(InputError, match="1 slots a layer must be at least the 2 experts"):
        replicate(np.ones((1, 2)), 1)
    with pytest.raises(InputError, match=r"3 items to pack, .* hold only 2"):
        pack(np.ones((1, 3)), np.array([1, 1]))


@settings(max_examples=100, deadline=None)
@given(loads(), st.data())
def test_items_go_heaviest_first_to_the_lightest_pack_with_a_place(weight: np.ndarray, data: st.DataObject) -> None:
    items = weight.shape[1]
    capacity = data.draw(st.lists(st.integers(0, items), min_size=1, max_size=5).filter(lambda c: sum(c) >= items))
    carried = data.draw(st.lists(LOADS, min_size=len(capacity), max_size=len(capacity)))
    packs, ranks = pack(weight, np.array(capacity), np.array(carried))
    for row, rank, weights in zip(packs.tolist(), ranks.tolist(), weight.tolist(), strict=True):
        contents: list[list[int]] = [[] for _ in capacity]
        for item in sorted(range(items), key=lambda i: -weights[i]):
            able = [g for g in range(len(capacity)) if len(contents[g]) < capacity[g]]
            contents[min(able, key=lambda g: carried[g] + sum(weights[i] for i in contents[g]))].append(item)
        assert [contents[g].index(i) for i, g in enumerate(row)] == rank


@settings(max_examples=150, deadline=None)
@given(loads(), st.data())
def test_replicas_are_dealt_to_the_device_done_first_and_never_twice(weight: np.ndarray, data: st.DataObject) -> None:
    layers, replicas = weight.shape
    devices, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    capacity = data.draw(st.lists(st.integers(0, 3), min_size=devices, max_size=devices))
    speed = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=devices, max_size=devices))
    expert = np.array(
        [data.draw(st.lists(st.integers(0, experts - 1), min_size=replicas, max_size=replicas)) for _ in range(layers)]
    )
    cells = layers * experts * devices
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=cells, max_size=cells)))
    allowed = allowed.reshape(layers, experts, devices)
    result = deal(weight, expert, np.array(capacity), np.array(speed), allowed)
    for layer in range(layers):
        busy, contents = [0.0] * devices, [set[int]() for _ in range(devices)]
        for turn in range(replicas):
            mine = int(expert[layer, turn])
            able = [
                g
                for g in range(devices)
                if allowed[layer, mine, g] and mine not in contents[g] and len(contents[g]) < capacity[g]
            ]
            if not able:
                assert result[layer, turn] == -1
                continue
            first = min(able, key=lambda g: busy[g] + weight[layer, turn] / speed[g])
            assert result[layer, turn] == first
            busy[first] += weight[layer, turn] / speed[first]
            contents[first].add(mine)


def naive_steepest_swap(weight: list[float], devices: int, nodes: int) -> list[int]:
    slots, width, in_node = len(weight), len(weight) // devices, len(weight) // nodes
    content = list(range(slots))

    def load(device: int) -> float:
        return sum(weight[content[slot]] for slot in range(device * width, (device + 1) * width))

    while True:
        heaviest = max(range(devices), key=load)
        node = heaviest // (devices // nodes)
        swaps = {}
        for p in range(heaviest * width, (heaviest + 1) * width):
            for q in range(node * in_node, (node + 1) * in_node):
                less = weight[content[p]] - weight[content[q]]
                swaps[p, q] = max(load(heaviest) - less, load(q // width) + less)
        p, q = min(swaps, key=lambda swap: swaps[swap])
        if swaps[p, q] >= load(heaviest):
            return content
        content[p], content[q] = content[q], content[p]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_best_swap_is_made_until_none_lightens_the_heaviest_device(data: st.DataObject) -> None:
    nodes, per_node, width = (data.draw(st.integers(1, 3)) for _ in range(3))
    devices = nodes * per_node
    layers, slots = data.draw(st.integers(1, 3)), devices * width
    flat = data.draw(st.lists(st.integers(0, 20).map(float), min_size=layers * slots, max_size=layers * slots))
    weight = np.array(flat).reshape(layers, slots)
    result = steepest_swap(weight, devices, nodes)
    for row, weights in zip(result, weight, strict=True):
        assert row.tolist() == naive_steepest_swap(weights.tolist(), devices, nodes)
