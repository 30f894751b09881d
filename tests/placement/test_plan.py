"""Plans: what they refuse, what they derive, and their file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.migration import migration
from moeplace.placement.plan import EMPTY, equal_shares

MODEL = mp.ModelSpec(layers=2, experts=4, top_k=2, hidden_size=8, ffn_size=8, moe_layers=(3, 4))
TOPOLOGY = mp.Topology.preset("h100-hgx", devices_per_node=2)
TABLE = np.array([[0, 1, 2, 3, 0, 2], [3, 2, 1, 0, 1, 3]])
DEVICES = np.array([0, 0, 0, 1, 1, 1])
EMPTIED = np.array([[0, 1, EMPTY, EMPTY, 3, 2], [3, 2, 1, 0, EMPTY, 3]])


def plan(**changes: Any) -> mp.Plan:
    return mp.Plan(
        **{"model": MODEL, "topology": TOPOLOGY, "physical_to_logical": TABLE, "slot_device": DEVICES} | changes
    )


def test_shares_default_to_equal_splits_and_reach_devices() -> None:
    made = plan()
    np.testing.assert_allclose(made.shares[0], [0.5, 1, 0.5, 1, 0.5, 0.5])
    np.testing.assert_allclose(made.device_share[0], [[0.5, 0.5], [1, 0], [0.5, 0.5], [0, 1]])
    assert made.has_equal_shares


def test_logical_to_physical_lists_the_slots_of_each_expert() -> None:
    assert plan().logical_to_physical.tolist() == [
        [[0, 4], [1, -1], [2, 5], [3, -1]],
        [[3, -1], [2, 4], [1, -1], [0, 5]],
    ]


def test_empty_slots_hold_nothing_and_serve_nothing() -> None:
    made = plan(physical_to_logical=EMPTIED)
    assert made.shares.tolist() == [[1, 1, 0, 0, 1, 1], [0.5, 1, 1, 1, 0, 0.5]]
    assert made.replicas.tolist() == [[1, 1, 1, 1], [1, 1, 1, 2]]
    assert made.slots_per_device.tolist() == [[2, 2], [3, 2]]
    assert made.logical_to_physical.tolist() == [
        [[0, -1], [1, -1], [5, -1], [4, -1]],
        [[3, -1], [2, -1], [1, -1], [0, 5]],
    ]
    assert made.holds[0].tolist() == [[True, False], [True, False], [False, True], [False, True]]
    np.testing.assert_array_equal(made.device_share[0], made.holds[0].astype(float))
    assert made.has_equal_shares


def test_a_filled_slot_is_a_move_and_an_emptied_one_is_none() -> None:
    full, emptied = plan(), plan(physical_to_logical=EMPTIED)
    size = MODEL.bytes_per_expert
    assert migration(full, emptied).bytes_moved == 0
    # Layer 3 gets expert 2 on device 0 and expert 0 on device 1, layer 4 expert 1 on device 1.
    found = migration(emptied, full)
    assert sorted(zip(found.layer.tolist(), found.expert.tolist(), found.target.tolist(), strict=True)) == [
        (0, 0, 1),
        (0, 2, 0),
        (1, 1, 1),
    ]
    assert found.bytes_moved == 3 * size


def test_plans_without_empty_slots_keep_their_bytes_and_fingerprint(tmp_path: Path) -> None:
    # Devices as they were before they named a GPU and its rates at other types.
    later = {"gpu": "", "fp8_compute": None, "fp4_compute": None}
    nodes = [
        node.replace(devices=[device.replace(**later) for device in node.devices])  # type: ignore[arg-type]
        for node in TOPOLOGY.nodes
    ]
    made = plan(topology=TOPOLOGY.replace(nodes=nodes))
    made.save(tmp_path / "plan.json")
    assert made.fingerprint == "f71bd4b0cdc3d8f8f9b773e38b3270198a466183d525b2069e6b80dba7ce7edb"
    written = hashlib.sha256((tmp_path / "plan.json").read_bytes()).hexdigest()
    assert written == "58f69fb0fde023ed38e22e10b49b96c0ad256238b01807aaee31d197253cbd1b"


def test_a_plan_with_empty_slots_loads_the_same_and_older_releases_are_told(tmp_path: Path) -> None:
    made = plan(physical_to_logical=EMPTIED)
    made.save(tmp_path / "plan.json")
    loaded = mp.Plan.load(tmp_path / "plan.json")
    assert loaded.fingerprint == made.fingerprint
    np.testing.assert_array_equal(loaded.physical_to_logical, EMPTIED)
    np.testing.assert_array_equal(loaded.shares, made.shares)
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2


@given(st.integers(0, 2**32 - 1))
def test_both_maps_say_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = np.stack([rng.permutation(np.concatenate([np.arange(4), rng.integers(4, size=2)])) for _ in range(2)])
    made = plan(physical_to_logical=table)
    for layer in range(2):
        for expert in range(4):
            slots = [slot for slot in made.logical_to_physical[layer, expert] if slot >= 0]
            assert slots == np.flatnonzero(table[layer] == expert).tolist()


def test_a_plan_cannot_be_changed() -> None:
    made = plan()
    for array in (made.physical_to_logical, made.slot_device, made.shares, made.device_share):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"physical_to_logical": TABLE[:1]}, r"has 1 layers, the model has 2.*\(3, 4\)"),
        ({"physical_to_logical": np.where(TABLE == 2, 1, TABLE)}, "layer 3 has no slot for expert 2"),
        ({"physical_to_logical": np.where(TABLE == 2, 4, TABLE)}, "layer 3 holds expert 4"),
        ({"physical_to_logical": np.where(TABLE == 2, -2, TABLE)}, "layer 3 holds expert -2"),
        ({"physical_to_logical": TABLE + 0.5}, "must hold integers"),
        ({"slot_device": np.array([0, 0, 0, 1, 1, 2])}, "within 0..1"),
        ({"slot_device": np.array([1, 0, 0, 1, 1, 1])}, "must not decrease"),
        ({"slot_device": DEVICES[:5]}, r"slot_device \(5,\)"),
        ({"shares": np.full((2, 6), 0.5)}, "layer 3, expert 1: shares sum to 0.5"),
        ({"shares": np.full((2, 5), 0.5)}, r"shape \(2, 5\), expected \(2, 6\)"),
        ({"shares": np.full((2, 6), np.nan)}, "finite"),
        (
            {"physical_to_logical": EMPTIED, "shares": np.where(EMPTIED < 0, 0.5, equal_shares(EMPTIED, 4))},
            "layer 3, slot 2 is empty, its share must be 0",
        ),
    ],
)
def test_a_wrong_plan_is_refused_with_layer_and_expert(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(mp.InputError, match=message):
        plan(**changes)


def test_gap_and_proof_follow_from_value_and_bound() -> None:
    assert plan().gap is None
    assert not plan().proven_optimal
    assert mp.Certificate("x", 2.0, 1.5).gap == pytest.approx(0.25)
    assert mp.Certificate("x", 0.0, 0.0).gap == 0.0
    assert plan(certificate=mp.Certificate("x", 1.0, 1.0)).proven_optimal
    assert not plan(certificate=mp.Certificate("x", 1.0, 0.999)).proven_optimal


def test_a_saved_plan_loads_the_same(tmp_path: Path) -> None:
    shares = plan().shares.copy()
    shares[0, [0, 4]] = 0.25, 0.75
    made = plan(
        shares=shares,
        certificate=mp.Certificate("x", 2.0, 1.5),
        provenance=mp.Provenance(
            "chain", "0.1.0", 3, {"minimise": "step"}, 0.5, "time limit", "ab", ((0.1, 2.0, None),)
        ),
        predicted={"step_seconds_mean": 0.001},
    )
    made.save(tmp_path / "plan.json")
    loaded = mp.Plan.load(tmp_path / "plan.json")
    assert loaded.fingerprint == made.fingerprint
    for name in ("model", "topology", "certificate", "provenance", "predicted"):
        assert getattr(loaded, name) == getattr(made, name)
    np.testing.assert_array_equal(loaded.shares, made.shares)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99, this release reads up to 2; upgrade"),
        ({"version": "one"}, "expected a whole number"),
        ({"format": "other"}, "not a moeplace.plan file"),
        ({"physical_to_logical": [[0, 1, 2, 3, 0, 2], [3]]}, "different lengths"),
        ({"physical_to_logical": [[0, 1, 2, 3, 0, 2], [3, 2, 1, 0, 1, None]]}, "whole numbers"),
        ({"physical_to_logical": [[0, 1, 2, 3, 0, 2]]}, "has 1 layers"),
        ({"physical_to_logical": [[0, 1, 1, 3, 0, 1]] * 2}, "no slot for expert 2"),
        ({"model": None}, "'model' must be an object"),
        ({"topology": {"nodes": []}}, "nodes is empty"),
        ({"certificate": {"objective": "x"}}, "value"),
    ],
)
def test_a_damaged_plan_file_is_refused_with_file_and_field(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(mp.FileFormatError, match=message) as caught:
        mp.Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_truncated_plan_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(mp.FileFormatError, match="truncated"):
        mp.Plan.load(path)
    with pytest.raises(mp.InputError, match="no such file"):
        mp.Plan.load(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path: Path) -> None:
    """A limit on file size stands for a full disk: the write fails half way with an OSError."""
    path = tmp_path / "plan.json"
    plan().save(path)
    before = path.read_bytes()
    script = (
        "import resource, signal, sys, moeplace as mp\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"plan = mp.Plan.load({str(path)!r})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"plan.save({str(path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


def test_nearly_equal_shares_are_kept_as_they_are(tmp_path: Path) -> None:
    shares = plan().shares.copy()
    shares[0, [0, 4]] += 1e-9, -1e-9
    made = plan(shares=shares)
    made.save(tmp_path / "plan.json")
    assert mp.Plan.load(tmp_path / "plan.json").fingerprint == made.fingerprint


def test_a_proof_is_of_its_map_alone(tmp_path: Path) -> None:
    proven = plan(certificate=mp.Certificate("x", 1.0, 1.0))
    proven.save(tmp_path / "p.json")
    assert mp.Plan.load(tmp_path / "p.json").proven_optimal
    document = json.loads((tmp_path / "p.json").read_text())

    def exchanged(change: Any) -> Path:
        changed = json.loads(json.dumps(document))
        change(changed)
        (tmp_path / "q.json").write_text(json.dumps(changed))
        return tmp_path / "q.json"

    def two_experts(data: Any) -> None:
        row = data["physical_to_logical"][0]
        row[1], row[3] = row[3], row[1]

    changes = {
        "two experts": two_experts,
        "a bound": lambda data: data["certificate"].update(bound=0.5),
        "a share": lambda data: data.update(shares=[[0.5, 1, 0.5, 1, 0.5, 0.5], [0.5, 1, 0.5, 1, 0.5, 0.5]]),
        "the cluster": lambda data: data["topology"].update(name="another"),
    }
    for change in changes.values():
        with pytest.raises(mp.FileFormatError, match="the certificate is of another map"):
            mp.Plan.load(exchanged(change))
    # What takes the proof out may have the plan.
    assert mp.Plan.load(exchanged(lambda data: (two_experts(data), data.update(certificate=None)))).certificate is None
    with pytest.warns(UserWarning, match="does not say which map it was proven for, and is left out"):
        assert mp.Plan.load(exchanged(lambda data: data["certificate"].pop("map"))).certificate is None


def test_a_proof_outlives_fields_and_numbers_that_stores_write_otherwise(tmp_path: Path) -> None:
    plan(certificate=mp.Certificate("x", 2.0, 1.0)).save(tmp_path / "p.json")
    document = json.loads((tmp_path / "p.json").read_text())
    document["certificate"]["value"] = 2
    reordered = {name: document[name] for name in sorted(document)}
    (tmp_path / "p.json").write_text(json.dumps(reordered))
    assert mp.Plan.load(tmp_path / "p.json").gap == 0.5
