"""Topologies: presets, files, heterogeneous clusters, and errors that name the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeplace as mp

DEVICE = {"compute": 1e12, "memory": 8e10, "memory_bandwidth": 1e12, "intra_bandwidth": 1e11}


def test_devices_are_ranked_node_by_node() -> None:
    topology = mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=4)
    assert topology.num_devices == 8
    assert topology.node_of.tolist() == [0] * 4 + [1] * 4
    assert topology.is_uniform


def test_half_a_box_has_half_its_network_cards() -> None:
    whole, half = (mp.Topology.preset("h100-hgx", nodes=2, devices_per_node=n) for n in (8, 4))
    np.testing.assert_allclose(half.inter_bandwidth, whole.inter_bandwidth / 2)


def test_nodes_and_devices_may_differ_and_repeat_by_count(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_text(
        "name: two kinds\n"
        "nodes:\n"
        "  - count: 2\n"
        "    inter_bandwidth: 50e9\n"
        "    devices:\n"
        "      - {count: 4, compute: 6e14, memory: 80e9, memory_bandwidth: 3e12, intra_bandwidth: 4e11}\n"
        "  - inter_bandwidth: 25e9\n"
        "    devices: [{count: 2, compute: 2e14, memory: 40e9, memory_bandwidth: 1e12, intra_bandwidth: 1e11}]\n"
    )
    topology = mp.Topology.load(path)
    assert topology.node_size.tolist() == [4, 4, 2]
    assert topology.inter_bandwidth.tolist() == [50e9, 50e9, 25e9]
    assert topology.compute.tolist() == [6e14] * 8 + [2e14] * 2
    assert not topology.is_uniform


@pytest.mark.parametrize("name", ["box.json", "box.yaml"])
def test_a_saved_topology_loads_equal(name: str, tmp_path: Path) -> None:
    topology = mp.Topology.preset("gb200-nvl72", nodes=2, devices_per_node=36)
    topology.save(tmp_path / name)
    assert mp.Topology.load(tmp_path / name) == topology


def test_a_file_may_name_a_preset(tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text("preset: a100-hgx\nnodes: 3\n")
    assert mp.Topology.load(tmp_path / "box.yaml") == mp.Topology.preset("a100-hgx", nodes=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nodes": [{"inter_bandwidth": float("nan"), "devices": [DEVICE]}]}, "inter_bandwidth: .*finite"),
        ({"nodes": [{"inter_bandwidth": -1.0, "devices": [DEVICE]}]}, r"inter_bandwidth: .*given: -1"),
        ({"nodes": [{"inter_bandwidth": 1e9, "devices": [DEVICE | {"compute": 0}]}]}, "compute.*greater than 0"),
        ({"nodes": [{"inter_bandwidth": 1e9, "devices": []}]}, "devices is empty"),
        ({"nodes": []}, "nodes is empty"),
        ({"nodes": "two"}, "expected a list"),
        ({"nodes": [{"count": 0, "inter_bandwidth": 1e9, "devices": [DEVICE]}]}, "count: 0"),
        ({"nodes": [{"inter_bandwidth": 1e9, "devices": [DEVICE], "colour": 1}]}, "colour"),
        ({"preset": "h100-hgx", "intra_latency": 1}, "cannot stand beside 'preset'"),
        ([], "expected a mapping"),
    ],
)
def test_a_wrong_topology_is_refused_with_the_field(data: Any, message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        mp.Topology.from_dict(data)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(mp.InputError, match="did you mean 'h100-sxm'"):
        mp.Topology.preset("h100")
    with pytest.raises(mp.InputError, match="between 1 and 8"):
        mp.Topology.preset("h100-hgx", devices_per_node=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: &a [*a]\n", "line 1: .a stands for nothing before it, or for itself"),
        (f"a: &a [{'0, ' * 100_000}]\nnodes: [{', '.join(['*a'] * 11)}]\n", "aliases stand for more than 1,048,576"),
        ("nodes: []\nnodes: []\n", "line 2: 'nodes' stands twice in a mapping"),
        ("nodes: " + "[" * 10_000, "nested deeper|maximum nesting depth"),
    ],
)
def test_a_topology_that_would_take_a_loader_down_or_say_something_twice_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(mp.FileFormatError, match=message):
        mp.Topology.load(tmp_path / "a.yaml")


def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_text("nodes: [")
    with pytest.raises(mp.FileFormatError, match="neither JSON nor YAML"):
        mp.Topology.load(path)
