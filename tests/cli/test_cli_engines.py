"""The commands that stand between plans, records and engines: solve --for, export, permute, import."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli_runs import run, toy_model, toy_trace_folder

import moeplace as mp
from moeplace.cli.options import ObjectiveOptions
from moeplace.cli.parse import read_objective
from moeplace.placement.engines import target_names
from moeplace.placement.objective import Objective
from moeplace.runtime.permute.checkpoint import expert_order

pytestmark = pytest.mark.slow

SEARCH = ("--solver", "search:steps=20:proposals=200", "--seconds", "5")


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return toy_trace_folder(tmp_path / "trace", toy_model())


def problem(devices: int = 4, **changes: Any) -> mp.Problem:
    experts, groups = changes.pop("experts", 8), changes.pop("groups", 1)
    dtype = changes.pop("expert_dtype", "bf16")
    spec = mp.ModelSpec(
        layers=2, experts=experts, top_k=2, hidden_size=8, ffn_size=8, groups=groups, expert_dtype=dtype
    )
    load = np.random.default_rng(0).integers(1, 100, (3, 2, experts))
    topology = mp.Topology.preset("gb200-nvl72", devices_per_node=devices)
    return mp.Problem(spec, topology, mp.RoutingStatistics.from_counts(load), **changes)


def test_types_of_rows_both_ways_reach_the_objective() -> None:
    said = read_objective(ObjectiveOptions(dispatch_dtype="int4/32", combine_dtype="int8/64"))
    assert (said.dispatch_dtype, said.combine_dtype) == ("int4/32", "int8/64")
    with pytest.raises(mp.InputError, match="combine_dtype \\('int3/32'\\)"):
        read_objective(ObjectiveOptions(combine_dtype="int3/32"))


# solve --for


OFTEN = ("vllm", "sglang")
"""Engines solved for in every run of the tests; the others before a release."""


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.long) for name in target_names()]
)
def test_a_solved_problem_of_an_engine_needs_no_repair(engine: str) -> None:
    narrowed = problem(slots=8 if engine == "permute" else 12, engine=engine)
    mp.check_export(mp.solve(narrowed, "search", seconds=5, steps=10, proposals=200), engine)


def test_transfers_are_those_of_the_engine_or_of_the_kind_asked_for(trace: Path) -> None:
    found = {}
    for kind in (None, "normal"):
        asked = () if kind is None else ("--dispatch", kind)
        command = ("compare", trace, "--topology", "h100-sxm", "--devices-per-node", 4, "--for", "vllm", *asked)
        shown = run(*command, "--solvers", "contiguous,round_robin", "--steps", 8, "--json")
        assert shown.code == 0, shown.err
        found[kind] = json.loads(shown.out)["prediction"]
    assert "all gather by NCCL" in found[None]
    assert "normal by DeepEP of vllm" in found["normal"]
    refused = run("compare", trace, "--topology", "h100-sxm", "--dispatch", "pplx")
    assert refused.code == 2


def test_what_is_known_of_transfers_is_listed() -> None:
    shown = run("topology", "transfers", "--gpu", "h100-sxm", "--json")
    assert shown.code == 0, shown.err
    rows = json.loads(shown.out)["rows"]
    assert {row["gpu"] for row in rows} == {"h100-sxm"}
    assert {row["kind"] for row in rows} == {"normal", "low_latency", "all_to_all", "all_gather"}
    assert all(0 < row["error"] < 0.4 for row in rows)
    refused = run("topology", "transfers", "--gpu", "h100")
    assert refused.code == 1
    assert "no transfers measured" in refused.err


@pytest.mark.parametrize("engine", ["sglang", "vllm", "vllm-ascend", "trtllm"])
def test_slots_are_the_fewest_the_engine_can_run_unless_given(engine: str) -> None:
    assert problem(experts=10, engine=engine).num_slots == 12
    assert problem(experts=12, engine=engine).num_slots == 12
    with pytest.raises(mp.UnsupportedError, match="14 do not divide over 4 devices; use 12 or 16"):
        problem(experts=10, slots=14, engine=engine)
    with pytest.raises(mp.UnsupportedError, match="use 12$"):
        problem(experts=10, device_slots=[4, 3, 2, 1], engine=engine)
    with pytest.raises(
        mp.UnsupportedError, match="this problem's have 8 to 12; use one number for all, a multiple of 4"
    ):
        problem(slots=[8, 12], engine=engine)
    with pytest.raises(mp.UnsupportedError, match="split='free'; use equal"):
        problem(objective=Objective(split="free"), engine=engine)


def test_a_permuted_model_has_no_replicas_and_even_devices() -> None:
    with pytest.raises(mp.UnsupportedError, match="12 slots a layer for 8 experts make replicas; use 8"):
        problem(slots=12, engine="permute")
    with pytest.raises(mp.UnsupportedError, match="10 experts do not divide over 4 devices; use 2"):
        problem(experts=10, engine="permute")
    assert not problem(engine="permute").forbidden_devices
    with pytest.raises(mp.InputError, match="did you mean 'sglang'"):
        problem(engine="sglan")


@pytest.mark.parametrize(
    ("experts", "groups", "devices"),
    [
        (12, 4, 6),
        (16, 2, 8),
        *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in ((16, 4, 4), (16, 8, 4), (24, 3, 4))),
    ],
)
def test_experts_keep_to_the_rows_of_their_group(experts: int, groups: int, devices: int) -> None:
    asked = problem(devices, experts=experts, groups=groups, forbidden={(0, 0): [devices - 1]}, engine="permute")
    assert devices - 1 in asked.forbidden_devices[0, 0]
    plan = mp.solve(asked, "search", seconds=5, steps=10, proposals=200)
    order = expert_order(plan)
    np.testing.assert_array_equal(order * groups // experts, np.tile(np.arange(experts) * groups // experts, (2, 1)))
    with pytest.raises(mp.UnsupportedError, match="these do: .*search"):
        mp.solve(asked, "eplb")


def test_solve_for_an_engine_and_export_to_it(trace: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    cluster = ("--topology", "gb200-nvl72", "--devices-per-node", 3)
    done = run("solve", trace, *cluster, *SEARCH, "--for", "sglang", "-o", plan, "--json")
    assert done.code == 0, done.err
    assert done.data["slots"] == 9
    assert run("export", plan, "--for", "sglang", "-o", tmp_path / "x.json").code == 0
    ended = run("solve", trace, *cluster, *SEARCH, "--for", "trtllm", "--slots", 10, "-o", tmp_path / "no.json")
    assert ended.code == 1
    assert "trtllm cannot run such a plan (TensorRT-LLM 1.0 or newer)" in ended.err
    assert not (tmp_path / "no.json").exists()


def test_for_an_engine_the_objective_is_what_it_does_unless_told() -> None:
    assert problem(engine="sglang").objective.replica_choice == "nearest"
    for other in ("vllm", "vllm-ascend", "trtllm", "permute", None):
        assert problem(engine=other).objective.replica_choice == "share"
    told = Objective(replica_choice="share")
    assert problem(engine="sglang", objective=told).objective.replica_choice == "share"
    with pytest.raises(mp.UnsupportedError, match="vllm .*does not do replica_choice='nearest'; use 'share'"):
        problem(engine="vllm", objective=Objective(replica_choice="nearest"))
    divided = Objective(replica_choice="balanced")
    assert problem(engine="sglang", objective=divided).objective.division == "lp"
    assert problem(engine="moeplace", objective=divided).objective.division == "local"
    assert problem(engine="sglang", objective=divided).objective.replace(replica_choice="nearest").division == "local"
    with pytest.raises(mp.UnsupportedError, match="division='local'; use 'lp' or 'waterfill'"):
        problem(engine="sglang", objective=divided.replace(division="local"))
    with pytest.raises(mp.UnsupportedError, match="vllm .*does not do replica_choice='balanced'; use 'share'"):
        problem(engine="vllm", objective=divided)
    with pytest.raises(mp.UnsupportedError, match="execution='context_coherent'; use 'dispatch_combine'"):
        problem(engine="trtllm", objective=Objective(execution="context_coherent"))
    # What an engine chose is no choice of the user's: another engine chooses anew.
    again = dataclasses.replace(problem(engine="sglang"), engine="vllm")
    assert (again.objective.replica_choice, again.objective.dispatch_dtype) == ("share", "bf16")
    assert problem(engine="sglang", expert_dtype="fp8").objective.dispatch_dtype == "fp8"
    assert problem(engine="vllm-ascend").objective.replace(risk="cvar:0.9").node_dedup is False


def test_a_solver_that_cannot_keep_the_limits_is_refused_before_it_runs(tmp_path: Path) -> None:
    load = np.ones((1, 1, 4))
    load[0, 0, 0] = 100
    mp.write_statistics(mp.RoutingStatistics.from_counts(load), tmp_path / "s.npz")
    sizes = ("--hidden-size", 8, "--ffn-size", 8, "--top-k", 2)
    cluster = ("--topology", "gb200-nvl72", "--devices-per-node", 2)
    common = ("solve", tmp_path / "s.npz", *sizes, *cluster, "--slots", 8, "--for", "vllm-ascend", "-s")
    ended = run(*common, "eplb", "-o", tmp_path / "p.json")
    assert ended.code == 1
    assert "solver 'eplb' does not support replicas each on a device of its own" in ended.err
    assert "these do: contiguous, round_robin, search" in ended.err
    assert not (tmp_path / "p.json").exists()
    assert run(*common, "search:steps=5:proposals=50", "--seconds", 5, "-o", tmp_path / "p.json").code == 0


# export


def test_layers_an_engine_counts_beside_the_plans_can_be_named(trace: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    run("solve", trace, "--topology", "gb200-nvl72", "--devices-per-node", 4, "-s", "contiguous", "-o", plan)
    done = run("export", plan, "--for", "sglang", "--hidden-layers", 6, "-o", tmp_path / "s.json")
    assert done.code == 0, done.err
    assert len(json.loads((tmp_path / "s.json").read_text())["physical_to_logical_map"]) == 6
    assert run("export", plan, "--for", "trtllm", "--extra-layers", "3,5-6", "-o", tmp_path / "t.yaml").code == 0
    assert list(yaml.safe_load((tmp_path / "t.yaml").read_text())["initial_global_assignments"]) == [0, 1, 2, 3, 5, 6]
    ended = run("export", plan, "--for", "vllm", "--hidden-layers", 6, "-o", tmp_path / "v.json")
    assert ended.code == 1
    assert "--hidden-layers goes with form 53022" in ended.err
    ended = run("export", plan, "--for", "trtllm", "--extra-layers", "three", "-o", tmp_path / "t.yaml")
    assert "'three' is not a number or a range" in ended.err


# permute


def test_a_permuted_checkpoint_gives_the_same_logits_and_comes_back(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="permuting models needs torch")
    models = pytest.importorskip("permute_models")
    torch.set_num_threads(1)
    original = tmp_path / "original"
    model = models.build("mixtral")
    model.save_pretrained(original, max_shard_size="20KB")
    plan = models.random_plan(original, seed=1)
    plan.save(tmp_path / "plan.json")
    done = run("permute", original, "--plan", tmp_path / "plan.json", "-o", tmp_path / "placed", "--json")
    assert done.code == 0, done.err
    assert len(done.data["weight_files"]) > 1
    assert done.data["bytes"] == sum(file.stat().st_size for file in original.glob("*.safetensors"))
    torch.testing.assert_close(models.logits(models.load(tmp_path / "placed")), models.logits(model))
    exports = run("plans", "show", run("plans", "list", "--json").data["rows"][0]["id"], "--json").data["exports"]
    assert [export["format"] for export in exports] == ["permute"]
    again = run("permute", tmp_path / "placed", "--plan", tmp_path / "plan.json", "-o", tmp_path / "back", "--invert")
    assert again.code == 0, again.err
    for file in original.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    ended = run("permute", tmp_path / "placed", "--plan", tmp_path / "plan.json", "-o", tmp_path / "twice")
    assert ended.code == 1
    assert "permuted already" in ended.err
    ended = run("permute", original, "--plan", tmp_path / "plan.json", "-o", tmp_path / "placed")
    assert ended.code == 1
    assert "is there already" in ended.err
    # An engine's own file says the same, for the checkpoint's model.
    file, cluster = tmp_path / "map.json", ("--plan-topology", f"h100-hgx:1x{plan.topology.num_devices}")
    assert run("export", tmp_path / "plan.json", "--for", "vllm", "-o", file).code == 0
    assert run("permute", original, "--plan", file, *cluster, "-o", tmp_path / "same").code == 0
    for placed in (tmp_path / "placed").glob("*.safetensors"):
        assert (tmp_path / "same" / placed.name).read_bytes() == placed.read_bytes()
    ended = run("permute", original, "--plan", file, "-o", tmp_path / "none")
    assert (ended.code, "does not say its topology; give that too (--plan-model, --plan-topology" in ended.err) == (
        1,
        True,
    )


# import


def test_experts_and_layer_numbers_a_record_lacks_are_given(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[0, 5, 2], [3, 4, 2]]))
    common = ("import", tmp_path / "t.npy", "-o", tmp_path / "trace", "--json")
    done = run(*common, "--num-experts", 16, "--moe-layers", "3,5-6")
    assert done.code == 0, done.err
    assert (done.data["experts"], done.data["moe_layers"]) == (16, [3, 5, 6])
    assert mp.read_trace(tmp_path / "trace").moe_layers == (3, 5, 6)
    ids = ("--as", "tokens")
    common = ("import", tmp_path / "t.npy", "-o", tmp_path / "another", "--json")
    assert "names 2 layers" in run(*common, *ids, "--moe-layers", "3-4").err
    assert "--moe-layers names 2 layers" in run(*common, *ids, "--moe-layers", "3,3,4").err


def test_options_a_format_has_no_use_for_are_refused_but_a_models_are_not(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.array([[0, 5, 2], [3, 4, 2]]))
    common = ("import", tmp_path / "t.npy", "--as", "tokens", "-o", tmp_path / "trace")
    ended = run(*common, "--top-k", 2)
    assert ended.code == 1
    assert "ExFlow" in ended.err
    assert "--top-k says nothing about it; options of this format: num_experts" in ended.err
    config = {"model_type": "mixtral", "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 8, "intermediate_size": 8}))
    assert run(*common, "--model", tmp_path / "config.json").code == 0


def test_slots_of_a_load_balancer_are_mapped_back_by_its_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    folder = tmp_path / "record"
    folder.mkdir()
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": 6, "num_experts_per_token": 2}))
    save_file({f"1_{layer}": torch.arange(6) + layer for layer in (3, 4)}, folder / "rank0.safetensors")
    rows = {3: [0, 1, 2, 3, 0, 1], 4: [3, 2, 1, 0, 3, 2]}
    balancer = tmp_path / "balancer.yaml"
    balancer.write_text(
        yaml.safe_dump({"num_slots": 6, "layer_updates_per_iter": 0, "initial_global_assignments": rows})
    )
    done = run("import", folder, "--assignments", balancer, "-o", tmp_path / "s.npz", "--json")
    assert done.code == 0, done.err
    load = mp.read_statistics(tmp_path / "s.npz").load
    np.testing.assert_array_equal(load[0], [[3 + 7, 4 + 8, 5, 6], [7, 6, 5 + 9, 4 + 8]])
    for content, message in (
        ("num_slots: 6", "expected num_slots and initial_global_assignments"),
        ("num_slots: 6\ninitial_global_assignments: {3: [0, 1]}", r"initial_global_assignments[3] is not a list of 6"),
        ("num_slots: 6\ninitial_global_assignments: {3: !!python/tuple [0]}", "tag"),
    ):
        balancer.write_text(content)
        ended = run("import", folder, "--assignments", balancer, "-o", tmp_path / "s.npz")
        assert ended.code == 1
        assert message in ended.err


def test_a_history_is_summed_into_windows(tmp_path: Path) -> None:
    entries = [{"logical_expert_load": [[i, 1.0]]} for i in range(1, 5)]
    (tmp_path / "h.json").write_text(json.dumps({"load_history": entries}))
    done = run("import", tmp_path / "h.json", "--entries-per-window", 2, "-o", tmp_path / "s.npz")
    assert done.code == 0, done.err
    np.testing.assert_array_equal(mp.read_statistics(tmp_path / "s.npz").load[:, 0], [[3, 2], [7, 2]])


# plans of an engine, judged and compared


CLUSTER = ("-t", "gb200-nvl72", "--nodes", 2, "--devices-per-node", 2)


def test_what_a_plan_was_solved_for_decides_how_it_is_judged(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    assert run("solve", trace, *CLUSTER, "--for", "sglang", "--slots", 12, "-s", "eplb", "-o", path).code == 0
    assert mp.Plan.load(path).provenance.engine == "sglang"
    judged = ("evaluate", path, trace, "--decode", 16, "--steps", 10, "--json")
    assert run(*judged).data["objective"]["replica_choice"] == "nearest"
    assert run(*judged, "--replica-choice", "share").data["objective"]["replica_choice"] == "share"


def test_comparing_for_an_engine_keeps_its_slots_and_its_choice_of_replicas(trace: Path) -> None:
    compared = ("compare", trace, *CLUSTER, "--solvers", "eplb", "--decode", 16, "--steps", 10, "--json")
    data = run(*compared, "--for", "sglang", "--slots", 12).data
    assert (data["objective"]["replica_choice"], data["slots"]) == ("nearest", 12)
    refused = run(*compared, "--for", "vllm", "--slots", 13)
    assert "13 do not divide over 4 devices; use 12 or 16" in refused.err


def test_plans_ready_for_a_failure_can_be_run_by_the_engine(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    assert run("solve", trace, *CLUSTER, "--slots", 12, "-s", "eplb", "-o", path).code == 0
    asked = ("whatif", path, trace, "--lose", "device:1", "-s", "eplb", "--decode", 16, "--steps", 10, "--json")
    data = run(*asked, "--for", "vllm").data
    assert data["changes"][0]["ready"]["device_slots"] == [3, 3, 3]
    refused = run(*asked, "--for", "permute").data["changes"][0]
    assert refused["ready"] is None
    assert "8 experts do not divide over 3 devices" in refused["reason"]


def test_usual_steps_are_said_first_under_any_risk(trace: Path) -> None:
    solved = ("solve", trace, *CLUSTER, *SEARCH)
    for risk in ("mean", "cvar:0.9"):
        # Broken at the terminal's width.
        said = " ".join(run(*solved, "--risk", risk).out.partition("\n\n")[0].split())
        assert said.startswith("Steps: decode steps of 64 tokens a device (")
        assert said.endswith("usual sizes, as none were named; equal time with contiguous placement")


def test_short_help_is_help() -> None:
    for command in ((), ("solve",), ("plans", "list")):
        assert run(*command, "-h").out == run(*command, "--help").out != ""


@pytest.mark.parametrize("command", [("solve", "-s", "eplb", "-o", "p.json"), ("compare",), ("pareto", "-o", "f")])
def test_what_an_engine_does_not_do_is_refused_before_the_routing_is_read(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    asked = (command[0], tmp_path / "absent", *CLUSTER, *command[1:])
    assert "engine 'vlm' is unknown; did you mean 'vllm'" in run(*asked, "--for", "vlm").err
    refused = run(*asked, "--for", "vllm", "--replica-choice", "nearest")
    assert "it does not do --replica-choice nearest; use 'share'" in refused.err
    assert "--split free; use equal" in run(*asked, "--for", "trtllm", "--split", "free").err
