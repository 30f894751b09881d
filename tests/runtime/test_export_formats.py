"""Plans as engines' files: what is written, what an engine cannot express, and what is refused when read back."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import moeplace as mp
from moeplace.placement.engines import Constraint
from moeplace.placement.plan import EMPTY
from moeplace.runtime.exporters.export import (
    check_export,
    engine_constraints,
    engine_names,
    engine_usage,
    export_plan,
    read_exported,
)
from moeplace.runtime.exporters.running import read_running
from moeplace.runtime.exporters.sglang import lost_ranks
from moeplace.runtime.exporters.trtllm import read_assignments

pytestmark = pytest.mark.slow

ENGINES = ("moeplace", "sglang", "sglang-lp", "vllm", "vllm-ascend", "trtllm")
DEALT = ENGINES[1:]
EQUAL = tuple(engine for engine in DEALT if engine != "sglang-lp")


def make_plan(
    layers: tuple[int, ...] = (1, 2, 4),
    experts: int = 6,
    slots: int = 8,
    nodes: int = 2,
    devices: int = 2,
    seed: int = 0,
) -> mp.Plan:
    rng = np.random.default_rng(seed)
    spare = rng.integers(experts, size=(len(layers), slots - experts))
    table = rng.permuted(np.hstack([np.tile(np.arange(experts), (len(layers), 1)), spare]), axis=1)
    model = mp.ModelSpec(
        layers=len(layers), moe_layers=layers, experts=experts, top_k=2, hidden_size=16, ffn_size=8, name="toy"
    )
    topology = mp.Topology.preset("h100-hgx", nodes=nodes, devices_per_node=devices)
    counts = [len(part) for part in np.array_split(np.arange(slots), topology.num_devices)]
    owner = np.repeat(np.arange(topology.num_devices), counts)
    return mp.Plan(model=model, topology=topology, physical_to_logical=table, slot_device=owner)


def stacked(plan: mp.Plan) -> bool:
    """Whether some device holds an expert twice, counted the slow way."""
    return any(
        len(set(row[plan.slot_device == device])) < (plan.slot_device == device).sum()
        for row in plan.physical_to_logical
        for device in range(plan.topology.num_devices)
    )


def same_placement(a: mp.Plan, b: mp.Plan) -> bool:
    return (
        a.model == b.model
        and a.topology == b.topology
        and np.array_equal(a.physical_to_logical, b.physical_to_logical)
        and np.array_equal(a.slot_device, b.slot_device)
        and np.array_equal(a.shares, b.shares)
    )


def test_the_engines_asked_for_are_registered() -> None:
    assert set(ENGINES) <= set(engine_names())


def test_a_trtllm_file_whose_experts_move_is_where_they_begin_and_maps_no_recorded_slots(tmp_path: Path) -> None:
    plan = make_plan()
    path = export_plan(plan, "trtllm", tmp_path / "a.yaml")
    assert list(read_assignments(path)) == [1, 2, 4]
    path.write_text(path.read_text().replace("layer_updates_per_iter: 0", "layer_updates_per_iter: 2"))
    with pytest.warns(UserWarning, match="layer_updates_per_iter is 2: TensorRT-LLM moves experts while it runs"):
        assert same_placement(read_exported(path, "trtllm", plan.model, plan.topology), plan)
    with pytest.raises(mp.UnsupportedError, match="slots it records are those of this file at the start alone"):
        read_assignments(path)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_plan_an_engine_takes_reads_back_as_itself(engine: str, data: Any, tmp_path: Path) -> None:
    layers = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(sorted))
    devices = data.draw(st.sampled_from([1, 2, 4]))
    experts = data.draw(st.integers(2, 9))
    slots = -(-experts // devices) * devices + devices * data.draw(st.integers(0, 2))
    plan = make_plan(tuple(layers), experts, slots, 1, devices, seed=data.draw(st.integers(0, 99)))
    if engine == "vllm-ascend":
        assume(not stacked(plan))
    if engine == "sglang":
        assume(not len(lost_ranks(plan.physical_to_logical, devices)))
    path = export_plan(plan, engine, tmp_path / "plan.json")
    assert same_placement(read_exported(path, engine, plan.model, plan.topology), plan)


def test_sglang_rows_count_dense_layers_and_the_map_is_the_only_key(tmp_path: Path) -> None:
    plan = make_plan()
    data = json.loads(export_plan(plan, "sglang", tmp_path / "a.json", hidden_layers=6).read_text())
    assert list(data) == ["physical_to_logical_map"]
    rows = data["physical_to_logical_map"]
    assert len(rows) == 6
    for dense in (0, 3, 5):
        assert rows[dense] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert [rows[1], rows[2], rows[4]] == plan.physical_to_logical.tolist()
    assert len(json.loads(export_plan(plan, "sglang", tmp_path / "b.json").read_text())["physical_to_logical_map"]) == 5


def test_vllm_ascend_lists_layers_and_devices_in_order(tmp_path: Path) -> None:
    plan = next(plan for seed in range(99) if not stacked(plan := make_plan(seed=seed)))
    data = json.loads(export_plan(plan, "vllm-ascend", tmp_path / "a.json").read_text())
    assert data["moe_layer_count"] == 3
    assert [layer["layer_id"] for layer in data["layer_list"]] == [0, 1, 2]
    device = data["layer_list"][2]["device_list"][3]
    assert device == {"device_id": 3, "device_expert": plan.physical_to_logical[2, 6:].tolist()}
    assert data["layer_list"][1]["device_count"] == 4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999))
def test_vllm_ascend_refuses_an_expert_twice_on_a_device(seed: int) -> None:
    plan = make_plan(seed=seed)
    if stacked(plan):
        with pytest.raises(mp.UnsupportedError, match=r"device \d holds expert \d 2 times in layer"):
            check_export(plan, "vllm-ascend")
    else:
        check_export(plan, "vllm-ascend")


def test_vllm_rows_are_moe_layers_only(tmp_path: Path) -> None:
    plan = make_plan()
    assert json.loads(export_plan(plan, "vllm", tmp_path / "a.json").read_text()) == plan.physical_to_logical.tolist()


def test_trtllm_keys_are_absolute_layers_and_extra_layers_can_be_named(tmp_path: Path) -> None:
    plan = make_plan()
    data = yaml.safe_load(export_plan(plan, "trtllm", tmp_path / "a.yaml", extra_layers=[5]).read_text())
    assert data["num_slots"] == 8
    assert data["layer_updates_per_iter"] == 0
    assert list(data["initial_global_assignments"]) == [1, 2, 4, 5]
    assert data["initial_global_assignments"][4] == plan.physical_to_logical[2].tolist()
    assert data["initial_global_assignments"][5] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert same_placement(read_exported(tmp_path / "a.yaml", "trtllm", plan.model, plan.topology), plan)


@pytest.mark.parametrize("engine", DEALT)
@pytest.mark.parametrize("nodes", [1, 2])
def test_usage_is_whole_commands_with_what_they_need(engine: str, nodes: int, tmp_path: Path) -> None:
    plan, path = make_plan(nodes=nodes, devices=4 // nodes), tmp_path / "two words" / "p.json"
    usage = engine_usage(plan, engine, path, "org/model name")
    commands = [line for line in usage.splitlines() if "'org/model name'" in line]
    assert len(commands) == (1 if engine == "trtllm" else nodes)
    for number, command in enumerate(commands):
        words = shlex.split(command)
        assert "4" in words
        assert any(path.name in word for word in words) or engine == "trtllm"
        if engine.startswith("sglang"):
            assert words[words.index("--moe-a2a-backend") + 1] == "deepep"
            assert words[words.index("--ep-num-redundant-experts") + 1] == "2"
            assert ("--node-rank" in words) == (nodes > 1)
            assert nodes == 1 or words[words.index("--node-rank") + 1] == str(number)
    for part in ("File: ", "Applied: ", "Roll back: ", "all 2 nodes" if nodes == 2 else "the machine"):
        assert part in usage
    if engine == "trtllm":
        assert f'load_balancer: "{path}"' in usage


def test_usage_without_replicas_asks_for_no_all_to_all_backend() -> None:
    assert "a2a" not in engine_usage(make_plan(slots=6, devices=1), "sglang", "p.json")


def test_vllms_own_options_are_those_that_a_release_takes() -> None:
    usage = engine_usage(make_plan(), "vllm", "p.json")
    # The variable comes first, and no field that 0.33's EPLBConfig, which forbids others, does not have.
    assert usage.split("# node 0\n")[1].startswith("MOEPLACE_VLLM_PLAN=p.json vllm serve MODEL ")
    config = json.loads(next(word for word in shlex.split(usage.splitlines()[1]) if word.startswith("{")))
    assert config == {"num_redundant_experts": 2}


def test_sglang_takes_a_tensor_file_too_and_no_other_name(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    plan = make_plan()
    path = export_plan(plan, "sglang", tmp_path / "p.pt", hidden_layers=6)
    content = torch.load(path, weights_only=True)
    assert list(content) == ["physical_to_logical_map"]
    assert content["physical_to_logical_map"].shape == (6, 8)
    assert same_placement(read_exported(path, "sglang", plan.model, plan.topology), plan)
    with pytest.raises(mp.InputError, match="ends in .json or .pt, not '.yaml'"):
        export_plan(plan, "sglang", tmp_path / "p.yaml")
    with pytest.raises(mp.InputError, match="ends in .json, not '.pt'"):
        export_plan(next(p for seed in range(99) if not stacked(p := make_plan(seed=seed))), "vllm-ascend", "p.pt")


def test_shares_of_a_plan_go_to_forks_of_sglang_that_serve_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    plan = make_plan(layers=(1, 3), experts=3, slots=4, devices=2, nodes=1)
    table = np.array([[0, 1, 2, 1], [2, 1, 0, 0]])
    shares = np.array([[1.0, 0.25, 1.0, 0.75], [1.0, 1.0, 0.0, 1.0]])
    plan = mp.Plan(plan.model, plan.topology, table, plan.slot_device, shares=shares)
    path = export_plan(plan, "sglang-lp", tmp_path / "shares.pt", hidden_layers=5)
    content = torch.load(path, weights_only=True)
    mass, served = content["physical_mass"], content["physical_to_logical_map"]
    assert mass.dtype == torch.float32
    # Every expert's mass of a layer adds up to the same, whose parts are the shares.
    for layer in range(5):
        sums = torch.zeros(3).index_add(0, served[layer], mass[layer])
        torch.testing.assert_close(sums, torch.full((3,), 1 / 3))
    torch.testing.assert_close(mass[1] * 3, torch.tensor([1.0, 0.25, 1.0, 0.75]))
    back = read_exported(path, "sglang-lp", plan.model, plan.topology)
    np.testing.assert_allclose(back.shares, shares, atol=1e-6)
    # SGLang's own option takes no other key than the map: that is a file of its own.
    placed = export_plan(plan, "sglang-lp", tmp_path / "map.pt", part="map", hidden_layers=5)
    assert torch.equal(torch.load(placed, weights_only=True)["physical_to_logical_map"], served)
    assert str(tmp_path / "shares-map.pt") in engine_usage(plan, "sglang-lp", path)


def test_vllms_open_forms_are_as_their_pull_requests_read_them(tmp_path: Path) -> None:
    plan = make_plan(layers=(0, 1, 2))
    record = json.loads(export_plan(plan, "vllm", tmp_path / "a.jsonl", form="41141").read_text())
    assert record == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 2,
        "num_slots": 8,
        "initial_global_assignments": {str(i): row for i, row in enumerate(plan.physical_to_logical.tolist())},
    }
    assert same_placement(read_exported(tmp_path / "a.jsonl", "vllm", plan.model, plan.topology), plan)
    (tmp_path / "a.jsonl").write_text(json.dumps({**record, "num_slots": 16}))
    with pytest.raises(mp.FileFormatError, match=r"initial_global_assignments\[0\] has 8 slots, num_slots is 16"):
        read_exported(tmp_path / "a.jsonl", "vllm", plan.model, plan.topology)
    rows = json.loads(export_plan(plan, "vllm", tmp_path / "b.json", form="53022", hidden_layers=4).read_text())
    assert rows == [*plan.physical_to_logical.tolist(), [0, 1, 2, 3, 4, 5, 0, 1]]
    assert same_placement(read_exported(tmp_path / "b.json", "vllm", plan.model, plan.topology), plan)
    (tmp_path / "b.json").write_text(json.dumps([*rows[:3], rows[0]]))
    with pytest.raises(mp.FileFormatError, match="4 rows, the model has 3 MoE layers"):
        read_exported(tmp_path / "b.json", "vllm", plan.model, plan.topology)
    with pytest.raises(mp.UnsupportedError, match="DeepSeek-V4, whose layers are all MoE"):
        export_plan(make_plan(), "vllm", tmp_path / "c.json", form="53022")
    with pytest.raises(mp.InputError, match="form '1' is none of vLLM's pull requests: 49572, 41141, 53022"):
        export_plan(plan, "vllm", tmp_path / "c.json", form="1")
    model = plan.model.replace(groups=2)
    row = np.array([[0, 3, 1, 4, 2, 5]] * 3)
    parted = mp.Plan(model, plan.topology.resized(devices=2), row, np.repeat([0, 1], 3))
    with pytest.raises(mp.UnsupportedError, match="permutes the router.*parts the groups of layer 0"):
        export_plan(parted, "vllm", tmp_path / "c.json", form="53022")


# Whose file it is, told by what it holds.


@pytest.mark.parametrize("engine", ENGINES)
def test_a_plan_is_read_from_any_engines_own_file(engine: str, tmp_path: Path) -> None:
    plan = next(plan for seed in range(99) if not stacked(plan := make_plan(seed=seed)))
    names = {"sglang-lp": ["x.pt"], "sglang": ["x.json", "x.pt"], "trtllm": ["x.yaml", "x.json"]}
    for name in names.get(engine, ["x.json"]):
        path = export_plan(plan, engine, tmp_path / name)
        back = mp.read_plan_file(path, plan.model, plan.topology)
        assert same_placement(back, plan)
        assert back.provenance.engine == ("" if engine == "moeplace" else engine)
        assert back.certificate is None
        if engine != "moeplace":
            with pytest.raises(mp.InputError, match=f"{engine}'s own file, which does not say its model and topology"):
                mp.read_plan_file(path)


def test_layers_of_a_load_balancer_may_be_quoted_or_bare(tmp_path: Path) -> None:
    plan = make_plan()
    path = export_plan(plan, "trtllm", tmp_path / "a.yaml")
    quoted = re.sub(r"^  (\d+):", r'  "\1":', path.read_text(), flags=re.MULTILINE)
    assert '"4":' in quoted
    path.write_text(quoted)
    assert same_placement(mp.read_plan_file(path, plan.model, plan.topology), plan)
    path.write_text(quoted + "  4: [0, 1, 2, 3, 4, 5, 0, 1]\n")
    with pytest.raises(mp.FileFormatError, match="line 7: .4. stands twice in a mapping"):
        mp.read_plan_file(path, plan.model, plan.topology)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"logical_count": [[1, 2]]}', "those are loads, `moeplace import` reads them: no plan of"),
        ("a.json", '{"a": 1, "b": 2}', "holds an object with a, b: no plan of"),
        ("a.json", '"text"', "holds a str"),
        ("a.json", "[[0, 1", "not JSON, or truncated"),
        ("a.yaml", "a: &x [1]\nb: *x", "holds an object with a, b: no plan of"),
        ("a.json", '[{"a": 1, "a": 2}]', "'a' stands twice in an object"),
        ("a.pt", "PK nothing", "damaged or not a plain torch.save file"),
    ],
)
def test_files_that_hold_no_plan_say_what_they_hold(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(mp.FileFormatError, match=re.escape(message)):
        mp.read_plan_file(tmp_path / name, make_plan().model, make_plan().topology)


def test_a_tensor_file_is_not_believed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    plan = make_plan()
    torch.save({"physical_to_logical_map": torch.zeros(5, 8, dtype=torch.int64), "extra": 1}, tmp_path / "a.pt")
    with pytest.raises(mp.FileFormatError, match="SGLang takes no other key"):
        mp.read_plan_file(tmp_path / "a.pt", plan.model, plan.topology)
    torch.save({"physical_to_logical_map": print}, tmp_path / "b.pt")
    with pytest.raises(mp.FileFormatError, match="refused|holds"):
        mp.read_plan_file(tmp_path / "b.pt", plan.model, plan.topology)


@pytest.mark.parametrize("engine", DEALT)
def test_uneven_slots_are_refused_with_the_slot_counts_that_work(engine: str, tmp_path: Path) -> None:
    plan = make_plan(experts=7, slots=10)
    with pytest.raises(mp.UnsupportedError, match=r"slots=8 or 12 and no device_slots"):
        export_plan(plan, engine, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(mp.UnsupportedError, match=r"slots=12 and no"):
        check_export(make_plan(experts=10, slots=10), engine)


@pytest.mark.parametrize("engine", DEALT)
def test_empty_slots_are_refused_with_the_slots_to_solve_for(engine: str, tmp_path: Path) -> None:
    full = make_plan()
    table = full.physical_to_logical.copy()
    counts = np.bincount(table[1], minlength=6)
    table[1, int(np.flatnonzero(counts[table[1]] > 1)[0])] = EMPTY
    plan = mp.Plan(full.model, full.topology, table, full.slot_device)
    with pytest.raises(mp.UnsupportedError, match=r"layers fill 7 to 8 of 8: solve with one number.*multiple of 4"):
        export_plan(plan, engine, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    export_plan(plan, "moeplace", tmp_path / "plan.json")
    assert same_placement(mp.Plan.load(tmp_path / "plan.json"), plan)


@pytest.mark.parametrize("engine", EQUAL)
def test_unequal_shares_are_refused_naming_layer_and_expert(engine: str) -> None:
    plan = make_plan(layers=(3,), experts=3, slots=4, devices=2, nodes=1)
    table = np.array([[0, 1, 2, 1]])
    plan = mp.Plan(plan.model, plan.topology, table, plan.slot_device, shares=np.array([[1.0, 0.25, 1.0, 0.75]]))
    with pytest.raises(mp.UnsupportedError, match=r"expert 1 in layer 3.*0\.500.*split='equal'"):
        check_export(plan, engine)
    check_export(plan, "moeplace")


def test_constraints_are_readable_without_a_plan() -> None:
    assert engine_constraints("moeplace") == frozenset()
    assert {Constraint.EQUAL_SLOTS, Constraint.EQUAL_SHARES} <= engine_constraints("sglang")


def test_unknown_engine_and_option_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(mp.InputError, match="did you mean 'sglang'"):
        export_plan(make_plan(), "sglan", tmp_path / "x")
    with pytest.raises(mp.InputError, match="did you mean 'hidden_layers'"):
        export_plan(make_plan(), "sglang", tmp_path / "x", hidden_layer=3)
    with pytest.raises(mp.InputError, match="known: none"):
        export_plan(make_plan(), "moeplace", tmp_path / "x", pretty=True)
    with pytest.raises(mp.InputError, match=r"hidden_layers \(4\)"):
        export_plan(make_plan(), "sglang", tmp_path / "x", hidden_layers=4)
    with pytest.raises(mp.InputError, match="extra_layers"):
        export_plan(make_plan(), "trtllm", tmp_path / "x", extra_layers=[4])


def test_a_moeplace_plan_for_another_model_or_topology_is_refused(tmp_path: Path) -> None:
    plan = make_plan()
    path = export_plan(plan, "moeplace", tmp_path / "p.json")
    with pytest.raises(mp.InputError, match="another model"):
        read_exported(path, "moeplace", plan.model.replace(hidden_size=32), plan.topology)
    with pytest.raises(mp.InputError, match="another topology"):
        read_exported(path, "moeplace", plan.model, mp.Topology.preset("a100-hgx"))


ROW = [0, 1, 2, 3, 4, 5, 0, 1]
ROWS = [ROW] * 5
SGLANG_BAD = {
    "an extra key": ({"physical_to_logical_map": ROWS, "note": 1}, "no other key"),
    "another key": ({"logical_count": ROWS}, "physical_to_logical_map"),
    "a list": (ROWS, "physical_to_logical_map"),
    "a map that is no list": ({"physical_to_logical_map": {"1": ROW}}, "expected a row of expert ids for each layer"),
    "text": ({"physical_to_logical_map": "[]"}, r"is '\[\]', expected a row of expert ids"),
    "no rows": ({"physical_to_logical_map": []}, "0 rows"),
    "MoE layers only": ({"physical_to_logical_map": ROWS[:3]}, "counts dense layers"),
    "a short row": ({"physical_to_logical_map": [*ROWS[:4], ROW[:7]]}, r"\[4\]: 7 slots, expected 8"),
    "an id too large": ({"physical_to_logical_map": [*ROWS[:4], [0, 1, 2, 3, 4, 6, 0, 1]]}, r"\[4\]: slot 5 holds '6'"),
    "a negative id": ({"physical_to_logical_map": [*ROWS[:4], [-1, 1, 2, 3, 4, 5, 0, 1]]}, r"slot 0 holds '-1'"),
    "a fraction": ({"physical_to_logical_map": [*ROWS[:4], [0.0, 1, 2, 3, 4, 5, 0, 1]]}, "slot 0 holds '0.0'"),
    "true for one": ({"physical_to_logical_map": [*ROWS[:4], [0, True, 2, 3, 4, 5, 0, 1]]}, "slot 1 holds 'True'"),
    "a missing expert": ({"physical_to_logical_map": [*ROWS[:4], [0, 1, 2, 3, 4, 4, 0, 1]]}, "no slot for expert 5"),
    "slots that do not divide": ({"physical_to_logical_map": [ROW[:7]] * 5}, "do not divide over 4 devices"),
    "empty rows": ({"physical_to_logical_map": [[]] * 5}, "no slot for expert 0"),
}


@pytest.mark.parametrize("case", SGLANG_BAD)
def test_a_wrong_sglang_file_is_refused(case: str, tmp_path: Path) -> None:
    content, message = SGLANG_BAD[case]
    plan = make_plan()
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(mp.FileFormatError, match=message):
        read_exported(tmp_path / "x.json", "sglang", plan.model, plan.topology)


def test_vllm_reads_one_row_for_all_layers_and_refuses_dense_rows(tmp_path: Path) -> None:
    plan, path = make_plan(), tmp_path / "x.json"
    path.write_text(json.dumps(ROW))
    assert read_exported(path, "vllm", plan.model, plan.topology).physical_to_logical.tolist() == [ROW] * 3
    for content, message in (
        (ROWS, "does not count dense layers"),
        ([], "expected a list"),
        ({}, "expected rows of experts, or a record"),
        ([ROW, 3, ROW], "row 1: expected a list"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(mp.FileFormatError, match=message):
            read_exported(path, "vllm", plan.model, plan.topology)


# Ten times more a line: ten million values from 300 bytes, as a loader alone would have no trouble with.
BOMB = "a: &a [0]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefgh"))
FLAT_BOMB = f"a: &a [{'0, ' * 100_000}]\nb: [{', '.join(['*a'] * 11)}]\n"
TRTLLM_BAD = {
    "an unknown field": ("num_slots: 8\nepsize: 4\n", "expected the fields"),
    "a list": ("- 1\n", "expected the fields"),
    "no slots": ("initial_global_assignments: {}\n", "num_slots is None"),
    "updates below zero": ("num_slots: 8\nlayer_updates_per_iter: -1\n", "layer_updates_per_iter is '-1', expected"),
    "updates in words": ("num_slots: 8\nlayer_updates_per_iter: some\n", "layer_updates_per_iter is 'some', expected"),
    "slots as text": ("num_slots: '8'\n", "num_slots is '8'"),
    "no assignments": ("num_slots: 8\n", "must map layers"),
    "a missing layer": ("num_slots: 8\ninitial_global_assignments:\n  1: [0]\n", "no entry for MoE layer 2"),
    "a short entry": (
        f"num_slots: 8\ninitial_global_assignments: {{1: {ROW}, 2: [0, 1], 4: {ROW}}}\n",
        r"\[2\]: 2 slots",
    ),
    "an alias of a short row": (
        f"num_slots: 8\ninitial_global_assignments:\n  1: &a [0, 1]\n  2: *a\n  4: {ROW}\n",
        r"\[1\]: 2 slots, expected 8",
    ),
    "an alias of nothing": (
        f"num_slots: 8\ninitial_global_assignments: {{1: *a, 2: {ROW}}}\n",
        "line 2: .a stands for",
    ),
    "an alias of itself": ("num_slots: 8\ninitial_global_assignments: &a {1: *a}\n", "line 2: .a stands for nothing"),
    "aliases that unfold without end": (BOMB, "line 6: aliases stand for more than 1,048,576 values, or deeper"),
    "aliases that unfold far": (FLAT_BOMB, "line 2: aliases stand for more than 1,048,576 values"),
    "aliases that go deep": (
        "a: &a [0]\n" + "".join(f"{b}: &{b} [*{a}]\n" for a, b in pairwise("abcdefgh")),
        "line 6: aliases stand for more than .* or deeper",
    ),
    "a layer twice": (
        f"num_slots: 8\ninitial_global_assignments:\n  1: {ROW}\n  1: {ROW}\n",
        "line 4: '1' stands twice",
    ),
    "a layer twice, of JSON": (
        f'{{"num_slots": 8, "initial_global_assignments": {{"1": {ROW}, "1": {ROW}}}}}',
        "twice",
    ),
    "a tag": ("num_slots: !!python/object/apply:os.getcwd []\n", "line 1: the tag .* is not accepted"),
    "deep nesting": ("num_slots: " + "[" * 500, "nested deeper"),
    "nesting without end": ("num_slots: " + "[" * 100_000, "nested deeper|maximum nesting depth"),
    "two documents": ("num_slots: 8\n---\nnum_slots: 8\n", "line 2: a second document"),
    "an open bracket": ("num_slots: [8\n", "nor YAML"),
    "an endless number": ("num_slots: " + "9" * 5000, "nor YAML|num_slots is"),
}


@pytest.mark.parametrize(
    "text",
    [
        f"num_slots: 8\ninitial_global_assignments:\n  1: &a {ROW}\n  2: *a\n  4: *a\n",
        f"num_slots: 8\ninitial_global_assignments:\n  <<: &base {{1: {ROW}, 2: {ROW}}}\n  4: {ROW}\n",
    ],
)
def test_layers_may_be_aliases_of_one_row(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    plan = make_plan()
    rows = read_exported(tmp_path / "x.yaml", "trtllm", plan.model, plan.topology).physical_to_logical
    assert rows.tolist() == [ROW] * 3


@pytest.mark.parametrize("case", TRTLLM_BAD)
def test_a_wrong_trtllm_file_is_refused(case: str, tmp_path: Path) -> None:
    content, message = TRTLLM_BAD[case]
    plan = make_plan()
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(mp.FileFormatError, match=message):
        read_exported(tmp_path / "x.yaml", "trtllm", plan.model, plan.topology)


ASCEND_BAD: dict[str, tuple[Any, str]] = {
    "no layers": (lambda d: d.pop("layer_list"), "'layer_list' must be a list of objects"),
    "a layer too few": (lambda d: d["layer_list"].pop(), "2 entries, expected 3 MoE layers"),
    "another layer count": (lambda d: d.update(moe_layer_count=4), "moe_layer_count is 4"),
    "layers out of order": (lambda d: d["layer_list"].reverse(), "layer_id is 2, expected 0"),
    "devices out of order": (
        lambda d: d["layer_list"][1]["device_list"].reverse(),
        r"\[1\].*device_id is 3, expected 0",
    ),
    "a device too many": (lambda d: d["layer_list"][0]["device_list"].append({}), "5 entries, expected 4 devices"),
    "a device without experts": (
        lambda d: d["layer_list"][0]["device_list"][1].pop("device_expert"),
        r"device_list\[1\].device_expert: expected a list",
    ),
    "an uneven device": (
        lambda d: d["layer_list"][0]["device_list"][1]["device_expert"].append(0),
        "device 1 has 3 slots",
    ),
    "a layer that is no object": (lambda d: d["layer_list"].insert(0, 3), "must be a list of objects"),
    "another device count": (lambda d: d["layer_list"][2].update(device_count=8), "device_count is 8, expected 4"),
    "an expert twice on a device": (
        lambda d: d["layer_list"][1]["device_list"][0].update(device_expert=[3, 3]),
        r"layer_list\[1\]: device 0 has an expert twice \(\[3, 3\]\)",
    ),
}


@pytest.mark.parametrize("case", ASCEND_BAD)
def test_a_wrong_vllm_ascend_file_is_refused(case: str, tmp_path: Path) -> None:
    change, message = ASCEND_BAD[case]
    plan = next(plan for seed in range(99) if not stacked(plan := make_plan(seed=seed)))
    path = export_plan(plan, "vllm-ascend", tmp_path / "x.json")
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(mp.FileFormatError, match=message):
        read_exported(path, "vllm-ascend", plan.model, plan.topology)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_truncated_file_is_refused_wherever_it_ends(engine: str, tmp_path: Path) -> None:
    plan = make_plan(slots=6, nodes=1)
    whole = export_plan(plan, engine, tmp_path / "whole").read_bytes().rstrip()
    for end in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}):
        (tmp_path / "cut").write_bytes(whole[:end])
        with pytest.raises(mp.FileFormatError):
            read_exported(tmp_path / "cut", engine, plan.model, plan.topology)


@pytest.mark.parametrize("engine", ENGINES)
def test_garbage_and_missing_files_are_refused(engine: str, tmp_path: Path) -> None:
    plan = make_plan()
    with pytest.raises(mp.InputError, match="no such file"):
        read_exported(tmp_path / "absent", engine, plan.model, plan.topology)
    for junk in (b"\xff\xfe\x00", b"{" * 50_000, b"[" * 50_000, b"null", b"1e999", b"NaN", b"\x00" * 64):
        (tmp_path / "junk").write_bytes(junk)
        with pytest.raises(mp.FileFormatError):
            read_exported(tmp_path / "junk", engine, plan.model, plan.topology)


@pytest.mark.parametrize("engine", DEALT)
def test_an_oversized_file_is_refused_unread(engine: str, tmp_path: Path) -> None:
    plan = make_plan()
    with (tmp_path / "huge").open("wb") as handle:
        handle.truncate(1 << 34)
    with pytest.raises(mp.FileFormatError, match="more than"):
        read_exported(tmp_path / "huge", engine, plan.model, plan.topology)


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_a_plan_or_the_typed_error(engine: str, data: Any, tmp_path: Path) -> None:
    plan = make_plan(layers=(0, 2), experts=4, slots=4, nodes=1, devices=2)
    content = bytearray(export_plan(plan, engine, tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.binary(max_size=3) | st.sampled_from([b"[", b"]", b"{", b"-1", b"99", b"&a ", b"*a", b": "])
        )
        content[at : at + data.draw(st.integers(0, 3))] = piece
    (tmp_path / "damaged").write_bytes(content)
    try:
        found = read_exported(tmp_path / "damaged", engine, plan.model, plan.topology)
    except mp.InputError:
        return
    assert found.physical_to_logical.shape[0] == 2


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_file_is_a_plan_or_a_typed_error(data: Any, tmp_path: Path) -> None:
    plan = next(plan for seed in range(99) if not stacked(plan := make_plan(seed=seed)))
    engine = data.draw(st.sampled_from(["moeplace", "sglang", "vllm", "vllm-ascend", "trtllm"]))
    text = export_plan(plan, engine, tmp_path / "a.json").read_text()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        piece = data.draw(st.sampled_from(["", "[", "}", '"', ":", "-1", "null", "1e309", "9" * 5000, "\n- ", "true"]))
        text = text[:at] + piece + text[at + data.draw(st.integers(0, 9)) :]
    (tmp_path / "a.json").write_text(text)
    with contextlib.suppress(mp.MoeplaceError), warnings.catch_warnings(action="ignore"):
        mp.read_plan_file(tmp_path / "a.json", plan.model, plan.topology)
    with contextlib.suppress(mp.MoeplaceError):
        read_running(tmp_path / "a.json", plan.model)
