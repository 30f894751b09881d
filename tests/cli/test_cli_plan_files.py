"""Plans in engines' own files as input of the commands, and the map that runs against the plan."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from cli_runs import CLUSTER, JUDGED, run, toy_model, toy_trace_folder
from engine_endpoints import EXPERTS, LAYERS, SLOTS, Other, SGLang, serving

import moeplace as mp
from moeplace.profiler import engine_servers as recorder

pytestmark = pytest.mark.slow

HERE = ("--plan-topology", "h100-hgx:2x2")


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEPLACE_DB", str(tmp_path / "store.db"))
    monkeypatch.setattr(recorder, "SETTLED", 0.15)
    monkeypatch.delenv("SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR", raising=False)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return toy_trace_folder(tmp_path / "trace", toy_model())


@pytest.fixture
def plan(trace: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    assert run("solve", trace, *CLUSTER, "--slots", 12, "-s", "round_robin", "-o", path).code == 0
    return path


FILES = {
    "sglang": ("x.json", "x.pt"),
    "vllm": ("x.json", "x.jsonl"),
    "vllm-ascend": ("x.json",),
    "trtllm": ("x.yaml",),
    "sglang-lp": ("x.pt",),
}


@pytest.mark.parametrize("engine", FILES)
def test_a_plan_in_an_engines_own_file_serves_every_command(
    engine: str, trace: Path, plan: Path, tmp_path: Path
) -> None:
    for name in FILES[engine]:
        file = tmp_path / name
        form = ("--form", "41141") if name.endswith("jsonl") else ()
        assert run("export", plan, "--for", engine, *form, "-o", file).code == 0
        judged = run("evaluate", file, trace, *HERE, *JUDGED, "--json").data
        expected = run("evaluate", plan, trace, "--for", engine, *JUDGED, "--json").data
        # How it was made and what was proven is the plan's own; what steps cost is the same.
        figures = [{k: v for k, v in data["rows"][1].items() if k.startswith("step_")} for data in (judged, expected)]
        assert figures[0] == pytest.approx(figures[1])
        assert figures[0]
        assert judged["objective"] == expected["objective"]
        compared = run(
            "compare", trace, *CLUSTER, *JUDGED, "--slots", 12, "--solvers", "eplb", "--plans", file, "--json"
        )
        assert [row["solver"] for row in compared.data["rows"]][:2] == ["contiguous", "x"], compared.err
        # The candidate says which cluster the plan in force is for.
        decided = run("decide", trace, "--candidates", plan, "--current", file, "--decode", 8, "--json").data
        assert decided["candidates"][0]["moves"] == 0
        changed = run("whatif", file, trace, *HERE, *JUDGED, "--lose", "device:1", "-s", "eplb", "--json")
        if engine == "vllm-ascend":
            assert "does not support replicas each on a device of its own" in changed.data["changes"][0]["reason"]
        else:
            # The file's engine is obeyed: equal slots on the devices left.
            assert changed.data["changes"][0]["ready"]["device_slots"] == [3, 3, 3], changed.err
        solved = run(
            "solve",
            trace,
            *CLUSTER,
            "--slots",
            12,
            "-s",
            "eplb",
            "--current",
            file,
            "--json",
            "-o",
            file.with_suffix(".new.json"),
        )
        assert solved.data["experts_moved"] is not None, solved.err
        back = run(
            "export", file, *HERE, "--plan-model", config(tmp_path), "--for", "moeplace", "-o", tmp_path / "b.json"
        )
        assert back.code == 0, back.err
        table = mp.Plan.load(tmp_path / "b.json").physical_to_logical
        np.testing.assert_array_equal(table, mp.Plan.load(plan).physical_to_logical)


def config(folder: Path) -> Path:
    path = folder / "config.json"
    fields = {"model_type": "mixtral", "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2}
    path.write_text(json.dumps(fields | {"hidden_size": 64, "intermediate_size": 128}))
    return path


def test_what_an_engines_file_does_not_say_is_asked_for(trace: Path, plan: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    run("export", plan, "--for", "sglang", "-o", file)
    ended = run("evaluate", file, trace, *JUDGED)
    assert (ended.code, "sglang's own file, which does not say its topology; give that too" in ended.err) == (1, True)
    ended = run("evaluate", file, trace, *JUDGED, "--plan-topology", "h100-hgx:2")
    assert "is not NAME, NAME:NODESxDEVICES or a file" in ended.err
    ended = run("evaluate", file, trace, *JUDGED, "--plan-topology", "h100-hgx:1x5")
    assert "12 slots a layer do not divide over 5 devices" in ended.err
    (tmp_path / "loads.json").write_text('{"logical_count": [[1]]}')
    assert "those are loads" in run("evaluate", tmp_path / "loads.json", trace, *JUDGED, *HERE).err


def test_a_placement_within_tensorrt_llms_options_is_read_and_one_that_they_name_is_asked_for(tmp_path: Path) -> None:
    rows = {1: list(range(8)), 2: list(range(8))[::-1]}
    inner = {"num_slots": 8, "initial_global_assignments": rows, "layer_updates_per_iter": 0}
    model = mp.ModelSpec(layers=2, moe_layers=(1, 2), experts=8, top_k=2, hidden_size=8, ffn_size=8)
    topology = mp.Topology.preset("h100-hgx", devices_per_node=2)
    path = tmp_path / "options.yaml"
    path.write_text(json.dumps({"enable_attention_dp": True, "moe_config": {"load_balancer": inner}}))
    assert mp.read_plan_file(path, model, topology).physical_to_logical.tolist() == list(rows.values())
    block = "".join(f"      {layer}: {row}\n" for layer, row in rows.items())
    text = "moe_config:\n  backend: WIDEEP\n  load_balancer:\n    num_slots: 8\n    initial_global_assignments:\n"
    path.write_text(text + block)
    assert mp.read_plan_file(path, model, topology).physical_to_logical.tolist() == list(rows.values())
    path.write_text("moe_config:\n  load_balancer: /plans/eplb.yaml\n")
    with pytest.raises(mp.InputError, match="load_balancer is the file /plans/eplb.yaml; give that one"):
        mp.read_plan_file(path, model, topology)


# The map that runs.


def placed(tmp_path: Path, *, experts: int = EXPERTS, layers: tuple[int, ...] = (1, 2, 3)) -> tuple[mp.Plan, Path]:
    """A plan of the stand-in server's model on two devices, other rows in every layer."""
    model = mp.ModelSpec(
        layers=len(layers), moe_layers=layers, experts=experts, top_k=2, hidden_size=8, ffn_size=8, name="served"
    )
    rows = np.stack([(np.arange(SLOTS) % experts + layer) % experts for layer in layers])
    topology = mp.Topology.preset("h100-hgx", devices_per_node=2)
    plan = mp.Plan(model, topology, rows, np.repeat([0, 1], SLOTS // 2))
    plan.save(tmp_path / "served.json")
    return plan, tmp_path / "served.json"


def running(plan: mp.Plan) -> Any:
    """[LAYERS, SLOTS] what an engine runs that applied the plan."""
    table = np.tile(np.arange(SLOTS) % EXPERTS, (LAYERS, 1))
    table[list(plan.moe_layers)] = plan.physical_to_logical
    return torch.from_numpy(table)


def dumped(path: Path, table: Any) -> Path:
    torch.save({"records": [], "last_physical_to_logical_map": table}, path)
    return path


def kinds(plan: Path, dump: Path) -> list[str]:
    done = run("check", plan, "--running", dump, "--json")
    assert done.code == (1 if done.data["findings"] else 0)
    assert done.data["sound"] == (not done.data["findings"])
    return [finding["kind"] for finding in done.data["findings"]]


def test_what_runs_is_compared_with_the_plan_and_with_itself(tmp_path: Path) -> None:
    plan, path = placed(tmp_path)
    dump = tmp_path / "d.pt"
    table = running(plan)
    assert kinds(path, dumped(dump, table)) == []
    exchanged = table.clone()
    exchanged[2, [0, 1]] = exchanged[2, [1, 0]]
    # Slots exchanged inside a rank serve the same.
    assert kinds(path, dumped(dump, exchanged)) == []
    exchanged = table.clone()
    exchanged[2, [2, 4]] = exchanged[2, [4, 2]]
    assert kinds(path, dumped(dump, exchanged)) == ["experts"]
    twice = table.clone()
    twice[1, 0] = twice[1, 1]
    assert "twice" in kinds(path, dumped(dump, twice))
    missing = table.clone()
    missing[3][missing[3] == 5] = 0
    assert {"missing", "experts"} <= set(kinds(path, dumped(dump, missing)))
    unknown = table.clone()
    unknown[1, 2] = EXPERTS
    assert "unknown" in kinds(path, dumped(dump, unknown))
    # Rows of MoE layers given to an engine that counts dense layers: every layer runs its neighbour's map.
    shifted = table.clone()
    shifted[1], shifted[2] = table[2], table[3]
    assert kinds(path, dumped(dump, shifted))[:1] == ["shifted"]
    assert kinds(path, dumped(dump, shifted)).count("other layer") == 2
    trivial = torch.arange(SLOTS).expand(LAYERS, SLOTS) % EXPERTS
    assert kinds(path, dumped(dump, trivial.contiguous()))[0] == "not applied"


@pytest.mark.parametrize("form", ["rows", "p2l_map", "record", "ascend", "trtllm"])
def test_dumps_of_other_engines_are_read(form: str, tmp_path: Path) -> None:
    plan, path = placed(tmp_path)
    rows = plan.physical_to_logical.tolist()
    devices = [[{"device_id": g, "device_expert": row[g * 4 : g * 4 + 4]} for g in range(2)] for row in rows]
    contents: dict[str, tuple[str, Any]] = {
        "rows": ("d.json", rows),
        "p2l_map": ("d.jsonl", {"record_type": "eplb_load_stats", "version": 1, "step": 3, "p2l_map": rows}),
        "record": ("d.json", json.loads(mp.runtime.exporters.export.export_bytes(plan, "vllm", form="41141"))),
        "ascend": ("d.json", {"moe_layer_count": 3, "layer_list": [{"device_list": each} for each in devices]}),
        "trtllm": (
            "d.json",
            {"num_slots": 8, "initial_global_assignments": {str(i + 1): r for i, r in enumerate(rows)}},
        ),
    }
    name, content = contents[form]
    (tmp_path / name).write_text(json.dumps(content) + "\n")
    assert kinds(path, tmp_path / name) == []
    alone = run(
        "check", "--running", tmp_path / name, "--plan-model", tmp_path / "none", "--plan-topology", "h100-hgx:1x2"
    )
    assert alone.code == 1


def test_a_map_alone_is_checked_for_a_model_and_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([[0, 1, 2, 3, 4, 5, 6, 7]] * 2 + [[0, 0, 2, 3, 4, 5, 6, 7]]))
    common = ("check", "--running", tmp_path / "d.json", "--json")
    assert "give PLAN, or --plan-model and --plan-topology" in run(*common).err
    done = run(*common, "--plan-model", config(tmp_path), "--plan-topology", "h100-hgx:1x4")
    assert [(finding["kind"], finding["layer"]) for finding in done.data["findings"]] == [("missing", 2), ("twice", 2)]


def test_a_running_server_is_asked_for_its_map_and_settings(tmp_path: Path) -> None:
    plan, path = placed(tmp_path)
    folder = tmp_path / "dumps"
    folder.mkdir()
    settings = {
        "ep_size": 2,
        "ep_num_redundant_experts": 2,
        "moe_a2a_backend": "deepep",
        "init_expert_location": "x.json",
    }
    engine = SGLang(folder, "per_pass", ranks=2, **settings)
    engine.mapping = running(plan)
    with serving(engine) as url:
        asked = ("check", path, "--running", url, "--folder", folder, "--json")
        done = run(*asked)
        assert (done.code, done.data["findings"]) == (0, []), done.err
        assert len(done.data["read"]) == 2
        engine.info |= {"moe_a2a_backend": "none", "enable_eplb": True, "ep_size": 4, "init_expert_location": "trivial"}
        found = [finding["text"] for finding in run(*asked).data["findings"]]
        assert len(found) == 4
        assert "no --moe-a2a-backend" in found[1]
        engine.info["expert_distribution_recorder_mode"] = "stat"
        ended = run(*asked)
        assert (ended.code, "this server's is stat; start it with" in ended.err) == (1, True)


def test_a_server_that_trickles_is_given_up_in_time(tmp_path: Path) -> None:
    _, path = placed(tmp_path)

    release, waited_out = threading.Event(), []

    def slowly() -> tuple[int, bytes]:
        if not release.wait(60):
            waited_out.append(True)
        return 200, b"{}"

    with serving(Other(slowly)) as url:
        ended = run("check", path, "--running", url, "--folder", tmp_path, "--timeout", 0.3)
        assert ended.code == 1
        assert "no answer in 0.3 s" in ended.err
        assert not waited_out
        release.set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"records": []}, "an object with records, no map that runs"),
        ([[0, 1]], "1 rows, vllm has one for each of 3 MoE layers"),
        ({"physical_to_logical_map": [[0, 1]] * 3}, "3 rows, sglang has one for each of at least 4 layers, dense ones"),
        ([[0, 1], [0, "x"], [1, 0]], "expected a list of expert ids"),
        ({"layer_list": [{"a": 1}]}, "layer_list must hold device_list"),
        ("text", "expected rows of experts"),
    ],
)
def test_a_dump_without_a_map_is_named(content: Any, message: str, tmp_path: Path) -> None:
    _, path = placed(tmp_path)
    (tmp_path / "d.json").write_text(json.dumps(content))
    ended = run("check", path, "--running", tmp_path / "d.json")
    assert (ended.code, message in ended.err) == (1, True), ended.err
